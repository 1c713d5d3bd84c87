//! Building edged: for this machine, and static for devices.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use edged_qemu::run::run;

use crate::apt::Suite;
use crate::say;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Arch {
    #[value(name = "x86_64")]
    X86_64,
    #[value(name = "aarch64")]
    Aarch64,
    #[value(name = "armv7")]
    Armv7,
}

impl Arch {
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
            Self::Armv7 => "armv7",
        }
    }

    pub fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
            Self::Armv7 => "armhf",
        }
    }

    /// As GOARCH and the image-spec say it.
    pub fn oci(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
            Self::Armv7 => "arm",
        }
    }

    pub fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
            Self::Armv7 => "armv7-unknown-linux-gnueabihf",
        }
    }

    fn linker(self) -> &'static str {
        match self {
            Self::X86_64 => "cc",
            Self::Aarch64 => "aarch64-linux-gnu-gcc",
            Self::Armv7 => "arm-linux-gnueabihf-gcc",
        }
    }
}

/// The workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// What may be fetched or built again at any time.
pub fn cache() -> PathBuf {
    root().join(".cache")
}

pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The programs for a device: static, small.
pub struct Programs {
    pub edged: PathBuf,
    pub edgectl: PathBuf,
    pub sample: PathBuf,
}

/// Builds what goes onto a device.
pub fn firmware(arch: Arch) -> Result<Programs> {
    say::step(&format!("building edged and edgectl for {} (static)", arch.name()));
    let target_dir = root().join("target/firmware");
    let mut build = cargo();
    build.args(["build", "--quiet", "--profile", "firmware", "--target", arch.target(), "--target-dir"]).arg(&target_dir);
    build.args(["-p", "edged", "-p", "sample-programs", "--bins"]);
    let variable = arch.target().to_uppercase().replace('-', "_");
    build.env(format!("CARGO_TARGET_{variable}_LINKER"), arch.linker());
    build.env(format!("CC_{}", arch.target().replace('-', "_")), arch.linker());
    build.env("RUSTFLAGS", "-C target-feature=+crt-static");
    compiler_for(arch, &mut build)?;
    match build.status().context("cargo")? {
        status if status.success() => {}
        status => bail!("the build for {} failed: {status}", arch.name()),
    }
    let dir = target_dir.join(arch.target()).join("firmware");
    Ok(Programs { edged: dir.join("edged"), edgectl: dir.join("edgectl"), sample: dir.join("sample") })
}

/// Programs for this machine that the rig uses.
pub fn host() -> Result<(PathBuf, PathBuf)> {
    say::step("building edgectl and edgefleet for this machine");
    match cargo().args(["build", "--quiet", "-p", "edged", "-p", "edge-fleet", "--bins"]).status().context("cargo")? {
        status if status.success() => {}
        status => bail!("the build failed: {status}"),
    }
    let dir = root().join("target/debug");
    Ok((dir.join("edgectl"), dir.join("edgefleet")))
}

/// The compiler that has the target's standard library: this one, one that rustup can complete, or Debian's.
fn compiler_for(arch: Arch, build: &mut Command) -> Result<()> {
    let sysroot = run(Command::new("rustc").args(["--print", "sysroot"]))?;
    let has = |sysroot: &Path| sysroot.join("lib/rustlib").join(arch.target()).join("lib").exists();
    if has(Path::new(sysroot.trim())) {
        return Ok(());
    }
    let added = Command::new("rustup").args(["target", "add", arch.target()]).output();
    if added.is_ok_and(|output| output.status.success()) && has(Path::new(sysroot.trim())) {
        return Ok(());
    }
    let sysroot = debian_compiler(arch)?;
    let library_path = [sysroot.join("lib/x86_64-linux-gnu"), sysroot.join("lib")].map(|dir| dir.display().to_string());
    build.env("RUSTC", sysroot.join("bin/rustc")).env("LD_LIBRARY_PATH", library_path.join(":"));
    Ok(())
}

/// Debian's rustc with the standard library of `arch`, unpacked from packages of one version.
fn debian_compiler(arch: Arch) -> Result<PathBuf> {
    let root = cache().join("rustc").join(arch.debian());
    if !root.join("complete").exists() {
        let suite = Suite::open("bookworm")?;
        if root.exists() {
            std::fs::remove_dir_all(&root)?;
        }
        let llvm = suite.names(&["libllvm19"])?;
        let llvm: Vec<&str> = llvm.iter().map(String::as_str).filter(|name| *name == "libllvm19").collect();
        suite.unpack_all(&[&["rustc-web", "libstd-rust-web-1.85", "libstd-rust-web-dev"][..], &llvm].concat(), "amd64", &root)?;
        suite.unpack_all(&["libstd-rust-web-dev"], arch.debian(), &root)?;
        std::fs::write(root.join("complete"), "")?;
    }
    Ok(root.join("usr"))
}
