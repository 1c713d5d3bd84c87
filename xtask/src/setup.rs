//! What each command needs from the machine it runs on, in one table. As root on Debian what is missing is installed;
//! elsewhere it is named.

use std::collections::BTreeSet;
use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::Artifacts;
use edged_qemu::process;

use crate::debian::Archive;
use crate::progress;

/// What for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Static binaries, kernel, initramfs, workload images.
    Build(Arch),
    /// Booting a device with registry and fleet beside it.
    Boot(Arch),
    /// Tests that run containers on this machine.
    HostTests,
}

/// A program, or an absolute path, and the Debian package that brings it.
type Item = (&'static str, &'static str);

fn items(need: Need) -> Vec<Item> {
    let mut items: Vec<Item> = Vec::new();
    match need {
        Need::Build(arch) => {
            items.extend([
                ("cc", "gcc"),
                ("readelf", "binutils"),
                ("depmod", "kmod"),
                ("xz", "xz-utils"),
                ("zstd", "zstd"),
                ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
                ("/etc/ssl/certs/ca-certificates.crt", "ca-certificates"),
            ]);
            if Arch::host() != Some(arch) {
                items.extend(match arch {
                    Arch::X86_64 => [
                        ("x86_64-linux-gnu-gcc", "gcc-x86-64-linux-gnu"),
                        ("/usr/x86_64-linux-gnu/lib/libc.a", "libc6-dev-amd64-cross"),
                    ],
                    Arch::Aarch64 => [
                        ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
                        ("/usr/aarch64-linux-gnu/lib/libc.a", "libc6-dev-arm64-cross"),
                    ],
                    Arch::Armv7 => [
                        ("arm-linux-gnueabihf-gcc", "gcc-arm-linux-gnueabihf"),
                        ("/usr/arm-linux-gnueabihf/lib/libc.a", "libc6-dev-armhf-cross"),
                    ],
                });
            }
        }
        Need::Boot(arch) => {
            items.push(match arch {
                Arch::X86_64 => ("qemu-system-x86_64", "qemu-system-x86"),
                Arch::Aarch64 => ("qemu-system-aarch64", "qemu-system-arm"),
                Arch::Armv7 => ("qemu-system-arm", "qemu-system-arm"),
            });
            items.extend([
                ("docker-registry", "docker-registry"),
                ("skopeo", "skopeo"),
                ("htpasswd", "apache2-utils"),
                ("openssl", "openssl"),
                // What loads into the guests' kernels is compiled here.
                ("/sbin/apparmor_parser", "apparmor"),
                ("secilc", "secilc"),
            ]);
        }
        Need::HostTests => items.extend([
            ("docker-registry", "docker-registry"),
            ("skopeo", "skopeo"),
            ("umoci", "umoci"),
            ("htpasswd", "apache2-utils"),
            ("openssl", "openssl"),
            ("crun", "crun"),
            ("runc", "runc"),
            ("podman", "podman"),
            ("conmon", "conmon"),
            ("/usr/libexec/podman/catatonit", "catatonit"),
            ("containerd", "containerd"),
            ("script", "bsdutils"),
            ("nft", "nftables"),
            ("/bin/busybox", "busybox-static"),
            ("curl", "curl"),
            ("nginx", "nginx-light"),
            ("/lib/systemd/systemd-journald", "systemd"),
            ("ssh", "openssh-client"),
            ("setpriv", "util-linux"),
            ("/sbin/mkfs.ext4", "e2fsprogs"),
            ("/sbin/mkfs.f2fs", "f2fs-tools"),
            ("cpio", "cpio"),
        ]),
    }
    items
}

/// Makes sure that it is all there.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let missing: BTreeSet<&str> = needs
        .iter()
        .flat_map(|need| items(*need))
        .filter(|(item, _)| !is_there(item))
        .map(|(_, package)| package)
        .collect();
    if !missing.is_empty() {
        install(&missing)?;
    }
    Ok(())
}

/// Fetches the signer; today's is only in Debian's newer suites, and needs no more than the C library.
pub fn cosign(artifacts: &Artifacts) -> Result<()> {
    if artifacts.cosign().is_ok() {
        return Ok(());
    }
    let host = Arch::host().map_or("amd64", Arch::debian);
    let unpacked = Archive::open(&artifacts.cache(), "sid", host)?.unpack("cosign", None)?;
    let home = artifacts.cache().join("cosign");
    process::run(Command::new("cp").arg("-a").arg(unpacked).arg(home)).map(drop)
}

/// For all commands at once.
pub fn everything() -> Result<()> {
    let mut needs = vec![Need::HostTests];
    for arch in Arch::ALL {
        needs.extend([Need::Build(arch), Need::Boot(arch)]);
    }
    ensure(&needs)?;
    cosign(&Artifacts::find())?;
    progress::step("all that the commands need is here");
    Ok(())
}

fn is_there(item: &str) -> bool {
    if item.starts_with('/') {
        return Path::new(item).exists();
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin"].map(Into::into);
    env::split_paths(&path).chain(usual).any(|dir| dir.join(item).exists())
}

fn install(packages: &BTreeSet<&str>) -> Result<()> {
    let names = packages.iter().copied().collect::<Vec<_>>().join(" ");
    let is_root = process::read(Command::new("id").arg("-u"))?.trim() == "0";
    if !is_root || !is_there("apt-get") {
        bail!("these Debian packages (or what is like them) are missing: {names}");
    }
    progress::step(&format!("installing {names}"));
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").arg("-q");
        command
    };
    // A mirror in the middle of its own update fails one index of many; the install tells whether it mattered.
    if let Err(error) = progress::run(apt().arg("update")) {
        progress::step(&format!("going on with what there is: {error:#}"));
    }
    progress::run(apt().args(["install", "-y", "--no-install-recommends"]).args(packages))
}
