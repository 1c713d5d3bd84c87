//! What a reset of the workloads takes from the disk, when none of them is left: again and again until all of it is gone.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use edged_model::id::WorkloadName;
use edged_model::quantity::Bytes;

use super::reclaim::{self, Wish};
use super::start::StartContext;
use super::{isolate, place};
use crate::content::{ContentError, remove};
use crate::crash_point;
use crate::store::{Store, StoreError, inline_chain};

#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    #[error("{path} cannot be taken away")]
    Remove {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the images cannot be taken away")]
    Images(#[from] ContentError),
    #[error("what {workload} had cannot be taken away: {why}")]
    Workload { workload: WorkloadName, why: String },
    #[error(transparent)]
    Ids(#[from] super::user_ids::UserIdsError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is gone, and why what is left could not be taken away.
#[derive(Debug, PartialEq, Eq, Default)]
pub struct Gone {
    pub images: Bytes,
    pub volumes: usize,
    pub left: Vec<String>,
}

impl Gone {
    fn note<T>(&mut self, done: Result<T, ResetError>) -> Option<T> {
        done.map_err(|error| self.left.push(inline_chain(&error))).ok()
    }
}

/// `wish`: needs nothing. Blocking; nobody may run, be started or be pulled for. What cannot be taken away does not keep
/// the rest.
pub fn finish(ctx: &StartContext, store: &Store, wish: &Wish, with_volumes: bool) -> Result<Gone, ResetError> {
    // A record of what is not there is worse than none.
    for name in wish.images.keys() {
        store.forget_image(name)?;
    }
    let mut gone = Gone::default();
    if let Some((pruned, _)) = gone.note(reclaim::collect(&ctx.content, wish).map_err(Into::into)) {
        gone.images = pruned.size;
    }
    gone.note(ctx.user_ids.release_unknown(&wish.workloads, |_| false).map_err(Into::into));
    crash_point::pass("reset-images-gone");
    // Records of images that an agent before us had half taken away, and workloads that it began and never told of.
    empty(&ctx.places.content().join("images"), &mut gone);
    let mut workloads: BTreeSet<WorkloadName> = store.histories()?.into_iter().map(|(name, _)| name).collect();
    let found = gone.note(names(&ctx.places.workloads())).unwrap_or_default();
    workloads.extend(found.iter().filter_map(|name| WorkloadName::parse(name.to_str()?).ok()));
    let running = gone.note(names(&ctx.places.run().join("workloads"))).unwrap_or_default();
    workloads.extend(running.iter().filter_map(|name| WorkloadName::parse(name.to_str()?).ok()));
    for name in &workloads {
        // One of which something is left is known to the next try.
        if remove_workload(ctx, name, &mut gone) {
            store.forget_workload(name)?;
        }
    }
    // What was taken aside and could not be taken away.
    empty(&ctx.content.staging(), &mut gone);
    empty(&ctx.places.workloads(), &mut gone);
    empty(&ctx.places.log(), &mut gone);
    crash_point::pass("reset-places-gone");
    if with_volumes {
        gone.volumes = empty(&ctx.places.volumes(), &mut gone);
        // Of a volume that is left, too: it is told, and taken away or taken over by hand.
        gone.note(ctx.volume_ids.forget_all().map_err(Into::into));
        crash_point::pass("reset-volumes-gone");
    }
    Ok(gone)
}

/// Its cgroup, namespaces and run files; whether all of them went. What lies on the disk goes with that of the others.
fn remove_workload(ctx: &StartContext, name: &WorkloadName, gone: &mut Gone) -> bool {
    let failed = |why| ResetError::Workload { workload: name.clone(), why };
    let run_home = place::run_home(&ctx.places, name);
    let parts = [
        ctx.cgroups.open(name.as_str()).remove().map_err(|error| failed(inline_chain(&error))),
        isolate::remove(ctx, name).map_err(|error| failed(inline_chain(error.as_ref()))),
        remove::path(&run_home).map_err(|source| ResetError::Remove { path: run_home, source }),
    ];
    let left = parts.map(|part| gone.note(part).is_none());
    !left.contains(&true)
}

/// What is in a directory goes, and stays gone; how many that were. What cannot be taken away is noted.
fn empty(dir: &Path, gone: &mut Gone) -> usize {
    let names = gone.note(names(dir)).unwrap_or_default();
    let mut removed = 0;
    for name in &names {
        let path = dir.join(name);
        let done = remove::path(&path).map_err(|source| ResetError::Remove { path, source });
        removed += usize::from(gone.note(done).is_some());
    }
    if removed > 0 {
        let synced = fs::File::open(dir).and_then(|dir| dir.sync_all());
        gone.note(synced.map_err(|source| ResetError::Remove { path: dir.to_owned(), source }));
    }
    removed
}

fn names(dir: &Path) -> Result<Vec<OsString>, ResetError> {
    let failed = |source| ResetError::Remove { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    entries.map(|entry| Ok(entry.map_err(failed)?.file_name())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_directory_goes_and_what_a_link_leads_to_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (volumes, other) = (dir.path().join("volumes"), dir.path().join("other"));
        fs::create_dir_all(volumes.join("data/deep")).unwrap();
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join("kept"), "").unwrap();
        fs::write(volumes.join("file"), "").unwrap();
        std::os::unix::fs::symlink(&other, volumes.join("link")).unwrap();
        let mut gone = Gone::default();
        assert_eq!(empty(&volumes, &mut gone), 3);
        assert!(names(&volumes).unwrap().is_empty() && volumes.exists() && other.join("kept").exists());
        assert_eq!(empty(&volumes, &mut gone), 0);
        assert_eq!(empty(&dir.path().join("none"), &mut gone), 0);
        assert_eq!(gone, Gone::default());
    }
}
