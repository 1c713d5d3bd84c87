//! What a device boots: Debian's kernel and an initramfs with `edged` as `/init`. The data disk is made by the device.
//!
//! Kernel command line: `console=` where kernel and keeper write, `edged.data=/dev/vda` the data disk (formatted when it
//! is empty), `edged.data-type=ext4` or `f2fs`, `edged.watchdog=60` seconds (0: none).

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::{Artifacts, Firmware};
use edged_qemu::cpio::Archive as Cpio;
use edged_qemu::filesystem::Filesystem;

use crate::debian::Archive;
use crate::elf;
use crate::kernel::Kernel;
use crate::progress;
use crate::setup::{self, Need};
use crate::toolchain::{self, Profile};

/// The release whose e2fsprogs and sample programs are taken.
pub const SUITE: &str = "bookworm";

pub fn run(arch: Arch, filesystem: Filesystem, quick: bool, edged: Option<&Path>) -> Result<()> {
    let firmware = build(arch, filesystem, if quick { Profile::Firmware } else { Profile::Release }, edged)?;
    println!("{}", fs::read_to_string(firmware.contents())?);
    println!("kernel     {}\ninitramfs  {}", firmware.kernel().display(), firmware.initramfs().display());
    Ok(())
}

/// An initramfs being filled, and the list of what is in it.
#[derive(Default)]
struct Root {
    cpio: Cpio,
    contents: Vec<(String, usize)>,
}

impl Root {
    fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.cpio.file(path, mode, content);
        self.contents.push((path.to_owned(), content.len()));
    }
}

/// Builds kernel and initramfs into `target/firmware/<arch>/`. With `edged`, that program is packed instead of ours.
pub fn build(arch: Arch, filesystem: Filesystem, profile: Profile, edged: Option<&Path>) -> Result<Firmware> {
    setup::ensure(&[Need::Build(arch)])?;
    let artifacts = Artifacts::find();
    let firmware = artifacts.firmware_on(arch, filesystem);
    let mut root = Root::default();
    base(&mut root)?;
    match edged {
        Some(program) => root.file("usr/bin/edged", 0o755, &fs::read(program)?),
        None => {
            let programs = toolchain::build(arch, profile, "edged", &["edged"])?;
            root.file("usr/bin/edged", 0o755, &fs::read(programs.join("edged"))?);
        }
    }
    root.cpio.symlink("init", "usr/bin/edged");
    // One file, two names: under this one it is the technician's program.
    root.cpio.symlink("usr/bin/edgectl", "edged");
    disk_tools(&mut root, &artifacts, arch, filesystem)?;
    let kernel = Kernel::fetch(&artifacts, arch, filesystem)?;
    modules(&mut root, &kernel, filesystem)?;

    progress::step(&format!("packing the initramfs for {arch}"));
    fs::create_dir_all(firmware.dir())?;
    fs::copy(&kernel.image, firmware.kernel())?;
    if let Some(module) = kernel.module_called("bfq")? {
        fs::write(firmware.bfq(), module)?;
    }
    let unpacked = root.cpio.finish();
    fs::write(firmware.initramfs(), compress(&unpacked)?)?;
    fs::write(firmware.contents(), table(&firmware, &kernel, &root.contents, unpacked.len())?)?;
    Ok(firmware)
}

/// The little that programs expect to find.
fn base(root: &mut Root) -> Result<()> {
    for (path, mode) in [
        ("dev", 0o755),
        ("proc", 0o555),
        ("sys", 0o555),
        ("run", 0o755),
        ("tmp", 0o1777),
        ("newroot", 0o755),
        ("root", 0o700),
        ("etc/edged", 0o755),
        ("var/lib/edged", 0o755),
    ] {
        root.cpio.directory(path, mode);
    }
    // The kernel opens it for init's own output before anything is mounted.
    root.cpio.character_device("dev/console", 0o600, 5, 1);
    root.file("etc/hostname", 0o644, b"edged\n");
    root.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n",
    );
    root.file("etc/group", 0o644, b"root:x:0:\ntty:x:5:\nedged:x:900:\nnogroup:x:65534:\n");
    root.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n");
    let authorities = "/etc/ssl/certs/ca-certificates.crt";
    root.file(&authorities[1..], 0o644, &fs::read(authorities).context("no public CA certificates on this machine")?);
    Ok(())
}

/// mkfs and fsck for the data disk, with exactly the libraries they need.
fn disk_tools(root: &mut Root, artifacts: &Artifacts, arch: Arch, filesystem: Filesystem) -> Result<()> {
    let (package, paths) = match filesystem {
        Filesystem::Ext4 => ("e2fsprogs", ["sbin/mke2fs", "sbin/e2fsck"]),
        Filesystem::F2fs => ("f2fs-tools", ["sbin/mkfs.f2fs", "sbin/fsck.f2fs"]),
    };
    let archive = Archive::open(&artifacts.cache(), SUITE, arch.debian())?;
    let tree = archive.unpack_with_dependencies(&[package])?;
    let mut programs = Vec::new();
    for path in paths {
        let file = elf::resolve(&tree, path).with_context(|| format!("no {path} in {package}"))?;
        root.file(path, 0o755, &fs::read(&file)?);
        programs.push(file);
    }
    if filesystem == Filesystem::Ext4 {
        root.cpio.symlink("sbin/mkfs.ext4", "mke2fs");
        root.file("etc/mke2fs.conf", 0o644, &fs::read(tree.join("etc/mke2fs.conf"))?);
    }
    for library in elf::libraries(arch, &tree, &programs)? {
        root.file(&library.path, 0o755, &fs::read(&library.file)?);
    }
    Ok(())
}

fn modules(root: &mut Root, kernel: &Kernel, filesystem: Filesystem) -> Result<()> {
    let picked = kernel.pick(filesystem);
    ensure!(!picked.files.is_empty(), "no modules were found for {}", kernel.release);
    let home = format!("lib/modules/{}", kernel.release);
    for path in &picked.files {
        root.file(&format!("{home}/{}", path.replace(".ko.xz", ".ko")), 0o644, &kernel.module(path)?);
    }
    root.file(&format!("{home}/modules.dep"), 0o644, kernel.dependencies_of(&picked).as_bytes());
    root.file("etc/modules-load.d/edged.conf", 0o644, (picked.names.join("\n") + "\n").as_bytes());
    Ok(())
}

/// zstd: the kernels take it, and it unpacks several times faster than gzip.
fn compress(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut zstd = Command::new("zstd")
        .args(["-q", "-12", "-T0", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run zstd")?;
    let mut input = zstd.stdin.take().context("zstd has no input")?;
    let writer = std::thread::scope(|scope| {
        let feeding = scope.spawn(move || input.write_all(bytes));
        let output = zstd.wait_with_output();
        (feeding.join(), output)
    });
    let (fed, output) = (writer.0, writer.1?);
    fed.map_err(|_| anyhow::anyhow!("the thread that feeds zstd panicked"))??;
    ensure!(output.status.success(), "zstd ended with {}", output.status);
    Ok(output.stdout)
}

fn table(firmware: &Firmware, kernel: &Kernel, contents: &[(String, usize)], unpacked: usize) -> Result<String> {
    let mut text = format!("{} device, Linux {}\n\n", firmware.arch, kernel.release);
    for (path, bytes) in contents {
        text.push_str(&format!("{bytes:>10}  /{path}\n"));
    }
    let packed = fs::metadata(firmware.initramfs())?.len();
    let image = fs::metadata(firmware.kernel())?.len();
    text.push_str(&format!("\n{unpacked:>10}  initramfs, unpacked\n{packed:>10}  initramfs\n{image:>10}  kernel\n"));
    Ok(text)
}
