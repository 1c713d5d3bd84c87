//! The second copy of what must never be lost, as plain files: written to a temporary name, synced, renamed, and the
//! directory synced. From it a damaged database is rebuilt, and the anti-rollback numbers survive.
//!
//! ```text
//! keep/summary            pointers, numbers, holds; names the bodies by digest; replaced as a whole
//! keep/summary.previous   the one before, should the newest be damaged
//! keep/manifest-<digest>  one generation and its signed envelope; never changed once written
//! keep/trust-<digest>     one trust root; never changed once written
//! ```
//! Bodies are written before the summary that names them, and taken away after one that does not. A change of state
//! costs the flash one small file, not the manifests again.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use edged_model::generation::{Generation, GenerationState, Pointers};
use edged_model::id::{Digest, Sequence, WorkloadName};
use edged_model::observed::Hold;
use edged_model::quantity::Timestamp;
use edged_model::reason::Reason;
use serde::{Deserialize, Serialize};

use super::record::{Blob, seal, unseal};
use super::{Reset, SavedSurvived, StoreError, sync_dir};
use crate::crash_point;

/// Damaged databases kept for inspection.
const ASIDE_MAX: u32 = 2;

const SUMMARY: &str = "summary";
const PREVIOUS: &str = "summary.previous";
const MANIFEST: &str = "manifest-";
const TRUST: &str = "trust-";

/// What `keep/summary` says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    pub revision: u64,
    pub pointers: Pointers,
    pub generations: Vec<KeptGeneration>,
    pub trust_root: Option<Digest>,
    pub time_floor: Timestamp,
    pub held: Vec<(WorkloadName, Hold)>,
    pub failed: Vec<Digest>,
    pub report_ceiling: u64,
    #[serde(default)]
    pub survived: SavedSurvived,
    #[serde(default)]
    pub dropped_reports: u64,
    #[serde(default)]
    pub reset: Option<Reset>,
}

/// A generation without its manifest, which lies in a file of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeptGeneration {
    pub sequence: Sequence,
    pub digest: Digest,
    pub state: GenerationState,
    pub since: Timestamp,
    pub reason: Option<Reason>,
}

impl From<&Generation> for KeptGeneration {
    fn from(generation: &Generation) -> Self {
        let Generation { sequence, digest, state, since, reason, .. } = generation.clone();
        Self { sequence, digest, state, since, reason }
    }
}

/// The summary with the bodies it names, as far as they can be read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Kept {
    pub summary: Summary,
    pub generations: Vec<(Generation, Vec<u8>)>,
    pub trust_root: Option<Vec<u8>>,
    /// Bodies that are missing or damaged.
    pub lost: Vec<String>,
}

/// What was kept, or `None` where there is nothing or it is damaged too.
pub fn load(dir: &Path) -> Result<Option<Kept>, StoreError> {
    let mut found: Option<Summary> = None;
    for name in [SUMMARY, PREVIOUS] {
        if found.is_none() {
            found = read(&dir.join(name))?.and_then(|bytes| unseal("keep", SUMMARY, &bytes));
        }
    }
    let Some(summary) = found else { return Ok(None) };
    let mut kept = Kept { summary, ..Kept::default() };
    for short in &kept.summary.generations {
        let name = format!("{MANIFEST}{}", short.digest.hex());
        match read(&dir.join(&name))?.and_then(|bytes| unseal::<(Generation, Blob)>("keep", &name, &bytes)) {
            Some((mut generation, envelope)) => {
                generation.state = short.state;
                generation.since = short.since;
                generation.reason.clone_from(&short.reason);
                kept.generations.push((generation, envelope.0));
            }
            None => kept.lost.push(name),
        }
    }
    if let Some(digest) = kept.summary.trust_root {
        let name = format!("{TRUST}{}", digest.hex());
        kept.trust_root = read(&dir.join(&name))?.filter(|bytes| Digest::of(bytes) == digest);
        if kept.trust_root.is_none() {
            kept.lost.push(name);
        }
    }
    Ok(Some(kept))
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some).map_err(|source| StoreError::File { path: path.to_owned(), source }),
    }
}

/// Writes what `kept` has and the directory lacks, then the summary, then takes away what nothing names any more.
/// `rewrite`: bodies are written even if a file of that name is there (it may be damaged).
pub fn save(dir: &Path, kept: &Kept, rewrite: bool) -> Result<(), StoreError> {
    let mut named = Vec::new();
    for (generation, envelope) in &kept.generations {
        let name = format!("{MANIFEST}{}", generation.digest.hex());
        let path = dir.join(&name);
        if rewrite || !path.exists() {
            durable(&path, &seal("keep", &name, &(generation, Blob(envelope.clone())))?, 0o600)?;
        }
        named.push(name);
    }
    if let Some(root) = &kept.trust_root {
        let name = format!("{TRUST}{}", Digest::of(root).hex());
        let path = dir.join(&name);
        if rewrite || !path.exists() {
            durable(&path, root, 0o600)?;
        }
        named.push(name);
    }
    crash_point::pass("keep-bodies-written");
    let path = dir.join(SUMMARY);
    if let Some(old) = read(&path)?.and_then(|bytes| unseal::<Summary>("keep", SUMMARY, &bytes)) {
        named.extend(old.generations.iter().map(|short| format!("{MANIFEST}{}", short.digest.hex())));
        named.extend(old.trust_root.iter().map(|digest| format!("{TRUST}{}", digest.hex())));
        // A second name for the old summary, so that one bad sector does not take both.
        let previous = dir.join(PREVIOUS);
        let _ = fs::remove_file(&previous);
        fs::hard_link(&path, &previous).map_err(|source| StoreError::File { path: previous, source })?;
        crash_point::pass("keep-previous-linked");
    }
    durable(&path, &seal("keep", SUMMARY, &kept.summary)?, 0o600)?;
    crash_point::pass("keep-saved");
    sweep(dir, &named);
    Ok(())
}

/// Takes away bodies that neither summary names. What cannot be removed stays: it is only space, and is tried again.
fn sweep(dir: &Path, named: &[String]) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = name.starts_with(MANIFEST) || name.starts_with(TRUST);
        if ours && !named.contains(&name) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Takes away what writers that ended in the middle have left. Only while nobody writes there.
pub fn sweep_unfinished(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().contains(UNFINISHED) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// In the names of files that are being written.
const UNFINISHED: &str = ".new-";

static WRITERS: AtomicU64 = AtomicU64::new(0);

/// Writes a file such that a power cut leaves the old or the new content, never a mix.
pub fn durable(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StoreError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    // A name of its own for each writer: two may write the same file at the same time.
    let number = WRITERS.fetch_add(1, Ordering::Relaxed);
    let temporary =
        path.with_file_name(format!("{}{UNFINISHED}{number}", path.file_name().unwrap_or_default().to_string_lossy()));
    let write = || {
        fs::create_dir_all(dir)?;
        let mut file = File::create(&temporary)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        crash_point::pass("file-written");
        fs::rename(&temporary, path)
    };
    write().map_err(|source| {
        // On a full disk of all things, nothing may stay of what failed.
        let _ = fs::remove_file(&temporary);
        StoreError::File { path: path.to_owned(), source }
    })?;
    crash_point::pass("file-named");
    sync_dir(dir)
}

/// Moves a damaged database out of the way; the oldest of those that lie there already makes room.
pub fn set_aside(state: &Path) -> Result<PathBuf, StoreError> {
    let name = |n: u32| state.with_extension(format!("damaged-{n}"));
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| StoreError::File { path, source }
    };
    let last = name(ASIDE_MAX);
    if last.exists() {
        fs::remove_dir_all(&last).map_err(failed(&last))?;
    }
    for n in (1..ASIDE_MAX).rev().filter(|n| name(*n).exists()) {
        fs::rename(name(n), name(n + 1)).map_err(failed(&name(n)))?;
    }
    let aside = name(1);
    fs::rename(state, &aside).map_err(failed(state))?;
    sync_dir(state.parent().unwrap_or(state))?;
    Ok(aside)
}
