//! Tool: the one door to sled, and the second copy under `keep/` of what must never be lost.
//!
//! sled 0.34's `flush()` hands its writes to the kernel and does not wait for the disk: measured, a power cut after it
//! loses acknowledged writes. This door therefore calls fdatasync(2) on sled's `db` file after every flush, and fsync(2)
//! on its directories once after creation. It never touches sled's `snap.*` files: opening without them loses writes.
//! Each record carries its own checksum, because sled does not notice every flipped byte.
//!
//! ```text
//! caller ─> changes ─> one sled batch or transaction ─> flush + fdatasync ─> keep/ (what matters) ─> acknowledged
//! ```
//! The database is written first and holds the whole change; a cut before `keep/` is written leaves `keep/` one revision
//! behind, which the next opening sees and mends. A database that is behind `keep/` has lost something: it is set aside
//! and rebuilt.
//!
//! One writer: all writes go through the store's own lock. All calls block; call them from a blocking thread.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use edged_model::id::{Sequence, WorkloadName};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::Places;
use crate::crash_point;

/// The boot that was seen last.
pub mod boots;
mod door;
/// The device's story, bounded.
mod events;
/// Generations and pointers: one transaction each.
mod generations;
/// Plain files that outlive the database.
pub mod keep;
mod migrate;
/// Reports that wait for a network, bounded.
mod outbox;
mod record;
/// What to believe when a store is opened; rebuilding it.
mod recover;
/// What a reset of the workloads leaves, and its mark.
mod reset;
/// What was survived, counted.
mod survived;
mod trees;
/// Openings that nobody survived.
mod tries;
/// Trust root, time floor, digests that failed: what only rises or grows.
mod trust;
/// Holds, restart histories, images on disk.
mod workloads;

use door::{Change, Door};
pub use recover::{Opened, opened_reason};
pub use reset::{FoundReset, Reset};
pub use survived::SavedSurvived;
use trees::meta;
pub use workloads::SavedHistory;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the state store")]
    Sled(#[from] sled::Error),
    #[error("{path}")]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("record `{key}` is damaged")]
    Damaged { key: String },
    #[error("record `{key}` cannot be written")]
    Encode {
        key: String,
        #[source]
        source: serde_cbor::Error,
    },
    #[error(
        "the store has format {found}, this edged knows format {known}: it was written by another version of edged"
    )]
    OtherFormat { found: u32, known: u32 },
    #[error("the store is at revision {found}, its second copy at {kept}: the store has lost something")]
    Behind { found: u64, kept: u64 },
    #[error("opening the store took longer than {secs} s")]
    Hangs { secs: u64 },
    #[error("opening the store took more than {} MiB of memory", bytes >> 20)]
    TakesMemory { bytes: u64 },
    #[error("{times} agents in a row died while they opened the store")]
    Deadly { times: u32 },
    #[error("reading the store failed inside sled: {words}")]
    Panicked { words: String },
    #[error("{path} is in use by another edged")]
    InUse { path: PathBuf },
    #[error("trust root version {given} is below version {highest}, which this device has had")]
    TrustRollback { given: u64, highest: u64 },
    #[error("the store could not be opened again after a failed write")]
    Closed,
    #[error("generation {sequence} is not in the store")]
    NoSuchGeneration { sequence: Sequence },
}

/// Whether a write must be on the disk when the call comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    Now,
    /// With the next durable write, or within ten seconds: for what may be lost (counters of restarts).
    Soon,
    /// In one write with the next durable one, or with [`Store::settle`], which the caller owes: a line of the story and
    /// the change that it tells of cost one batch and one flush. Nothing may be done because of it before that.
    Together,
    /// The same, and not worth a flush alone.
    Along,
}

/// What shares the next write, in order. Only its own story reads it before it is there ([`Store::events`]).
#[derive(Default)]
struct Waiting {
    changes: Vec<Change>,
    must_sync: bool,
}

/// Cheap to clone; blocking.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    /// `None` only while, or after, opening it again failed.
    door: RwLock<Option<Door>>,
    /// A write failed: sled takes no more until it is opened again.
    is_broken: AtomicBool,
    state: PathBuf,
    keep: PathBuf,
    writer: Mutex<Writer>,
    /// Only touched by who has `writer`.
    waiting: Mutex<Waiting>,
    outbox_max: usize,
}

/// What the one writer knows without reading: numbers not yet given out.
#[derive(Default)]
struct Writer {
    next_event: u64,
    next_report: u64,
    /// `None`: none since this store was opened.
    last_report_number: Option<u64>,
}

impl Store {
    /// Opens the store, or sets a damaged one aside and rebuilds it. A store that is in use, of a newer format, or on a
    /// disk that does not answer is left as it is.
    pub fn open(places: &Places, outbox_max: u32) -> Result<(Self, Opened), StoreError> {
        recover::open(&places.state(), &places.keep(), outbox_max as usize)
    }

    /// Makes durable what was written with [`Durability::Soon`].
    pub fn sync(&self) -> Result<(), StoreError> {
        let one = self.lock();
        self.commit(&one, &[], Durability::Now)
    }

    /// Writes what waits for company.
    pub fn settle(&self) -> Result<(), StoreError> {
        let one = self.lock();
        let (is_empty, must_sync) = {
            let waiting = self.waiting();
            (waiting.changes.is_empty(), waiting.must_sync)
        };
        match (is_empty, must_sync) {
            (true, _) => Ok(()),
            (false, true) => self.commit(&one, &[], Durability::Now),
            (false, false) => self.commit(&one, &[], Durability::Soon),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often the disk was waited for: each costs a page of flash or more.
    pub fn flushes(&self) -> u64 {
        self.with_door(|door| Ok(door.flushes())).unwrap_or(0)
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        // A panic inside sled leaves no half-written record: batches are atomic.
        let one = self.inner.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.mend();
        one
    }

    fn with_door<T>(&self, work: impl FnOnce(&Door) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let door = self.inner.door.read().unwrap_or_else(PoisonError::into_inner);
        door.as_ref().map_or(Err(StoreError::Closed), work)
    }

    fn written(&self, result: Result<(), StoreError>) -> Result<(), StoreError> {
        if matches!(result, Err(StoreError::Sled(_) | StoreError::File { .. })) {
            self.inner.is_broken.store(true, Ordering::Relaxed);
        }
        result
    }

    /// After one failed write (a full disk) sled fails for ever, though it still reads. It is opened again as soon as
    /// there is room for it: what was acknowledged is on the disk, what failed was told.
    fn mend(&self) {
        if !self.inner.is_broken.load(Ordering::Relaxed) || !has_room(&self.inner.state) {
            return;
        }
        let mut door = self.inner.door.write().unwrap_or_else(PoisonError::into_inner);
        drop(door.take());
        match recover::open_door(&self.inner.state) {
            Ok(opened) => {
                *door = Some(opened);
                self.inner.is_broken.store(false, Ordering::Relaxed);
            }
            // To set it aside under the feet of everybody who holds it is more than can be done well: the next agent does.
            Err(error) if recover::is_damage(&error) || matches!(error, StoreError::Hangs { .. }) => {
                eprintln!("edged[agent]: the store cannot be opened again: {}", inline_chain(&error));
                std::process::abort();
            }
            // A disk that does not answer now: it is tried again with the next write.
            Err(_) => {}
        }
    }

    fn get<T: DeserializeOwned>(&self, tree: &str, key: &str) -> Result<Option<T>, StoreError> {
        let Some(sealed) = self.with_door(|door| door.get(tree, key))? else { return Ok(None) };
        let damaged = || StoreError::Damaged { key: format!("{tree}/{key}") };
        record::unseal(tree, key, &sealed).map(Some).ok_or_else(damaged)
    }

    /// All readable records of a tree, in order. A damaged one is left out: one bad record must not take the others
    /// along.
    fn all<T: DeserializeOwned>(&self, tree: &str) -> Result<Vec<(String, T)>, StoreError> {
        let records = self.with_door(|door| door.records(tree))?;
        let readable = |(key, sealed): (String, Vec<u8>)| {
            let value = record::unseal(tree, &key, &sealed)?;
            Some((key, value))
        };
        Ok(records.into_iter().filter_map(readable).collect())
    }

    /// Like [`Store::all`], for trees whose keys are workloads.
    fn all_named<T: DeserializeOwned>(&self, tree: &str) -> Result<Vec<(WorkloadName, T)>, StoreError> {
        let records = self.all(tree)?;
        Ok(records.into_iter().filter_map(|(key, value)| Some((WorkloadName::parse(&key).ok()?, value))).collect())
    }

    /// Writes what only the database has.
    fn commit(&self, _one: &MutexGuard<'_, Writer>, changes: &[Change], durable: Durability) -> Result<(), StoreError> {
        let all = {
            let mut waiting = self.waiting();
            waiting.changes.extend_from_slice(changes);
            waiting.must_sync |= durable == Durability::Together;
            match durable {
                Durability::Together | Durability::Along => return Ok(()),
                // What waits is of another thread, which has it synced.
                Durability::Soon if waiting.must_sync => return Ok(()),
                Durability::Now | Durability::Soon => std::mem::take(&mut *waiting),
            }
        };
        self.written(self.with_door(|door| {
            door.write(&newest(all.changes))?;
            crash_point::pass("store-written");
            match durable {
                Durability::Now => door.sync(),
                Durability::Soon | Durability::Together | Durability::Along => Ok(()),
            }
        }))
    }

    /// Writes what `keep/` has too: database first, then the second copy. When this comes back both are on the disk.
    fn commit_kept(&self, one: &MutexGuard<'_, Writer>, mut changes: Vec<Change>) -> Result<(), StoreError> {
        let revision = self.get::<u64>(trees::META, meta::REVISION)?.unwrap_or(0) + 1;
        changes.push(put(trees::META, meta::REVISION, &revision)?);
        self.commit(one, &changes, Durability::Now)?;
        crash_point::pass("store-synced");
        keep::save(&self.inner.keep, &self.kept()?, false)
    }

    /// What `keep/` should say now.
    fn kept(&self) -> Result<keep::Kept, StoreError> {
        let pointers = self.pointers()?;
        let mut generations = Vec::new();
        for sequence in [pointers.active, pointers.last_good].into_iter().flatten() {
            if generations
                .iter()
                .any(|(known, _): &(edged_model::generation::Generation, _)| known.sequence == sequence)
            {
                continue;
            }
            let whole = (self.generation(sequence)?, self.envelope(sequence)?);
            let (Some(generation), Some(envelope)) = whole else {
                return Err(StoreError::NoSuchGeneration { sequence });
            };
            generations.push((generation, envelope));
        }
        let trust_root = self.trust_root()?;
        let summary = keep::Summary {
            revision: self.get(trees::META, meta::REVISION)?.unwrap_or(0),
            pointers,
            generations: generations.iter().map(|(generation, _)| generation.into()).collect(),
            trust_root: trust_root.as_deref().map(edged_model::id::Digest::of),
            time_floor: self.time_floor()?,
            held: self.held()?,
            failed: self.failed()?,
            report_ceiling: self.get(trees::META, meta::REPORT_CEILING)?.unwrap_or(0),
            survived: self.survived()?.unwrap_or_default(),
            dropped_reports: self.dropped_reports()?,
            reset: self.reset()?,
        };
        Ok(keep::Kept { summary, generations, trust_root, lost: Vec::new() })
    }
}

/// The last word on each record: what was said of it before in the same batch never was.
fn newest(changes: Vec<Change>) -> Vec<Change> {
    let mut seen = std::collections::BTreeSet::new();
    let mut kept: Vec<Change> =
        changes.into_iter().rev().filter(|change| seen.insert((change.tree, change.key.clone()))).collect();
    kept.reverse();
    kept
}

fn put<T: Serialize>(tree: &'static str, key: &str, value: &T) -> Result<Change, StoreError> {
    Ok(Change { tree, key: key.to_owned(), sealed: Some(record::seal(tree, key, value)?) })
}

fn remove(tree: &'static str, key: &str) -> Change {
    Change { tree, key: key.to_owned(), sealed: None }
}

/// An error and what caused it, in one line.
pub fn inline_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// Room for sled to open: a few of its segments.
const ROOM_BYTES: u64 = 4 << 20;

fn has_room(dir: &Path) -> bool {
    // A disk that cannot be asked is tried.
    rustix::fs::statvfs(dir).map_or(true, |disk| disk.f_bavail.saturating_mul(disk.f_frsize) >= ROOM_BYTES)
}

fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    std::fs::File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| StoreError::File { path: dir.to_owned(), source })
}

#[cfg(test)]
mod tests;
