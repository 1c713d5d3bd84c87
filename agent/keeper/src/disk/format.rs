//! An empty disk is formatted so that a power cut in the middle of it is noticed. The programs that make file systems sync
//! at their end, and what a cut leaves before that is any part of what they wrote: a superblock without the rest, which can
//! be neither mounted nor mended, or the rest without a superblock, which looks like somebody else's.
//!
//! So a mark lies on the disk from before the first of those writes until after the last:
//!
//! ```text
//!  the mark, synced ──> mkfs, synced ──> no mark, synced
//! ```
//! It lies behind the end of the file system, which is made a little smaller than the disk: not in the way of mkfs, and out
//! of reach of whoever may write files. A disk that was formatted whole has files there, and what they say means nothing.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use super::Filesystem;

/// What the file system leaves of the disk.
const TAIL_BYTES: u64 = 1 << 20;
/// A sector: there as a whole or not at all.
const MARK_BYTES: usize = 512;
const WORDS: &[u8] = b"edged: this disk is being formatted\n";

/// Where the mark lies and the file system ends, in whole MiB; `None` if the disk is too small for any.
fn end(disk: &mut File) -> io::Result<Option<u64>> {
    let bytes = disk.seek(SeekFrom::End(0))?;
    Ok(bytes.checked_sub(TAIL_BYTES).map(|bytes| bytes - bytes % TAIL_BYTES).filter(|end| *end > 0))
}

/// Whether it was being formatted when the power went. `extent`: how far the file system on it reaches, if there is one.
pub(super) fn is_unfinished(disk: &mut File, extent: Option<u64>) -> io::Result<bool> {
    let Some(end) = end(disk)? else { return Ok(false) };
    let mut there = [0; MARK_BYTES];
    disk.read_exact_at(&mut there, end)?;
    let (words, rest) = there.split_at(WORDS.len());
    let is_marked = words == WORDS && rest.iter().all(|byte| *byte == 0);
    Ok(is_marked && extent.is_none_or(|extent| extent <= end))
}

pub(super) fn format(filesystem: Filesystem, protects: bool, device: &Path) -> io::Result<()> {
    let mut disk = File::options().read(true).write(true).open(device)?;
    let Some(end) = end(&mut disk)? else {
        return Err(io::Error::other(format!("{} is too small for a file system", device.display())));
    };
    mark(&disk, end, WORDS)?;
    super::done(&mut make(filesystem, protects, device, &disk, end), &[0])?;
    disk.sync_all()?;
    mark(&disk, end, &[])
}

fn mark(disk: &File, at: u64, words: &[u8]) -> io::Result<()> {
    let mut sector = [0; MARK_BYTES];
    sector[..words.len()].copy_from_slice(words);
    disk.write_all_at(&sector, at)?;
    disk.sync_all()
}

/// `protects`: with its feature `verity`, by which the agent has the kernel check layers whenever they are read
/// (filesystems/fsverity.rst). Older kernels want blocks of a page then (ext4 before Linux 6.3).
///
/// By force: a part of the same may be there already.
pub(super) fn make(filesystem: Filesystem, protects: bool, device: &Path, disk: &File, bytes: u64) -> Command {
    let (mut command, size) = match filesystem {
        Filesystem::Ext4 => {
            let mut command = Command::new("/sbin/mkfs.ext4");
            command.args(["-q", "-F", "-L", "edged-data", "-E", "lazy_itable_init=1"]);
            command.args(if protects { &["-O", "verity", "-b", "4096"][..] } else { &[] });
            (command, format!("{}k", bytes / 1024))
        }
        Filesystem::F2fs => {
            let mut command = Command::new("/sbin/mkfs.f2fs");
            command.args(["-q", "-f", "-l", "edged-data"]);
            command.args(if protects { &["-O", "verity"][..] } else { &[] });
            // In sectors of the disk; those of a file are the smallest there are.
            let sector = rustix::fs::ioctl_blksszget(disk).unwrap_or(512);
            (command, (bytes / u64::from(sector)).to_string())
        }
    };
    command.arg(device).arg(size);
    command
}

#[cfg(test)]
pub(super) fn set_mark(device: &Path, is_there: bool) {
    let mut disk = File::options().read(true).write(true).open(device).unwrap();
    let end = end(&mut disk).unwrap().unwrap();
    mark(&disk, end, if is_there { WORDS } else { &[] }).unwrap();
}
