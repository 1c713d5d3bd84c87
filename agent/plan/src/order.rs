//! Dependencies first. A cycle is refused when a manifest is validated; should one come here all the same, its members
//! come last, in the order of their names, and wait for each other with a reason.

use edged_model::action::{Action, Plan};
use edged_model::id::WorkloadName;
use edged_model::manifest::{DependsOn, Manifest};
use edged_model::observed::{InstanceState, Observed};
use edged_model::reason::{Code, Reason};
use edged_model::workload::Health;

use crate::restart;

/// The workloads of `manifest`, each after what it depends on.
pub fn start_order(manifest: &Manifest) -> Vec<&WorkloadName> {
    let mut order: Vec<&WorkloadName> = Vec::with_capacity(manifest.workloads.len());
    let mut rest: Vec<&WorkloadName> = manifest.workloads.keys().collect();
    while !rest.is_empty() {
        let ready = |name: &&WorkloadName| {
            let mut needs = manifest.workloads[*name].depends_on.keys();
            needs.all(|need| order.contains(&need) || !manifest.workloads.contains_key(need))
        };
        let (next, later): (Vec<_>, Vec<_>) = rest.iter().partition(|name| ready(name));
        if next.is_empty() {
            order.extend(rest);
            break;
        }
        order.extend(next);
        rest = later;
    }
    order
}

/// What `name` still waits for, if anything.
pub fn unmet(manifest: &Manifest, observed: &Observed, name: &WorkloadName) -> Option<Reason> {
    let workload = manifest.workloads.get(name)?;
    workload.depends_on.iter().find_map(|(need, condition)| {
        // What still runs as an older generation had it does not count: it is about to be taken down.
        let wanted = manifest.workloads.get(need).map(edged_model::spec::Spec::digest);
        let instance = observed.workloads.get(need).filter(|instance| instance.spec == wanted);
        let running = instance.is_some_and(|i| matches!(i.state, InstanceState::Running { .. }));
        let (met, word) = match condition {
            DependsOn::Started => (running, "be started"),
            DependsOn::Healthy => {
                let healthy = instance.is_some_and(|i| matches!(i.health, Health::Healthy | Health::Unchecked));
                (running && healthy, "be healthy")
            }
            DependsOn::Completed => {
                let done = instance.is_some_and(|i| {
                    i.state == InstanceState::Ended
                        && !restart::ended_by_us(&i.history)
                        && i.history.last_exit.as_ref().is_some_and(|exit| exit.cause.is_success())
                });
                (done, "end with exit code 0")
            }
        };
        (!met).then(|| Reason::new(Code::WaitingForDependency, format!("{name} waits for {need} to {word}")))
    })
}

/// What `name` needs and this very plan stops or starts anew: it is up no longer.
pub fn moved(manifest: &Manifest, plan: &Plan, name: &WorkloadName) -> Option<Reason> {
    let workload = manifest.workloads.get(name)?;
    workload.depends_on.keys().find_map(|need| {
        let is_moved = plan.actions.iter().any(|action| match action {
            Action::Start { workload, .. } | Action::Stop { workload, .. } => workload == need,
            Action::Pull { .. }
            | Action::Resize { .. }
            | Action::Kill { .. }
            | Action::Remove { .. }
            | Action::Transition { .. } => false,
        });
        is_moved
            .then(|| Reason::new(Code::WaitingForDependency, format!("{name} waits for {need}, which is restarted")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::manifest::Workload;
    use std::collections::BTreeMap;

    fn manifest(edges: &[(&str, &[&str])]) -> Manifest {
        let workload = |needs: &[&str]| Workload {
            depends_on: needs.iter().map(|n| (WorkloadName::parse(n).unwrap(), DependsOn::Started)).collect(),
            ..Workload::of_image("r/i:1")
        };
        let workloads: BTreeMap<_, _> =
            edges.iter().map(|(name, needs)| (WorkloadName::parse(name).unwrap(), workload(needs).into())).collect();
        Manifest { workloads, ..Manifest::empty() }
    }

    #[test]
    fn dependencies_come_first_and_cycles_end() {
        let chain = manifest(&[("a", &["b"]), ("b", &["c"]), ("c", &[])]);
        let order: Vec<_> = start_order(&chain).iter().map(|n| n.as_str()).collect();
        assert_eq!(order, ["c", "b", "a"]);
        let cycle = manifest(&[("a", &["b"]), ("b", &["a"]), ("c", &[])]);
        assert_eq!(start_order(&cycle).len(), 3);
    }
}
