//! The real `edgefleet`, over TLS.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::operator::Operator;
use crate::run::{Running, free_port, run, wait_for};

/// Of the rig only.
pub const OPERATOR_TOKEN: &str = "rig-operator-token";

pub struct Fleet {
    process: Option<Running>,
    pub port: u16,
    dir: PathBuf,
    edgefleet: PathBuf,
    serve: Vec<String>,
}

impl Fleet {
    pub fn start(dir: &Path, operator: &Operator, edgefleet: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        std::fs::write(dir.join("token"), OPERATOR_TOKEN)?;
        let port = free_port()?;
        let show = |path: PathBuf| path.display().to_string();
        let serve = [
            ["serve".to_owned(), format!("--listen=127.0.0.1:{port}")],
            ["--data".to_owned(), show(dir.join("data"))],
            ["--tls-cert".to_owned(), show(operator.path("server.pem"))],
            ["--tls-key".to_owned(), show(operator.path("server.key"))],
            ["--operator-token-file".to_owned(), show(dir.join("token"))],
        ]
        .concat();
        let mut fleet = Self { process: None, port, dir: dir.to_owned(), edgefleet: edgefleet.to_owned(), serve };
        fleet.resume()?;
        Ok(fleet)
    }

    /// Starts serving, again after [`Fleet::stop`].
    pub fn resume(&mut self) -> Result<()> {
        let log = self.dir.join("log");
        self.process = Some(Running::start(Command::new(&self.edgefleet).args(&self.serve), &log)?);
        let address = format!("127.0.0.1:{}", self.port);
        wait_for("the fleet listens", Duration::from_secs(20), || {
            std::net::TcpStream::connect(&address).map(drop).context(address.clone())
        })
    }

    pub fn stop(&mut self) {
        self.process = None;
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub fn token(&self) -> Result<String> {
        let token = run(Command::new(&self.edgefleet).args(["token", "--data"]).arg(self.data()))?;
        Ok(token.trim().to_owned())
    }

    /// What operators see.
    pub fn table(&self) -> Result<String> {
        run(Command::new(&self.edgefleet).args(["devices", "--data"]).arg(self.data()))
    }

    /// The last report of `device`.
    pub fn report(&self, device: &str) -> Result<serde_json::Value> {
        let text = run(Command::new(&self.edgefleet).args(["devices", "--json", "--data"]).arg(self.data()))?;
        let all: serde_json::Value = serde_json::from_str(&text)?;
        let found = all.as_array().and_then(|list| list.iter().find(|entry| entry["device"] == device));
        let report = found.map(|entry| entry["report"].clone()).filter(|report| !report.is_null());
        report.with_context(|| format!("no report of {device}"))
    }
}
