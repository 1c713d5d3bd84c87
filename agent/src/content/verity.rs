//! fs-verity for the files of layers: the kernel keeps a tree of hashes beside a file, holds every block against it that it
//! reads from the disk, and refuses the block (`EIO`, or SIGBUS where the file is mapped) rather than give out another
//! one. Whether a file is still protected by the tree that was made when it was unpacked is told without reading it.
//!
//! Only files of some size: the tree and its descriptor take two blocks at least, which is half of a file of four blocks and
//! 3 % of one of 64. What is smaller keeps the sum of its content, as everything does where the kernel or the file system
//! cannot do it.

use std::os::fd::AsFd;
use std::path::Path;

use edged_sys::verity::{self, DIGEST_BYTES};
use rustix::fs::{Mode, OFlags, Stat, Timespec, Timestamps, futimens, openat};
use rustix::io::Errno;

/// So that the trees of an image take 3 % of it at most.
pub const LEAST_BYTES: u64 = 256 << 10;

/// The tree's blocks; smaller where the file system's are.
const BLOCK_BYTES: u32 = 4096;

/// What a file of this size takes besides its bytes: a hash of 32 bytes for each block, those of these in turn, and a
/// block for the descriptor.
pub fn extra_bytes(size: u64) -> u64 {
    const BLOCK: u64 = BLOCK_BYTES as u64;
    const HASHES_IN_BLOCK: u64 = BLOCK / DIGEST_BYTES as u64;
    if size < LEAST_BYTES {
        return 0;
    }
    let (mut blocks, mut level) = (1, size.div_ceil(BLOCK));
    while level > 1 {
        level = level.div_ceil(HASHES_IN_BLOCK);
        blocks += level;
    }
    blocks * BLOCK
}

/// Whether the file system of `directory` can protect files, and the kernel knows how.
pub fn is_possible(directory: &Path) -> bool {
    // It never gets a name, nor a block.
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR);
    file.is_ok_and(|file| verity::measure(file) == Err(Errno::NODATA))
}

/// Protects a file that nobody has open for writing; what the kernel will hold it against. One that is protected already
/// (a second name of a file) stays as it is.
pub fn protect(directory: impl AsFd, path: &Path, stat: &Stat) -> Result<[u8; DIGEST_BYTES], Errno> {
    let file = open(directory, path)?;
    let of_the_disk = u32::try_from(stat.st_blksize).unwrap_or(BLOCK_BYTES);
    match verity::enable(&file, of_the_disk.min(BLOCK_BYTES)) {
        // Its tree was written behind its end, and the kernel takes that for a change.
        Ok(()) => futimens(&file, &times(stat))?,
        Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    verity::measure(&file)
}

/// What the kernel holds a file against; `None` where the file can be opened and nobody knows of such things. `NODATA`: it is
/// not protected, and could be.
pub fn measured(directory: impl AsFd, path: &Path) -> Result<Option<[u8; DIGEST_BYTES]>, Errno> {
    match verity::measure(open(directory, path)?) {
        Err(Errno::NOTTY | Errno::OPNOTSUPP) => Ok(None),
        measured => measured.map(Some),
    }
}

fn times(stat: &Stat) -> Timestamps {
    // The types' widths depend on the machine; a nanosecond fits them all.
    let time = |secs, nanos| Timespec { tv_sec: secs, tv_nsec: nanos };
    Timestamps {
        last_access: time(stat.st_atime as _, stat.st_atime_nsec as _),
        last_modification: time(stat.st_mtime as _, stat.st_mtime_nsec as _),
    }
}

fn open(directory: impl AsFd, path: &Path) -> Result<std::os::fd::OwnedFd, Errno> {
    openat(directory, path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trees_take_three_per_cent_of_an_image_at_most() {
        assert_eq!(extra_bytes(LEAST_BYTES - 1), 0);
        for size in [LEAST_BYTES, LEAST_BYTES + 1, 600_000, 1 << 20, 10 << 20, 1 << 30] {
            let extra = extra_bytes(size);
            assert!(extra > 0 && extra * 1000 <= size * 32, "{extra} for {size}");
        }
        // 65,536 blocks, 512 of their hashes, 4 of those, 1 above them, and the descriptor.
        assert_eq!(extra_bytes(256 << 20), (512 + 4 + 1 + 1) * 4096);
    }
}
