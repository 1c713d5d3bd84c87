//! What a reset of the workloads takes from the disk, when none of them is left: again and again until all of it is gone.

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

/// What is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone {
    pub images: Bytes,
    pub volumes: usize,
}

/// `wish`: needs nothing. Blocking; nobody may run, be started or be pulled for.
pub fn finish(ctx: &StartContext, store: &Store, wish: &Wish, with_volumes: bool) -> Result<Gone, ResetError> {
    // A record of what is not there is worse than none.
    for name in wish.images.keys() {
        store.forget_image(name)?;
    }
    let (pruned, _) = reclaim::collect(&ctx.content, wish)?;
    ctx.user_ids.release_unknown(&wish.workloads, |_| false)?;
    crash_point::pass("reset-images-gone");
    // Records of images that an agent before us had half taken away, and workloads that it began and never told of.
    empty(&ctx.places.content().join("images"))?;
    for name in names(&ctx.places.workloads())?.iter().filter_map(|name| WorkloadName::parse(name.to_str()?).ok()) {
        let failed = |why| ResetError::Workload { workload: name.clone(), why };
        isolate::remove(ctx, &name).map_err(|error| failed(inline_chain(error.as_ref())))?;
        place::remove(&ctx.places, &name).map_err(|error| failed(inline_chain(&error)))?;
    }
    empty(&ctx.places.workloads())?;
    empty(&ctx.places.log())?;
    crash_point::pass("reset-places-gone");
    let mut volumes = 0;
    if with_volumes {
        volumes = empty(&ctx.places.volumes())?;
        ctx.volume_ids.forget_all()?;
        crash_point::pass("reset-volumes-gone");
    }
    Ok(Gone { images: pruned.size, volumes })
}

/// What is in a directory goes, and stays gone; how many that were.
fn empty(dir: &Path) -> Result<usize, ResetError> {
    let names = names(dir)?;
    for name in &names {
        let path = dir.join(name);
        remove::path(&path).map_err(|source| ResetError::Remove { path, source })?;
    }
    if !names.is_empty() {
        let synced = fs::File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(|source| ResetError::Remove { path: dir.to_owned(), source })?;
    }
    Ok(names.len())
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
        assert_eq!(empty(&volumes).unwrap(), 3);
        assert!(names(&volumes).unwrap().is_empty() && volumes.exists() && other.join("kept").exists());
        assert_eq!(empty(&volumes).unwrap(), 0);
        assert_eq!(empty(&dir.path().join("none")).unwrap(), 0);
    }
}
