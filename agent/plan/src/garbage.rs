//! What may go. Whatever the active, the last good or the coming generation names stays: a rollback needs no network.

use std::collections::BTreeSet;

use edged_model::observed::Desired;

/// The images that some generation needs, as its manifest spells them.
pub fn needed_images(desired: &Desired) -> BTreeSet<&str> {
    let needed = desired.pointers.needed();
    needed
        .filter_map(|sequence| desired.generations.get(&sequence))
        .flat_map(|generation| generation.manifest.workloads.values().map(|workload| workload.image.as_str()))
        .collect()
}

/// What becomes of a thing on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// A generation needs it.
    Needed,
    /// Nothing needs it; it stays for a while, in case the operator goes back to it.
    Young,
    Goes,
}

/// First what is needed, then age, then how much room there is: when it is short, age does not save anything.
pub fn fate(is_needed: bool, age_secs: u64, keep_unused_secs: u64, room_is_short: bool) -> Fate {
    match (is_needed, room_is_short || age_secs >= keep_unused_secs) {
        (true, _) => Fate::Needed,
        (false, false) => Fate::Young,
        (false, true) => Fate::Goes,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use edged_model::generation::{Generation, GenerationState, Pointers};
    use edged_model::id::{Digest, Sequence, WorkloadName};
    use edged_model::manifest::{Manifest, Workload};
    use edged_model::quantity::Timestamp;

    fn generation(number: u64, image: &str) -> (Sequence, Generation) {
        let mut manifest = Manifest::empty();
        manifest.workloads.insert(WorkloadName::parse("w").unwrap(), Workload::of_image(image).into());
        let generation = Generation {
            sequence: Sequence(number),
            state: GenerationState::Good,
            ..Generation::received(manifest, Digest::of(image.as_bytes()), Timestamp(0))
        };
        (Sequence(number), generation)
    }

    #[test]
    fn what_runs_what_one_can_go_back_to_and_what_is_coming_stays() {
        let generations: BTreeMap<_, _> = (1..=4).map(|n| generation(n, &format!("r.example/i:{n}"))).collect();
        let pointers = Pointers {
            active: Some(Sequence(3)),
            last_good: Some(Sequence(2)),
            candidate: Some(Sequence(4)),
            ..Pointers::default()
        };
        let desired = Desired { pointers, generations, ..Desired::default() };
        let needed: Vec<_> = needed_images(&desired).into_iter().collect();
        assert_eq!(needed, ["r.example/i:2", "r.example/i:3", "r.example/i:4"]);
    }

    #[test]
    fn need_comes_before_age_and_age_before_room() {
        assert_eq!(fate(true, 1_000, 10, true), Fate::Needed);
        assert_eq!(fate(false, 9, 10, false), Fate::Young);
        assert_eq!(fate(false, 10, 10, false), Fate::Goes);
        assert_eq!(fate(false, 0, 10, true), Fate::Goes);
    }
}
