//! `update.maxUnavailable`: how many changed workloads may be taken down now.

use edged_model::action::Plan;
use edged_model::generation::Generation;
use edged_model::id::WorkloadName;
use edged_model::observed::{Desired, Hold, ImageStatus, Instance, InstanceState, Observed};
use edged_model::spec::Spec;
use edged_model::workload::Health;

use crate::order;
use crate::restart::{self, Verdict};
use crate::room;

pub struct Turns {
    left: usize,
}

impl Turns {
    pub fn new(active: &Generation, desired: &Desired, observed: &Observed) -> Self {
        let max = usize::try_from(active.manifest.update.max_unavailable.max(1)).unwrap_or(usize::MAX);
        let is_changing = active.manifest.workloads.iter().any(|(name, workload)| {
            observed.workloads.get(name).is_some_and(|instance| {
                matches!(instance.state, InstanceState::Running { .. }) && instance.spec != Some(workload.digest())
            })
        });
        if !is_changing {
            return Self { left: max };
        }
        let down = active.manifest.workloads.iter().filter(|(name, workload)| {
            let instance = observed.workloads.get(*name);
            instance.is_some_and(|instance| has_a_turn(active, name, workload, instance, desired, observed))
        });
        Self { left: max.saturating_sub(down.count()) }
    }

    pub fn take(&mut self) -> bool {
        let had = self.left > 0;
        self.left = self.left.saturating_sub(1);
        had
    }
}

/// Whether `name` is down and will come up without another one being taken down first. One that waits for others, or
/// that failed all its attempts, must not hold them up: they would wait for each other for ever.
fn has_a_turn(
    active: &Generation,
    name: &WorkloadName,
    workload: &Spec,
    instance: &Instance,
    desired: &Desired,
    observed: &Observed,
) -> bool {
    // What has never run takes nobody's turn: only one that was taken down does.
    let Some(spec) = instance.spec else { return false };
    let is_as_wanted = spec == workload.digest();
    match instance.state {
        InstanceState::Starting { .. } | InstanceState::Stopping { .. } => true,
        // Up is who answers his health check.
        InstanceState::Running { .. } => is_as_wanted && instance.health == Health::Starting,
        InstanceState::Ended | InstanceState::Absent => {
            let history = &instance.history;
            let stays = is_as_wanted
                && !matches!(desired.held.get(name), Some(Hold::Restart { .. }))
                && (history.in_a_row > workload.restart.attempts
                    || restart::verdict(name, &workload.restart, history) == Verdict::Never);
            !stays
                && desired.held.get(name) != Some(&Hold::Stopped)
                && matches!(observed.images.get(&workload.image), Some(ImageStatus::Ready { .. }))
                && order::unmet(&active.manifest, observed, name).is_none()
                && room::missing(active, name, desired, observed, &Plan::default()).is_none()
        }
    }
}
