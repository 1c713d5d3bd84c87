//! Images and volumes on the disk: what operators ask of them. Each answer is looked up on a thread of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use edged_model::api::Answer;
use edged_model::id::{Digest, Sequence, VolumeName, WorkloadName};
use edged_model::images::{ImageInfo, ImageState, LayerInfo, LoadedImage, VolumeInfo};
use edged_model::manifest::MountSource;
use edged_model::observed::{Desired, ImageStatus};
use edged_model::quantity::Bytes;
use edged_model::reason::{Code, Reason};
use tokio::sync::mpsc;

use super::pulling::on_own_thread;
use super::{Agent, Message, answer};
use crate::content::Content;
use crate::content::reading::FromTheDisk;
use crate::content::usage::tree_bytes;
use crate::crash_point;
use crate::execute::check;
use crate::execute::pull::load::{self, Loaded, Wish};
use crate::execute::pull::{PullFailure, ReadyImage};
use crate::store::inline_chain;

/// An operator's images are on the disk, or not.
pub struct LoadEnded {
    path: String,
    by: String,
    result: Result<Vec<Loaded>, PullFailure>,
    reply: mpsc::Sender<Answer>,
}

/// Who needs a thing: generations that are still to come back to, and their workloads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Users {
    generations: BTreeSet<Sequence>,
    workloads: BTreeSet<WorkloadName>,
}

fn users<K: Ord>(desired: &Desired, of: impl Fn(&edged_model::manifest::Workload) -> Vec<K>) -> BTreeMap<K, Users> {
    let mut all: BTreeMap<K, Users> = BTreeMap::new();
    for generation in desired.pointers.needed().filter_map(|sequence| desired.generations.get(&sequence)) {
        for (name, workload) in &generation.manifest.workloads {
            for key in of(workload) {
                let users = all.entry(key).or_default();
                users.generations.insert(generation.sequence);
                users.workloads.insert(name.clone());
            }
        }
    }
    all
}

impl Agent {
    pub(super) fn load_images(&mut self, answers: mpsc::Sender<Answer>, path: String, wish: Wish, by: String) {
        if !Path::new(&path).is_absolute() {
            let why = Reason::new(Code::ImageNotFound, format!("{path}: not an absolute path of the device"));
            return answer::error(&answers, why);
        }
        if self.collected.under_way || !self.under_way.loads.insert(path.clone()) {
            let why = Reason::new(Code::Busy, "the disk is being cleared, or this path is being read already");
            return answer::error(&answers, why.next("try again"));
        }
        let (context, inbox) = (self.pull_context.clone(), self.inbox.clone());
        tokio::spawn(async move {
            let (from, asking) = (path.clone(), answers.clone());
            let loading = on_own_thread(move || {
                let tell = |progress: crate::execute::pull::Progress| {
                    // A progress that finds no room is told by the next one.
                    let _ = asking.try_send(Answer::Progress { done: progress.done, total: progress.total });
                };
                load::load(&context, Path::new(&from), &wish, &tell)
            });
            let result = loading.await;
            let ended = LoadEnded { path, by, result, reply: answers };
            // The loop has ended only when the agent ends.
            let _ = inbox.send(Message::Loaded(Box::new(ended))).await;
        });
    }

    pub(super) fn loaded(&mut self, ended: LoadEnded) {
        let LoadEnded { path, by, result, reply } = ended;
        self.under_way.loads.remove(&path);
        let list = match result {
            Ok(list) => list,
            Err(failure) => {
                self.collected.room_is_short |= failure.reason.code == Code::DiskDoesNotFit;
                self.tell(None, None, &failure.reason, &by);
                return answer_last(reply, Answer::Error(failure.reason));
            }
        };
        let mut shown = Vec::new();
        for Loaded { names, image } in list {
            let text = format!("image {} was loaded from {path} and verified", image.digest.short());
            self.tell(None, None, &Reason::new(Code::ImageReady, text), &by);
            let layers = image.layers.len() as u64;
            shown.push(LoadedImage { names: names.clone(), digest: image.digest, layers });
            self.image_came(names, image);
        }
        answer_last(reply, Answer::Loaded(shown));
    }

    /// What a name has become, for this agent and the next.
    pub(super) fn remember_image(&mut self, name: String, image: ReadyImage) {
        let (key, record) = (name.clone(), image.clone());
        let written = self.writes.submit(move |store| {
            if let Err(error) = store.put_image(&key, &record) {
                tracing::error!("image record: {}", inline_chain(&error));
            }
            crash_point::pass("image-stored");
        });
        self.warn_if_busy(written);
        self.images.insert(name, image);
    }

    /// Images that wait for a later try can be had now.
    fn image_came(&mut self, names: Vec<String>, image: ReadyImage) {
        for name in names {
            self.remember_image(name, image.clone());
        }
        let failed = |status: &ImageStatus| matches!(status, ImageStatus::Failed { .. });
        self.world.observed.images.retain(|_, status| !failed(status));
    }

    pub(super) fn list_images(&self, answers: mpsc::Sender<Answer>) {
        let users = users(&self.world.desired, |workload| vec![workload.image.clone()]);
        let (images, states) = (self.images.clone(), self.world.observed.images.clone());
        let content = self.start_context.content.clone();
        tokio::task::spawn_blocking(move || {
            answer::one(&answers, Answer::Images(image_list(&content, &images, &states, &users)));
        });
    }

    pub(super) fn list_volumes(&self, answers: mpsc::Sender<Answer>) {
        let users = users(&self.world.desired, |workload| {
            let volumes = workload.mounts.iter().filter_map(|mount| match &mount.source {
                MountSource::Volume(name) => Some(name.clone()),
                MountSource::Bind(_) | MountSource::Tmpfs { .. } => None,
            });
            volumes.collect()
        });
        let volumes = self.start_context.places.volumes();
        tokio::task::spawn_blocking(move || answer::one(&answers, Answer::Volumes(volume_list(&volumes, &users))));
    }

    pub(super) fn check_images(&self, answers: mpsc::Sender<Answer>, image: Option<String>) {
        let mut images = self.images.clone();
        if let Some(wanted) = &image {
            let is_it = |name: &String| name == wanted || name.split('@').next() == Some(wanted);
            images.retain(|name, image| is_it(name) || image.digest.to_string() == *wanted);
            if images.is_empty() {
                let why = Reason::new(Code::ImageNotFound, format!("{wanted} is not on the disk"));
                return answer::error(&answers, why.next("`edgectl images` lists them"));
            }
        }
        let (content, under_way) = (self.start_context.content.clone(), Arc::clone(&self.checks_by_word));
        tokio::task::spawn_blocking(move || {
            let by_layer = check::by_layer(&images);
            // What the disk has: a program that runs is in the cache as it was when it was read.
            let mut layers = check::layers(&content, &by_layer, &mut FromTheDisk);
            layers.extend(check::copies(&content, &by_layer, &mut FromTheDisk));
            if layers.iter().any(|layer| !layer.damage.is_empty()) {
                // Something may run on it now: it is replaced before anything does, at the next start.
                if let Err(error) = check::mark_unclean(&content) {
                    tracing::error!("{}", inline_chain(&error));
                }
            }
            drop(under_way);
            answer::one(&answers, Answer::Checked(layers));
        });
    }
}

/// Behind answers that may have filled the channel: who asked reads them, or has gone.
fn answer_last(reply: mpsc::Sender<Answer>, last: Answer) {
    tokio::spawn(async move {
        let is_error = matches!(last, Answer::Error(_));
        if reply.send(last).await.is_ok() && !is_error {
            let _ = reply.send(Answer::End).await;
        }
    });
}

fn image_list(
    content: &Content,
    images: &BTreeMap<String, ReadyImage>,
    states: &BTreeMap<String, ImageStatus>,
    users: &BTreeMap<String, Users>,
) -> Vec<ImageInfo> {
    let mut sizes: BTreeMap<Digest, u64> = BTreeMap::new();
    let mut owners: BTreeMap<Digest, BTreeSet<Digest>> = BTreeMap::new();
    let mut names: BTreeMap<Digest, (&ReadyImage, Vec<String>)> = BTreeMap::new();
    for (name, image) in images {
        names.entry(image.digest).or_insert_with(|| (image, Vec::new())).1.push(name.clone());
        for chain in &image.layers {
            sizes.entry(*chain).or_insert_with(|| tree_bytes(&content.layer(*chain)));
            owners.entry(*chain).or_default().insert(image.digest);
        }
    }
    let size = |chain: &Digest| sizes.get(chain).copied().unwrap_or(0);
    let mut list: Vec<ImageInfo> = names
        .into_values()
        .map(|(image, names)| {
            let mut all = Users::default();
            for users in names.iter().filter_map(|name| users.get(name)) {
                all.generations.extend(&users.generations);
                all.workloads.extend(users.workloads.iter().cloned());
            }
            let is_own = |chain: &&Digest| owners.get(chain).is_some_and(|owners| owners.len() == 1);
            ImageInfo {
                names,
                digest: Some(image.digest),
                state: ImageState::Ready,
                size: Bytes(image.layers.iter().map(size).sum()),
                own: Bytes(image.layers.iter().filter(is_own).map(size).sum()),
                layers: image
                    .layers
                    .iter()
                    .map(|chain| {
                        let protected = Bytes(content.protected_bytes(*chain));
                        LayerInfo { chain: *chain, size: Bytes(size(chain)), protected }
                    })
                    .collect(),
                generations: all.generations.into_iter().collect(),
                workloads: all.workloads.into_iter().collect(),
            }
        })
        .collect();
    for (name, status) in states.iter().filter(|(name, _)| !images.contains_key(*name)) {
        let state = match status {
            ImageStatus::Pulling { done, total } => ImageState::Pulling { done: *done, total: *total },
            ImageStatus::Failed { reason, .. } => ImageState::Failed(reason.clone()),
            ImageStatus::Ready { .. } => continue,
        };
        let users = users.get(name).cloned().unwrap_or_default();
        list.push(ImageInfo {
            names: vec![name.clone()],
            digest: None,
            state,
            size: Bytes(0),
            own: Bytes(0),
            layers: Vec::new(),
            generations: users.generations.into_iter().collect(),
            workloads: users.workloads.into_iter().collect(),
        });
    }
    list
}

fn volume_list(volumes: &Path, users: &BTreeMap<VolumeName, Users>) -> Vec<VolumeInfo> {
    let mut list: Vec<VolumeInfo> = std::fs::read_dir(volumes)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = VolumeName::parse(entry.file_name().to_str()?).ok()?;
            let users = users.get(&name).cloned().unwrap_or_default();
            Some(VolumeInfo {
                size: Bytes(tree_bytes(&entry.path())),
                name,
                generations: users.generations.into_iter().collect(),
                workloads: users.workloads.into_iter().collect(),
            })
        })
        .collect();
    list.sort_by(|a, b| a.name.cmp(&b.name));
    list
}
