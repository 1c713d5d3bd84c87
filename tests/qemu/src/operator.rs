//! The operator's side: keys, a private CA, the trust root, signed manifests. Made by the programs that operators use.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::run::run;

pub struct Operator {
    dir: PathBuf,
    edgectl: PathBuf,
}

impl Operator {
    /// Makes keys, CA and trust root in `dir`.
    pub fn new(dir: &Path, edgectl: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let operator = Self { dir: dir.to_owned(), edgectl: edgectl.to_owned() };
        for key in ["root", "ops", "stranger"] {
            operator.edgectl(&["key", "generate", "--out", &format!("{key}.key")])?;
        }
        // An image key made by openssl: any Ed25519 key will do.
        operator.openssl(&["genpkey", "-algorithm", "ed25519", "-out", "image.key"])?;
        operator.openssl(&["pkey", "-in", "image.key", "-pubout", "-out", "image.pub"])?;
        let trust = ["trust", "init", "--root-key", "root.key", "--manifest-key", "ops.pub", "--image-key", "image.pub"];
        operator.edgectl(&[&trust[..], &["-o", "trust.cose"]].concat())?;
        operator.certificates()?;
        Ok(operator)
    }

    fn certificates(&self) -> Result<()> {
        let ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
        let ca = ["req", "-x509", "-days", "3650", "-subj", "/CN=rig CA", "-keyout", "ca.key", "-out", "ca.pem"];
        self.openssl(&[&ca[..], &ec[..]].concat())?;
        let server = ["req", "-subj", "/CN=rig", "-keyout", "server.key", "-out", "server.csr"];
        self.openssl(&[&server[..], &ec[..]].concat())?;
        // 10.0.2.2 is the host as QEMU's user network shows it to the guest.
        let names = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:10.0.2.2\nextendedKeyUsage=serverAuth\n";
        std::fs::write(self.path("names"), names)?;
        self.openssl(&[
            "x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days",
            "3650", "-extfile", "names", "-out", "server.pem",
        ])?;
        Ok(())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn openssl(&self, args: &[&str]) -> Result<String> {
        run(Command::new("openssl").args(args).current_dir(&self.dir))
    }

    pub fn edgectl(&self, args: &[&str]) -> Result<String> {
        run(Command::new(&self.edgectl).args(args).current_dir(&self.dir))
    }

    /// Writes `yaml` and signs it with `key`; returns the envelope's path.
    pub fn sign(&self, name: &str, yaml: &str, key: &str) -> Result<PathBuf> {
        let file = format!("{name}.yaml");
        std::fs::write(self.path(&file), yaml).context(file.clone())?;
        self.edgectl(&["manifest", "sign", &file, "--key", key, "--expires", "30days"])?;
        Ok(self.path(&format!("{name}.cose")))
    }
}
