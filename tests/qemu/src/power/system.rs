//! A device whose program lies on its disk, as on most boards, and not in memory: an upgrade in place writes to the disk,
//! and the next boot runs what is there.
//!
//! ```text
//!   MBR │ part 1: system, ext4: all that is in the firmware's initramfs, and the factory's files │ part 2: data
//! ```
//! What boots it is a small initramfs with the kernel's modules and busybox, which mounts the first part and hands over
//! (switch_root(8)).

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::artifacts::{Artifacts, Firmware};
use crate::filesystem::Part;
use crate::machine::{Setup, blank_disk};
use crate::process;

/// Room for four programs: the one that runs, the newer one, and two copies on their way.
pub const SYSTEM: Part = Part { at_mib: 1, mib: 255 };
pub const DATA: Part = Part { at_mib: 256, mib: 512 };

/// Where an upgrade puts the newer program.
pub const PROGRAM_DIR: &str = "/usr/bin";

const SECTORS_IN_MIB: u64 = 2048;

const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc /system
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
for name in $(/bin/busybox cat /etc/modules-load.d/edged.conf) crc32c_generic ext4; do /bin/busybox modprobe $name 2>/dev/null; done
until [ -b /dev/vda1 ]; do /bin/busybox usleep 5000; done
/bin/busybox mount -t ext4 -o noatime /dev/vda1 /system || exit 1
/bin/busybox umount /proc /dev
exec /bin/busybox switch_root /system /usr/bin/edged
";

/// The program of this firmware.
pub fn program(firmware: &Firmware, dir: &Path) -> Result<Vec<u8>> {
    let root = dir.join("root");
    unpack(&firmware.initramfs(), &root)?;
    let program = root.join(PROGRAM_DIR.trim_start_matches('/')).join("edged");
    let bytes = fs::read(&program).with_context(|| program.display().to_string())?;
    fs::remove_dir_all(&root)?;
    Ok(bytes)
}

/// The same device, with all that its initramfs had on a disk of two parts. `setup` has the factory's files.
pub fn on_disk(firmware: &Firmware, dir: &Path, setup: &Setup) -> Result<Setup> {
    let root = dir.join("root");
    unpack(&firmware.initramfs(), &root)?;
    for (path, mode, content) in &setup.files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().context("a file has a directory")?)?;
        fs::write(&path, content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
    }
    let disk = setup.disk.clone().context("a device has a disk")?;
    make_disk(&root, &disk)?;
    let files = boot_files(firmware, &root)?;
    fs::remove_dir_all(&root)?;
    Ok(Setup { data: "/dev/vda2", files, replaces_firmware: true, ..setup.clone() })
}

fn unpack(initramfs: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let mut zstd = Command::new("zstd").args(["-q", "-d", "-c"]).arg(initramfs).stdout(Stdio::piped()).spawn()?;
    let archive = zstd.stdout.take().context("zstd has no output")?;
    let mut cpio = Command::new("cpio");
    // Nodes are the kernel's business: it mounts its own `/dev`.
    cpio.args(["-idm", "--quiet", "--no-absolute-filenames", "-f", "dev/console"]).current_dir(to).stdin(archive);
    process::run(&mut cpio)?;
    ensure!(zstd.wait()?.success(), "zstd cannot read {}", initramfs.display());
    Ok(())
}

fn make_disk(root: &Path, disk: &Path) -> Result<()> {
    let system = disk.with_extension("system");
    blank_disk(&system, SYSTEM.mib)?;
    // Without checksums: with them the kernel refuses a superblock that a cut has torn, and the small initramfs has nothing
    // to mend it with, as those of boards have. The data's part is mended by the keeper.
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-F", "-t", "ext4", "-O", "^metadata_csum", "-d"]).arg(root).arg(&system);
    process::run(&mut make)?;
    blank_disk(disk, DATA.at_mib + DATA.mib)?;
    OpenOptions::new().write(true).open(disk)?.write_all_at(&partition_table(), 0)?;
    let mut dd = Command::new("dd");
    dd.arg(format!("if={}", system.display())).arg(format!("of={}", disk.display()));
    process::run(dd.arg(format!("seek={}", SYSTEM.at_mib)).args(["bs=1M", "conv=sparse,notrunc", "status=none"]))?;
    fs::remove_file(&system).map_err(Into::into)
}

/// A master boot record: four entries of 16 bytes from byte 446, each with its kind, first sector and number of sectors,
/// and the mark 0x55 0xaa.
fn partition_table() -> [u8; 512] {
    const LINUX: u8 = 0x83;
    let mut sector = [0; 512];
    for (index, part) in [SYSTEM, DATA].into_iter().enumerate() {
        let entry = &mut sector[446 + 16 * index..][..16];
        entry[4] = LINUX;
        for (at, mib) in [(8, part.at_mib), (12, part.mib)] {
            let sectors = u32::try_from(mib * SECTORS_IN_MIB).unwrap_or(u32::MAX);
            entry[at..at + 4].copy_from_slice(&sectors.to_le_bytes());
        }
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// What the small initramfs holds.
fn boot_files(firmware: &Firmware, root: &Path) -> Result<Vec<(String, u32, Vec<u8>)>> {
    let mut files = vec![("init".to_owned(), 0o755, INIT.into())];
    files.push(("bin/busybox".to_owned(), 0o755, busybox(firmware)?));
    for part in ["lib/modules", "etc/modules-load.d"] {
        for path in all_files(&root.join(part))? {
            let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
            files.push((name, 0o644, fs::read(&path)?));
        }
    }
    Ok(files)
}

fn all_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let (mut files, mut queue) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = queue.pop() {
        for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() { queue.push(path) } else { files.push(path) }
        }
    }
    Ok(files)
}

/// The device's own, out of the workload image of that name: whichever of its blobs is the layer that has it.
fn busybox(firmware: &Firmware) -> Result<Vec<u8>> {
    let blobs = Artifacts::find().image(firmware.arch, "busybox").join("blobs/sha256");
    for blob in all_files(&blobs)? {
        let output = Command::new("tar").arg("-xOzf").arg(&blob).arg("./bin/busybox").output()?;
        if output.status.success() && !output.stdout.is_empty() {
            return Ok(output.stdout);
        }
    }
    anyhow::bail!("no layer in {} has bin/busybox", blobs.display())
}
