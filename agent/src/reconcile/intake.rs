//! A signed manifest was offered: by the fleet, by a push, by hand. It is verified, written down, and only then wanted.

use edged_model::generation::{Generation, GenerationState};
use edged_model::id::Sequence;
use edged_model::manifest::Manifest;
use edged_model::observed::ImageStatus;
use edged_model::reason::{Code, Reason};
use edged_model::report::Refusal;

use edged_plan::transition;

use super::{Agent, Message};
use crate::crash_point;
use crate::execute::start;
use crate::report::{News, Offer, Taken};
use crate::verify::{self, DeviceFacts, Verdict};

/// A manifest that was not refused.
enum Considered {
    BeingWritten(Sequence),
    /// The very one that the device has.
    Known(Sequence),
}

impl Agent {
    pub(super) async fn receive(&mut self, message: Message) {
        match message {
            Message::Pulled { image, result } => self.pulled(image, *result),
            Message::PullProgress { image, progress } => {
                if let Some(ImageStatus::Pulling { done, total }) = self.world.observed.images.get_mut(&image) {
                    (*done, *total) = (progress.done, progress.total);
                }
            }
            Message::CopiesMade { generation, result } => self.copies_made(generation, *result),
            Message::Started { workload, spec, result } => self.started(workload, &spec, result).await,
            Message::Changed { change, failed, activated } => self.changed(*change, failed, activated),
            Message::ImageChecked { name, image, is_whole } => self.image_checked(name, *image, is_whole),
            Message::LayersChecked(checked) => self.layers_checked(&checked),
            Message::Scrubbed(scrubbed) => self.scrubbed(&scrubbed),
            Message::KernelSays(file) => self.kernel_says(file),
            Message::Loaded(ended) => self.loaded(*ended),
            Message::Collected { result, reply } => self.collected(result, reply),
            Message::RootWritten { root, by, failed, reply } => self.root_written(*root, &by, failed, reply),
            Message::ResetBegun(result) => self.reset_begun(result),
            Message::ResetEnded(result) => self.reset_ended(result),
            Message::EndWritten { workload } => self.end_written(&workload).await,
            Message::Resized { workload, spec, result } => self.resized(workload, &spec, result).await,
            Message::Removed { workload, failed } => self.removed(&workload, failed),
            Message::Probed { workload, pid, outcome, took } => {
                self.took(&workload, &outcome, took);
                self.probed(&workload, pid, &outcome);
            }
            Message::Offer(offer) => self.offer(offer),
            Message::Again(again) => self.again(*again),
            Message::TimeHeard(heard) => self.time_heard(heard).await,
            Message::Locks(files) => self.locks_seen(files),
            Message::Upgrade { text, by } => self.upgrade_now(text, &by),
            Message::Network(text) => self.tell(None, None, &Reason::new(Code::Network, text), "agent"),
        }
    }

    fn probed(&mut self, name: &edged_model::id::WorkloadName, pid: i32, outcome: &crate::observe::ProbeOutcome) {
        let check = self.active().and_then(|active| active.manifest.workloads.get(name)?.health.clone());
        let Some(check) = check else { return };
        // One that is frozen cannot answer.
        if self.is_paused(name) {
            return;
        }
        let now = self.now();
        if let Some(why) = self.world.probed(name, pid, &check, outcome, now) {
            self.world.instance(name).history.last_reason = Some(why.clone());
            self.tell(Some(name), self.world.desired.pointers.active, &why, "probe");
        }
    }

    pub(super) fn offer(&mut self, offer: Box<Offer>) {
        if self.under_way.change && self.under_way.offer.is_none() {
            self.under_way.offer = Some(offer);
            return;
        }
        let Offer { envelope, chain, by, reply } = *offer;
        if edged_model::envelope::open(&envelope, edged_model::envelope::Kind::TrustRoot).is_ok() {
            return self.offer_roots(std::iter::once(envelope).chain(chain).collect(), &by, reply);
        }
        let verdict = match self.consider(envelope, &by) {
            // Taken is what is on the disk: until then nobody is told so.
            Ok(Considered::BeingWritten(sequence)) => {
                self.under_way.acknowledge = Some((sequence, reply));
                return;
            }
            Ok(Considered::Known(sequence)) => Ok(Taken::Generation(sequence)),
            Err(reason) => Err(reason),
        };
        // Who pushed may have gone.
        let _ = reply.send(verdict);
    }

    /// Verifies and takes a manifest. What runs is not touched by a refusal.
    fn consider(&mut self, envelope: Vec<u8>, by: &str) -> Result<Considered, Reason> {
        let busy = || Reason::new(Code::Busy, "another change is being written").next("push it again");
        if let Some(reset) = self.refused_by_reset() {
            return Err(reset);
        }
        if self.under_way.change {
            return Err(busy());
        }
        let pointers = self.world.desired.pointers;
        let facts = DeviceFacts {
            id: self.device.clone(),
            groups: self.config.device.groups.clone(),
            highest_sequence: pointers.highest_sequence,
            newest_digest: self.newest_digest(),
            now: self.now().wall,
            knows_time: self.knows_time(),
        };
        let verdict = verify::manifest(&envelope, &self.root, &facts).and_then(|verdict| match verdict {
            Verdict::Accepted(verified) => match start::refusal(&verified.manifest, &self.config.allow) {
                Some(reason) => Err(reason),
                None => edged_plan::fit::fits(&verified.manifest, &self.world.observed.capacity)
                    .map(|()| Verdict::Accepted(verified)),
            },
            known @ Verdict::Known { .. } => Ok(known),
        });
        let verified = match verdict {
            Ok(Verdict::Accepted(verified)) => verified,
            Ok(Verdict::Known { .. }) => return self.known(pointers.highest_sequence).map(Considered::Known),
            Err(reason) => {
                self.refuse(&format!("manifest {}", edged_model::id::Digest::of(&envelope).short()), &reason);
                self.tell(None, None, &reason, by);
                return Err(reason);
            }
        };
        let (sequence, issued) = (verified.manifest.sequence, verified.manifest.issued);
        let now = self.now().wall;
        let generation = Generation {
            received_boot: self.boot_id.clone(),
            ..Generation::received(verified.manifest, verified.digest, now)
        };
        let signers = verified.signers.iter().map(edged_model::id::Digest::short).collect::<Vec<_>>().join(", ");
        let why = Reason::new(
            Code::Verified,
            format!("generation {sequence} is signed by {signers} and meant for this device"),
        );
        self.tell(None, Some(sequence), &why, by);
        self.try_images_anew(&generation.manifest);
        crash_point::pass("manifest-verified");
        let change = transition::received(&self.world.desired, generation, now);
        self.write_change(change, Some((sequence, envelope)), None, false);
        if !self.under_way.change {
            return Err(busy());
        }
        self.raise_floor(issued);
        Ok(Considered::BeingWritten(sequence))
    }

    /// A new generation begins without the failures of the one before: the operator may have signed the image, or put
    /// the registry right, and that is why there is a new one.
    pub(super) fn try_images_anew(&mut self, manifest: &Manifest) {
        self.try_copies_anew();
        // What the one before lacked is not made room for any more.
        self.collected.room_is_short = false;
        self.pull_context.promises.take_lacking();
        let images = &mut self.world.observed.images;
        for workload in manifest.workloads.values() {
            if matches!(images.get(&workload.image), Some(ImageStatus::Failed { .. })) {
                images.remove(&workload.image);
            }
            self.collected.no_room.remove(&workload.image);
        }
    }

    /// The very manifest the device has. One that failed here is not tried again: that has to be asked for anew.
    fn known(&self, sequence: Sequence) -> Result<Sequence, Reason> {
        let generation = self.world.desired.generations.get(&sequence);
        let has_failed = |state| matches!(state, GenerationState::RolledBack | GenerationState::Rejected);
        let Some(failed) = generation.filter(|generation| has_failed(generation.state)) else { return Ok(sequence) };
        let (code, text) = match &failed.reason {
            Some(why) => (why.code, format!("generation {sequence} was tried already: {}", why.text)),
            None => (Code::RolledBack, format!("generation {sequence} was tried already")),
        };
        Err(Reason::new(code, text).next(format!(
            "correct it and sign it with sequence {} or higher, or `edgectl retry {sequence}`",
            sequence.0.saturating_add(1)
        )))
    }

    /// Remembers what was refused last, for the status and the report.
    pub(super) fn refuse(&mut self, what: &str, why: &Reason) {
        let at = self.now().wall;
        self.refused = Some(Refusal { at, what: what.to_owned(), why: why.clone() });
        self.fleet.changed(News::Fresh);
    }
}
