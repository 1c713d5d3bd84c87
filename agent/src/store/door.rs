//! sled itself: opened within a bound, read in whole records, written in batches, synced for real.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use sled::transaction::{ConflictableTransactionError, TransactionError, TransactionalTree};
use sled::{Batch, Transactional};

use super::record::{is_piece_of, piece_key, pieces};
use super::{StoreError, sync_dir, trees};

/// sled's cache is a gigabyte unless told otherwise.
const CACHE_BYTES: u64 = 2 << 20;

/// An opening that takes longer is given up: a damaged database can keep sled busy for ever.
const OPEN_SECS: u64 = 20;

/// An opening that takes more memory is given up; a good one takes a few mebibytes. Far above what the agent's other threads
/// may take meanwhile. On a device the agent's wall is lower, and who runs into it is counted ([`super::tries`]).
const OPEN_MEMORY_BYTES: u64 = 256 << 20;

/// Between two looks at what it takes.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What was written with `Durability::Soon` is on the disk after this time at the latest. Each round may cost a flash
/// page, so it is long; sled also uses the round to free old segments.
const FLUSH_EVERY_MS: u64 = 10_000;

/// One change of one record: its sealed value, or `None` to remove it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub tree: &'static str,
    pub key: String,
    pub sealed: Option<Vec<u8>>,
}

#[derive(Debug)]
pub struct Door {
    trees: BTreeMap<&'static str, sled::Tree>,
    db: sled::Db,
    file: File,
    path: PathBuf,
    flushes: AtomicU64,
}

impl Door {
    /// Opens the database at `dir`, or makes it. What decides is read once from end to end, so that damage
    /// shows here and not in the middle of the work.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("db");
        let is_new = !path.exists();
        std::fs::create_dir_all(dir).map_err(file_error(dir))?;
        let (db, trees) = open_within_bound(dir)?;
        let file = File::options().read(true).write(true).open(&path).map_err(file_error(&path))?;
        let door = Self { trees, db, file, path, flushes: AtomicU64::new(0) };
        door.sync()?;
        if is_new {
            let conf = dir.join("conf");
            File::open(&conf).and_then(|conf| conf.sync_all()).map_err(file_error(&conf))?;
            sync_dir(dir)?;
            sync_dir(dir.parent().unwrap_or(dir))?;
        }
        Ok(door)
    }

    fn tree(&self, name: &str) -> Result<&sled::Tree, StoreError> {
        self.trees.get(name).ok_or_else(|| StoreError::Damaged { key: name.to_owned() })
    }

    /// Everything written so far is on the disk when this comes back. `flush()` alone hands it to the kernel only.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.db.flush()?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.file.sync_data().map_err(file_error(&self.path))
    }

    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    pub fn get(&self, tree: &str, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let tree = self.tree(tree)?;
        let Some(first) = tree.get(key)? else { return Ok(None) };
        let mut sealed = first.to_vec();
        for entry in tree.range(piece_key(key, 1)..=piece_key(key, u32::MAX as usize)) {
            sealed.extend_from_slice(&entry?.1);
        }
        Ok(Some(sealed))
    }

    /// All records of a tree in the order of their keys, still sealed.
    pub fn records(&self, tree: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        records(self.tree(tree)?)
    }

    /// The keys of a tree from the last to the first.
    pub fn keys_backwards(&self, tree: &str) -> Result<impl Iterator<Item = Result<String, StoreError>>, StoreError> {
        Ok(self.tree(tree)?.iter().keys().rev().filter_map(|key| match key {
            Ok(key) if key.contains(&0) => None,
            Ok(key) => Some(Ok(String::from_utf8_lossy(&key).into_owned())),
            Err(error) => Some(Err(error.into())),
        }))
    }

    pub fn keys(&self, tree: &str) -> Result<Vec<String>, StoreError> {
        let mut keys = self.keys_backwards(tree)?.collect::<Result<Vec<_>, _>>()?;
        keys.reverse();
        Ok(keys)
    }

    /// Writes records of one or several trees as one: all of them or none, whatever happens. The caller holds the lock
    /// of the one writer.
    pub fn write(&self, changes: &[Change]) -> Result<(), StoreError> {
        let mut batches: BTreeMap<&'static str, Batch> = BTreeMap::new();
        for change in changes {
            let tree = self.tree(change.tree)?;
            let batch = batches.entry(change.tree).or_default();
            let sealed = change.sealed.as_deref().unwrap_or_default();
            let mut count = 0;
            for (key, piece) in pieces(&change.key, sealed) {
                batch.insert(key, piece);
                count += 1;
            }
            // Pieces of the old value that the new one does not have.
            for old in tree.scan_prefix(change.key.as_bytes()).keys() {
                let old = old?;
                let own = old == change.key.as_bytes() || is_piece_of(&old, change.key.as_bytes());
                if own && *old >= piece_key(&change.key, count)[..] {
                    batch.remove(old);
                } else if !own {
                    break;
                }
            }
        }
        // A transaction over no tree panics in sled, and one over a single tree is a batch.
        if batches.len() < 2 {
            for (name, batch) in batches {
                self.tree(name)?.apply_batch(batch)?;
            }
            return Ok(());
        }
        let touched = batches.keys().map(|name| self.tree(name)).collect::<Result<Vec<_>, _>>()?;
        let touched: Vec<sled::Tree> = touched.into_iter().cloned().collect();
        let apply = |trees: &Vec<TransactionalTree>| {
            for (tree, batch) in trees.iter().zip(batches.values()) {
                tree.apply_batch(batch)?;
            }
            Ok::<_, ConflictableTransactionError<()>>(())
        };
        match touched.as_slice().transaction(apply) {
            Ok(()) | Err(TransactionError::Abort(())) => Ok(()),
            Err(TransactionError::Storage(error)) => Err(error.into()),
        }
    }
}

fn records(tree: &sled::Tree) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
    let mut list: Vec<(String, Vec<u8>)> = Vec::new();
    for entry in tree {
        let (key, piece) = entry?;
        match list.last_mut() {
            Some((last, sealed)) if is_piece_of(&key, last.as_bytes()) => sealed.extend_from_slice(&piece),
            _ => list.push((String::from_utf8_lossy(&key).into_owned(), piece.to_vec())),
        }
    }
    Ok(list)
}

fn file_error(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError + use<> {
    let path = path.to_owned();
    move |source| StoreError::File { path, source }
}

type Opened = (sled::Db, BTreeMap<&'static str, sled::Tree>);

/// sled on damaged files may panic, never come back, or take all memory there is: it is opened and read on a thread of its
/// own. One that hangs cannot be ended, but for the whole process.
fn open_within_bound(dir: &Path) -> Result<Opened, StoreError> {
    let config = sled::Config::new()
        .path(dir)
        .cache_capacity(CACHE_BYTES)
        .mode(sled::Mode::LowSpace)
        .flush_every_ms(Some(FLUSH_EVERY_MS));
    let (sender, receiver) = mpsc::channel();
    let opener = std::thread::Builder::new().name("open-store".to_owned()).spawn(move || {
        // Nobody listens any more when the bound has passed.
        let _ = sender.send(open_and_read(&config));
    });
    let opener = opener.map_err(file_error(dir))?;
    let (begin, memory_before) = (Instant::now(), resident_bytes());
    let opened = loop {
        let waited = receiver.recv_timeout(LOOK_EVERY);
        let taken = resident_bytes().saturating_sub(memory_before);
        match waited {
            Err(mpsc::RecvTimeoutError::Timeout) if taken > OPEN_MEMORY_BYTES => {
                return Err(StoreError::TakesMemory { bytes: taken });
            }
            Err(mpsc::RecvTimeoutError::Timeout) if begin.elapsed() < Duration::from_secs(OPEN_SECS) => {}
            waited => break waited,
        }
    };
    match opened {
        Ok(opened) => opened,
        Err(mpsc::RecvTimeoutError::Timeout) => Err(StoreError::Hangs { secs: OPEN_SECS }),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            let panic = opener.join().err();
            let words = panic.as_ref().and_then(|panic| {
                panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied())
            });
            Err(StoreError::Panicked { words: words.unwrap_or("no words").chars().take(200).collect() })
        }
    }
}

/// What this process has in memory (proc(5), `status`).
fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn open_and_read(config: &sled::Config) -> Result<Opened, StoreError> {
    let db = config.open()?;
    let mut opened = BTreeMap::new();
    for name in trees::ALL {
        let tree = db.open_tree(name)?;
        // Every page of it is read once: events and reports too, because a page that cannot be read stays so.
        for entry in &tree {
            entry?;
        }
        opened.insert(name, tree);
    }
    Ok((db, opened))
}
