//! `edgefleet`: serves the fleet endpoint, makes enrolment tokens, shows devices.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use edge_fleet::db::Db;
use edge_fleet::db::sqlite::Sqlite;
use edge_fleet::{App, devices, http, new_token, system_clock, table, tls};
use edged_model::fleet::{DeviceStatus, Problem, TokenRequest};
use edged_model::id::{DeviceId, GroupName};
use edged_model::quantity::Span;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;

#[derive(Debug, Parser)]
#[command(name = "edgefleet", version, about = "The fleet endpoint of edged")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serve devices and operators over HTTPS
    Serve(Serve),
    /// Make a one-time token for the enrolment of a device
    Token(Token),
    /// All devices and how they are
    Devices {
        #[command(flatten)]
        from: From,
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
        /// The same as `-o json`
        #[arg(long, conflicts_with = "output")]
        json: bool,
    },
    /// All that is known of one device, as JSON
    Device {
        id: DeviceId,
        #[command(flatten)]
        from: From,
    },
}

#[derive(Debug, Args)]
struct Serve {
    /// Directory of the database; made if it is not there
    #[arg(long)]
    data: PathBuf,
    /// Address and port; port 0 takes a free one
    #[arg(long)]
    listen: SocketAddr,
    /// PEM file with the server's certificate and its chain
    #[arg(long)]
    tls_cert: PathBuf,
    /// PEM file with the certificate's key
    #[arg(long)]
    tls_key: PathBuf,
    /// A file that holds the operator's token; without it, `operator.token` in the data directory, made on first start
    #[arg(long)]
    operator_token_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum TokenVerb {
    /// Make a one-time token and print it: the only time that it can be read
    #[default]
    Create,
}

#[derive(Debug, Args)]
struct Token {
    #[arg(value_enum, default_value_t)]
    verb: TokenVerb,
    #[arg(long)]
    data: PathBuf,
    /// Only this device may use it
    #[arg(long)]
    device: Option<DeviceId>,
    /// Groups of the device that uses it, in place of those it names itself
    #[arg(long = "group")]
    groups: Vec<GroupName>,
    /// How long it is good for
    #[arg(long, default_value = "1day")]
    valid: Span,
}

/// Where to read: the database itself, or a running server.
#[derive(Debug, Args)]
struct From {
    /// Directory of the database
    #[arg(long, required_unless_present = "url", conflicts_with = "url")]
    data: Option<PathBuf>,
    /// https://HOST[:PORT] of a running server
    #[arg(long)]
    url: Option<String>,
    /// PEM file with the CA of that server
    #[arg(long, requires = "url")]
    ca: Option<PathBuf>,
    /// A file that holds the operator's token
    #[arg(long, requires = "url")]
    operator_token_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Output {
    #[default]
    Table,
    Json,
}

fn main() -> ExitCode {
    let level = std::env::var("EDGEFLEET_LOG").ok().and_then(|text| text.parse().ok()).unwrap_or(LevelFilter::INFO);
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).init();
    match run(Cli::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("edgefleet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Serve(serve) => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            runtime.block_on(serve.run())
        }
        Verb::Token(Token { verb: TokenVerb::Create, data, device, groups, valid }) => {
            let groups = (!groups.is_empty()).then_some(groups);
            let request = TokenRequest { device, groups, valid_secs: Some(valid.ms / 1000) };
            println!("{}", http::add_token(&Sqlite::open(&data)?, new_token()?, request, system_clock())?.token);
            Ok(())
        }
        Verb::Devices { from, output, json } => {
            let all = from.devices()?;
            match if json { Output::Json } else { output } {
                Output::Table => print!("{}", table::devices(&all, system_clock())),
                Output::Json => println!("{}", serde_json::to_string_pretty(&all)?),
            }
            Ok(())
        }
        Verb::Device { id, from } => {
            println!("{}", serde_json::to_string_pretty(&from.device(&id)?)?);
            Ok(())
        }
    }
}

impl Serve {
    async fn run(self) -> Result<()> {
        let config = tls::server_config(&self.tls_cert, &self.tls_key)?;
        let app = Arc::new(App::open(&self.data, self.operator_token_file.as_deref(), system_clock)?);
        let listener =
            TcpListener::bind(self.listen).await.with_context(|| format!("cannot listen on {}", self.listen))?;
        // Scripts wait for this line to learn the port.
        println!("listening on https://{}", listener.local_addr()?);
        if self.operator_token_file.is_none() {
            println!("the operator's token is in {}", self.data.join("operator.token").display());
        }
        let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        tls::serve(listener, config, http::router(app), stop).await;
        Ok(())
    }
}

/// One page of the server's list.
const PAGE: u32 = 1000;

impl From {
    fn devices(&self) -> Result<Vec<DeviceStatus>> {
        let database = self.data.as_deref().map(open_existing).transpose()?;
        let mut all: Vec<DeviceStatus> = Vec::new();
        loop {
            let after = all.last().map(|last| last.device.clone());
            let page: Vec<DeviceStatus> = match &database {
                Some(database) => {
                    let rows = database.devices(after.as_ref(), PAGE)?;
                    rows.into_iter().map(devices::status).collect::<Result<_, _>>()?
                }
                None => {
                    let after = after.map_or_else(String::new, |id| format!("&after={id}"));
                    self.get(&format!("/v1/devices?limit={PAGE}{after}"))?
                }
            };
            let is_last = page.len() < PAGE as usize;
            all.extend(page);
            if is_last {
                return Ok(all);
            }
        }
    }

    fn device(&self, id: &DeviceId) -> Result<DeviceStatus> {
        let Some(data) = &self.data else { return self.get(&format!("/v1/devices/{id}")) };
        let row = open_existing(data)?.device(id)?.with_context(|| format!("device `{id}` is not known here"))?;
        Ok(devices::status(row)?)
    }

    /// Asks the running server.
    fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T> {
        let url = format!("{}{path}", self.url.as_deref().unwrap_or_default().trim_end_matches('/'));
        let mut tls = ureq::tls::TlsConfig::builder();
        if let Some(ca) = &self.ca {
            tls = tls.root_certs(ureq::tls::RootCerts::from(read_ca(ca)?));
        }
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .tls_config(tls.build())
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(60)))
            .build()
            .into();
        let mut request = agent.get(&url);
        if let Some(path) = &self.operator_token_file {
            let token = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            request = request.header("authorization", format!("Bearer {}", token.trim()));
        }
        let mut response = request.call().with_context(|| url.clone())?;
        let body = response.body_mut().with_config().limit(64 << 20).read_to_vec().with_context(|| url.clone())?;
        if response.status().is_success() {
            return serde_json::from_slice(&body).with_context(|| format!("{url}: the answer"));
        }
        match serde_json::from_slice::<Problem>(&body) {
            Ok(Problem { detail, next: Some(next), .. }) => bail!("{url}: {detail} ({next})"),
            Ok(Problem { detail, .. }) => bail!("{url}: {detail}"),
            Err(_) => bail!("{url}: it answers {}", response.status().as_u16()),
        }
    }
}

/// Reading must not make an empty database where somebody mistyped the directory.
fn open_existing(data: &Path) -> Result<Sqlite> {
    let file = data.join("fleet.db");
    if !file.exists() {
        bail!("{} is not there: is {} the data directory of `edgefleet serve`?", file.display(), data.display());
    }
    Ok(Sqlite::open(data)?)
}

fn read_ca(path: &Path) -> Result<Vec<ureq::tls::Certificate<'static>>> {
    let pem = std::fs::read(path).with_context(|| path.display().to_string())?;
    let mut certificates = Vec::new();
    for item in ureq::tls::parse_pem(&pem) {
        if let ureq::tls::PemItem::Certificate(certificate) = item.with_context(|| path.display().to_string())? {
            certificates.push(certificate);
        }
    }
    if certificates.is_empty() {
        bail!("{} holds no certificate", path.display());
    }
    Ok(certificates)
}
