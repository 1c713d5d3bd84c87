//! The contents of files, read for their sums. From the page cache where that is as good; past it where the question is what
//! the disk has now: a program that runs is in the cache for months, as it was when it was read.
//!
//! Past the cache is O_DIRECT (open(2)), which leaves the cache of others alone as well. Files under fs-verity, and file
//! systems that have no such thing, are read through the cache all the same (ext4 and f2fs do so by themselves); what of it
//! nobody has mapped is dropped before, so that the disk is asked, and afterwards.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Advice, Mode, OFlags, fadvise, openat};
use rustix::io::Errno;

use super::table::Asked;

/// O_DIRECT wants buffers, lengths and places that are multiples of the device's block: 512 bytes, or 4096.
const ALIGNED: usize = 4096;

/// Who reads, and how.
pub trait Reader {
    /// Asked before each content.
    fn may_read(&mut self, asked: Asked) -> bool;

    /// Told after each piece of it. May take its time.
    fn has_read(&mut self, bytes: usize) {
        let _ = bytes;
    }

    /// Whether it is to be what the disk has.
    fn is_past_the_cache(&self) -> bool {
        false
    }
}

/// Through the cache.
impl<F: FnMut(Asked) -> bool> Reader for F {
    fn may_read(&mut self, asked: Asked) -> bool {
        self(asked)
    }
}

/// Everything, as the disk has it.
#[derive(Debug, Clone, Copy)]
pub struct FromTheDisk;

impl Reader for FromTheDisk {
    fn may_read(&mut self, _: Asked) -> bool {
        true
    }

    fn is_past_the_cache(&self) -> bool {
        true
    }
}

/// Memory that begins where O_DIRECT wants it.
pub(super) struct Buffer {
    bytes: Vec<u8>,
    from: usize,
}

impl Buffer {
    /// `bytes`: a multiple of 4096.
    pub(super) fn new(bytes: usize) -> Self {
        let all = vec![0; bytes + ALIGNED];
        let from = all.as_ptr().align_offset(ALIGNED).min(ALIGNED);
        Self { bytes: all, from }
    }

    fn part(&mut self) -> &mut [u8] {
        let end = self.bytes.len() - ALIGNED + self.from;
        &mut self.bytes[self.from..end]
    }
}

/// Gives each piece of a file to `take`; how much it was. `size`: what the file has, by its inode.
pub(super) fn read(
    directory: &OwnedFd,
    path: &Path,
    size: u64,
    buffer: &mut Buffer,
    reader: &mut dyn Reader,
    take: &mut dyn FnMut(&[u8]),
) -> io::Result<u64> {
    if !reader.is_past_the_cache() {
        return pieces(open(directory, path, OFlags::empty())?, None, buffer, reader, take);
    }
    match open(directory, path, OFlags::DIRECT) {
        Ok(file) => {
            forget(&file);
            let first = refused_at_first(&file, buffer);
            if !first {
                let read = pieces(file.try_clone()?, Some(size), buffer, reader, take);
                forget(&file);
                return read;
            }
        }
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {}
        Err(error) => return Err(error),
    }
    let file = open(directory, path, OFlags::empty())?;
    forget(&file);
    let read = pieces(file.try_clone()?, None, buffer, reader, take);
    forget(&file);
    read
}

/// Whether the file system took the flag and does not mean it. Reads nothing that is counted.
fn refused_at_first(file: &File, buffer: &mut Buffer) -> bool {
    rustix::io::pread(file, &mut buffer.part()[..ALIGNED], 0) == Err(Errno::INVAL)
}

fn pieces(
    mut file: File,
    size: Option<u64>,
    buffer: &mut Buffer,
    reader: &mut dyn Reader,
    take: &mut dyn FnMut(&[u8]),
) -> io::Result<u64> {
    let mut bytes = 0;
    // Past the cache a file is not asked for more than it has: its end is no place that O_DIRECT may read at.
    while size.is_none_or(|size| bytes < size) {
        let part = buffer.part();
        match file.read(part)? {
            0 => break,
            count => {
                take(&part[..count]);
                bytes += count as u64;
                reader.has_read(count);
            }
        }
    }
    Ok(bytes)
}

fn open(directory: &OwnedFd, path: &Path, more: OFlags) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | more;
    Ok(File::from(openat(directory, path, flags, Mode::empty())?))
}

/// Drops what the cache has of it and nobody has mapped; a wish, which may stay one.
fn forget(file: impl AsFd) {
    let _ = fadvise(file, 0, None, Advice::DontNeed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sum_of(reader: &mut dyn Reader, directory: &OwnedFd, name: &str, size: u64) -> (Vec<u8>, u64) {
        let (mut all, mut buffer) = (Vec::new(), Buffer::new(2 * ALIGNED));
        let take = &mut |piece: &[u8]| all.extend_from_slice(piece);
        let bytes = read(directory, Path::new(name), size, &mut buffer, reader, take).unwrap();
        (all, bytes)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn past_the_cache_the_bytes_are_the_same(size in 0_usize..40_000) {
            let dir = tempfile::tempdir().unwrap();
            let is: Vec<u8> = (0..size).map(|at| (at * 7 % 251) as u8).collect();
            let path = dir.path().join("file");
            std::fs::write(&path, &is).unwrap();
            File::open(&path).unwrap().sync_all().unwrap();
            let directory = OwnedFd::from(File::open(dir.path()).unwrap());
            for reader in [&mut FromTheDisk as &mut dyn Reader, &mut |_: Asked| true] {
                let (all, bytes) = sum_of(reader, &directory, "file", size as u64);
                prop_assert_eq!(bytes, size as u64);
                prop_assert_eq!(&all, &is);
            }
        }
    }
}
