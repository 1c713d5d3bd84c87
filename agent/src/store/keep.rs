//! The second copy of what must never be lost, as plain files: written to a temporary name, synced, renamed, and the
//! directory synced. From it a damaged database is rebuilt, and the anti-rollback numbers survive.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use edged_model::generation::{Generation, Pointers};
use edged_model::quantity::Timestamp;

use super::{Blob, StoreError, seal, sync_dir, unseal};

/// Damaged databases kept for inspection.
const ASIDE_MAX: u32 = 2;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Kept {
    pub pointers: Pointers,
    pub generations: Vec<(Generation, Vec<u8>)>,
    pub trust_root: Option<Vec<u8>>,
    pub time_floor: Timestamp,
}

/// What the file holds: everything in one, so that it is never half old and half new.
type Written = (Pointers, Vec<(Generation, Blob)>, Option<Blob>, Timestamp);

const FILE: &str = "kept";

pub fn save(dir: &Path, kept: &Kept) -> Result<(), StoreError> {
    let generations: Vec<_> = kept.generations.iter().map(|(g, bytes)| (g.clone(), Blob(bytes.clone()))).collect();
    let written: Written = (kept.pointers, generations, kept.trust_root.clone().map(Blob), kept.time_floor);
    durable(&dir.join(FILE), &seal("keep", FILE, &written)?, 0o600)
}

/// What was kept, or `None` where there is nothing or it is damaged too.
pub fn load(dir: &Path) -> Result<Option<Kept>, StoreError> {
    let path = dir.join(FILE);
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(|source| StoreError::File { path, source })?,
    };
    let Some((pointers, generations, trust_root, time_floor)) = unseal::<Written>(&bytes) else { return Ok(None) };
    let generations = generations.into_iter().map(|(generation, blob)| (generation, blob.0)).collect();
    Ok(Some(Kept { pointers, generations, trust_root: trust_root.map(|blob| blob.0), time_floor }))
}

static WRITERS: AtomicU64 = AtomicU64::new(0);

/// Writes a file such that a power cut leaves the old or the new content, never a mix.
pub fn durable(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StoreError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    // A name of its own for each writer: two may write the same file at the same time.
    let number = WRITERS.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("new-{number}"));
    let write = || {
        fs::create_dir_all(dir)?;
        let mut file = File::create(&temporary)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|source| StoreError::File { path: path.to_owned(), source })?;
    sync_dir(dir)
}

/// Moves a damaged database out of the way.
pub fn set_aside(state: &Path) -> Result<PathBuf, StoreError> {
    let name = |n: u32| state.with_extension(format!("damaged-{n}"));
    let file = |path: &Path| {
        let path = path.to_owned();
        move |source| StoreError::File { path, source }
    };
    let free = (1..=ASIDE_MAX).map(name).find(|path| !path.exists());
    let aside = match free {
        Some(path) => path,
        None => {
            let oldest = name(1);
            fs::remove_dir_all(&oldest).map_err(file(&oldest))?;
            oldest
        }
    };
    fs::rename(state, &aside).map_err(file(state))?;
    sync_dir(state.parent().unwrap_or(state))?;
    Ok(aside)
}
