//! The real fleet server, `edgefleet`, over TLS.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::artifacts::Artifacts;
use crate::certs::{Authority, Pair};
use crate::machine::HOST_SEEN_FROM_GUEST;
use crate::process::{self, Service};
use crate::wait;

#[derive(Debug)]
pub struct Fleet {
    service: Option<Service>,
    pub port: u16,
    program: PathBuf,
    data: PathBuf,
    ca: PathBuf,
    pair: Pair,
}

impl Fleet {
    /// Starts one with its database in `dir`, on a free port.
    pub fn start(dir: &Path, authority: &Authority) -> Result<Self> {
        let (data, port) = (dir.join("data"), process::free_port()?);
        fs::create_dir_all(&data)?;
        let pair = authority.issue("fleet")?;
        let program = Artifacts::find().host_program("edgefleet")?;
        let service = serve(&program, &data, &pair, port)?;
        Ok(Self { service: Some(service), port, program, data, ca: authority.cert(), pair })
    }

    /// It goes away, as servers do.
    pub fn stop(&mut self) {
        self.service = None;
    }

    /// And comes back, under the same address and with its data.
    pub fn start_again(&mut self) -> Result<()> {
        self.stop();
        self.service = Some(serve(&self.program, &self.data, &self.pair, self.port)?);
        Ok(())
    }

    /// The fleet's own tool, on this fleet's data: `edgefleet <verb> --data DIR …`.
    pub fn tool(&self, verb: &[&str]) -> Result<String> {
        process::read(Command::new(&self.program).args(verb).arg("--data").arg(&self.data))
    }

    /// A token with which one device may enrol.
    pub fn enroll_token(&self) -> Result<String> {
        Ok(self.tool(&["token", "create"])?.trim().to_owned())
    }

    /// The token with which operators push.
    pub fn operator_token(&self) -> Result<String> {
        Ok(fs::read_to_string(self.data.join("operator.token"))?.trim().to_owned())
    }

    pub fn url_seen_from_guest(&self) -> String {
        format!("https://{HOST_SEEN_FROM_GUEST}:{}", self.port)
    }

    pub fn url_seen_from_host(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// The CA of its certificate.
    pub fn ca(&self) -> &Path {
        &self.ca
    }
}

fn serve(program: &Path, data: &Path, pair: &Pair, port: u16) -> Result<Service> {
    let mut command = Command::new(program);
    command.args(["serve", "--listen", &format!("127.0.0.1:{port}"), "--data"]).arg(data);
    command.arg("--tls-cert").arg(&pair.cert).arg("--tls-key").arg(&pair.key);
    let mut service = Service::start("edgefleet", &mut command, &data.with_extension("log"))?;
    service.wait_for_port(port, wait::LONG)?;
    Ok(service)
}
