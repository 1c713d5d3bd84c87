//! A workload could not be given what its image has: the disk, or fs-verity, refused to read it. It is seen by how the
//! workload ended, and by what the kernel says of files that fs-verity guards (`observe::kernel_log`). All of its layers are
//! then read and held against what was unpacked, and what is damaged is fetched again, it alone.

use std::collections::{BTreeMap, BTreeSet};

use edged_model::id::{Digest, WorkloadName};
use edged_model::manifest::Workload;
use edged_model::observed::ImageStatus;
use edged_model::quantity::Bytes;
use edged_model::reason::Code;
use edged_model::workload::ExitCause;
use edged_plan::garbage::needed_images;
use nix::sys::signal::Signal;

use super::check::{self, InUse, Look};
use super::{Agent, StartFailure, clock};
use crate::content::reading::FromTheDisk;
use crate::execute::pull::ReadyImage;
use crate::execute::unread::is_of_the_image;
use crate::runtime::keeper_link::LaunchError;

/// A workload may end so by its own fault, again and again: its image is not read more often than this.
const AGAIN_MS: u64 = 3_600_000;

/// All images, among those that were looked at; none is called so.
const ALL: &str = "(all)";

/// Whether a start failed because something of the image could not be read.
pub(super) fn is_unread(failure: &StartFailure, workload: &Workload) -> bool {
    match failure {
        StartFailure::Reason(reason) => reason.code == Code::LayerDamaged,
        StartFailure::Launch(LaunchError::Failed { stage, errno }) => is_of_the_image(stage, *errno, workload),
        StartFailure::Launch(LaunchError::Link(_)) => false,
    }
}

/// Whether a run may have ended because a page of its program could not be read: by SIGBUS, or as a shell or an init tells
/// of one that did.
pub(super) fn may_be_unread(cause: &ExitCause) -> bool {
    const SIGBUS: i32 = Signal::SIGBUS as i32;
    match cause {
        ExitCause::Signal { signal, .. } => *signal == SIGBUS,
        ExitCause::Code { code } => *code == 128 + SIGBUS,
        _ => false,
    }
}

/// What is to be looked at.
#[derive(Debug, Default)]
pub struct Suspects {
    workloads: BTreeSet<WorkloadName>,
    /// A file that fs-verity refused to read.
    kernel_said: Option<String>,
    /// What the scrub found damaged, and what of that something ran on when it was last looked at.
    scrubbed: BTreeSet<Digest>,
    pub(super) left_in_use: BTreeSet<Digest>,
    /// Images that were looked at, and when.
    looked_at_boot_ms: BTreeMap<String, u64>,
}

impl Suspects {
    fn was_looked_at(&self, image: &str, now: u64) -> bool {
        self.looked_at_boot_ms.get(image).is_some_and(|at| now.saturating_sub(*at) < AGAIN_MS)
    }

    /// Damage was found: what the kernel said is explained. What was left because something ran on it is looked at when a
    /// workload fails of it the next time.
    pub(super) fn found(&mut self, is_left: bool) {
        self.kernel_said = None;
        if is_left {
            self.looked_at_boot_ms.retain(|image, _| image == ALL);
        }
    }
}

impl Agent {
    /// Has the image of a workload looked at, now or at a heartbeat.
    pub(super) fn suspect(&mut self, name: &WorkloadName) {
        self.suspects.workloads.insert(name.clone());
        self.look_at_suspects();
    }

    pub(super) fn look_at_suspects(&mut self) {
        for name in self.suspects.workloads.clone() {
            if self.look_at_image_of(&name) {
                self.suspects.workloads.remove(&name);
            }
        }
    }

    /// False: not now.
    fn look_at_image_of(&mut self, name: &WorkloadName) -> bool {
        let workload = self.active().and_then(|active| active.manifest.workloads.get(name));
        let Some(image) = workload.map(|workload| workload.image.clone()) else { return true };
        let now = clock::boot_ms();
        // What is not here is fetched and checked as it comes.
        let Some(layers) = self.images.get(&image).map(|ready| ready.layers.clone()) else { return true };
        if self.suspects.was_looked_at(&image, now) {
            return true;
        }
        let shares = |other: &ReadyImage| other.layers.iter().any(|layer| layers.contains(layer));
        // What shares a layer may not start meanwhile either.
        let images = self.images.iter().filter(|(_, other)| shares(other)).map(|(name, _)| name.clone()).collect();
        let is_looked_at = self.look_at(&images, None, &format!("because {name} could not read its files"));
        if is_looked_at {
            self.suspects.looked_at_boot_ms.insert(image, now);
        }
        is_looked_at
    }

    /// The kernel has refused to read a file of the data disk. Looked into at a heartbeat: whoever read it may be about to
    /// end of it, and what nobody runs on can be replaced at once.
    pub(super) fn kernel_says(&mut self, file: String) {
        self.suspects.kernel_said.get_or_insert(file);
    }

    pub(super) fn look_at_what_the_kernel_said(&mut self) {
        let Some(file) = self.suspects.kernel_said.clone() else { return };
        let now = clock::boot_ms();
        if self.suspects.was_looked_at(ALL, now) {
            self.suspects.kernel_said = None;
            return;
        }
        let needed = needed_images(&self.world.desired).into_iter().map(str::to_owned).collect();
        let when = format!("because fs-verity refused to read a file ({file})");
        if self.look_at(&needed, None, &when) {
            self.suspects.kernel_said = None;
            self.suspects.looked_at_boot_ms.insert(ALL.to_owned(), now);
        }
    }

    /// The scrub only reads. What it found is looked at once more, by whom nothing can be started from it meanwhile.
    pub(super) fn scrub_found(&mut self, layer: Digest) {
        // Nothing has changed about it as long as something runs on it.
        if !self.suspects.left_in_use.contains(&layer) {
            self.suspects.scrubbed.insert(layer);
            self.look_at_what_the_scrub_found();
        }
    }

    /// Also what was left because something ran on it, once nothing does.
    pub(super) fn look_at_what_the_scrub_found(&mut self) {
        if !self.suspects.left_in_use.is_empty() {
            let in_use = self.layers_in_use();
            let left = std::mem::take(&mut self.suspects.left_in_use);
            let (left, freed): (BTreeSet<_>, BTreeSet<_>) = left.into_iter().partition(|layer| in_use.contains(layer));
            self.suspects.left_in_use = left;
            self.suspects.scrubbed.extend(freed);
        }
        if self.suspects.scrubbed.is_empty() {
            return;
        }
        let has_one = |image: &ReadyImage| image.layers.iter().any(|layer| self.suspects.scrubbed.contains(layer));
        let images = self.images.iter().filter(|(_, image)| has_one(image));
        let names: BTreeSet<String> = images.map(|(name, _)| name.clone()).collect();
        // What no image has any more is collected.
        if names.is_empty() || self.look_at(&names, Some(&self.suspects.scrubbed.clone()), "where damage was seen") {
            self.suspects.scrubbed.clear();
        }
    }

    /// False: not now; whoever has a reason has it again.
    fn look_at(&mut self, names: &BTreeSet<String>, only: Option<&BTreeSet<Digest>>, when: &str) -> bool {
        // Nobody may be pulling, starting or collecting while layers are taken away.
        if self.collected.under_way || self.under_way.is_fetching() || !self.under_way.starts.is_empty() {
            return false;
        }
        let in_use = self.layers_in_use();
        let mut images = BTreeMap::new();
        for name in names {
            if let Some(image) = self.images.remove(name) {
                let status = ImageStatus::Pulling { done: Bytes(0), total: Bytes(0) };
                self.world.observed.images.insert(name.clone(), status);
                images.insert(name.clone(), image);
            }
        }
        if images.is_empty() {
            return false;
        }
        self.collected.under_way = true;
        let (content, inbox, when) = (self.start_context.content.clone(), self.inbox.clone(), when.to_owned());
        let only = only.cloned();
        tokio::task::spawn_blocking(move || {
            let what =
                Look { in_use: InUse::Kept(&in_use), only: only.as_ref(), reader: &mut FromTheDisk, when: &when };
            let ended = check::look(&content, images, what, &inbox);
            // The loop has ended only when the agent ends.
            let _ = inbox.blocking_send(ended);
        });
        true
    }
}
