//! The word that `edgectl ps` prints for a workload, and why it is so.

use edged_model::action::Plan;
use edged_model::id::WorkloadName;
use edged_model::manifest::Workload;
use edged_model::observed::{Desired, Hold, Instance, InstanceState};
use edged_model::reason::{Code, Reason};
use edged_model::workload::{Health, Phase};

use crate::restart::{self, Verdict};

/// The phase of `name`, and a reason unless it simply runs well.
pub fn phase_of(
    name: &WorkloadName,
    workload: &Workload,
    instance: Option<&Instance>,
    desired: &Desired,
    plan: &Plan,
) -> (Phase, Option<Reason>) {
    let waits_for = plan.waits.iter().find(|wait| wait.workload.as_ref() == Some(name)).map(|wait| wait.why.clone());
    let waiting = |why: Option<Reason>| match why.as_ref().map(|why| why.code) {
        Some(Code::WaitingForImage) => (Phase::Pulling, why),
        _ => (Phase::Waiting, why),
    };
    let is_held = desired.held.get(name) == Some(&Hold::Stopped);
    let not_there = |why| if is_held { (Phase::Stopped, why) } else { waiting(why) };
    let Some(instance) = instance else { return not_there(waits_for) };
    match &instance.state {
        InstanceState::Absent => not_there(waits_for),
        InstanceState::Starting { .. } => (Phase::Starting, None),
        InstanceState::Running { .. } => {
            let unhealthy = instance.health == Health::Unhealthy;
            let why = if unhealthy { instance.history.last_reason.clone().or(waits_for) } else { waits_for };
            (Phase::Running, why)
        }
        InstanceState::Stopping { why, .. } => (Phase::Stopping, Some(why.clone())),
        InstanceState::Ended if is_held => (Phase::Stopped, waits_for),
        InstanceState::Ended => {
            if restart::verdict(name, &workload.restart, &instance.history) != Verdict::Never {
                return waiting(waits_for.or_else(|| instance.history.last_reason.clone()));
            }
            let exit = instance.history.last_exit.as_ref();
            let success = exit.is_some_and(|exit| exit.cause.is_success());
            if success { (Phase::Completed, None) } else { (Phase::Failed, instance.history.last_reason.clone()) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_operator_stopped_is_stopped_though_it_never_ran_in_this_boot() {
        let name = WorkloadName::parse("web").unwrap();
        let (workload, plan) = (Workload::of_image("r.example/web:1"), Plan::default());
        let mut desired = Desired::default();
        assert_eq!(phase_of(&name, &workload, None, &desired, &plan).0, Phase::Waiting);
        desired.held.insert(name.clone(), Hold::Stopped);
        assert_eq!(phase_of(&name, &workload, None, &desired, &plan).0, Phase::Stopped);
        assert_eq!(phase_of(&name, &workload, Some(&Instance::default()), &desired, &plan).0, Phase::Stopped);
    }
}
