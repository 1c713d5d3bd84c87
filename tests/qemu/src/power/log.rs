//! The log that QEMU's `blklogwrites` driver writes: the format of the kernel's dm-log-writes target
//! (Documentation/admin-guide/device-mapper/log-writes.rst, drivers/md/dm-log-writes.c).
//!
//! ```text
//! sector 0: magic, version, number of entries, sector size
//! then for each entry a sector of head (sector, sectors, flags, length) and the sectors that were written
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
pub const SECTOR: u64 = 512;

/// What the disk was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// `data`: where its bytes lie in the log. `is_durable`: it must be on the medium before it is answered (FUA).
    Write {
        at: u64,
        length: u64,
        data: u64,
        is_durable: bool,
    },
    Discard {
        at: u64,
        length: u64,
    },
    Flush,
}

/// The log while it is written, and afterwards.
#[derive(Debug, Clone)]
pub struct WriteLog {
    path: PathBuf,
}

impl WriteLog {
    /// An empty one for [`crate::machine::Setup::write_log`].
    pub fn create(path: &Path) -> Result<Self> {
        File::create(path)?.set_len(SECTOR).with_context(|| path.display().to_string())?;
        Ok(Self { path: path.to_owned() })
    }

    /// One that is there already.
    pub fn of(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many requests the disk has been given so far.
    pub fn entries(&self) -> Result<usize> {
        let file = File::open(&self.path)?;
        let mut head = [0; 28];
        file.read_exact_at(&mut head, 0)?;
        let [magic, version, entries] = [0, 8, 16].map(|at| word(&head, at));
        if head == [0; 28] {
            // The disk has been told nothing yet.
            return Ok(0);
        }
        ensure!(magic == MAGIC && version == VERSION, "{}: magic {magic:#x}, version {version}", self.path.display());
        let size = u32::from_le_bytes(head[24..28].try_into().unwrap_or_default());
        ensure!(u64::from(size) == SECTOR, "sectors of {size} bytes");
        Ok(usize::try_from(entries)?)
    }

    /// All requests, in the order in which the disk was given them; up to the first that was counted and never written: the
    /// machine was killed, or QEMU's log has failed.
    pub fn read(&self) -> Result<Vec<Request>> {
        let count = self.entries()?;
        let file = File::open(&self.path)?;
        let mut requests = Vec::with_capacity(count);
        let mut at = SECTOR;
        for number in 0..count {
            let mut head = [0; 32];
            file.read_exact_at(&mut head, at).with_context(|| format!("entry {number} of {count} at {at}"))?;
            let [sector, sectors, flags] = [0, 8, 16].map(|at| word(&head, at));
            if sectors == 0 && flags == 0 {
                break;
            }
            at += SECTOR;
            let (place, length) = (sector * SECTOR, sectors * SECTOR);
            if flags & DISCARD != 0 {
                requests.push(Request::Discard { at: place, length });
                continue;
            }
            if flags & FLUSH != 0 {
                requests.push(Request::Flush);
            }
            if length > 0 {
                requests.push(Request::Write { at: place, length, data: at, is_durable: flags & FUA != 0 });
                at += length;
            }
        }
        Ok(requests)
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
