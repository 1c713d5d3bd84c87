//! What `cargo xtask image` built, found by the environment that xtask sets.

use std::path::PathBuf;

use anyhow::{Context, Result};

/// One architecture's device, and the host's own programs.
#[derive(Debug, Clone)]
pub struct Artifacts {
    /// `x86_64` or `aarch64`.
    pub arch: String,
    pub kernel: PathBuf,
    /// Without the device's own configuration, which the rig appends.
    pub initramfs: PathBuf,
    /// `edgectl` for this machine.
    pub edgectl: PathBuf,
    pub edgefleet: PathBuf,
    /// OCI layouts, one directory per image.
    pub images: PathBuf,
    pub cosign: PathBuf,
}

impl Artifacts {
    /// From `EDGED_ARTIFACTS` (a JSON file that xtask writes) and `EDGED_ARCH`.
    pub fn from_env() -> Result<Self> {
        let arch = std::env::var("EDGED_ARCH").context("EDGED_ARCH is not set: run `cargo xtask test`")?;
        let file = std::env::var("EDGED_ARTIFACTS").context("EDGED_ARTIFACTS is not set: run `cargo xtask test`")?;
        let text = std::fs::read_to_string(&file).context(file)?;
        let all: serde_json::Value = serde_json::from_str(&text)?;
        let path = |key: &str| {
            let value = all[&arch][key].as_str().with_context(|| format!("{arch}.{key} is not in EDGED_ARTIFACTS"))?;
            Ok::<_, anyhow::Error>(PathBuf::from(value))
        };
        Ok(Self {
            kernel: path("kernel")?,
            initramfs: path("initramfs")?,
            edgectl: path("edgectl")?,
            edgefleet: path("edgefleet")?,
            images: path("images")?,
            cosign: path("cosign")?,
            arch,
        })
    }

    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "kernel": self.kernel, "initramfs": self.initramfs, "edgectl": self.edgectl,
            "edgefleet": self.edgefleet, "images": self.images, "cosign": self.cosign,
        })
    }
}
