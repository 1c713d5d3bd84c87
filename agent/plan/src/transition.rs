//! What a generation's step means for the records and the pointers. Pure; the store writes what comes out as one.

use std::collections::BTreeSet;

use edged_model::generation::{Generation, GenerationState, Pointers};
use edged_model::id::{Sequence, WorkloadName};
use edged_model::observed::{Desired, InstanceState, Observed};
use edged_model::quantity::Timestamp;
use edged_model::reason::{Code, Reason};
use edged_model::workload::Health;

use crate::restart;

/// Records to write together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub generations: Vec<Generation>,
    pub pointers: Pointers,
}

/// A new generation, verified: the next to be fetched. One that was on its way and not active yet makes room.
pub fn received(desired: &Desired, mut generation: Generation, now: Timestamp) -> Change {
    let mut change = Change { generations: Vec::new(), pointers: desired.pointers };
    if let Some(waiting) = change.pointers.candidate {
        let text = format!("generation {} came before it was active", generation.sequence);
        supersede(desired, waiting, Reason::new(Code::Superseded, text), now, &mut change);
    }
    generation.state = GenerationState::Verified;
    generation.since = now;
    change.pointers.candidate = Some(generation.sequence);
    change.pointers.highest_sequence = change.pointers.highest_sequence.max(generation.sequence);
    change.generations.push(generation);
    change
}

/// Generations kept in memory beside those that are needed.
const RECENT: usize = 4;

/// Lets go of what neither a pointer nor a living workload needs; the store remembers more.
pub fn forget_old(desired: &mut Desired, observed: &Observed) {
    let pointers = desired.pointers;
    let pointed = [pointers.active, pointers.last_good, pointers.candidate, Some(pointers.highest_sequence)];
    let others = desired.generations.keys().rev().filter(|sequence| !pointed.contains(&Some(**sequence)));
    for old in others.skip(RECENT).copied().collect::<Vec<_>>() {
        if !lives(&desired.generations[&old], observed) {
            desired.generations.remove(&old);
        }
    }
}

/// Whether something runs, or is being started, as this generation has it.
fn lives(generation: &Generation, observed: &Observed) -> bool {
    generation.manifest.workloads.iter().any(|(name, workload)| {
        observed.workloads.get(name).is_some_and(|instance| {
            let spec = match instance.state {
                InstanceState::Absent | InstanceState::Ended => None,
                InstanceState::Starting { spec, .. } => Some(spec),
                InstanceState::Running { .. } | InstanceState::Stopping { .. } => instance.spec,
            };
            let digest = workload.digest();
            spec == Some(digest) || instance.resizing == Some(digest)
        })
    })
}

/// A step the planner ordered; `None` for a generation that is not there.
pub fn step(
    desired: &Desired,
    observed: &Observed,
    sequence: Sequence,
    to: GenerationState,
    why: &Reason,
    now: Timestamp,
) -> Option<Change> {
    let mut generation = desired.generations.get(&sequence)?.clone();
    generation.state = to;
    generation.since = now;
    generation.reason = Some(why.clone());
    let mut change = Change { generations: Vec::new(), pointers: desired.pointers };
    let superseded = || Reason::new(Code::Superseded, format!("generation {sequence} took over"));
    match to {
        GenerationState::Activating => {
            let before = change.pointers.active.replace(sequence);
            let good = change.pointers.last_good.and_then(|good| desired.generations.get(&good));
            generation.ailing = good.map(|good| ailing(good, &generation, observed)).unwrap_or_default();
            change.pointers.candidate = change.pointers.candidate.filter(|candidate| *candidate != sequence);
            // The last good one stays what it is: it is where a rollback goes.
            if let Some(before) =
                before.filter(|before| change.pointers.last_good != Some(*before) && *before != sequence)
            {
                supersede(desired, before, superseded(), now, &mut change);
            }
        }
        GenerationState::Good => {
            let before = change.pointers.last_good.replace(sequence);
            if let Some(before) = before.filter(|before| *before != sequence) {
                supersede(desired, before, superseded(), now, &mut change);
            }
        }
        GenerationState::RolledBack => change.pointers.active = change.pointers.last_good,
        GenerationState::Rejected => {
            change.pointers.candidate = change.pointers.candidate.filter(|candidate| *candidate != sequence);
        }
        GenerationState::Received
        | GenerationState::Verified
        | GenerationState::Staged
        | GenerationState::Probation
        | GenerationState::Superseded => {}
    }
    change.generations.push(generation);
    Some(change)
}

/// What is not well although it runs as the last good generation has it, and `next` leaves as it is.
fn ailing(good: &Generation, next: &Generation, observed: &Observed) -> BTreeSet<WorkloadName> {
    let unchanged = next.manifest.workloads.iter().filter(|(name, workload)| {
        good.manifest.workloads.get(*name).is_some_and(|known| known.digest() == workload.digest())
    });
    let unwell = unchanged.filter(|(name, workload)| {
        observed.workloads.get(*name).is_some_and(|instance| {
            let history = &instance.history;
            let has_failed = instance.state == InstanceState::Ended
                && !restart::ended_by_us(history)
                && history.last_exit.as_ref().is_some_and(|exit| !exit.cause.is_success());
            let fails = history.in_a_row > 1 || instance.health == Health::Unhealthy || has_failed;
            fails && instance.spec == Some(workload.digest())
        })
    });
    unwell.map(|(name, _)| name.clone()).collect()
}

fn supersede(desired: &Desired, sequence: Sequence, why: Reason, now: Timestamp, change: &mut Change) {
    if let Some(generation) = desired.generations.get(&sequence) {
        let mut generation = generation.clone();
        // An operator had asked for the last good one again: it stays where a rollback goes.
        let is_good = change.pointers.last_good == Some(sequence);
        generation.state = if is_good { GenerationState::Good } else { GenerationState::Superseded };
        generation.since = now;
        generation.reason = Some(why);
        change.generations.push(generation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::id::Digest;
    use edged_model::manifest::Manifest;

    fn generation(n: u64) -> Generation {
        Generation {
            sequence: Sequence(n),
            ..Generation::received(Manifest::empty(), Digest::of(&[n as u8]), Timestamp(0))
        }
    }

    fn apply(desired: &mut Desired, change: Change) {
        desired.pointers = change.pointers;
        desired.generations.extend(change.generations.into_iter().map(|g| (g.sequence, g)));
    }

    fn walk(desired: &mut Desired, n: u64, steps: &[GenerationState]) {
        let change = received(desired, generation(n), Timestamp(1));
        apply(desired, change);
        for to in steps {
            let why = Reason::new(Code::Activated, "test");
            let change = step(desired, &Observed::default(), Sequence(n), *to, &why, Timestamp(1)).unwrap();
            apply(desired, change);
        }
    }

    use GenerationState::{Activating, Good, Probation, RolledBack, Staged, Superseded};

    #[test]
    fn a_good_life_and_its_successor() {
        let mut desired = Desired::default();
        walk(&mut desired, 1, &[Staged, Activating, Probation, Good]);
        assert_eq!((desired.pointers.active, desired.pointers.last_good), (Some(Sequence(1)), Some(Sequence(1))));
        walk(&mut desired, 2, &[Staged, Activating]);
        assert_eq!((desired.pointers.active, desired.pointers.last_good), (Some(Sequence(2)), Some(Sequence(1))));
        assert_eq!(desired.generations[&Sequence(1)].state, Good, "where a rollback would go");
        walk(&mut desired, 3, &[Staged, Activating, Probation, Good]);
        assert_eq!(desired.generations[&Sequence(1)].state, Superseded);
        assert_eq!(desired.generations[&Sequence(2)].state, Superseded);
    }

    #[test]
    fn memory_is_bounded_and_keeps_what_is_pointed_at() {
        let mut desired = Desired::default();
        walk(&mut desired, 1, &[Staged, Activating, Probation, Good]);
        for n in 2..50 {
            walk(&mut desired, n, &[Staged, Activating, RolledBack]);
            forget_old(&mut desired, &Observed::default());
        }
        assert!(desired.generations.len() <= RECENT + 4, "{}", desired.generations.len());
        assert!(desired.generations.contains_key(&Sequence(1)) && desired.generations.contains_key(&Sequence(49)));
    }

    #[test]
    fn a_bad_one_goes_back_and_its_number_stays_used() {
        let mut desired = Desired::default();
        walk(&mut desired, 1, &[Staged, Activating, Probation, Good]);
        walk(&mut desired, 2, &[Staged, Activating, Probation, RolledBack]);
        assert_eq!(desired.pointers.active, Some(Sequence(1)));
        assert_eq!(desired.pointers.highest_sequence, Sequence(2));
        assert_eq!(desired.generations[&Sequence(2)].state, RolledBack);
    }
}
