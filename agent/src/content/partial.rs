//! Bytes of a layer that is on its way, as they travel: kept where they are dear, so that the next try, by another process or
//! after another boot, goes on where this one stops. They are believed by nobody: the layer's digest is taken over all of
//! them again.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::PathBuf;

use edged_model::id::Digest;
use rustix::fs::{FlockOperation, flock};

use super::Content;
use crate::crash_point;

/// What a power cut may cost.
const SYNC_BYTES: u64 = 4 << 20;

/// Locked while somebody has it.
#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    file: File,
    bytes: u64,
    unsynced: u64,
}

impl Content {
    fn partial_path(&self, layer: Digest) -> PathBuf {
        self.partials.join(layer.hex())
    }

    /// What there is of a layer, at least a byte of it; `None` also if somebody else is at it.
    pub fn partial(&self, layer: Digest) -> Option<Partial> {
        let path = self.partial_path(layer);
        let file = File::options().read(true).write(true).open(&path).ok()?;
        let partial = Partial::lock(path, file).ok()?;
        (partial.bytes > 0).then_some(partial)
    }

    /// Begins to keep a layer.
    pub fn new_partial(&self, layer: Digest) -> io::Result<Partial> {
        fs::create_dir_all(&self.partials)?;
        let path = self.partial_path(layer);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
        let mut partial = Partial::lock(path, file)?;
        partial.file.set_len(0)?;
        partial.file.rewind()?;
        partial.bytes = 0;
        crash_point::pass("partial-begun");
        Ok(partial)
    }
}

impl Partial {
    fn lock(path: PathBuf, mut file: File) -> io::Result<Self> {
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let bytes = file.seek(SeekFrom::End(0))?;
        Ok(Self { path, file, bytes, unsynced: 0 })
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All of it, from the beginning.
    pub fn reader(&self) -> io::Result<File> {
        // A descriptor of its own, for an offset of its own.
        File::open(&self.path)
    }

    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        self.unsynced += bytes.len() as u64;
        if self.unsynced >= SYNC_BYTES {
            self.file.sync_data()?;
            crash_point::pass("partial-synced");
            self.unsynced = 0;
        }
        Ok(())
    }

    pub fn remove(self) {
        // What cannot be removed is collected later.
        let _ = fs::remove_file(&self.path);
        crash_point::pass("partial-removed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn it_goes_on_where_it_stopped_and_only_one_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(&crate::config::Places::new(Some(dir.path()), None)).unwrap();
        let layer = Digest::of(b"layer");
        assert!(content.partial(layer).is_none());
        let mut partial = content.new_partial(layer).unwrap();
        partial.append(b"one").unwrap();
        assert!(content.partial(layer).is_none() && content.new_partial(layer).is_err(), "it is locked");
        drop(partial);
        let mut partial = content.partial(layer).unwrap();
        partial.append(b"two").unwrap();
        let mut read = String::new();
        partial.reader().unwrap().read_to_string(&mut read).unwrap();
        assert_eq!((read.as_str(), partial.bytes()), ("onetwo", 6));
        partial.remove();
        assert!(content.partial(layer).is_none());
    }
}
