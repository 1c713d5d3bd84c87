//! sled itself: opened within a bound, synced for real.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use sled::transaction::TransactionError;

use super::{StoreError, sync_dir};

/// sled's cache is a gigabyte unless told otherwise.
const CACHE_BYTES: u64 = 2 << 20;

/// An opening that takes longer is given up: a damaged database can keep sled busy for ever.
const OPEN_SECS: u64 = 20;

/// What sled writes without being asked reaches the kernel this often.
const FLUSH_EVERY_MS: u64 = 5_000;

#[derive(Debug)]
pub struct Door {
    db: sled::Db,
    file: File,
}

impl Door {
    /// Opens the database at `dir`; true if it was made now.
    pub fn open(dir: &Path) -> Result<(Self, bool), StoreError> {
        let file_error = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::File { path, source }
        };
        let is_new = !dir.join("db").exists();
        std::fs::create_dir_all(dir).map_err(file_error(dir))?;
        let db = open_within_bound(dir)?;
        let path = dir.join("db");
        let file = File::options().read(true).write(true).open(&path).map_err(file_error(&path))?;
        let door = Self { db, file };
        door.sync()?;
        if is_new {
            sync_dir(dir)?;
            sync_dir(dir.parent().unwrap_or(dir))?;
        }
        Ok((door, is_new))
    }

    pub fn tree(&self, name: &str) -> Result<sled::Tree, StoreError> {
        Ok(self.db.open_tree(name)?)
    }

    /// Everything written so far is on the disk when this comes back.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.db.flush()?;
        let path = || PathBuf::from("state/db");
        self.file.sync_data().map_err(|source| StoreError::File { path: path(), source })
    }

    /// Writes records of several trees as one: all of them or none.
    pub fn together(&self, records: Vec<(&'static str, String, Vec<u8>)>) -> Result<(), StoreError> {
        use sled::Transactional;
        let mut names: Vec<&str> = records.iter().map(|(tree, ..)| *tree).collect();
        names.sort_unstable();
        names.dedup();
        let trees = names.iter().map(|name| self.tree(name)).collect::<Result<Vec<_>, _>>()?;
        let index: BTreeMap<&str, usize> = names.iter().enumerate().map(|(index, name)| (*name, index)).collect();
        let result = trees.as_slice().transaction(|trees| {
            for (tree, key, value) in &records {
                trees[index[tree]].insert(key.as_bytes(), value.as_slice())?;
            }
            Ok::<_, sled::transaction::ConflictableTransactionError<()>>(())
        });
        match result {
            Ok(()) | Err(TransactionError::Abort(())) => Ok(()),
            Err(TransactionError::Storage(error)) => Err(error.into()),
        }
    }
}

/// sled on damaged files may panic or never come back: it is opened on a thread of its own.
fn open_within_bound(dir: &Path) -> Result<sled::Db, StoreError> {
    let config = sled::Config::new()
        .path(dir)
        .cache_capacity(CACHE_BYTES)
        .mode(sled::Mode::LowSpace)
        .flush_every_ms(Some(FLUSH_EVERY_MS));
    let (sender, receiver) = mpsc::channel();
    let opener = std::thread::Builder::new().name("open-store".to_owned()).spawn(move || {
        // Nobody listens any more when the bound has passed.
        let _ = sender.send(config.open());
    });
    opener.map_err(|source| StoreError::File { path: dir.to_owned(), source })?;
    match receiver.recv_timeout(Duration::from_secs(OPEN_SECS)) {
        Ok(opened) => Ok(opened?),
        Err(mpsc::RecvTimeoutError::Timeout) => Err(StoreError::Hangs { secs: OPEN_SECS }),
        // The thread ended without an answer: it panicked.
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            Err(StoreError::Damaged { key: dir.display().to_string() })
        }
    }
}
