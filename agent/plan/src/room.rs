//! The budget in the middle of a switch: what starts must fit beside what an older generation left running. A generation
//! as a whole fits, or it would not have been staged (`fit.rs`).

use edged_model::action::{Action, Plan};
use edged_model::generation::Generation;
use edged_model::id::{Digest, WorkloadName};
use edged_model::manifest::Resources;
use edged_model::observed::{Desired, InstanceState, Observed};
use edged_model::quantity::{Bytes, MilliCpu};
use edged_model::reason::{Code, Reason};

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
        let (more_memory, more_cpu) = resources.map_or((0, 0), needs);
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

fn needs(resources: &Resources) -> (u64, u64) {
    (resources.memory.map_or(0, |memory| memory.0), resources.cpu.map_or(0, |cpu| cpu.0))
}

/// The walls of a run, by the specification it was started from.
fn resources_of<'d>(name: &WorkloadName, spec: Digest, desired: &'d Desired) -> Option<&'d Resources> {
    let versions = desired.generations.values().filter_map(|generation| generation.manifest.workloads.get(name));
    versions.into_iter().find(|workload| workload.digest() == spec).map(|workload| &workload.resources)
}
