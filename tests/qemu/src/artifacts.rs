//! Where the built things lie. `cargo xtask` builds them; stories only look them up, so that a story never builds.

use std::env;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::arch::Arch;
use crate::filesystem::Filesystem;

/// The variable that names the architecture a story runs on.
pub const ARCH_ENV: &str = "EDGED_QEMU_ARCH";

#[derive(Debug, Clone)]
pub struct Artifacts {
    root: PathBuf,
}

impl Artifacts {
    /// Those of the checkout this program was built in.
    pub fn find() -> Self {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        Self { root: here.ancestors().nth(2).unwrap_or(here).to_owned() }
    }

    /// The checkout itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What is fetched from elsewhere, or takes long to make; kept until it is removed by hand.
    pub fn cache(&self) -> PathBuf {
        self.root.join(".cache")
    }

    /// What a device boots.
    pub fn firmware(&self, arch: Arch) -> Firmware {
        self.firmware_on(arch, Filesystem::Ext4)
    }

    /// What a device boots whose data disk is of another kind: another kernel, and that file system's programs.
    pub fn firmware_on(&self, arch: Arch, filesystem: Filesystem) -> Firmware {
        let name = match filesystem {
            Filesystem::Ext4 => arch.name().to_owned(),
            Filesystem::F2fs => format!("{arch}-f2fs"),
        };
        Firmware { arch, filesystem, dir: self.root.join("target/firmware").join(name) }
    }

    /// The OCI layout of a workload image.
    pub fn image(&self, arch: Arch, name: &str) -> PathBuf {
        self.cache().join("images").join(arch.name()).join(name)
    }

    /// A program built for this machine: `edgectl`, `edgefleet`.
    pub fn host_program(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join("target/debug").join(name);
        ensure!(path.exists(), "{} is not there; `cargo xtask test` builds it", path.display());
        Ok(path)
    }

    /// cosign: `EDGED_COSIGN`, else the one that `cargo xtask setup` fetched, else the one in PATH.
    pub fn cosign(&self) -> Result<PathBuf> {
        if let Some(path) = env::var_os("EDGED_COSIGN") {
            return Ok(path.into());
        }
        let fetched = self.cache().join("cosign/usr/bin/cosign");
        if fetched.exists() {
            return Ok(fetched);
        }
        let path = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&path)
            .map(|dir| dir.join("cosign"))
            .find(|file| file.exists())
            .context("no cosign; `cargo xtask setup` fetches it")
    }

    /// The architecture of this run of the stories.
    pub fn arch_under_test() -> Result<Arch> {
        let name = env::var(ARCH_ENV).unwrap_or_else(|_| "x86_64".to_owned());
        name.parse().map_err(anyhow::Error::msg)
    }

    /// A directory for one run, emptied now.
    pub fn run_dir(&self, story: &str, arch: Arch) -> Result<RunDir> {
        let path = self.root.join("target/qemu").join(arch.name()).join(story);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir_all(&path)?;
        Ok(RunDir { path })
    }
}

/// Kernel and initramfs of one architecture.
#[derive(Debug, Clone)]
pub struct Firmware {
    pub arch: Arch,
    pub filesystem: Filesystem,
    dir: PathBuf,
}

impl Firmware {
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn kernel(&self) -> PathBuf {
        self.dir.join("kernel")
    }

    pub fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs.img")
    }

    /// The kernel's other scheduler of disks: no device loads it, one test does.
    pub fn bfq(&self) -> PathBuf {
        self.dir.join("bfq.ko")
    }

    /// What is in it, with sizes.
    pub fn contents(&self) -> PathBuf {
        self.dir.join("contents.txt")
    }
}

/// A directory of one run. It stays, logs and all, unless [`RunDir::remove`] is called.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// The run ended well.
    pub fn remove(self) {
        let _ = fs::remove_dir_all(self.path);
    }
}

impl Deref for RunDir {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}
