//! From a described launch to one in namespaces of its own: the network namespace, and the user namespace with its ids.

use std::os::fd::AsFd;
use std::path::PathBuf;

use edged_model::id::WorkloadName;
use edged_model::keeper::MAX_MESSAGE_FDS;
use edged_model::manifest::{Manifest, NetworkMode};
use edged_model::reason::{Code, Reason};
use edged_model::spec::Spec;

use super::copies::{self, OwnIds, has_own_ids};
use super::pull::ReadyImage;
use super::start::{self, Prepared, Purpose, StartContext, failed, netns_path};
use super::user_ids::IDS_PER_WORKLOAD;
use super::{place, unread, volumes};
use crate::crash_point;
use crate::network::netns;
use crate::runtime::mapped::{self, Around, MappedError, index};

/// Where the workload's user namespace is pinned. The range is in the name: one made for another is not taken.
fn userns_path(ctx: &StartContext, name: &WorkloadName, first: u32) -> PathBuf {
    // No workload has a dot in its name.
    ctx.places.userns().join(format!("{name}.{first}"))
}

/// What a launch is made of.
pub struct Launch<'l> {
    pub name: &'l WorkloadName,
    pub workload: &'l Spec,
    pub manifest: &'l Manifest,
    pub image: &'l ReadyImage,
}

/// Everything for a new run, in namespaces of its own. `note` comes back with it from the keeper. Blocking.
pub fn run(ctx: &StartContext, launch: &Launch<'_>, note: String) -> Result<Prepared, Reason> {
    let Launch { name, workload, .. } = *launch;
    let own = if has_own_ids(ctx, workload) { Some(copies::ready(ctx, name, launch.image)?) } else { None };
    let prepared = start::prepare(Purpose::Run, ctx, launch, own.and_then(OwnIds::copied), note)?;
    // A run that was killed while it was paused leaves the freezer on, and nothing would move in there.
    if prepared.cgroup.is_frozen() {
        prepared.cgroup.freeze(false).map_err(|error| failed(name, &error))?;
    }
    let prepared = match own {
        Some(own) => with_own_ids(ctx, launch, own, prepared),
        None => with_host_ids(ctx, launch, prepared),
    }?;
    crash_point::pass("namespace-made");
    Ok(prepared)
}

fn with_host_ids(ctx: &StartContext, launch: &Launch<'_>, prepared: Prepared) -> Result<Prepared, Reason> {
    let Launch { name, workload, .. } = *launch;
    let Prepared { mut spec, mut fds, cgroup } = prepared;
    volumes::with_host_ids(ctx, launch)?;
    give_run_files(ctx, name, 0)?;
    if let Some(path) = netns_path(&ctx.places, name, workload.network_mode) {
        spec.netns_fd = Some(index(&fds));
        fds.push(netns::ensure(&path).map_err(|error| failed(name, &error))?);
    }
    Ok(Prepared { spec, fds, cgroup })
}

/// A command in a living run, whose namespaces it joins. Blocking.
pub fn command(ctx: &StartContext, launch: &Launch<'_>) -> Result<Prepared, Reason> {
    let mut prepared = start::prepare(Purpose::Command, ctx, launch, None, String::new())?;
    if has_own_ids(ctx, launch.workload) {
        let ids = ctx.user_ids.of(launch.name).map_err(|error| failed(launch.name, &error))?;
        (prepared.spec.uid_map, prepared.spec.gid_map) = (vec![ids], vec![ids]);
    }
    Ok(prepared)
}

fn with_own_ids(ctx: &StartContext, launch: &Launch<'_>, own: OwnIds, prepared: Prepared) -> Result<Prepared, Reason> {
    let Launch { name, workload, .. } = *launch;
    let Prepared { spec, mut fds, cgroup } = prepared;
    if let Some(id) = [spec.uid, spec.gid].iter().chain(&spec.additional_gids).find(|id| **id >= IDS_PER_WORKLOAD) {
        let text = format!("{name} could not be started: its user or group {id} is beyond its {IDS_PER_WORKLOAD} ids");
        return Err(Reason::new(Code::StartFailed, text).next("choose a lower number, or `user: host`"));
    }
    let OwnIds { ids, layers } = own;
    let own = workload.network_mode == NetworkMode::Bridge;
    let path = netns_path(&ctx.places, name, workload.network_mode);
    let pin = userns_path(ctx, name, ids.outside);
    let pair = netns::ensure_owned(&pin, path.as_deref().filter(|_| own), ids);
    let pair = pair.map_err(|error| {
        failed(name, &error).next("the kernel needs CONFIG_USER_NS and user.max_user_namespaces above 0")
    })?;
    let network = match (pair.network, path) {
        (None, Some(shared)) => Some(netns::ensure(&shared).map_err(|error| failed(name, &error))?),
        (network, _) => network,
    };
    give_run_files(ctx, name, ids.outside)?;
    let mut ready = volumes::with_own_ids(ctx, launch, pair.user.as_fd(), ids)?;
    ready.push(place::run_home(&ctx.places, name));
    let around = Around {
        layers,
        user: pair.user,
        network,
        owns_network: own,
        ids,
        owned_by_workload: ctx.places.volumes(),
        ready,
    };
    let (spec, more) = mapped::map(spec, index(&fds), around).map_err(|error| explain(ctx, name, &error))?;
    fds.extend(more);
    if fds.len() > MAX_MESSAGE_FDS {
        let text =
            format!("{name} could not be started: its mounts need {} descriptors of {MAX_MESSAGE_FDS}", fds.len());
        return Err(Reason::new(Code::StartFailed, text).next("mount fewer directories"));
    }
    Ok(Prepared { spec, fds, cgroup })
}

fn give_run_files(ctx: &StartContext, name: &WorkloadName, root: u32) -> Result<(), Reason> {
    place::give_run_files(&place::run_home(&ctx.places, name), root).map_err(|error| failed(name, &error))
}

fn explain(ctx: &StartContext, name: &WorkloadName, error: &MappedError) -> Reason {
    if unread::is_of_a_layer(error, &ctx.places.layers()) {
        return unread::failed(name, error);
    }
    let reason = failed(name, error);
    match error {
        MappedError::Idmap { .. } | MappedError::Overlay { .. } => {
            reason.next("a device that cannot do this sets runtime.user-namespaces = false in its agent.toml")
        }
        MappedError::DeviceElsewhere { .. } => reason.next("choose a target under /dev, or `user: host`"),
        MappedError::Path { .. } | MappedError::Thread(_) => reason,
    }
}

/// Takes away what a workload that is gone had of this.
pub fn remove(ctx: &StartContext, name: &WorkloadName) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    netns::remove(&ctx.places.netns().join(format!("w-{name}")))?;
    let pins = std::fs::read_dir(ctx.places.userns()).into_iter().flatten().flatten();
    for pin in pins {
        let is_its =
            pin.file_name().to_str().and_then(|file| file.split_once('.')).is_some_and(|(of, _)| of == name.as_str());
        if is_its {
            netns::remove(&pin.path())?;
        }
    }
    // What a rollback would need keeps it: copies go with the generation that needs them.
    Ok(ctx.user_ids.release(name, |first| ctx.content.has_copies(first))?)
}
