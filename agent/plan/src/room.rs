//! The budget in the middle of a switch: what starts must fit beside what an older generation left running. A generation
//! as a whole fits, or it would not have been staged (`fit.rs`).

use edged_model::action::{Action, Plan};
use edged_model::generation::Generation;
use edged_model::id::{Digest, WorkloadName};
use edged_model::manifest::Resources;
use edged_model::observed::{Desired, Instance, InstanceState, Observed};
use edged_model::quantity::{Bytes, MilliCpu};
use edged_model::reason::{Code, Reason};
use edged_model::spec::Spec;

/// Why `name` cannot start yet: it does not fit beside what is about to go. `plan`: what starts in this very round.
pub fn missing(
    active: &Generation,
    name: &WorkloadName,
    desired: &Desired,
    observed: &Observed,
    plan: &Plan,
) -> Option<Reason> {
    let wanted = &active.manifest.workloads;
    let is_living = |state: &InstanceState| !matches!(state, InstanceState::Ended | InstanceState::Absent);
    let others = observed.workloads.iter().filter(|(other, instance)| *other != name && is_living(&instance.state));
    let (mut memory, mut cpu) = needs(&wanted.get(name)?.resources);
    let mut old = None;
    for (other, instance) in others {
        let spec = match instance.state {
            InstanceState::Starting { spec, .. } => Some(spec),
            _ => instance.spec,
        };
        let as_wanted = wanted.get(other).filter(|workload| spec == Some(workload.digest()));
        let resources = match as_wanted {
            Some(workload) => Some(&workload.resources),
            None => {
                old = Some(other);
                spec.and_then(|spec| resources_of(other, spec, desired))
            }
        };
        if instance.resizing.is_some() {
            old = Some(other);
        }
        let (mut more_memory, mut more_cpu) = resources.map_or((0, 0), needs);
        // Whose limits are being changed has the old ones or the new ones, nobody knows which.
        let next = wanted.get(other).filter(|next| differs_in_limits(instance, next)).map(|next| &next.resources);
        let ordered = instance.resizing.and_then(|spec| resources_of(other, spec, desired));
        for resources in next.into_iter().chain(ordered) {
            let (next_memory, next_cpu) = needs(resources);
            (more_memory, more_cpu) = (more_memory.max(next_memory), more_cpu.max(next_cpu));
        }
        memory = memory.saturating_add(more_memory);
        cpu = cpu.saturating_add(more_cpu);
    }
    // Nothing old is there, so nothing would be won by waiting.
    let old = old?;
    for action in &plan.actions {
        if let Action::Start { workload, .. } = action {
            let (more_memory, more_cpu) = wanted.get(workload).map_or((0, 0), |workload| needs(&workload.resources));
            memory = memory.saturating_add(more_memory);
            cpu = cpu.saturating_add(more_cpu);
        }
    }
    let capacity = &observed.capacity;
    let memory_free = capacity.memory_total.0.saturating_sub(capacity.memory_reserve.0);
    let cpu_free = capacity.cpu_total.0.saturating_sub(capacity.cpu_reserve.0);
    let (need, free) = if memory > memory_free {
        (Bytes(memory).human(), Bytes(memory_free).human())
    } else if cpu > cpu_free {
        (MilliCpu(cpu).to_string(), MilliCpu(cpu_free).to_string())
    } else {
        return None;
    };
    let text = format!("{name} waits until {old} makes room: together they need {need} of {free}");
    Some(Reason::new(Code::WaitingForTurn, text))
}

/// Whether a living run and the specification differ in nothing but limits, which can be changed while it runs.
pub fn differs_in_limits(instance: &Instance, wanted: &Spec) -> bool {
    instance.spec != Some(wanted.digest()) && instance.frame == Some(wanted.digest_without_limits())
}

/// How a change of limits changes what is left for the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing grows.
    Shrinks,
    Grows,
    /// More of the one, less of the other: two such could wait for each other for ever.
    Mixed,
}

/// From the limits of the run that is there to those of `wanted`.
pub fn change(name: &WorkloadName, instance: &Instance, wanted: &Spec, desired: &Desired) -> Change {
    let Some(old) = instance.spec.and_then(|spec| resources_of(name, spec, desired)) else { return Change::Grows };
    let ((old_memory, old_cpu), (memory, cpu)) = (needs(old), needs(&wanted.resources));
    match (memory > old_memory || cpu > old_cpu, memory < old_memory || cpu < old_cpu) {
        (false, _) => Change::Shrinks,
        (true, false) => Change::Grows,
        (true, true) => Change::Mixed,
    }
}

fn needs(resources: &Resources) -> (u64, u64) {
    (resources.memory.map_or(0, |memory| memory.0), resources.cpu.map_or(0, |cpu| cpu.0))
}

/// The walls of a run, by the specification it was started from.
fn resources_of<'d>(name: &WorkloadName, spec: Digest, desired: &'d Desired) -> Option<&'d Resources> {
    let versions = desired.generations.values().filter_map(|generation| generation.manifest.workloads.get(name));
    versions.into_iter().find(|workload| workload.digest() == spec).map(|workload| &workload.resources)
}
