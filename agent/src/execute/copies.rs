//! The layers of a workload with ids of its own. Shared by idmapped mounts; where the kernel or the file system cannot do
//! that, copied once for each range of ids, while the image is staged or, at the latest, before the start. Whether it can
//! is tried out once, with directories beside the layers.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use edged_model::id::{Digest, WorkloadName};
use edged_model::keeper::IdMapping;
use edged_model::manifest::Workload;
use edged_model::quantity::Bytes;
use edged_model::reason::{Code, Reason};
use edged_model::spec::Spec;

use super::pull::room::{Disk, Need, Promises, weigh_alone};
use super::pull::{PullFailure, ReadyImage};
use super::start::{StartContext, failed};
use super::unread;
use crate::config::Places;
use crate::content::copies::{CopyError, Owners};
use crate::content::usage::tree_bytes;
use crate::runtime::mapped::{self, Layers};
use crate::store::inline_chain;

/// How layers reach workloads with ids of their own on this device.
#[derive(Debug)]
pub struct LayerWay {
    may_map: bool,
    found: OnceLock<Layers>,
    promises: Arc<Promises>,
    disk_reserve: Bytes,
}

impl LayerWay {
    /// `may_map`: `runtime.idmapped-layers`.
    pub fn new(may_map: bool, promises: Arc<Promises>, disk_reserve: Bytes) -> Self {
        Self { may_map, found: OnceLock::new(), promises, disk_reserve }
    }

    /// `runtime.idmapped-layers`, for volumes too.
    pub fn may_map(&self) -> bool {
        self.may_map
    }

    /// What was found out; `None` as long as nobody had to know.
    pub fn known(&self) -> Option<Layers> {
        if self.may_map { self.found.get().copied() } else { Some(Layers::Copied) }
    }

    /// Finds out. What goes wrong on the way goes wrong again when it is done in earnest, and is told then.
    fn find(&self, places: &Places, ids: IdMapping) -> Layers {
        if let Some(known) = self.known() {
            return known;
        }
        let Ok(made) = edged_sys::owned::namespaces(&[ids], &[ids], false) else { return Layers::Mapped };
        let directories = [places.layers(), places.content()].map(|path| path.to_string_lossy().into_owned());
        let way = match mapped::takes_mapped_layers(directories, made.user, ids) {
            Ok(true) => Layers::Mapped,
            Ok(false) => {
                tracing::info!("idmapped layers cannot be mounted here: each workload gets a copy with its own ids");
                Layers::Copied
            }
            Err(_) => return Layers::Mapped,
        };
        *self.found.get_or_init(|| way)
    }
}

/// Whether `workload` has ids of its own here.
pub fn has_own_ids(ctx: &StartContext, workload: &Workload) -> bool {
    ctx.user_namespaces && !workload.has_host_ids()
}

/// By what the writable root of a workload is named: what it holds has the ids of one way, and of one range.
pub fn root_name(workload: &Spec, copied: Option<IdMapping>) -> Digest {
    let frame = workload.digest_without_limits();
    copied.map_or(frame, |ids| Digest::of(format!("{frame} {}", ids.outside).as_bytes()))
}

/// The ids of a workload, and how its layers reach it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnIds {
    pub ids: IdMapping,
    pub layers: Layers,
}

impl OwnIds {
    pub fn copied(self) -> Option<IdMapping> {
        (self.layers == Layers::Copied).then_some(self.ids)
    }
}

/// What a start needs: the copies are there, if it needs any. Blocking.
pub fn ready(ctx: &StartContext, name: &WorkloadName, image: &ReadyImage) -> Result<OwnIds, Reason> {
    let ids = ctx.user_ids.of(name).map_err(|error| failed(name, &error))?;
    let layers = ctx.layer_way.find(&ctx.places, ids);
    if layers == Layers::Copied {
        let promises = ctx.layer_way.promises.of_a_start();
        copy(ctx, &[User { name, image, ids }], &promises).map_err(|failure| failure.reason)?;
    }
    Ok(OwnIds { ids, layers })
}

/// The copies that these workloads will need, weighed together, before anything that runs is touched. Blocking.
pub fn stage(ctx: &StartContext, users: &[(WorkloadName, ReadyImage)]) -> Result<(), PullFailure> {
    let passing = |reason| PullFailure { reason, permanent: false, retry_after: None };
    let mut all = Vec::with_capacity(users.len());
    for (name, image) in users {
        let ids = ctx.user_ids.of(name).map_err(|error| passing(failed(name, &error)))?;
        if ctx.layer_way.find(&ctx.places, ids) == Layers::Mapped {
            return Ok(());
        }
        all.push(User { name, image, ids });
    }
    copy(ctx, &all, &ctx.layer_way.promises)
}

/// Where the layers of a copied root lie, lowest first.
pub fn paths(ctx: &StartContext, image: &ReadyImage, ids: IdMapping) -> Vec<PathBuf> {
    image.layers.iter().map(|chain| ctx.content.copy(*chain, ids.outside)).collect()
}

/// Whose copies they are.
struct User<'u> {
    name: &'u WorkloadName,
    image: &'u ReadyImage,
    ids: IdMapping,
}

fn copy(ctx: &StartContext, users: &[User<'_>], promises: &Promises) -> Result<(), PullFailure> {
    let missing: Vec<(&User<'_>, Digest)> = users
        .iter()
        .flat_map(|user| user.image.layers.iter().map(move |chain| (user, *chain)))
        .filter(|(user, chain)| !ctx.content.has_copy(*chain, user.ids.outside))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let what = in_words(&missing);
    // A layer is copied once for each range.
    let needs = missing.iter().map(|(user, chain)| {
        let copy = Digest::of(format!("{chain} {}", user.ids.outside).as_bytes());
        (copy, Need::known(tree_bytes(&ctx.content.layer(*chain))))
    });
    let disk = Disk::of(ctx.places.data(), ctx.layer_way.disk_reserve);
    let promise = weigh_alone(&what, needs, promises, disk)?;
    for (user, chain) in missing {
        let owners = Owners { first: user.ids.outside, count: user.ids.count };
        ctx.content.copy_layer(chain, owners, promise.left()).map_err(|error| match error {
            CopyError::DiskFull { .. } => promise.was_too_small(&what),
            error => {
                let text = format!("{what}: {}", inline_chain(&error));
                // Which of the two disks' ends it was is seen when the layers are looked at.
                let code = if unread::is_of_the_disk(&error) { Code::LayerDamaged } else { Code::DiskFull };
                PullFailure { reason: Reason::new(code, text), permanent: false, retry_after: None }
            }
        })?;
    }
    Ok(())
}

fn in_words(missing: &[(&User<'_>, Digest)]) -> String {
    let mut names: Vec<&str> = missing.iter().map(|(user, _)| user.name.as_str()).collect();
    names.dedup();
    match names[..] {
        [name] => format!("{name} (a copy of its image's layers with its own ids)"),
        _ => format!("a set of layer copies (for {}, each with its own ids)", names.join(", ")),
    }
}
