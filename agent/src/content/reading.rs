//! The contents of files, read for their sums. From the page cache where that is as good; past it where the question is what
//! the disk has now: a program that runs is in the cache for months, as it was when it was read.
//!
//! Past the cache is O_DIRECT (open(2)), which leaves the cache of others alone as well. Files under fs-verity are read
//! through the cache (ext4 and f2fs do so whatever they are asked for), and so is everything on a file system that has no
//! such thing; what of it nobody has mapped is dropped before, so that the disk is asked, and afterwards.

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

/// What is read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Content<'f> {
    pub(super) directory: &'f OwnedFd,
    pub(super) path: &'f Path,
    /// By its inode.
    pub(super) bytes: u64,
    /// The kernel checks it when it comes from the disk, and so not when it is in the cache.
    pub(super) is_protected: bool,
}

/// Gives each piece of a file to `take`; how much it was.
pub(super) fn read(
    content: Content<'_>,
    buffer: &mut Buffer,
    reader: &mut dyn Reader,
    take: &mut dyn FnMut(&[u8]),
) -> io::Result<u64> {
    let Content { directory, path, bytes, is_protected } = content;
    if !reader.is_past_the_cache() {
        return pieces(&open(directory, path, OFlags::empty())?, None, buffer, reader, take);
    }
    let direct = if is_protected { Err(Errno::INVAL.into()) } else { open(directory, path, OFlags::DIRECT) };
    match direct {
        Err(error) if is_not_so(&error) => {
            let file = open(directory, path, OFlags::empty())?;
            forget(&file);
            pieces(&file, None, buffer, reader, take)
        }
        Err(error) => Err(error),
        Ok(file) => pieces(&file, Some(bytes), buffer, reader, take),
    }
}

/// This file, or this place in it, cannot be read by O_DIRECT.
fn is_not_so(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::INVAL.raw_os_error())
}

/// `direct`: how much there is, where the cache is passed by.
fn pieces(
    mut file: &File,
    mut direct: Option<u64>,
    buffer: &mut Buffer,
    reader: &mut dyn Reader,
    take: &mut dyn FnMut(&[u8]),
) -> io::Result<u64> {
    let mut bytes = 0;
    // A file's end is no place that O_DIRECT may read at.
    while direct.is_none_or(|size| bytes < size) {
        let part = buffer.part();
        match file.read(part) {
            Ok(0) => break,
            Ok(count) => {
                take(&part[..count]);
                bytes += count as u64;
                reader.has_read(count);
            }
            // It took the flag and did not mean it, or stopped at an odd place: on through the cache.
            Err(error) if direct.is_some() && is_not_so(&error) => {
                rustix::fs::fcntl_setfl(file, OFlags::empty())?;
                direct = None;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    if direct.is_none() && reader.is_past_the_cache() {
        forget(file);
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

    fn sum_of(
        reader: &mut dyn Reader,
        directory: &OwnedFd,
        (name, size, is_protected): (&str, u64, bool),
    ) -> (Vec<u8>, u64) {
        let (mut all, mut buffer) = (Vec::new(), Buffer::new(2 * ALIGNED));
        let take = &mut |piece: &[u8]| all.extend_from_slice(piece);
        let content = Content { directory, path: Path::new(name), bytes: size, is_protected };
        let bytes = read(content, &mut buffer, reader, take).unwrap();
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
                for is_protected in [false, true] {
                    let (all, bytes) = sum_of(reader, &directory, ("file", size as u64, is_protected));
                    prop_assert_eq!(bytes, size as u64);
                    prop_assert_eq!(&all, &is);
                }
            }
        }
    }
}
