//! Health probes. Each running workload with a health check has one task that asks at its interval and reports what it
//! found; what follows from it is the planner's business.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use edged_model::manifest::{Health, Probe};
use hyper::client::conn::http1;
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::ProbeOutcome;
use crate::network;

/// Where a probe of the network kind connects to.
#[derive(Debug, Clone)]
pub enum Target {
    /// Inside this network namespace, on its loopback address.
    Namespace(PathBuf),
    /// The device's own loopback (a workload in `host` mode).
    Host,
}

/// Asks once over the network; `None` for a probe that is a command (the caller runs it through the keeper).
pub async fn ask(health: &Health, target: &Target) -> Option<ProbeOutcome> {
    let timeout = health.timeout.duration();
    let asked = async {
        match &health.probe {
            Probe::Exec { .. } => None,
            Probe::Tcp { port } => Some(connect(target, *port, timeout).await.map(drop)),
            Probe::Http { port, path } => Some(match connect(target, *port, timeout).await {
                Ok(stream) => get(stream, path).await,
                Err(why) => Err(why),
            }),
        }
    };
    match tokio::time::timeout(timeout, asked).await {
        Ok(None) => None,
        Ok(Some(Ok(()))) => Some(ProbeOutcome::Passed),
        Ok(Some(Err(why))) => Some(ProbeOutcome::Failed { why }),
        Err(_) => Some(no_answer(health)),
    }
}

pub fn no_answer(health: &Health) -> ProbeOutcome {
    ProbeOutcome::Failed { why: format!("no answer in {}", health.timeout.human()) }
}

async fn connect(target: &Target, port: u16, timeout: Duration) -> Result<TcpStream, String> {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let failed = |error: std::io::Error| format!("port {port}: {error}");
    match target {
        Target::Host => TcpStream::connect(address).await.map_err(failed),
        Target::Namespace(path) => {
            let path = path.clone();
            let stream = tokio::task::spawn_blocking(move || network::netns::connect_in_netns(&path, address, timeout))
                .await
                .map_err(|error| error.to_string())?
                .map_err(|error| format!("port {port}: {error}"))?;
            stream.set_nonblocking(true).map_err(failed)?;
            TcpStream::from_std(stream).map_err(failed)
        }
    }
}

async fn get(stream: TcpStream, path: &str) -> Result<(), String> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let driver = tokio::spawn(connection);
    let request = Request::get(path)
        .header(header::HOST, "localhost")
        .header(header::USER_AGENT, concat!("edged/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close")
        .body(http_body_util::Empty::<hyper::body::Bytes>::new())
        .map_err(|error| format!("path `{path}`: {error}"))?;
    let status = sender.send_request(request).await.map(|response| response.status());
    // The body does not matter; dropping the driver closes the connection.
    driver.abort();
    match status {
        Ok(status) if status.is_success() || status.is_redirection() => Ok(()),
        Ok(status) => Err(format!("status {}", status.as_u16())),
        Err(error) => Err(format!("GET {path}: {error}")),
    }
}
