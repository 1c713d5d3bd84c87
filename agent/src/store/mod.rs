//! Tool: the one door to sled, and the second copy under `keep/` of what must never be lost.
//!
//! sled 0.34's `flush()` hands its writes to the kernel and does not wait for the disk: measured, a power cut after it
//! loses acknowledged writes. This door therefore calls fdatasync(2) on sled's `db` file after every flush, and on the
//! directories once after creation. Each value carries its own checksum, because sled does not notice every flipped
//! byte.
//!
//! One writer: all writes go through the store's own lock. Durable means on the disk before the call comes back.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use edged_model::api::Event;
use edged_model::generation::{Generation, Pointers};
use edged_model::id::{Digest, Sequence, WorkloadName};
use edged_model::observed::{Hold, RestartHistory};
use edged_model::quantity::Timestamp;
use edged_model::reason::Reason;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use crate::config::Places;

mod door;
/// Plain files that outlive the database.
pub mod keep;

use door::Door;

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
    #[error("the store has format {found}; this version knows {FORMAT}: it was written by a newer edged")]
    NewerFormat { found: u32 },
    #[error("the store knows no sequence above {found}; the second copy has {kept}")]
    Behind { found: Sequence, kept: Sequence },
    #[error("opening the store took longer than {secs} s")]
    Hangs { secs: u64 },
}

/// The version of what is written here.
const FORMAT: u32 = 1;

/// Events kept: about a quarter of a mebibyte.
const EVENTS_MAX: u64 = 2000;

/// How the store was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    Fresh,
    Whole,
    /// It could not be opened; it lies aside and was rebuilt from `keep/`.
    Rebuilt { damage: String, aside: PathBuf },
}

/// Whether a write must be on the disk when the call comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    Now,
    /// With the next durable write, or sled's own timer: for what may be lost (counters of restarts).
    Soon,
}

/// Cheap to clone; blocking.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    door: Door,
    keep: PathBuf,
    write: Mutex<()>,
    outbox_max: u64,
}

/// Trees, each with one kind of record.
mod tree {
    pub const META: &str = "meta";
    pub const GENERATIONS: &str = "generations";
    pub const ENVELOPES: &str = "envelopes";
    pub const HELD: &str = "held";
    pub const HISTORY: &str = "history";
    pub const IMAGES: &str = "images";
    pub const EVENTS: &str = "events";
    pub const OUTBOX: &str = "outbox";
    pub const FAILED: &str = "failed";
}

mod meta {
    pub const FORMAT: &str = "format";
    pub const POINTERS: &str = "pointers";
    pub const TIME_FLOOR: &str = "time-floor";
    pub const TRUST: &str = "trust";
    pub const DROPPED: &str = "dropped-reports";
    pub const REPORT_NUMBER: &str = "report-number";
}

impl Store {
    /// Opens the store, or sets a damaged one aside and rebuilds it.
    pub fn open(places: &Places, outbox_max: u32) -> Result<(Self, Opened), StoreError> {
        let (state, keep) = (places.state(), places.keep());
        let kept = keep::load(&keep)?;
        let attempt = || {
            let (door, is_new) = Door::open(&state)?;
            let inner = Inner { door, keep: keep.clone(), write: Mutex::new(()), outbox_max: u64::from(outbox_max) };
            let store = Self { inner: Arc::new(inner) };
            store.check_format()?;
            // sled opens some damaged files as if they were empty: the second copy knows better.
            let (known, least) = (store.pointers()?, kept.as_ref().map(|kept| kept.pointers).unwrap_or_default());
            if known.highest_sequence < least.highest_sequence {
                return Err(StoreError::Behind { found: known.highest_sequence, kept: least.highest_sequence });
            }
            Ok((store, is_new))
        };
        match attempt() {
            Ok((store, true)) => Ok((store, Opened::Fresh)),
            Ok((store, false)) => Ok((store, Opened::Whole)),
            Err(error @ StoreError::NewerFormat { .. }) => Err(error),
            Err(error) => {
                let aside = keep::set_aside(&state)?;
                let (door, _) = Door::open(&state)?;
                let inner = Inner { door, keep: keep.clone(), write: Mutex::new(()), outbox_max: u64::from(outbox_max) };
                let store = Self { inner: Arc::new(inner) };
                store.check_format()?;
                if let Some(kept) = kept {
                    store.rebuild(kept)?;
                }
                Ok((store, Opened::Rebuilt { damage: inline_chain(&error), aside }))
            }
        }
    }

    fn check_format(&self) -> Result<(), StoreError> {
        match self.get::<u32>(tree::META, meta::FORMAT)? {
            None => self.put(tree::META, meta::FORMAT, &FORMAT, Durability::Now),
            Some(found) if found > FORMAT => Err(StoreError::NewerFormat { found }),
            Some(_) => Ok(()),
        }
    }

    /// What `keep/` still knows: pointers with the highest numbers, and the two manifests they name.
    fn rebuild(&self, kept: keep::Kept) -> Result<(), StoreError> {
        self.put(tree::META, meta::POINTERS, &kept.pointers, Durability::Soon)?;
        for (generation, envelope) in &kept.generations {
            let key = sequence_key(generation.sequence);
            self.put(tree::GENERATIONS, &key, generation, Durability::Soon)?;
            self.put(tree::ENVELOPES, &key, &Blob(envelope.clone()), Durability::Soon)?;
        }
        if let Some(root) = kept.trust_root {
            self.put(tree::META, meta::TRUST, &Blob(root), Durability::Soon)?;
        }
        self.put(tree::META, meta::TIME_FLOOR, &kept.time_floor, Durability::Now)
    }

    fn get<T: DeserializeOwned>(&self, tree: &str, key: &str) -> Result<Option<T>, StoreError> {
        match self.inner.door.tree(tree)?.get(key)? {
            None => Ok(None),
            Some(bytes) => unseal(&bytes).map(Some).ok_or_else(|| StoreError::Damaged { key: format!("{tree}/{key}") }),
        }
    }

    fn put<T: Serialize>(&self, tree: &str, key: &str, value: &T, durability: Durability) -> Result<(), StoreError> {
        let _one_writer = self.inner.write.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.door.tree(tree)?.insert(key, seal(tree, key, value)?)?;
        self.settle(durability)
    }

    fn delete(&self, tree: &str, key: &str, durability: Durability) -> Result<(), StoreError> {
        let _one_writer = self.inner.write.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.door.tree(tree)?.remove(key)?;
        self.settle(durability)
    }

    fn settle(&self, durability: Durability) -> Result<(), StoreError> {
        match durability {
            Durability::Now => self.inner.door.sync(),
            Durability::Soon => Ok(()),
        }
    }

    /// All readable records of a tree, in order. A damaged one is left out: what it held is rebuilt or lost, and one
    /// bad record must not take the others along.
    fn all<T: DeserializeOwned>(&self, tree: &str) -> Result<Vec<(String, T)>, StoreError> {
        let mut list = Vec::new();
        for entry in &self.inner.door.tree(tree)? {
            let (key, bytes) = entry?;
            if let (Ok(key), Some(value)) = (std::str::from_utf8(&key), unseal(&bytes)) {
                list.push((key.to_owned(), value));
            }
        }
        Ok(list)
    }

    // --- generations

    pub fn pointers(&self) -> Result<Pointers, StoreError> {
        Ok(self.get(tree::META, meta::POINTERS)?.unwrap_or_default())
    }

    pub fn generations(&self) -> Result<Vec<Generation>, StoreError> {
        Ok(self.all(tree::GENERATIONS)?.into_iter().map(|(_, generation)| generation).collect())
    }

    pub fn envelope(&self, sequence: Sequence) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.get::<Blob>(tree::ENVELOPES, &sequence_key(sequence))?.map(|blob| blob.0))
    }

    /// A generation's new state and the pointers that go with it, in one transaction that is on the disk before this
    /// comes back; then the second copy. A cut between the two leaves the database newer, and it is the first read.
    pub fn transition(
        &self,
        changed: &[Generation],
        envelope: Option<(Sequence, &[u8])>,
        pointers: &Pointers,
    ) -> Result<(), StoreError> {
        {
            let _one_writer = self.inner.write.lock().unwrap_or_else(PoisonError::into_inner);
            let before: Pointers = self.get(tree::META, meta::POINTERS)?.unwrap_or_default();
            // Whatever the caller says, these two never fall.
            let pointers = Pointers {
                highest_sequence: pointers.highest_sequence.max(before.highest_sequence),
                highest_trust_version: pointers.highest_trust_version.max(before.highest_trust_version),
                ..*pointers
            };
            let mut records = Vec::new();
            for generation in changed {
                let key = sequence_key(generation.sequence);
                records.push((tree::GENERATIONS, key.clone(), seal(tree::GENERATIONS, &key, generation)?));
            }
            if let Some((sequence, bytes)) = envelope {
                let key = sequence_key(sequence);
                let sealed = seal(tree::ENVELOPES, &key, &Blob(bytes.to_vec()))?;
                records.push((tree::ENVELOPES, key, sealed));
            }
            let key = meta::POINTERS.to_owned();
            records.push((tree::META, key, seal(tree::META, meta::POINTERS, &pointers)?));
            self.inner.door.together(records)?;
            self.inner.door.sync()?;
        }
        self.keep_copy()
    }

    fn keep_copy(&self) -> Result<(), StoreError> {
        let pointers = self.pointers()?;
        let mut generations = Vec::new();
        for sequence in [pointers.active, pointers.last_good].into_iter().flatten() {
            let generation = self.get::<Generation>(tree::GENERATIONS, &sequence_key(sequence))?;
            if let (Some(generation), Some(envelope)) = (generation, self.envelope(sequence)?) {
                generations.push((generation, envelope));
            }
        }
        let (trust_root, time_floor) = (self.trust_root()?, self.time_floor()?);
        keep::save(&self.inner.keep, &keep::Kept { pointers, generations, trust_root, time_floor })
    }

    /// Takes generations away that nothing points at, but for the newest few.
    pub fn forget_generation(&self, sequence: Sequence) -> Result<(), StoreError> {
        let key = sequence_key(sequence);
        self.delete(tree::ENVELOPES, &key, Durability::Soon)?;
        self.delete(tree::GENERATIONS, &key, Durability::Soon)
    }

    /// A manifest that did not become good: its digest is not tried again.
    pub fn remember_failed(&self, digest: Digest) -> Result<(), StoreError> {
        self.put(tree::FAILED, &digest.hex(), &true, Durability::Now)
    }

    pub fn has_failed(&self, digest: Digest) -> Result<bool, StoreError> {
        Ok(self.get::<bool>(tree::FAILED, &digest.hex())?.is_some())
    }

    // --- trust and time

    pub fn trust_root(&self) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.get::<Blob>(tree::META, meta::TRUST)?.map(|blob| blob.0))
    }

    pub fn set_trust_root(&self, envelope: &[u8]) -> Result<(), StoreError> {
        self.put(tree::META, meta::TRUST, &Blob(envelope.to_vec()), Durability::Now)?;
        self.keep_copy()
    }

    pub fn time_floor(&self) -> Result<Timestamp, StoreError> {
        Ok(self.get(tree::META, meta::TIME_FLOOR)?.unwrap_or_default())
    }

    /// Lifts the time floor; it never falls.
    pub fn raise_time_floor(&self, to: Timestamp) -> Result<Timestamp, StoreError> {
        let floor = self.time_floor()?;
        if to > floor {
            self.put(tree::META, meta::TIME_FLOOR, &to, Durability::Now)?;
        }
        Ok(floor.max(to))
    }

    // --- workloads

    pub fn held(&self) -> Result<Vec<(WorkloadName, Hold)>, StoreError> {
        Ok(named(self.all(tree::HELD)?))
    }

    pub fn hold(&self, name: &WorkloadName, hold: Option<Hold>) -> Result<(), StoreError> {
        match hold {
            Some(hold) => self.put(tree::HELD, name.as_str(), &hold, Durability::Now),
            None => self.delete(tree::HELD, name.as_str(), Durability::Now),
        }
    }

    pub fn histories(&self) -> Result<Vec<(WorkloadName, SavedHistory)>, StoreError> {
        Ok(named(self.all(tree::HISTORY)?))
    }

    pub fn save_history(&self, name: &WorkloadName, history: &SavedHistory, d: Durability) -> Result<(), StoreError> {
        self.put(tree::HISTORY, name.as_str(), history, d)
    }

    pub fn forget_workload(&self, name: &WorkloadName) -> Result<(), StoreError> {
        self.delete(tree::HISTORY, name.as_str(), Durability::Soon)?;
        self.delete(tree::HELD, name.as_str(), Durability::Soon)
    }

    // --- images

    /// What is known of the images on disk, by the text the manifests use.
    pub fn images<T: DeserializeOwned>(&self) -> Result<Vec<(String, T)>, StoreError> {
        self.all(tree::IMAGES)
    }

    pub fn put_image<T: Serialize>(&self, image: &str, record: &T) -> Result<(), StoreError> {
        self.put(tree::IMAGES, image, record, Durability::Now)
    }

    // --- events

    /// Appends to the story of the device; the oldest goes when there are too many. Returns the event's number.
    pub fn append_event(&self, mut event: Event, durability: Durability) -> Result<u64, StoreError> {
        let events = self.inner.door.tree(tree::EVENTS)?;
        let number = |key: &sled::IVec| std::str::from_utf8(key).ok().and_then(|key| key.parse::<u64>().ok());
        let last = events.last()?.and_then(|(key, _)| number(&key)).unwrap_or(0);
        event.number = last + 1;
        self.put(tree::EVENTS, &number_key(event.number), &event, durability)?;
        if let Some(old) = event.number.checked_sub(EVENTS_MAX) {
            self.delete(tree::EVENTS, &number_key(old), Durability::Soon)?;
        }
        Ok(event.number)
    }

    /// The last `count` events that `wanted` lets through, oldest first.
    pub fn events(&self, count: usize, wanted: impl Fn(&Event) -> bool) -> Result<Vec<Event>, StoreError> {
        let mut found = Vec::new();
        for entry in self.inner.door.tree(tree::EVENTS)?.iter().rev() {
            if found.len() == count {
                break;
            }
            found.extend(unseal::<Event>(&entry?.1).filter(|event| wanted(event)));
        }
        found.reverse();
        Ok(found)
    }

    // --- outbox

    /// Puts a report into the outbox; the oldest goes when it is full, and is counted.
    pub fn push_report(&self, report: &[u8]) -> Result<(), StoreError> {
        let outbox = self.inner.door.tree(tree::OUTBOX)?;
        let number = self.next_number(meta::REPORT_NUMBER)?;
        self.put(tree::OUTBOX, &number_key(number), &Blob(report.to_vec()), Durability::Soon)?;
        while outbox.len() as u64 > self.inner.outbox_max {
            outbox.pop_min()?;
            self.next_number(meta::DROPPED)?;
        }
        Ok(())
    }

    /// The oldest report and its number. Damaged ones are thrown away on the way.
    pub fn oldest_report(&self) -> Result<Option<(u64, Vec<u8>)>, StoreError> {
        let outbox = self.inner.door.tree(tree::OUTBOX)?;
        while let Some((key, bytes)) = outbox.first()? {
            let number = std::str::from_utf8(&key).ok().and_then(|key| key.parse().ok());
            match (number, unseal::<Blob>(&bytes)) {
                (Some(number), Some(blob)) => return Ok(Some((number, blob.0))),
                _ => outbox.remove(&key)?,
            };
        }
        Ok(None)
    }

    pub fn remove_report(&self, number: u64) -> Result<(), StoreError> {
        self.delete(tree::OUTBOX, &number_key(number), Durability::Soon)
    }

    pub fn waiting_reports(&self) -> Result<u64, StoreError> {
        Ok(self.inner.door.tree(tree::OUTBOX)?.len() as u64)
    }

    pub fn dropped_reports(&self) -> Result<u64, StoreError> {
        Ok(self.get(tree::META, meta::DROPPED)?.unwrap_or(0))
    }

    /// A number for the next report: one more than the last, over all boots.
    pub fn next_report_number(&self) -> Result<u64, StoreError> {
        self.next_number("report")
    }

    fn next_number(&self, counter: &str) -> Result<u64, StoreError> {
        let next = self.get::<u64>(tree::META, counter)?.unwrap_or(0) + 1;
        self.put(tree::META, counter, &next, Durability::Soon)?;
        Ok(next)
    }

    /// Makes durable what was written with [`Durability::Soon`].
    pub fn sync(&self) -> Result<(), StoreError> {
        self.inner.door.sync()
    }
}

/// What is remembered of one workload over restarts of the agent and the device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, serde::Deserialize)]
pub struct SavedHistory {
    /// The specification the history is about.
    pub spec: Option<Digest>,
    pub history: RestartHistory,
    pub boot_id: String,
}

/// Bytes as a CBOR byte string.
#[derive(Debug)]
struct Blob(Vec<u8>);

impl Serialize for Blob {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for Blob {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl serde::de::Visitor<'_> for Bytes {
            type Value = Blob;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a byte string")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Blob, E> {
                Ok(Blob(bytes.to_vec()))
            }
        }
        d.deserialize_bytes(Bytes)
    }
}

const SEAL_BYTES: usize = 8;

/// The value behind the first bytes of its own sha256.
fn seal<T: Serialize>(tree: &str, key: &str, value: &T) -> Result<Vec<u8>, StoreError> {
    let bytes = serde_cbor::to_vec(value)
        .map_err(|source| StoreError::Encode { key: format!("{tree}/{key}"), source })?;
    let mut sealed = Sha256::digest(&bytes)[..SEAL_BYTES].to_vec();
    sealed.extend(bytes);
    Ok(sealed)
}

fn unseal<T: DeserializeOwned>(sealed: &[u8]) -> Option<T> {
    let (sum, bytes) = sealed.split_at_checked(SEAL_BYTES)?;
    if Sha256::digest(bytes)[..SEAL_BYTES] != *sum {
        return None;
    }
    serde_cbor::from_slice(bytes).ok()
}

fn sequence_key(sequence: Sequence) -> String {
    number_key(sequence.0)
}

/// Sorts as the number does.
fn number_key(number: u64) -> String {
    format!("{number:020}")
}

fn named<T>(records: Vec<(String, T)>) -> Vec<(WorkloadName, T)> {
    records.into_iter().filter_map(|(key, value)| Some((WorkloadName::parse(&key).ok()?, value))).collect()
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

/// For people: what was found when the store was opened.
pub fn opened_reason(opened: &Opened) -> Option<Reason> {
    let Opened::Rebuilt { damage, aside } = opened else { return None };
    let text = format!("the state store was damaged ({damage}) and rebuilt from its second copy");
    let next = format!("the damaged one lies at {}", aside.display());
    Some(Reason::new(edged_model::reason::Code::StoreRebuilt, text).next(next))
}

fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    std::fs::File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| StoreError::File { path: dir.to_owned(), source })
}

#[cfg(test)]
mod tests;
