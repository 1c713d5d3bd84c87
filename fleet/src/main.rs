//! `edgefleet`: serves the fleet endpoint, and shows what it knows.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use edge_fleet::db::Db;
use edge_fleet::http::{App, DeviceView, router};
use edged_model::quantity::{Span, Timestamp};

#[derive(Debug, Parser)]
#[command(name = "edgefleet", version, about = "The fleet endpoint of edged")]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serve devices and operators over HTTPS
    Serve {
        /// Where the database lies
        #[arg(long)]
        data: PathBuf,
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        tls_cert: PathBuf,
        #[arg(long)]
        tls_key: PathBuf,
        /// A file with the operator's token; without it one is made at the first start and printed once
        #[arg(long)]
        operator_token_file: Option<PathBuf>,
    },
    /// Make a one-time token for the enrolment of a device
    Token {
        #[arg(long)]
        data: PathBuf,
        #[arg(long)]
        group: Option<String>,
    },
    /// The devices and how they are
    Devices {
        #[arg(long)]
        data: PathBuf,
        /// JSON with the whole last report of each
        #[arg(long)]
        json: bool,
    },
}

fn main() -> Result<()> {
    match Args::parse().verb {
        Verb::Serve { data, listen, tls_cert, tls_key, operator_token_file } => {
            std::fs::create_dir_all(&data).with_context(|| data.display().to_string())?;
            let db = Db::open(&data)?;
            match operator_token_file {
                Some(path) => {
                    let token = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
                    db.set_operator_token(token.trim())?;
                }
                None => {
                    if let Some(token) = db.operator_token()? {
                        println!("operator token (shown once): {token}");
                    }
                }
            }
            tokio::runtime::Runtime::new()?.block_on(serve(db, listen, tls_cert, tls_key))
        }
        Verb::Token { data, group } => {
            println!("{}", Db::open(&data)?.create_token(group.as_deref())?);
            Ok(())
        }
        Verb::Devices { data, json } => {
            let devices: Vec<DeviceView> = Db::open(&data)?.devices()?.into_iter().map(DeviceView::from).collect();
            if json {
                println!("{}", serde_json::to_string_pretty(&devices)?);
            } else {
                print!("{}", table(&devices, now()));
            }
            Ok(())
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a server stamps what arrives; nothing is decided by it")]
fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

async fn serve(db: Db, listen: SocketAddr, cert: PathBuf, key: PathBuf) -> Result<()> {
    // Fails only if it was done already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let tls = axum_server::tls_rustls::RustlsConfig::from_pem_file(&cert, &key)
        .await
        .with_context(|| format!("{} and {}", cert.display(), key.display()))?;
    let (manifests, _) = tokio::sync::watch::channel(0);
    let app = Arc::new(App { db, manifests, clock: now });
    println!("listening on https://{listen}");
    axum_server::bind_rustls(listen, tls).serve(router(app).into_make_service()).await.context("serving")
}

/// One line per device, and one per workload that is not simply running.
fn table(devices: &[DeviceView], now: i64) -> String {
    let mut text = format!("{:<20} {:<12} {:<16} {:<14} {}\n", "DEVICE", "SEEN", "GENERATION", "STATE", "WORKLOADS");
    for device in devices {
        let seen = device.last_seen.map_or("never".to_owned(), |at| {
            format!("{} ago", Span::from_secs(u64::try_from(now - at).unwrap_or(0)).human())
        });
        let Some(report) = &device.report else {
            text.push_str(&format!("{:<20} {seen:<12} -\n", device.device));
            continue;
        };
        let generation = report.generation.as_ref();
        let sequence = generation.map_or("-".to_owned(), |generation| generation.sequence.to_string());
        let state = generation.map_or("-".to_owned(), |generation| format!("{:?}", generation.state).to_lowercase());
        let well = report.workloads.values().filter(|workload| workload.why.is_none()).count();
        text.push_str(&format!(
            "{:<20} {seen:<12} {sequence:<16} {state:<14} {well} of {} well\n",
            device.device,
            report.workloads.len()
        ));
        for (name, workload) in &report.workloads {
            if let Some(why) = &workload.why {
                text.push_str(&format!("  {name}: {why}\n"));
            }
        }
        if let Some(refused) = &report.refused {
            text.push_str(&format!("  refused at {}: {}\n", Timestamp(refused.at.0), refused.why));
        }
    }
    text
}
