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
//! of reach of whoever may write files. A disk that was formatted whole has files there, and what they say means nothing. Nor
//! does a mark that was left behind where something else has been put on the disk since.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Filesystem, Superblock};

/// What the file system leaves of the disk, at least.
const TAIL_BYTES: u64 = 1 << 20;
/// A sector: there as a whole or not at all.
const MARK_BYTES: usize = 512;
const WORDS: &[u8] = b"edged: this disk is being formatted\n";

/// Where the mark lies and the file system ends, in whole MiB; `None` if the disk is too small for any.
pub(super) fn end(mut disk: &File) -> io::Result<Option<u64>> {
    let bytes = disk.seek(SeekFrom::End(0))?;
    Ok(bytes.checked_sub(TAIL_BYTES).map(|bytes| bytes - bytes % TAIL_BYTES).filter(|end| *end > 0))
}

/// Whether we had begun to format it and were not done. A mark that cannot be read is none: a disk with a bad end is of use.
pub(super) fn is_unfinished(disk: &File, there: Option<&Superblock>) -> bool {
    let Ok(Some(end)) = end(disk) else { return false };
    if there.is_some_and(|there| there.bytes > end || !there.is_named_ours) {
        return false;
    }
    let mut found = [0; MARK_BYTES];
    disk.read_exact_at(&mut found, end).is_ok() && found == sector(WORDS)
}

/// `again`: over what the last try has left.
pub(super) fn format(filesystem: Filesystem, protects: bool, device: &Path, again: bool) -> io::Result<()> {
    let disk = File::options().read(true).write(true).open(device)?;
    let Some(end) = end(&disk)? else {
        return Err(io::Error::other(format!("{} is too small for a file system", device.display())));
    };
    let mut command = filesystem.make(protects);
    if again {
        command.arg(filesystem.by_force());
    }
    command.arg(device).arg(size(filesystem, &disk, end));
    under_mark(&disk, end, || super::done(&mut command, &[0]))
}

pub(super) fn under_mark(disk: &File, end: u64, make: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    mark(disk, end, WORDS)?;
    if let Err(error) = make() {
        if super::head(disk).is_ok_and(|head| super::is_empty(&head)) {
            // It has found something that we do not know, or was never started: nothing is half done.
            mark(disk, end, &[])?;
        }
        return Err(error);
    }
    disk.sync_all()?;
    mark(disk, end, &[])
}

fn mark(disk: &File, at: u64, words: &[u8]) -> io::Result<()> {
    disk.write_all_at(&sector(words), at)?;
    disk.sync_all()
}

fn sector(words: &[u8]) -> [u8; MARK_BYTES] {
    let mut sector = [0; MARK_BYTES];
    sector[..words.len()].copy_from_slice(words);
    sector
}

/// How large it is to be, as its program wants to hear it.
pub(super) fn size(filesystem: Filesystem, disk: &File, bytes: u64) -> String {
    match filesystem {
        Filesystem::Ext4 => format!("{}k", bytes / 1024),
        // In sectors of the disk; those of a file are the smallest there are.
        Filesystem::F2fs => (bytes / u64::from(rustix::fs::ioctl_blksszget(disk).unwrap_or(512))).to_string(),
    }
}

#[cfg(test)]
pub(super) fn set_mark(device: &Path, is_there: bool) {
    let disk = File::options().read(true).write(true).open(device).unwrap();
    let end = end(&disk).unwrap().unwrap();
    mark(&disk, end, if is_there { WORDS } else { &[] }).unwrap();
}
