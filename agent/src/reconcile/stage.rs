//! The copies of layers that a candidate needs of images that were there already (those of a pulled image are made with the
//! pull). They are weighed together and made before the candidate counts as staged, so that one that cannot fit is refused
//! with nothing switched. What a start finds missing it still makes itself.

use edged_model::generation::GenerationState;
use edged_model::id::{Sequence, WorkloadName};
use edged_model::quantity::Now;

use super::{Agent, Message};
use crate::execute::copies;
use crate::execute::pull::{PullFailure, ReadyImage};
use crate::runtime::mapped::Layers;

/// The key of this among what failed, and among what found no room; no workload and no image has such a name.
const COPIES: &str = " layer copies";

/// What is under way of it.
#[derive(Debug, Default)]
pub(super) struct Staging {
    pub under_way: bool,
    /// The candidate whose copies were tried last.
    tried: Option<Sequence>,
    /// The candidate that has all of its copies.
    done: Option<Sequence>,
}

impl Agent {
    /// Whether `generation` has its copies; if not, they are being made, or will be tried again.
    pub(super) fn has_copies(&mut self, generation: Sequence, now: Now) -> bool {
        if self.staging.done == Some(generation) || self.start_context.layer_way.known() == Some(Layers::Mapped) {
            return true;
        }
        let users = self.users_of_copies(generation);
        if users.is_empty() {
            return true;
        }
        if self.staging.tried != Some(generation) {
            self.try_copies_anew();
            self.staging.tried = Some(generation);
        }
        let may = self.under_way.failed.get(COPIES).is_none_or(|backoff| backoff.is_over(now.boot_ms));
        if !may || self.staging.under_way || self.collected.under_way {
            return false;
        }
        self.staging.under_way = true;
        let (context, inbox) = (self.start_context.clone(), self.inbox.clone());
        tokio::task::spawn_blocking(move || {
            let result = Box::new(copies::stage(&context, &users));
            let _ = inbox.blocking_send(Message::CopiesMade { generation, result });
        });
        false
    }

    fn users_of_copies(&self, generation: Sequence) -> Vec<(WorkloadName, ReadyImage)> {
        let workloads = self.world.desired.generations.get(&generation).map(|known| &known.manifest.workloads);
        let own = workloads.into_iter().flatten().filter(|(_, one)| copies::has_own_ids(&self.start_context, one));
        own.filter_map(|(name, workload)| Some((name.clone(), self.images.get(&workload.image)?.clone()))).collect()
    }

    pub(super) fn copies_made(&mut self, generation: Sequence, result: Result<(), PullFailure>) {
        self.staging.under_way = false;
        if self.world.desired.pointers.candidate != Some(generation) {
            return;
        }
        let Err(failure) = result else {
            self.staging.done = Some(generation);
            return self.try_copies_anew();
        };
        if failure.permanent || self.found_no_room(COPIES, &failure.reason) {
            self.try_copies_anew();
            return self.change(generation, GenerationState::Rejected, &failure.reason, self.now());
        }
        self.tell(None, Some(generation), &failure.reason, "agent");
        self.try_later(COPIES);
    }

    /// What the copies of one candidate did not find room for says nothing of the next one's.
    pub(super) fn try_copies_anew(&mut self) {
        self.under_way.failed.remove(COPIES);
        self.collected.no_room.remove(COPIES);
    }
}
