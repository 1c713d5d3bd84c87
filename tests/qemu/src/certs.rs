//! A private certificate authority, made by `openssl`: what a plant or a fleet of one's own has.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::machine::HOST_SEEN_FROM_GUEST;
use crate::process;

const DAYS: &str = "3650";

#[derive(Debug, Clone)]
pub struct Authority {
    dir: PathBuf,
}

/// A certificate and its key, both PEM files.
#[derive(Debug, Clone)]
pub struct Pair {
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    /// Makes the authority in `dir`, or takes the one that is there.
    pub fn in_dir(dir: &Path) -> Result<Self> {
        let authority = Self { dir: dir.to_owned() };
        if authority.cert().exists() {
            return Ok(authority);
        }
        fs::create_dir_all(dir)?;
        process::run(
            Command::new("openssl")
                .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256"])
                .args(["-days", DAYS, "-subj", "/CN=edged test authority"])
                .args([
                    "-addext",
                    "basicConstraints=critical,CA:TRUE",
                    "-addext",
                    "keyUsage=critical,keyCertSign,cRLSign",
                ])
                .arg("-keyout")
                .arg(authority.key())
                .arg("-out")
                .arg(authority.cert()),
        )?;
        Ok(authority)
    }

    /// The CA certificate, PEM.
    pub fn cert(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    fn key(&self) -> PathBuf {
        self.dir.join("ca.key")
    }

    /// A server certificate for every name under which the host can be reached, from itself and from the guest.
    pub fn issue(&self, name: &str) -> Result<Pair> {
        let at = |extension: &str| self.dir.join(format!("{name}.{extension}"));
        let pair = Pair { cert: at("pem"), key: at("key") };
        if pair.cert.exists() {
            return Ok(pair);
        }
        process::run(
            Command::new("openssl")
                .args(["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256"])
                .args(["-subj", &format!("/CN={name}")])
                .arg("-keyout")
                .arg(&pair.key)
                .arg("-out")
                .arg(at("csr")),
        )?;
        let names = format!("subjectAltName=DNS:localhost,IP:127.0.0.1,IP:{HOST_SEEN_FROM_GUEST}");
        let extensions = format!("basicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n{names}\n");
        fs::write(at("ext"), extensions)?;
        process::run(
            Command::new("openssl")
                .args(["x509", "-req", "-sha256", "-days", DAYS, "-CAcreateserial"])
                .arg("-in")
                .arg(at("csr"))
                .arg("-CA")
                .arg(self.cert())
                .arg("-CAkey")
                .arg(self.key())
                .arg("-extfile")
                .arg(at("ext"))
                .arg("-out")
                .arg(&pair.cert),
        )?;
        Ok(pair)
    }
}
