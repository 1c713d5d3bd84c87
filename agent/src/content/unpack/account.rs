//! What a layer takes, held against its bounds before it is made. An entry may become more than the archive says of it: a
//! hard link a copy of a file below, a name the directories on the way to it.

use std::sync::atomic::Ordering;

use super::super::verity;
use super::{Bounds, Item, UnpackError};

/// What a file takes on a disk besides its bytes, at least: a block of metadata.
pub const DISK_BLOCK: u64 = 4096;

pub struct Account<'b> {
    bounds: Bounds<'b>,
    entries: u64,
    bytes: u64,
}

impl<'b> Account<'b> {
    pub fn new(bounds: Bounds<'b>) -> Self {
        Self { bounds, entries: 0, bytes: 0 }
    }

    /// An entry of the archive, with the content that it brings itself.
    pub fn entry(&mut self, item: &Item) -> Result<(), UnpackError> {
        let name = || item.shown_name();
        self.count(&name)?;
        let attributes = item.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() as u64;
        let stored = stored_bytes(item).saturating_add(self.tree_bytes(item.size));
        // What is only said of it does not get to the disk, but it is decoded and read.
        let bytes = item.size.saturating_add(attributes.max(item.described_bytes));
        self.take(&name, bytes, stored.saturating_add(attributes + DISK_BLOCK))
    }

    /// One more that is made for an entry: a directory on the way to it, or a whiteout.
    pub fn one_more(&mut self, name: &dyn Fn() -> String) -> Result<(), UnpackError> {
        self.count(name)?;
        self.take(name, 0, DISK_BLOCK)
    }

    /// The content of a file that is made for an entry: `stored` bytes of `size`, the rest are holes.
    pub fn content(&mut self, name: &dyn Fn() -> String, size: u64, stored: u64) -> Result<(), UnpackError> {
        self.take(name, size, stored.saturating_add(self.tree_bytes(size)))
    }

    /// Attributes that are copied from below.
    pub fn attributes(&mut self, name: &dyn Fn() -> String, bytes: u64) -> Result<(), UnpackError> {
        self.take(name, bytes, bytes)
    }

    fn tree_bytes(&self, size: u64) -> u64 {
        if self.bounds.is_protected { verity::extra_bytes(size) } else { 0 }
    }

    fn count(&mut self, name: &dyn Fn() -> String) -> Result<(), UnpackError> {
        self.entries += 1;
        let max = self.bounds.entries_max;
        if self.entries > max { Err(UnpackError::TooMany { name: name(), max }) } else { Ok(()) }
    }

    fn take(&mut self, name: &dyn Fn() -> String, bytes: u64, on_disk: u64) -> Result<(), UnpackError> {
        self.bytes = self.bytes.saturating_add(bytes);
        let max = self.bounds.bytes_max;
        if self.bytes > max {
            return Err(UnpackError::TooLarge { name: name(), max });
        }
        let take = |left: u64| left.checked_sub(on_disk);
        if self.bounds.disk_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            return Err(UnpackError::DiskFull { name: name(), size: on_disk });
        }
        Ok(())
    }
}

/// Holes cost nothing.
fn stored_bytes(item: &Item) -> u64 {
    item.segments.as_ref().map_or(item.size, |segments| segments.iter().map(|segment| segment.length).sum())
}
