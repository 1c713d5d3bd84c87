//! Layers are held against what was unpacked, image by image: after an unclean stop those of what is about to run, where a
//! workload starts when its own image has been looked at, and later those that a workload could not be given (`suspect`). A
//! damaged layer is taken away, and the planner has its image fetched again, of which nothing else is missing.

use std::collections::{BTreeMap, BTreeSet};

use edged_model::id::{Digest, WorkloadName};
use edged_model::images::CheckedLayer;
use edged_model::observed::{ImageStatus, InstanceState};
use edged_model::quantity::Bytes;
use edged_model::reason::{Code, Reason};
use edged_model::report::BootCause;
use edged_plan::garbage::needed_images;
use tokio::sync::mpsc;

use super::{Agent, Message, clock};
use crate::content::Content;
use crate::content::reading::Reader;
use crate::content::table::Asked;
use crate::crash_point;
use crate::execute::check;
use crate::execute::pull::ReadyImage;
use crate::store::inline_chain;

impl Agent {
    /// `runs`: workloads that were taken over. What they stand on cannot be replaced under them, and is left out when an
    /// agent before us had begun to look and has started some of them.
    pub(super) fn check_if_unclean(&mut self, runs: usize) {
        let content = self.start_context.content.clone();
        if runs > 0 && !check::is_begun(&content) {
            return;
        }
        let ended_in_order = self.boot_cause == Some(BootCause::Requested);
        match check::is_due(&content, &self.boot_id, ended_in_order) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                let text = format!("whether images are to be checked: {}", inline_chain(&error));
                return self.tell(None, None, &Reason::new(Code::DiskFull, text), "agent");
            }
        }
        crash_point::pass("check-begun");
        let in_use = self.layers_in_use();
        let needed: BTreeSet<String> = needed_images(&self.world.desired).into_iter().map(str::to_owned).collect();
        let mut images = BTreeMap::new();
        for name in needed {
            if let Some(image) = self.images.remove(&name) {
                // Nothing is started from it and nobody fetches it meanwhile.
                let status = ImageStatus::Pulling { done: Bytes(0), total: Bytes(0) };
                self.world.observed.images.insert(name.clone(), status);
                images.insert(name, image);
            }
        }
        let boot_id = self.boot_id.clone();
        if images.is_empty() {
            return end(&content, &in_use, &boot_id);
        }
        // Nobody may be pulling or collecting while layers are taken away.
        self.collected.under_way = true;
        let until = clock::boot_ms().saturating_add(self.config.images.check_time.ms);
        let inbox = self.inbox.clone();
        tokio::task::spawn_blocking(move || {
            // What the kernel checks by itself need not be read now.
            let mut may_read = |asked: Asked| !asked.is_protected && clock::boot_ms() < until;
            let what = Look {
                in_use: InUse::Unseen(&in_use),
                only: None,
                reader: &mut may_read,
                when: "after an unclean stop",
            };
            let ended = look(&content, images, what, &inbox);
            end(&content, &in_use, &boot_id);
            crash_point::pass("check-done");
            // The loop has ended only when the agent ends.
            let _ = inbox.blocking_send(ended);
        });
    }

    /// Of the images that what runs may have been started from.
    pub(super) fn layers_in_use(&self) -> BTreeSet<Digest> {
        let runs = |name: &WorkloadName| {
            let instance = self.world.observed.workloads.get(name);
            let runs =
                |state: &InstanceState| matches!(state, InstanceState::Running { .. } | InstanceState::Stopping { .. });
            instance.is_some_and(|instance| runs(&instance.state))
        };
        let generations = self.world.desired.generations.values();
        let workloads = generations.flat_map(|generation| &generation.manifest.workloads);
        let images = workloads.filter(|(name, _)| runs(name)).filter_map(|(_, spec)| self.images.get(&spec.image));
        images.flat_map(|image| image.layers.iter().copied()).collect()
    }

    pub(super) fn image_checked(&mut self, name: String, image: ReadyImage, is_whole: bool) {
        if is_whole {
            self.world.observed.images.insert(name.clone(), ImageStatus::Ready { digest: image.digest });
            self.images.insert(name, image);
            return;
        }
        self.world.observed.images.remove(&name);
        let written = self.writes.submit(move |store| {
            if let Err(error) = store.forget_image(&name) {
                tracing::error!("image record: {}", inline_chain(&error));
            }
            crash_point::pass("check-written");
        });
        self.warn_if_busy(written);
    }

    pub(super) fn layers_checked(&mut self, checked: &Checked) {
        self.collected.under_way = false;
        if checked.layers.iter().any(|layer| !layer.damage.is_empty()) {
            self.suspects.found(!checked.kept.is_empty());
        }
        self.suspects.left_in_use.extend(&checked.kept);
        for _ in checked.layers.iter().filter(|layer| !layer.damage.is_empty()) {
            self.count(|survived| &mut survived.layers_damaged);
        }
        for why in told(checked) {
            self.tell(None, None, &why, "agent");
        }
    }
}

/// What a check has found.
pub struct Checked {
    layers: Vec<CheckedLayer>,
    /// Damaged, and not taken away because something runs on them.
    kept: BTreeSet<Digest>,
    took_ms: u64,
    /// When it was, or why: the beginning of a sentence.
    when: String,
}

/// Layers that something runs on.
pub(super) enum InUse<'l> {
    /// Not looked at.
    Unseen(&'l BTreeSet<Digest>),
    /// Looked at, and left where they are.
    Kept(&'l BTreeSet<Digest>),
}

/// What is looked at, and how.
pub(super) struct Look<'l> {
    pub(super) in_use: InUse<'l>,
    /// No other layers than these.
    pub(super) only: Option<&'l BTreeSet<Digest>>,
    pub(super) reader: &'l mut dyn Reader,
    /// When it is, or why: the beginning of a sentence.
    pub(super) when: &'l str,
}

/// On a thread of its own. The loop has ended only when the agent ends.
pub(super) fn look(
    content: &Content,
    images: BTreeMap<String, ReadyImage>,
    what: Look<'_>,
    inbox: &mpsc::Sender<Message>,
) -> Message {
    let Look { in_use, only, reader, when } = what;
    let nothing = BTreeSet::new();
    let (unseen, keep) = match in_use {
        InUse::Unseen(layers) => (layers, &nothing),
        InUse::Kept(layers) => (&nothing, layers),
    };
    let is_asked_for = |chain: &Digest| !unseen.contains(chain) && only.is_none_or(|only| only.contains(chain));
    let mut kept = BTreeSet::new();
    let began = clock::boot_ms();
    let mut layers: BTreeMap<Digest, CheckedLayer> = BTreeMap::new();
    let mut copies = Vec::new();
    let names = check::by_layer(&images);
    for (name, image) in images {
        let chains = image.layers.iter().filter(|chain| !layers.contains_key(chain) && is_asked_for(chain));
        let chains: BTreeMap<_, _> =
            chains.map(|chain| (*chain, names.get(chain).cloned().unwrap_or_default())).collect();
        copies.extend(check_copies(content, &chains, keep, reader));
        for layer in check::layers(content, &chains, reader) {
            let is_damaged = !layer.damage.is_empty();
            if is_damaged && keep.contains(&layer.chain) {
                kept.insert(layer.chain);
            } else if is_damaged {
                crash_point::pass("check-found");
                if let Err(error) = content.remove_layer(layer.chain) {
                    tracing::error!("a damaged layer: {}", inline_chain(&error));
                }
                crash_point::pass("check-removed");
            }
            layers.insert(layer.chain, layer);
        }
        let is_damaged =
            |chain| layers.get(chain).is_some_and(|layer| !layer.damage.is_empty() && !kept.contains(chain));
        let is_whole = !image.layers.iter().any(is_damaged);
        let _ = inbox.blocking_send(Message::ImageChecked { name, image: Box::new(image), is_whole });
    }
    if !kept.is_empty() {
        // Replaced before anything runs on it again, at the next start.
        if let Err(error) = check::mark_unclean(content) {
            tracing::error!("{}", inline_chain(&error));
        }
    }
    let took_ms = clock::boot_ms().saturating_sub(began);
    let layers = layers.into_values().chain(copies).collect();
    Message::LayersChecked(Checked { layers, kept, took_ms, when: when.to_owned() })
}

/// Nobody looks again in this boot; but what was left out is looked at in the next.
fn end(content: &Content, left_out: &BTreeSet<Digest>, boot_id: &str) {
    if !left_out.is_empty() {
        return;
    }
    if let Err(error) = check::done(content, boot_id) {
        tracing::error!("the mark of the check: {}", inline_chain(&error));
    }
}

/// A damaged copy is taken away; the next start makes it again, of layers that were looked at.
fn check_copies(
    content: &Content,
    layers: &BTreeMap<Digest, Vec<String>>,
    keep: &BTreeSet<Digest>,
    reader: &mut dyn Reader,
) -> Vec<CheckedLayer> {
    let layers = layers.iter().filter(|(chain, _)| !keep.contains(chain));
    let layers = layers.map(|(chain, images)| (*chain, images.clone())).collect();
    let copies = check::copies(content, &layers, reader);
    for copy in copies.iter().filter(|copy| !copy.damage.is_empty()) {
        if let Err(error) = content.remove_copy(copy.chain, copy.copy.unwrap_or_default()) {
            tracing::error!("a damaged copy of a layer: {}", inline_chain(&error));
        }
    }
    copies
}

/// For the events: what a check has found.
fn told(checked: &Checked) -> Vec<Reason> {
    let Checked { layers, kept, took_ms, when } = checked;
    let damaged = layers.iter().filter(|layer| !layer.damage.is_empty());
    let mut list: Vec<Reason> = damaged
        .map(|layer| {
            let (what, again) = match layer.copy {
                Some(first) => (format!("the copy for the ids from {first} of layer"), "made again"),
                None if kept.contains(&layer.chain) => {
                    ("layer".to_owned(), "fetched again when nothing runs on it, at the next boot at the latest")
                }
                None => ("layer".to_owned(), "fetched again"),
            };
            let text = format!(
                "{what} {} of {} is damaged ({}) and is {again}",
                layer.chain.short(),
                layer.images.join(", "),
                layer.damage.join("; ")
            );
            let next = match layer.copy {
                None if kept.contains(&layer.chain) => "restart what runs on it to have that now",
                _ => "if this comes back, the disk is failing",
            };
            Reason::new(Code::LayerDamaged, text).next(next)
        })
        .collect();
    let sum = |of: fn(&CheckedLayer) -> Bytes| Bytes(layers.iter().map(|layer| of(layer).0).sum()).human();
    let unread = layers.iter().filter(|layer| layer.unread).count();
    let rest = match unread {
        0 => String::new(),
        n => format!("; {n} of them not in full (no time left, or unpacked by an older edged)"),
    };
    let text = format!(
        "{when} {} layers were checked in {took_ms} ms, {} read and {} under fs-verity: {} damaged{rest}",
        layers.len(),
        sum(|layer| layer.read),
        sum(|layer| layer.protected),
        list.len()
    );
    list.push(Reason::new(Code::LayersChecked, text));
    list
}
