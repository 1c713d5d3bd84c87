//! Volumes of workloads with ids of their own. On the disk a volume has the ids that a container sees, and a mount
//! translates; where the file system (or the kernel, or `runtime.idmapped-layers`) does not let it, the volume is given to
//! the ids of its one user, and given back when that is over.
//!
//! `volume-ids` in the data directory: one line for each volume that was given: its name, the first id, the one before, and
//! to whom. Written before anything is moved, with `?` for the id, so that nobody takes a volume half given for a whole one.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use edged_model::id::{VolumeName, WorkloadName};
use edged_model::keeper::IdMapping;
use edged_model::manifest::{MountSource, Workload};
use edged_model::moment::LOCKS_VOLUME;
use edged_model::reason::{Code, Reason};

use super::isolate::Launch;
use super::start::{StartContext, failed};
use super::user_ids::IDS_PER_WORKLOAD;
use super::{copies, place};
use crate::config::UserIds;
use crate::content::shift::{self, Shift};
use crate::runtime::mapped;
use crate::store::{StoreError, keep};

#[derive(Debug, thiserror::Error)]
pub enum VolumeIdsError {
    #[error("volume {volume} at {path} cannot be given to other ids")]
    Give {
        volume: VolumeName,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Place(#[from] place::PlaceError),
    #[error(transparent)]
    Write(#[from] StoreError),
}

/// To whom a volume was given.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Given {
    /// `None`: it was begun.
    first: Option<u32>,
    /// Where it was before, or is now.
    former: u32,
    workload: WorkloadName,
}

/// The only writer of its file.
#[derive(Debug)]
pub struct VolumeIds {
    file: PathBuf,
    pool: UserIds,
    given: Mutex<BTreeMap<VolumeName, Given>>,
}

impl VolumeIds {
    pub fn open(file: PathBuf, pool: UserIds) -> Self {
        let given = parse(&fs::read_to_string(&file).unwrap_or_default());
        Self { file, pool, given: Mutex::new(given) }
    }

    fn user(&self, volume: &VolumeName) -> Option<WorkloadName> {
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        given.get(volume).map(|given| given.workload.clone())
    }

    /// All volumes are gone.
    pub fn forget_all(&self) -> Result<(), StoreError> {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        given.clear();
        // Where everything can be idmapped there is no such file.
        if self.file.exists() { write(&self.file, &given) } else { Ok(()) }
    }

    /// Gives what lies at `path` to the range from `to` on, for `workload`. 0 is the ids that a container sees.
    fn give(&self, volume: &VolumeName, path: &Path, to: u32, workload: &WorkloadName) -> Result<(), VolumeIdsError> {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let before = given.get(volume);
        let former = before.map_or(0, |before| before.former);
        let shift = Shift { to, count: IDS_PER_WORKLOAD, pool: (self.pool.first(), self.pool.count()), former };
        let failed = |source| VolumeIdsError::Give { volume: volume.clone(), path: path.to_owned(), source };
        let is_done = before.map_or(to == 0, |before| before.first == Some(to)) && shift.has(path).map_err(failed)?;
        if is_done {
            return Ok(());
        }
        let workload = workload.clone();
        given.insert(volume.clone(), Given { first: None, former, workload: workload.clone() });
        write(&self.file, &given)?;
        shift::give(path, &shift).map_err(failed)?;
        if to == 0 {
            given.remove(volume);
        } else {
            given.insert(volume.clone(), Given { first: Some(to), former: to, workload });
        }
        Ok(write(&self.file, &given)?)
    }
}

/// What cannot be read is as good as not there: the walk finds by itself what belongs to whom.
fn parse(text: &str) -> BTreeMap<VolumeName, Given> {
    let line = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let [volume, first, former, workload] = words[..] else { return None };
        let given = Given {
            first: first.parse().ok(),
            former: former.parse().ok()?,
            workload: WorkloadName::parse(workload).ok()?,
        };
        Some((VolumeName::parse(volume).ok()?, given))
    };
    text.lines().filter_map(line).collect()
}

fn write(file: &Path, given: &BTreeMap<VolumeName, Given>) -> Result<(), StoreError> {
    let line = |(volume, given): (&VolumeName, &Given)| {
        let first = given.first.map_or_else(|| "?".to_owned(), |first| first.to_string());
        format!("{volume} {first} {} {}\n", given.former, given.workload)
    };
    keep::durable(file, given.iter().map(line).collect::<String>().as_bytes(), 0o644)
}

fn volumes(workload: &Workload) -> impl Iterator<Item = &VolumeName> {
    workload.mounts.iter().filter_map(|mount| match &mount.source {
        MountSource::Volume(volume) => Some(volume),
        MountSource::Tmpfs { .. } | MountSource::Bind(_) => None,
    })
}

/// The volumes of a launch are as it needs them. Gives those that are to be mounted as they are. Blocking.
pub(super) fn with_own_ids(
    ctx: &StartContext,
    launch: &Launch<'_>,
    user: BorrowedFd<'_>,
    ids: IdMapping,
) -> Result<Vec<PathBuf>, Reason> {
    let name = launch.name;
    let mut as_they_are = Vec::new();
    for volume in volumes(launch.workload) {
        let path = place::volume(&ctx.places, volume).map_err(|error| failed(name, &error))?;
        let is_mapped = ctx.layer_way.may_map()
            && mapped::can_be_idmapped(&path, user.as_fd()).map_err(|error| failed(name, &error))?;
        if is_mapped {
            give(ctx, launch, volume, &path, 0)?;
            continue;
        }
        // Everybody may write there, and the agent reads it.
        if volume.as_str() != LOCKS_VOLUME {
            give(ctx, launch, volume, &path, ids.outside)?;
        }
        as_they_are.push(path);
    }
    Ok(as_they_are)
}

/// The same for one that has the ids of the device.
pub(super) fn with_host_ids(ctx: &StartContext, launch: &Launch<'_>) -> Result<(), Reason> {
    for volume in volumes(launch.workload) {
        let path = place::volume(&ctx.places, volume).map_err(|error| failed(launch.name, &error))?;
        give(ctx, launch, volume, &path, 0)?;
    }
    Ok(())
}

fn give(ctx: &StartContext, launch: &Launch<'_>, volume: &VolumeName, path: &Path, to: u32) -> Result<(), Reason> {
    let name = launch.name;
    let other = ctx.volume_ids.user(volume).filter(|user| user != name && runs(ctx, user));
    if let Some(other) = other.or_else(|| host_user(ctx, launch, volume).filter(|_| to != 0)) {
        let text = format!(
            "{name} could not be started: volume {volume} is {other}'s, which runs: mounts of {} cannot be idmapped, so it \
             has one user at a time",
            path.display()
        );
        let next =
            "stop the other one, give each a volume of its own, or have the volumes on a file system that can (ext4)";
        return Err(Reason::new(Code::StartFailed, text).next(next));
    }
    ctx.volume_ids.give(volume, path, to, name).map_err(|error| failed(name, &error))
}

/// A running workload of the same manifest, with the ids of the device, that has the volume too.
fn host_user(ctx: &StartContext, launch: &Launch<'_>, volume: &VolumeName) -> Option<WorkloadName> {
    let mut others = launch.manifest.workloads.iter().filter(|(name, _)| *name != launch.name);
    let found = others.find(|(name, workload)| {
        !copies::has_own_ids(ctx, workload) && volumes(workload).any(|one| one == volume) && runs(ctx, name)
    });
    found.map(|(name, _)| name.clone())
}

/// Whether anybody is in its group.
fn runs(ctx: &StartContext, name: &WorkloadName) -> bool {
    let procs = ctx.cgroups.open(name.as_str()).path().join("cgroup.procs");
    fs::read_to_string(procs).is_ok_and(|text| !text.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_volume_goes_from_range_to_range_and_what_was_cut_off_is_done_again() {
        let dir = tempfile::tempdir().unwrap();
        let (file, tree) = (dir.path().join("volume-ids"), dir.path().join("kept"));
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("a"), "").unwrap();
        let pool = UserIds::new(2_000_000, 4 * IDS_PER_WORKLOAD).unwrap();
        let (kept, web) = (VolumeName::parse("kept").unwrap(), WorkloadName::parse("web").unwrap());
        let of = |name: &str| fs::metadata(tree.join(name)).unwrap().uid();
        let ids = VolumeIds::open(file.clone(), pool);
        ids.give(&kept, &tree, 0, &web).unwrap();
        assert!(!file.exists(), "where everything can be idmapped nothing is written");
        ids.give(&kept, &tree, 2_000_000, &web).unwrap();
        assert_eq!((of(""), of("a")), (2_000_000, 2_000_000));
        // In the middle of the next.
        fs::write(&file, "kept ? 2000000 web\nnonsense\n").unwrap();
        std::os::unix::fs::chown(tree.join("a"), Some(2_065_536), Some(2_065_536)).unwrap();
        let ids = VolumeIds::open(file.clone(), pool);
        assert_eq!(ids.user(&kept), Some(web.clone()));
        ids.give(&kept, &tree, 2_065_536, &web).unwrap();
        assert_eq!((of(""), of("a")), (2_065_536, 2_065_536));
        // Another pool, and nothing that can be idmapped, then everything.
        let ids = VolumeIds::open(file.clone(), UserIds::new(9_000_000, IDS_PER_WORKLOAD).unwrap());
        ids.give(&kept, &tree, 9_000_000, &web).unwrap();
        assert_eq!((of(""), of("a")), (9_000_000, 9_000_000));
        ids.give(&kept, &tree, 0, &web).unwrap();
        assert_eq!((of(""), of("a"), ids.user(&kept)), (0, 0, None));
    }
}
