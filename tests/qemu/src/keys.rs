//! Keys, trust roots and signed manifests, made by the real `edgectl`, as an operator makes them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::artifacts::Artifacts;
use crate::process;

/// The three keys of a fleet and the trust root over them.
#[derive(Debug, Clone)]
pub struct Keys {
    dir: PathBuf,
    edgectl: PathBuf,
}

impl Keys {
    /// Makes them in `dir`, or takes those that are there.
    pub fn in_dir(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let keys = Self { dir: dir.to_owned(), edgectl: Artifacts::find().host_program("edgectl")? };
        if keys.trust_root().exists() {
            return Ok(keys);
        }
        for role in ["root", "manifest", "image"] {
            process::run(keys.edgectl().args(["key", "generate", "--out"]).arg(keys.private(role)))?;
        }
        process::run(
            keys.edgectl()
                .args(["trust", "init", "--root-key"])
                .arg(keys.private("root"))
                .arg("--manifest-key")
                .arg(keys.public("manifest"))
                .arg("--image-key")
                .arg(keys.public("image"))
                .arg("-o")
                .arg(keys.trust_root()),
        )?;
        Ok(keys)
    }

    /// The operator's tool.
    pub fn edgectl(&self) -> Command {
        Command::new(&self.edgectl)
    }

    /// `root`, `manifest` or `image`; PKCS#8 PEM.
    pub fn private(&self, role: &str) -> PathBuf {
        self.dir.join(format!("{role}.key"))
    }

    pub fn public(&self, role: &str) -> PathBuf {
        self.dir.join(format!("{role}.pub"))
    }

    pub fn trust_root(&self) -> PathBuf {
        self.dir.join("trust.cose")
    }

    /// Signs a manifest written in YAML; the signed file lies beside the keys.
    pub fn sign(&self, name: &str, yaml: &str) -> Result<PathBuf> {
        self.sign_with(name, yaml, &self.private("manifest"))
    }

    /// The same with any key: for what a device must refuse.
    pub fn sign_with(&self, name: &str, yaml: &str, key: &Path) -> Result<PathBuf> {
        let source = self.dir.join(format!("{name}.yaml"));
        let signed = self.dir.join(format!("{name}.cose"));
        fs::write(&source, yaml)?;
        process::run(self.edgectl().args(["manifest", "sign", "--key"]).arg(key).arg(&source).arg("-o").arg(&signed))
            .with_context(|| format!("the manifest was:\n{yaml}"))?;
        Ok(signed)
    }
}
