//! The disk: what takes it, and when what is not needed goes. By itself that happens when a generation has become good,
//! every hour after, and when a pull found no room; never while an image is fetched or a generation is on its way.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use edged_model::api::{Answer, GenerationRole};
use edged_model::disk::{DiskUse, ItemFate, NeededBy, Pruned};
use edged_model::generation::{Generation, GenerationState};
use edged_model::id::{Sequence, WorkloadName};
use edged_model::observed::InstanceState;
use edged_model::quantity::Bytes;
use edged_model::reason::{Code, Reason};
use edged_model::scrub::ScrubStatus;
use edged_model::spec::Spec;
use edged_plan::garbage::{Room, Rules};
use tokio::sync::mpsc;

use super::{Agent, Message, answer};
use crate::config::Places;
use crate::content::Content;
use crate::execute::pull::room::Ticket;
use crate::execute::reclaim::{self, Former, Needed, Wish};
use crate::execute::start::StartContext;
use crate::execute::{copies, place};
use crate::observe::disk;
use crate::runtime::mapped::Layers;
use crate::store::inline_chain;
use parts::Holdings;

/// Whose each file is.
mod parts;

const EVERY_MS: u64 = 3_600_000;
/// What is made room for beyond what a pull lacks: file systems take some for themselves.
const ROOM_BESIDE: u64 = 1 << 20;

/// When it was collected, and for which generation.
#[derive(Debug, Default)]
pub struct Collected {
    pub under_way: bool,
    at_boot_ms: Option<u64>,
    generation: Option<Sequence>,
    /// A pull found no room: next time age saves nothing that has to go for it.
    pub room_is_short: bool,
    /// The one under way lets age save nothing.
    makes_room: bool,
    /// Images that found no room, and whether all there was to be had was made since.
    pub no_room: BTreeMap<String, bool>,
}

impl Agent {
    /// Whether nothing is on its way that a collection could disturb.
    fn is_settled(&self) -> bool {
        let desired = &self.world.desired;
        let is_good = self.active().is_some_and(|active| active.state == GenerationState::Good);
        let mut instances = self.world.observed.workloads.values();
        // The room that a candidate lacks is made while it waits: its pulls stand still.
        (is_good && desired.pointers.candidate.is_none() || self.collected.room_is_short)
            && !self.under_way.is_fetching()
            && !self.staging.under_way
            && self.under_way.starts.is_empty()
            && !self.under_way.change
            && !self.collected.under_way
            && !instances.any(|instance| matches!(instance.state, InstanceState::Stopping { .. }))
    }

    pub(super) fn collect_if_due(&mut self) {
        let now = self.now().boot_ms;
        let active = self.world.desired.pointers.active;
        let is_old = self.collected.at_boot_ms.is_none_or(|at| now.saturating_sub(at) >= EVERY_MS);
        let is_due = self.collected.room_is_short || is_old || self.collected.generation != active;
        if !is_due || !self.is_settled() {
            return;
        }
        let wish = self.wish(self.room(), false);
        self.collected = Collected {
            under_way: true,
            at_boot_ms: Some(now),
            generation: active,
            room_is_short: false,
            makes_room: self.collected.room_is_short,
            no_room: std::mem::take(&mut self.collected.no_room),
        };
        let (start_context, inbox) = (self.start_context.clone(), self.inbox.clone());
        tokio::task::spawn_blocking(move || {
            let result = collect(&start_context, &wish);
            let _ = inbox.blocking_send(Message::Collected { result, reply: None });
        });
    }

    fn room(&self) -> Room {
        if !self.collected.room_is_short {
            // Nobody is on the way: who lacked something was withdrawn.
            self.pull_context.promises.take_lacking();
            return Room::Enough;
        }
        match self.pull_context.promises.take_lacking() {
            // A write found no room, or an archive was larger than it said.
            None => Room::Short,
            Some(bytes) => Room::ShortBy(bytes.saturating_add(bytes / 16).saturating_add(ROOM_BESIDE)),
        }
    }

    pub(super) fn wish(&self, room: Room, dry_run: bool) -> Wish {
        Wish {
            images: self.images.clone(),
            needed: self.needed_images(),
            former: self.former_images(),
            copies: self.needed_copies(),
            workloads: self.workloads_known(),
            rules: Rules {
                now: self.now().wall,
                keep_unused_secs: self.config.images.keep_unused.ms / 1000,
                budget: self.config.images.budget.map(|budget| budget.0),
                room,
            },
            dry_run,
        }
    }

    /// Those that are still to come back to, with what they are.
    pub(super) fn needed_generations(&self) -> impl Iterator<Item = (GenerationRole, &Generation)> {
        let pointers = self.world.desired.pointers;
        let mut roles: BTreeMap<Sequence, GenerationRole> = BTreeMap::new();
        let all = [
            (pointers.active, GenerationRole::Active),
            (pointers.last_good, GenerationRole::LastGood),
            (pointers.candidate, GenerationRole::Candidate),
        ];
        for (sequence, role) in all {
            if let Some(sequence) = sequence {
                roles.entry(sequence).or_insert(role);
            }
        }
        let generations = &self.world.desired.generations;
        roles.into_iter().filter_map(|(sequence, role)| Some((role, generations.get(&sequence)?)))
    }

    fn needed_images(&self) -> Needed {
        let mut needed = Needed::new();
        for (role, generation) in self.needed_generations() {
            for (name, workload) in &generation.manifest.workloads {
                note(&mut needed, &workload.image, generation.sequence, role, name);
            }
        }
        needed
    }

    /// When those ended that are remembered and are not come back to any more, by the images that they named.
    fn former_images(&self) -> BTreeMap<String, Former> {
        let desired = &self.world.desired;
        let needed: BTreeSet<Sequence> = desired.pointers.needed().collect();
        let mut former: BTreeMap<String, Former> = BTreeMap::new();
        for generation in desired.generations.values().filter(|generation| !needed.contains(&generation.sequence)) {
            let this = Former { generation: generation.sequence, until: generation.since };
            for workload in generation.manifest.workloads.values() {
                let last = former.entry(workload.image.clone()).or_insert(this);
                *last = if last.until <= this.until { this } else { *last };
            }
        }
        former
    }

    /// All that generations need, or that are here.
    fn workloads_known(&self) -> BTreeSet<WorkloadName> {
        let needed = self.needed_workloads().map(|(name, _)| name);
        needed.chain(self.world.observed.workloads.keys()).cloned().collect()
    }

    fn needed_workloads(&self) -> impl Iterator<Item = (&WorkloadName, &Spec)> {
        let desired = &self.world.desired;
        let generations = desired.pointers.needed().filter_map(|sequence| desired.generations.get(&sequence));
        generations.flat_map(|generation| &generation.manifest.workloads)
    }

    /// Those of `image` that have ids of their own.
    pub(super) fn own_id_users(&self, image: &str) -> Vec<WorkloadName> {
        let users = self.needed_workloads().filter(|(_, workload)| workload.image == image);
        let own = users.filter(|(_, workload)| copies::has_own_ids(&self.start_context, workload));
        own.map(|(name, _)| name.clone()).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Where layers are not copied any more, what is left was started when they were.
    fn needed_copies(&self) -> BTreeMap<u32, Needed> {
        let context = &self.start_context;
        let is_mapped = context.layer_way.known() == Some(Layers::Mapped);
        let mut needed: BTreeMap<u32, Needed> = BTreeMap::new();
        for (role, generation) in self.needed_generations() {
            for (name, workload) in &generation.manifest.workloads {
                let Some(ids) = context.user_ids.known(name) else { continue };
                let root = copies::root_name(workload, Some(ids));
                let runs_on_one = || place::root_paths(&context.places, name, root).upper.exists();
                if copies::has_own_ids(context, workload) && !is_mapped || runs_on_one() {
                    let images = needed.entry(ids.outside).or_default();
                    note(images, &workload.image, generation.sequence, role, name);
                }
            }
        }
        needed
    }

    /// Whom a pull is weighed with: the others of its update. What the active generation lacks waits for no update.
    pub(super) fn ticket(&self, image: &str) -> Ticket {
        let update = self.under_way.update.as_ref().filter(|_| !self.is_active(image));
        update.map_or_else(Ticket::alone, Ticket::another)
    }

    pub(super) fn is_active(&self, image: &str) -> bool {
        self.active().is_some_and(|active| active.manifest.workloads.values().any(|workload| workload.image == image))
    }

    /// Takes note that a pull found no room, which the next collection makes. Whether that was the last word: an update that
    /// does not fit after that either is refused; what runs or is gone back to is tried for ever.
    pub(super) fn found_no_room(&mut self, image: &str, why: &Reason) -> bool {
        if why.code == Code::DiskFull {
            self.collected.room_is_short = true;
            self.pull_context.promises.lack_unknown();
        }
        if why.code != Code::DiskDoesNotFit {
            return false;
        }
        let room_was_made = self.collected.no_room.insert(image.to_owned(), false) == Some(true);
        let is_last_word = room_was_made && !self.is_kept(image);
        self.collected.room_is_short |= !is_last_word;
        if is_last_word {
            // Nobody waits for that much any more.
            self.pull_context.promises.take_lacking();
        }
        is_last_word
    }

    /// An operator's `prune`.
    pub(super) fn prune(&mut self, answers: mpsc::Sender<Answer>, dry_run: bool) {
        if !dry_run && !self.is_settled() {
            let why = Reason::new(Code::Busy, "a generation or an image is on its way, or none is good");
            return answer::error(&answers, why.next("try again when `edgectl status` says `good`"));
        }
        self.collected.under_way |= !dry_run;
        self.collected.makes_room |= !dry_run;
        let wish = self.wish(Room::Asked, dry_run);
        let (start_context, inbox) = (self.start_context.clone(), self.inbox.clone());
        tokio::task::spawn_blocking(move || {
            let result = collect(&start_context, &wish);
            let _ = inbox.blocking_send(Message::Collected { result, reply: Some(answers) });
        });
    }

    pub(super) fn collected(
        &mut self,
        result: Result<(Pruned, Vec<String>), String>,
        reply: Option<mpsc::Sender<Answer>>,
    ) {
        let why = match &result {
            Ok((pruned, _)) if pruned.dry_run => None,
            Ok((pruned, _)) if pruned.items.is_empty() => None,
            Ok((pruned, _)) => {
                let text = format!("{} that no generation needs were taken away", pruned.size.human());
                Some(Reason::new(Code::Pruned, text))
            }
            Err(error) => {
                Some(Reason::new(Code::DiskFull, format!("what is not needed cannot be taken away: {error}")))
            }
        };
        if let Some(why) = &why {
            self.tell(None, None, why, if reply.is_some() { "operator" } else { "agent" });
        }
        if !result.as_ref().is_ok_and(|(pruned, _)| pruned.dry_run) {
            self.collected.under_way = false;
            if self.collected.makes_room && result.as_ref().is_ok_and(|(pruned, _)| is_all(pruned)) {
                self.collected.no_room.values_mut().for_each(|made| *made = true);
            }
        }
        if let Ok((Pruned { dry_run: false, .. }, broken)) = &result {
            for name in broken {
                self.images.remove(name);
                self.world.observed.images.remove(name);
            }
            let names = broken.clone();
            let written = self.writes.submit(move |store| {
                for name in names {
                    if let Err(error) = store.forget_image(&name) {
                        tracing::error!("image record: {}", inline_chain(&error));
                    }
                }
            });
            self.warn_if_busy(written);
        }
        match (reply, result, why) {
            (Some(reply), Ok((pruned, _)), _) => {
                let stays = if pruned.dry_run { pruned.stays } else { Vec::new() };
                answer::one(&reply, Answer::Pruned(Pruned { stays, ..pruned }));
            }
            (Some(reply), Err(_), Some(why)) => answer::error(&reply, why),
            _ => {}
        }
    }

    /// An operator's `df`: looks at every file, on a thread of its own.
    pub(super) fn df(&self, answers: mpsc::Sender<Answer>) {
        let wish = self.wish(Room::Enough, true);
        let (places, content) = (self.start_context.places.clone(), self.start_context.content.clone());
        let (reserve, scrub) = (self.config.limits.disk_reserve, self.scrub_status());
        let trust_root = self.config.device.trust_root.clone();
        tokio::task::spawn_blocking(move || match use_of(&places, &content, &wish, trust_root) {
            Ok(used) => answer::one(&answers, Answer::Df(DiskUse { reserve, scrub, ..used })),
            Err(error) => answer::error(&answers, Reason::new(Code::DiskFull, inline_chain(&error))),
        });
    }
}

fn note(needed: &mut Needed, image: &str, generation: Sequence, role: GenerationRole, workload: &WorkloadName) {
    let by = needed.entry(image.to_owned()).or_default();
    match by.iter_mut().find(|by| by.generation == generation) {
        Some(by) => by.workloads.push(workload.clone()),
        None => by.push(NeededBy { generation, role, workloads: vec![workload.clone()] }),
    }
}

/// Whether a collection left nothing that could go for room.
fn is_all(pruned: &Pruned) -> bool {
    pruned.stays.iter().all(|item| matches!(item.fate, Some(ItemFate::Needed { .. })))
}

fn collect(context: &StartContext, wish: &Wish) -> Result<(Pruned, Vec<String>), String> {
    let collected = caught(|| collect_disk(context, wish));
    // A generation has just become good, or an hour has gone by: what its staging and its starts took is free now.
    edged_sys::memory::give_back();
    collected
}

/// Nothing is fetched until the end of a collection is told: a panic is told like any other failure.
fn caught<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    // What it had in hand is on the disk, which is looked at anew each time.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(in_words(&*panic)))
}

fn in_words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("it ended unexpectedly: {}", text.unwrap_or("nothing is known of it"))
}

fn collect_disk(context: &StartContext, wish: &Wish) -> Result<(Pruned, Vec<String>), String> {
    let collected = reclaim::collect(&context.content, wish).map_err(|error| inline_chain(&error))?;
    if !wish.dry_run {
        let has_copies = |first| context.content.has_copies(first);
        let released = context.user_ids.release_unknown(&wish.workloads, has_copies);
        released.map_err(|error| inline_chain(&error))?;
    }
    Ok(collected)
}

fn use_of(
    places: &Places,
    content: &Content,
    wish: &Wish,
    trust_root: Option<PathBuf>,
) -> Result<DiskUse, crate::content::ContentError> {
    let items = reclaim::survey(content, wish)?;
    let is_kept = |fate: &ItemFate| matches!(fate, ItemFate::Needed { .. } | ItemFate::Awaited { .. });
    let reclaimable = |kind: &str| {
        let items = items.iter().filter(|item| item.kind == kind && !item.fate.as_ref().is_some_and(is_kept));
        Bytes(items.map(|item| item.size.0).sum())
    };
    let holdings = Holdings::look(places, trust_root.as_deref());
    let parts = holdings.parts(reclaimable);
    let layers = items.iter().filter(|item| item.kind == reclaim::LAYER);
    let protected: u64 = layers.map(|layer| content.protected_bytes(layer.digest)).sum();
    let space = disk::space(places.data());
    let (total, free) = space.map_or((Bytes(0), Bytes(0)), |space| (space.total, space.free));
    Ok(DiskUse {
        total,
        free,
        reserve: Bytes(0),
        budget: wish.rules.budget.map(Bytes),
        protected: (content.protects() || protected > 0).then_some(Bytes(protected)),
        scrub: ScrubStatus::default(),
        parts,
        unknown: holdings.unknown(),
        items,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    use edged_model::disk::{DiskItem, Unused};
    use edged_model::id::Digest;
    use edged_model::quantity::Timestamp;

    fn stays(fate: ItemFate) -> Pruned {
        let (kind, digest) = (reclaim::LAYER.to_owned(), Digest::of(b"layer"));
        let item = DiskItem { kind, digest, copy: None, size: Bytes(1), image: None, fate: Some(fate) };
        Pruned { stays: vec![item], ..Pruned::default() }
    }

    #[test]
    fn what_is_young_or_awaited_could_still_go_for_room() {
        let unused = Unused { since: Timestamp(0), generation: None };
        assert!(!is_all(&stays(ItemFate::Young { unused, until: Timestamp(1) })));
        assert!(!is_all(&stays(ItemFate::Awaited { by: Vec::new() })));
        assert!(is_all(&stays(ItemFate::Needed { by: Vec::new() })) && is_all(&Pruned::default()));
    }

    #[test]
    fn a_collection_that_panics_ends_with_its_words() {
        assert_eq!(caught(|| Ok(1)), Ok(1));
        assert_eq!(caught::<()>(|| Err("no".to_owned())), Err("no".to_owned()));
        let number = 3;
        let of_text = caught::<()>(|| panic!("layer {number}"));
        assert_eq!(of_text, Err("it ended unexpectedly: layer 3".to_owned()));
        assert_eq!(caught::<()>(|| panic!("bare")), Err("it ended unexpectedly: bare".to_owned()));
    }
}
