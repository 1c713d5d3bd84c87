//! A bootable device: Debian's kernel and an initramfs with edged as `/init`, the modules it needs and the two tools that
//! look after the data disk. What is particular to one device (configuration, trust root) is appended later.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use edged_qemu::run::run;

use crate::apt::Suite;
use crate::build::{self, Arch};
use crate::say;

pub struct Image {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub programs: build::Programs,
}

/// In the order in which they are loaded; what they need comes before them, what is built in is passed over.
/// `crc32c_generic` is a soft dependency of ext4, which modules.dep does not have.
const MODULES: [&str; 12] = [
    "virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "crc32c_generic", "libcrc32c", "ext4", "overlay",
    "af_packet", "softdog", "i6300esb", "mqueue",
];

/// What formats and mends the data disk, with the libraries it is linked to.
const DISK_TOOLS: [&str; 8] =
    ["e2fsprogs", "libext2fs2", "libcom-err2", "libss2", "libblkid1", "libuuid1", "libc6", "logsave"];

pub fn build(arch: Arch) -> Result<Image> {
    let programs = build::firmware(arch)?;
    if arch == Arch::Armv7 {
        bail!("Debian's armhf kernel is not in the rig; the programs are built: {}", programs.edged.display());
    }
    let (kernel, modules, version) = kernel(arch)?;
    say::step(&format!("packing the initramfs for {}", arch.name()));
    let dir = build::root().join("target/image").join(arch.name());
    let root = dir.join("root");
    if root.exists() {
        std::fs::remove_dir_all(&root)?;
    }
    for sub in ["dev", "proc", "sys", "run", "tmp", "newroot", "etc/edged", "etc/modules-load.d", "usr/bin", "sbin", "var/lib"] {
        std::fs::create_dir_all(root.join(sub))?;
    }
    copy(&programs.edged, &root.join("init"), 0o755)?;
    std::os::unix::fs::symlink("/init", root.join("usr/bin/edged"))?;
    copy(&programs.edgectl, &root.join("usr/bin/edgectl"), 0o755)?;
    // Before devtmpfs is there, the kernel and the standard library want these two.
    for (name, major, minor) in [("console", "5", "1"), ("null", "1", "3")] {
        run(Command::new("mknod").arg(root.join("dev").join(name)).args(["c", major, minor]))?;
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/false\n")?;
    std::fs::write(root.join("etc/group"), "root:x:0:\ntty:x:5:\nedged:x:900:\n")?;
    std::fs::write(root.join("etc/hostname"), "edged\n")?;
    std::fs::write(root.join("etc/modules-load.d/edged.conf"), MODULES.join("\n") + "\n")?;
    install_modules(&modules, &version, &root)?;
    install_disk_tools(arch, &root)?;
    let initramfs = dir.join("initramfs.gz");
    let pack = format!("find . | LC_ALL=C sort | cpio --quiet -o -H newc --owner=0:0 | gzip -9n > {}", initramfs.display());
    run(Command::new("sh").args(["-ec", &pack]).current_dir(&root))?;
    let size = |path: &Path| Ok::<_, anyhow::Error>(std::fs::metadata(path)?.len() / 1024);
    say::done(&format!(
        "    edged {} KiB, edgectl {} KiB, initramfs {} KiB, kernel {version}",
        size(&programs.edged)?, size(&programs.edgectl)?, size(&initramfs)?
    ));
    Ok(Image { kernel, initramfs, programs })
}

fn copy(from: &Path, to: &Path, mode: u32) -> Result<()> {
    std::fs::copy(from, to).with_context(|| from.display().to_string())?;
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// The kernel file, the directory of its modules, its version.
fn kernel(arch: Arch) -> Result<(PathBuf, PathBuf, String)> {
    let suite = Suite::open("trixie")?;
    let flavour = format!("-cloud-{}", arch.debian());
    let names = suite.names(&["linux-image-6.12", &flavour])?;
    let package = names.iter().rfind(|name| name.ends_with(&flavour)).context("Debian has no such kernel any more")?;
    let dir = suite.unpacked(package, arch.debian())?;
    let version = package.trim_start_matches("linux-image-").to_owned();
    let modules = ["usr/lib/modules", "lib/modules"].map(|sub| dir.join(sub).join(&version));
    let modules = modules.into_iter().find(|dir| dir.exists()).context("the kernel has no modules")?;
    Ok((dir.join(format!("boot/vmlinuz-{version}")), modules, version))
}

/// The modules of [`MODULES`] with all they need, and modules.dep of just these.
fn install_modules(modules: &Path, version: &str, root: &Path) -> Result<()> {
    if !modules.join("modules.dep").exists() {
        // depmod wants the tree under lib/modules.
        let base = modules.parent().and_then(Path::parent).context("modules")?;
        let base = if base.ends_with("usr/lib") { base.parent().context("modules")?.join(".") } else { base.parent().context("modules")?.to_owned() };
        let linked = base.join("lib");
        if !linked.exists() {
            std::os::unix::fs::symlink("usr/lib", &linked)?;
        }
        run(Command::new("/sbin/depmod").arg("-b").arg(&base).arg(version))?;
    }
    let dep = std::fs::read_to_string(modules.join("modules.dep"))?;
    let target = root.join("lib/modules").join(version);
    let mut kept = String::new();
    let mut wanted: Vec<String> = Vec::new();
    let module = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split('.').next().unwrap_or(file).replace('-', "_")
    };
    for line in dep.lines() {
        let Some((path, needs)) = line.split_once(':') else { continue };
        if MODULES.contains(&module(path).as_str()) {
            wanted.push(path.to_owned());
            wanted.extend(needs.split_whitespace().map(str::to_owned));
            kept.push_str(line);
            kept.push('\n');
        }
    }
    wanted.sort();
    wanted.dedup();
    for path in wanted {
        let to = target.join(&path);
        std::fs::create_dir_all(to.parent().context("module")?)?;
        copy(&modules.join(&path), &to, 0o644)?;
    }
    std::fs::write(target.join("modules.dep"), kept)?;
    Ok(())
}

fn install_disk_tools(arch: Arch, root: &Path) -> Result<()> {
    let suite = Suite::open("bookworm")?;
    let all = build::cache().join("disk-tools").join(arch.debian());
    if !all.exists() {
        suite.unpack_all(&DISK_TOOLS, arch.debian(), &all)?;
    }
    for (from, to) in [("mke2fs", "mkfs.ext4"), ("e2fsck", "e2fsck")] {
        copy(&all.join("sbin").join(from), &root.join("sbin").join(to), 0o755)?;
    }
    let libraries = root.join("lib");
    std::fs::create_dir_all(&libraries)?;
    let names = ["libext2fs.so.2", "libcom_err.so.2", "libe2p.so.2", "libblkid.so.1", "libuuid.so.1", "libc.so.6", "libm.so.6"];
    let triplet = if arch == Arch::X86_64 { "x86_64-linux-gnu" } else { "aarch64-linux-gnu" };
    for name in names {
        let found = ["lib", "usr/lib"].map(|dir| all.join(dir).join(triplet).join(name)).into_iter().find(|path| path.exists());
        if let Some(path) = found {
            copy(&path, &libraries.join(name), 0o755)?;
        }
    }
    // The loader's name is in the programs.
    let (loader, place) = match arch {
        Arch::X86_64 => ("ld-linux-x86-64.so.2", "lib64"),
        Arch::Aarch64 | Arch::Armv7 => ("ld-linux-aarch64.so.1", "lib"),
    };
    std::fs::create_dir_all(root.join(place))?;
    copy(&all.join("lib").join(triplet).join(loader), &root.join(place).join(loader), 0o755)
}
