//! What the commands need of the machine, and how it gets there: by apt where there is apt, else it is named.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::say;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Unit, property and host tests.
    Host,
    /// And everything that boots a device.
    Everything,
}

/// A program that must be there, and the Debian package that has it.
const NEEDED: [(Scope, &str, &str); 15] = [
    (Scope::Host, "openssl", "openssl"),
    (Scope::Host, "docker-registry", "docker-registry"),
    (Scope::Host, "skopeo", "skopeo"),
    (Scope::Host, "htpasswd", "apache2-utils"),
    (Scope::Host, "cc", "gcc"),
    (Scope::Host, "tar", "tar"),
    (Scope::Everything, "qemu-system-x86_64", "qemu-system-x86"),
    (Scope::Everything, "qemu-system-aarch64", "qemu-system-arm"),
    (Scope::Everything, "aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    (Scope::Everything, "arm-linux-gnueabihf-gcc", "gcc-arm-linux-gnueabihf"),
    (Scope::Everything, "cpio", "cpio"),
    (Scope::Everything, "depmod", "kmod"),
    (Scope::Everything, "xz", "xz-utils"),
    (Scope::Everything, "crun", "crun"),
    (Scope::Everything, "runc", "runc"),
];

fn is_there(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let more = "/usr/sbin:/sbin";
    path.split(':').chain(more.split(':')).any(|dir| std::path::Path::new(dir).join(program).exists())
}

pub fn ensure(scope: Scope) -> Result<()> {
    let missing: Vec<_> = NEEDED.iter().filter(|(needed, program, _)| *needed <= scope && !is_there(program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = missing.iter().map(|(_, _, package)| *package).collect();
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.starts_with(b"0\n"));
    if !is_there("apt-get") || !is_root {
        let programs: Vec<_> = missing.iter().map(|(_, program, _)| *program).collect();
        bail!("missing: {}\nOn Debian: sudo apt-get install {}", programs.join(", "), packages.join(" "));
    }
    say::step(&format!("installing {}", packages.join(" ")));
    let apt = |args: &[&str]| {
        let status = Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(args).status();
        match status.context("apt-get")? {
            status if status.success() => Ok(()),
            status => bail!("apt-get {args:?}: {status}"),
        }
    };
    apt(&["-qq", "update"])?;
    apt(&[&["-qq", "install", "-y", "--no-install-recommends"][..], &packages].concat())
}
