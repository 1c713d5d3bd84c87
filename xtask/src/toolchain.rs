//! Static binaries for other machines. rustup's standard library if it can be had, else Debian's compiler with its
//! standard library for all three architectures (unpacked under `.cache/`, never installed).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::Artifacts;
use edged_qemu::process;

use crate::debian::Archive;
use crate::progress;
use crate::setup::{self, Need};

/// How much the compiler may try. Both are the same code with the same checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// As shipped: smallest.
    Release,
    /// For the tests: builds in a fraction of the time.
    Firmware,
    /// The OCI runtime alone: fastest.
    Runtime,
}

impl Profile {
    fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Firmware => "firmware",
            Self::Runtime => "runtime",
        }
    }
}

/// Builds programs of a package, static, and gives back the directory they are in.
pub fn build(arch: Arch, profile: Profile, package: &str, programs: &[&str]) -> Result<PathBuf> {
    setup::ensure(&[Need::Build(arch)])?;
    let artifacts = Artifacts::find();
    let target_dir = artifacts.root().join("target/image").join(arch.name());
    let mut command = Command::new("cargo");
    if let Some(rustc) = debian_compiler_if_needed(&artifacts, arch)? {
        command.env("RUSTC", &rustc.program).env("LD_LIBRARY_PATH", &rustc.libraries);
    }
    let target = arch.rust_target();
    command.current_dir(artifacts.root());
    command.args(["build", "--package", package, "--target", target, "--profile", profile.name()]);
    command.arg("--target-dir").arg(&target_dir);
    for program in programs {
        command.args(["--bin", program]);
    }
    let variable = target.replace('-', "_").to_uppercase();
    let linker = if Arch::host() == Some(arch) { "cc" } else { arch.linker() };
    command.env(format!("CARGO_TARGET_{variable}_RUSTFLAGS"), flags(package, linker)?);
    if Arch::host() != Some(arch) {
        command.env(format!("CARGO_TARGET_{variable}_LINKER"), linker);
        command.env(format!("CC_{}", target.replace('-', "_")), arch.linker());
    }
    progress::step(&format!("building {} for {arch}, static, {}", programs.join(" and "), profile.name()));
    progress::run(&mut command)?;
    Ok(target_dir.join(target).join(profile.name()))
}

/// A bench of this machine, to be given its arguments: built as the shipped programs are, static, and not run yet.
pub fn bench(package: &str, name: &str) -> Result<Command> {
    let arch = Arch::host().context("this machine's architecture is none of ours")?;
    let artifacts = Artifacts::find();
    let target = arch.rust_target();
    let mut command = Command::new("cargo");
    command.current_dir(artifacts.root()).args(["bench", "--quiet", "--package", package, "--bench", name]);
    command.args(["--target", target, "--target-dir"]).arg(artifacts.root().join("target/image").join(arch.name()));
    let variable = target.replace('-', "_").to_uppercase();
    command.env(format!("CARGO_TARGET_{variable}_RUSTFLAGS"), flags(package, "cc")?);
    command.arg("--");
    Ok(command)
}

fn flags(package: &str, linker: &str) -> Result<String> {
    let mut flags = format!("-C target-feature=+crt-static{}", model(package));
    if can_pack_relocations(linker)? {
        flags.push_str(" -C link-arg=-Wl,-z,pack-relative-relocs");
    }
    Ok(flags)
}

/// Packed (DT_RELR), the addresses that a program at a random place must correct take 10 KB instead of half a megabyte.
/// Not every linker can do it, and a C library before glibc 2.36 would start the program with them uncorrected.
fn can_pack_relocations(compiler: &str) -> Result<bool> {
    let options = process::read(Command::new(compiler).arg("-Wl,--help"))?;
    let macros = process::read(Command::new(compiler).args("-E -dM -include features.h -x c /dev/null".split(' ')))?;
    let number = |name: &str| macros.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u32>().ok());
    let glibc = (number("#define __GLIBC__ "), number("#define __GLIBC_MINOR__ "));
    Ok(options.contains("pack-relative-relocs") && glibc >= (Some(2), Some(36)))
}

/// What has an address of its own beforehand need not be relocated at each start, which for the runtime alone is a fifth of
/// its page faults. It lives for milliseconds and listens to nobody; what lives long is placed anew at each start.
fn model(package: &str) -> &'static str {
    if package == "edged-oci" { " -C relocation-model=static" } else { "" }
}

struct Rustc {
    program: PathBuf,
    libraries: PathBuf,
}

fn debian_compiler_if_needed(artifacts: &Artifacts, arch: Arch) -> Result<Option<Rustc>> {
    if std::env::var_os("EDGED_DEBIAN_RUSTC").is_none() && (has_standard_library(arch) || add_with_rustup(arch)) {
        return Ok(None);
    }
    progress::step("no standard library for it from rustup: taking Debian's compiler");
    debian_compiler(artifacts).map(Some).context("no way to build for this architecture")
}

fn has_standard_library(arch: Arch) -> bool {
    let output = Command::new("rustc").args(["--print", "target-libdir", "--target", arch.rust_target()]).output();
    let path = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    Path::new(&path).is_dir()
}

fn add_with_rustup(arch: Arch) -> bool {
    progress::step(&format!("asking rustup for {}", arch.rust_target()));
    Command::new("rustup").args(["target", "add", arch.rust_target()]).status().is_ok_and(|status| status.success())
        && has_standard_library(arch)
}

/// The newest version that Debian has of compiler and standard library for all three architectures alike; they only
/// work together when they are of one version.
fn debian_compiler(artifacts: &Artifacts) -> Result<Rustc> {
    const SUITE: &str = "bookworm";
    let home = artifacts.cache().join("rust-web");
    let rustc = Rustc { program: home.join("usr/bin/rustc"), libraries: home.join("usr/lib/x86_64-linux-gnu") };
    if rustc.program.exists() {
        return Ok(rustc);
    }
    let archives = Arch::ALL.map(|arch| Archive::open(&artifacts.cache(), SUITE, arch.debian()));
    let [amd64, arm64, armhf] = archives;
    let (amd64, arm64, armhf) = (amd64?, arm64?, armhf?);
    let others = [arm64.versions("libstd-rust-web-dev")?, armhf.versions("libstd-rust-web-dev")?];
    let version = amd64
        .versions("rustc-web")?
        .into_iter()
        .find(|version| others.iter().all(|other| other.contains(version)))
        .context("Debian has no compiler of the same version for all architectures")?;
    let release = version.split('.').take(2).collect::<Vec<_>>().join(".");
    let runtime = format!("libstd-rust-web-{release}");
    let needs = amd64.field(&runtime, "Depends")?.join(", ");
    let llvm = needs.split(", ").find(|name| name.starts_with("libllvm")).context("the compiler names no LLVM")?;
    let llvm = llvm.split(' ').next().unwrap_or(llvm);

    let mut trees = vec![amd64.unpack(llvm, None)?];
    for package in ["rustc-web", &runtime, "libstd-rust-web-dev"] {
        trees.push(amd64.unpack(package, Some(&version))?);
    }
    trees.push(arm64.unpack("libstd-rust-web-dev", Some(&version))?);
    trees.push(armhf.unpack("libstd-rust-web-dev", Some(&version))?);
    let partial = artifacts.cache().join("rust-web.partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial)?;
    for tree in trees {
        process::run(Command::new("cp").args(["-a", "--link"]).arg(tree.join("usr")).arg(&partial))?;
    }
    fs::rename(partial, &home)?;
    Ok(rustc)
}
