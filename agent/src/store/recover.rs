//! What to believe when a store is opened, and how a lost one is rebuilt from `keep/`.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use edged_model::generation::Pointers;
use edged_model::id::Sequence;
use edged_model::reason::{Code, Reason};

use super::record::{self, Blob, number_key};
use super::trees::{self, meta};
use super::tries::{DEATHS_MAX, Tries};
use crate::crash_point;

use super::{Door, Durability, Inner, Store, StoreError, Writer, inline_chain, keep, migrate, put, remove};

/// How the store was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    Fresh,
    Whole,
    /// Single records that nothing depends on were damaged and taken away.
    Mended {
        records: Vec<String>,
    },
    /// It could not be used and was rebuilt from `keep/`; the old one lies aside (unless it was gone altogether).
    Rebuilt {
        damage: String,
        aside: Option<PathBuf>,
        from_keep: bool,
    },
}

/// For people: what was found when the store was opened, if it was not as it should be.
pub fn opened_reason(opened: &Opened) -> Option<Reason> {
    match opened {
        Opened::Fresh | Opened::Whole => None,
        Opened::Mended { records } => {
            let text = format!("the state store had {} damaged records: {}", records.len(), records.join(", "));
            Some(Reason::new(Code::StoreRebuilt, text).next("if it happens again, the disk is failing"))
        }
        Opened::Rebuilt { damage, aside, from_keep } => {
            let from = if *from_keep { "from its second copy" } else { "empty: there was no second copy" };
            let text = format!("the state store was damaged ({damage}) and rebuilt {from}");
            let next = aside.as_ref().map(|aside| format!("the damaged one lies at {}", aside.display()));
            Some(Reason::new(Code::StoreRebuilt, text).next(next.unwrap_or_default()))
        }
    }
}

/// What the two copies say of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Agree,
    /// `keep/` is to be written again: there was a cut before it, or it is damaged.
    RefreshKeep,
    /// The database has lost acknowledged writes.
    StoreLost,
}

/// `kept`: revision of `keep/` and whether all it names could be read.
fn judge(store: u64, kept: Option<(u64, bool)>) -> Verdict {
    match kept {
        None if store == 0 => Verdict::Agree,
        None => Verdict::RefreshKeep,
        Some((kept, _)) if kept > store => Verdict::StoreLost,
        Some((kept, whole)) if kept < store || !whole => Verdict::RefreshKeep,
        Some(_) => Verdict::Agree,
    }
}

pub fn open(state: &Path, keep: &Path, outbox_max: usize) -> Result<(Store, Opened), StoreError> {
    let mut tries = Tries::begin(state);
    let opened = open_or_rebuild(state, keep, outbox_max, tries.deaths);
    // The thread that opens it cannot be ended. This process can: the next one does not try.
    if matches!(opened, Err(StoreError::Hangs { .. } | StoreError::TakesMemory { .. })) {
        tries.give_up();
    }
    opened
}

fn open_or_rebuild(state: &Path, keep: &Path, outbox_max: usize, deaths: u32) -> Result<(Store, Opened), StoreError> {
    keep::sweep_unfinished(keep);
    let kept = keep::load(keep)?;
    let existed = state.join("db").exists();
    let as_it_is = if existed && deaths >= DEATHS_MAX {
        Err(StoreError::Deadly { times: deaths })
    } else {
        crash_point::pass("store-opening");
        open_as_it_is(state, keep, outbox_max, kept.as_ref())
    };
    let (damage, aside) = match as_it_is {
        Ok((store, mended)) if existed || kept.is_none() => {
            let opened = match (existed, mended) {
                (false, _) => Opened::Fresh,
                (true, records) if records.is_empty() => Opened::Whole,
                (true, records) => Opened::Mended { records },
            };
            return Ok((store, opened));
        }
        Ok((store, _)) => {
            drop(store);
            ("it was gone".to_owned(), None)
        }
        Err(error) if !existed && matches!(error, StoreError::Behind { .. }) => ("it was gone".to_owned(), None),
        Err(error) if is_damage(&error) => (inline_chain(&error), {
            let aside = keep::set_aside(state)?;
            crash_point::pass("store-set-aside");
            Some(aside)
        }),
        Err(error) => return Err(error),
    };
    let store = bare(state, keep, outbox_max)?;
    crash_point::pass("store-empty");
    let from_keep = kept.is_some();
    if let Some(kept) = kept {
        store.rebuild(kept)?;
    }
    crash_point::pass("store-rebuilt");
    Ok((store.count()?.0, Opened::Rebuilt { damage, aside, from_keep }))
}

/// The last agent may still be on its way out (its memory is torn down before its files are): its lock is waited for.
const IN_USE_TRIES: u32 = 100;
const IN_USE_PAUSE: Duration = Duration::from_millis(30);

pub(super) fn open_door(state: &Path) -> Result<Door, StoreError> {
    for _ in 1..IN_USE_TRIES {
        match Door::open(state).map_err(|error| in_use(state, error)) {
            Err(StoreError::InUse { .. }) => std::thread::park_timeout(IN_USE_PAUSE),
            other => return other,
        }
    }
    Door::open(state).map_err(|error| in_use(state, error))
}

fn bare(state: &Path, keep: &Path, outbox_max: usize) -> Result<Store, StoreError> {
    let door = open_door(state)?;
    let inner = Inner {
        door: RwLock::new(Some(door)),
        is_broken: AtomicBool::new(false),
        state: state.to_owned(),
        keep: keep.to_owned(),
        writer: Mutex::new(Writer::default()),
        waiting: Mutex::default(),
        outbox_max,
    };
    let store = Store { inner: Arc::new(inner) };
    if migrate::step(store.get(trees::META, meta::FORMAT)?)? == migrate::Step::Stamp {
        let change = put(trees::META, meta::FORMAT, &migrate::FORMAT)?;
        store.commit(&store.lock(), &[change], Durability::Now)?;
    }
    Ok(store)
}

/// The store, and the records that were taken out of it; an error if what matters is not there.
fn open_as_it_is(
    state: &Path,
    keep: &Path,
    outbox_max: usize,
    kept: Option<&keep::Kept>,
) -> Result<(Store, Vec<String>), StoreError> {
    let store = bare(state, keep, outbox_max)?;
    let now = store.kept()?;
    let (found, known) = (now.summary.revision, kept.map(|kept| (kept.summary.revision, kept.lost.is_empty())));
    match judge(found, known) {
        Verdict::Agree => {}
        Verdict::RefreshKeep => keep::save(keep, &now, true)?,
        Verdict::StoreLost => {
            return Err(StoreError::Behind { found, kept: kept.map_or(0, |kept| kept.summary.revision) });
        }
    }
    store.count()
}

/// Whether an error says that the database is broken, and not that the disk or the moment is bad: only then may it be
/// set aside.
pub(super) fn is_damage(error: &StoreError) -> bool {
    use std::io::ErrorKind::{InvalidData, InvalidInput, NotFound, UnexpectedEof};
    match error {
        StoreError::Sled(sled::Error::Io(source)) => {
            matches!(source.kind(), InvalidData | InvalidInput | NotFound | UnexpectedEof)
        }
        StoreError::Sled(_)
        | StoreError::Damaged { .. }
        | StoreError::Behind { .. }
        | StoreError::Deadly { .. }
        | StoreError::Panicked { .. }
        | StoreError::NoSuchGeneration { .. } => true,
        StoreError::File { .. }
        | StoreError::Encode { .. }
        | StoreError::OtherFormat { .. }
        | StoreError::InUse { .. }
        | StoreError::Hangs { .. }
        | StoreError::TakesMemory { .. }
        | StoreError::Closed
        | StoreError::TrustRollback { .. } => false,
    }
}

/// sled says in words alone that somebody else holds its lock.
fn in_use(state: &Path, error: StoreError) -> StoreError {
    match error {
        StoreError::Sled(sled::Error::Io(source)) if source.to_string().starts_with("could not acquire lock") => {
            StoreError::InUse { path: state.to_owned() }
        }
        other => other,
    }
}

impl Store {
    /// Takes out what cannot be read (nothing that matters: that was looked at before), and finds the next numbers.
    fn count(self) -> Result<(Self, Vec<String>), StoreError> {
        let mut damaged = Vec::new();
        let mut changes = Vec::new();
        for tree in trees::ALL {
            for (key, sealed) in self.with_door(|door| door.records(tree))? {
                if record::unseal::<serde_cbor::Value>(tree, &key, &sealed).is_none() {
                    damaged.push(format!("{tree}/{key}"));
                    changes.push(remove(tree, &key));
                }
            }
        }
        let mut writer = self.lock();
        self.commit(&writer, &changes, Durability::Soon)?;
        let next = |tree| -> Result<u64, StoreError> {
            let last = self.with_door(|door| door.keys_backwards(tree)?.next().transpose())?;
            Ok(last.and_then(|key| key.parse::<u64>().ok()).map_or(1, |last| last.saturating_add(1)))
        };
        writer.next_event = next(trees::EVENTS)?;
        writer.next_report = next(trees::OUTBOX)?;
        drop(writer);
        Ok((self, damaged))
    }

    /// Fills an empty database with what `keep/` still knows. A pointer to a generation that is lost points nowhere; the
    /// numbers against rollback hold in any case.
    fn rebuild(&self, kept: keep::Kept) -> Result<(), StoreError> {
        let known = |sequence: Option<Sequence>| {
            sequence.filter(|sequence| kept.generations.iter().any(|(known, _)| known.sequence == *sequence))
        };
        let last_good = known(kept.summary.pointers.last_good);
        let pointers = Pointers {
            active: known(kept.summary.pointers.active).or(last_good),
            last_good,
            candidate: None,
            ..kept.summary.pointers
        };
        let mut changes = vec![
            put(trees::META, meta::POINTERS, &pointers)?,
            put(trees::META, meta::TIME_FLOOR, &kept.summary.time_floor)?,
            put(trees::META, meta::REPORT_CEILING, &kept.summary.report_ceiling)?,
            put(trees::META, meta::REVISION, &kept.summary.revision)?,
        ];
        let mut survived = kept.summary.survived.clone();
        survived.survived.store_rebuilt += 1;
        changes.push(put(trees::META, meta::SURVIVED, &survived)?);
        changes.push(put(trees::META, meta::DROPPED, &kept.summary.dropped_reports)?);
        if let Some(reset) = &kept.summary.reset {
            changes.push(put(trees::META, meta::RESET, reset)?);
        }
        for (generation, envelope) in &kept.generations {
            let key = number_key(generation.sequence.0);
            changes.push(put(trees::GENERATIONS, &key, generation)?);
            changes.push(put(trees::ENVELOPES, &key, &Blob(envelope.clone()))?);
        }
        if let Some(root) = &kept.trust_root {
            changes.push(put(trees::META, meta::TRUST, &Blob(root.clone()))?);
        }
        for (name, hold) in &kept.summary.held {
            changes.push(put(trees::HELD, name.as_str(), hold)?);
        }
        for (age, digest) in (1_u64..).zip(&kept.summary.failed) {
            changes.push(put(trees::FAILED, &digest.hex(), &age)?);
        }
        self.commit_kept(&self.lock(), changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newer_copy_is_believed() {
        assert_eq!(judge(0, None), Verdict::Agree);
        assert_eq!(judge(4, None), Verdict::RefreshKeep);
        assert_eq!(judge(4, Some((4, true))), Verdict::Agree);
        assert_eq!(judge(4, Some((4, false))), Verdict::RefreshKeep);
        assert_eq!(judge(5, Some((4, true))), Verdict::RefreshKeep);
        assert_eq!(judge(3, Some((4, true))), Verdict::StoreLost);
    }
}
