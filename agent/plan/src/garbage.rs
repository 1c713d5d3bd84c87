//! What may go. Whatever the active, the last good or the coming generation names stays: a rollback needs no network.

use std::collections::{BTreeMap, BTreeSet};

use edged_model::disk::Cause;
use edged_model::observed::Desired;
use edged_model::quantity::Timestamp;

/// The images that some generation needs, as its manifest spells them.
pub fn needed_images(desired: &Desired) -> BTreeSet<&str> {
    let needed = desired.pointers.needed();
    needed
        .filter_map(|sequence| desired.generations.get(&sequence))
        .flat_map(|generation| generation.manifest.workloads.values().map(|workload| workload.image.as_str()))
        .collect()
}

/// Who asks for a thing on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// One that is still to come back to.
    Generation,
    /// A pull that goes on from it: it would have to be fetched again.
    Pull,
    Nobody,
}

/// A thing on the disk that came with an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thing {
    pub need: Need,
    /// Since when nobody needs it; absent for what is made again without a network, which waits for nothing.
    pub unused_since: Option<Timestamp>,
    /// Things with the same number go together: half an image is of no use.
    pub of: usize,
    pub bytes: u64,
}

/// Whether somebody waits for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    Enough,
    /// For so many bytes.
    ShortBy(u64),
    /// For nobody knows how many.
    Short,
    /// An operator wants all there is to be had.
    Asked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    pub now: Timestamp,
    pub keep_unused_secs: u64,
    /// The most that all of it may take as long as something of it is needed by nobody.
    pub budget: Option<u64>,
    pub room: Room,
}

/// What becomes of a thing on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// A generation needs it, or a pull.
    Needed,
    /// Nothing needs it; it stays for a while, in case the operator goes back to it.
    Young {
        until: Timestamp,
    },
    Goes(Cause),
}

/// First what is needed, then age, then how much room there is: when it is short, or images take more than they may, what
/// nobody needs goes before its time, what has not been needed for longest first, and no more of it than has to. What a pull
/// could go on from comes last, and only for room.
pub fn fates(things: &[Thing], rules: &Rules) -> Vec<Fate> {
    let mut fates: Vec<Fate> = things.iter().map(|thing| by_need_and_age(thing, rules)).collect();
    let bytes_that = |fates: &[Fate], goes: bool| -> u64 {
        let those = things.iter().zip(fates).filter(|(_, fate)| matches!(fate, Fate::Goes(_)) == goes);
        those.map(|(thing, _)| thing.bytes).fold(0, u64::saturating_add)
    };
    let mut short = match rules.room {
        Room::Enough | Room::Asked => 0,
        Room::ShortBy(bytes) => bytes.saturating_sub(bytes_that(&fates, true)),
        Room::Short => u64::MAX,
    };
    let mut over = rules.budget.map_or(0, |budget| bytes_that(&fates, false).saturating_sub(budget));
    let mut together: BTreeMap<(bool, Option<Timestamp>, usize), Vec<usize>> = BTreeMap::new();
    for (index, (thing, fate)) in things.iter().zip(&fates).enumerate() {
        let is_awaited = thing.need == Need::Pull;
        if is_awaited || matches!(fate, Fate::Young { .. }) {
            together.entry((is_awaited, thing.unused_since, thing.of)).or_default().push(index);
        }
    }
    for ((is_awaited, ..), indexes) in together {
        let cause = match (short > 0, over > 0 && !is_awaited) {
            (true, _) => Cause::RoomIsShort,
            (false, true) => Cause::OverBudget,
            (false, false) => continue,
        };
        let bytes = indexes.iter().map(|index| things[*index].bytes).fold(0, u64::saturating_add);
        (short, over) = (short.saturating_sub(bytes), over.saturating_sub(bytes));
        indexes.into_iter().for_each(|index| fates[index] = Fate::Goes(cause));
    }
    fates
}

fn by_need_and_age(thing: &Thing, rules: &Rules) -> Fate {
    if thing.need != Need::Nobody {
        return Fate::Needed;
    }
    let Some(since) = thing.unused_since else { return Fate::Goes(Cause::MadeAgain) };
    let age_secs = u64::try_from(rules.now.0.saturating_sub(since.0)).unwrap_or(0);
    if age_secs >= rules.keep_unused_secs {
        return Fate::Goes(Cause::Old);
    }
    if rules.room == Room::Asked {
        return Fate::Goes(Cause::Asked);
    }
    let keep_secs = i64::try_from(rules.keep_unused_secs).unwrap_or(i64::MAX);
    Fate::Young { until: Timestamp(since.0.saturating_add(keep_secs)) }
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

    const DAY: u64 = 86_400;
    const NOW: Timestamp = Timestamp(1_700_000_000);

    fn rules(budget: Option<u64>, room: Room) -> Rules {
        Rules { now: NOW, keep_unused_secs: DAY, budget, room }
    }

    /// Of the image `of`, which nobody has needed for so long.
    fn unused(of: usize, secs: i64, bytes: u64) -> Thing {
        Thing { need: Need::Nobody, unused_since: Some(Timestamp(NOW.0 - secs)), of, bytes }
    }

    /// Which of them go.
    fn gone(things: &[Thing], rules: &Rules) -> Vec<usize> {
        let goes = |(index, fate): (usize, Fate)| matches!(fate, Fate::Goes(_)).then_some(index);
        fates(things, rules).into_iter().enumerate().filter_map(goes).collect()
    }

    #[test]
    fn need_comes_before_age_and_age_before_room() {
        let old = unused(0, 2 * DAY as i64, 1);
        let things = [Thing { need: Need::Generation, ..old }, old, unused(1, 60, 1)];
        let until = Timestamp(NOW.0 - 60 + DAY as i64);
        let fates = |room| super::fates(&things, &rules(None, room));
        assert_eq!(fates(Room::Enough), [Fate::Needed, Fate::Goes(Cause::Old), Fate::Young { until }]);
        assert_eq!(fates(Room::Short), [Fate::Needed, Fate::Goes(Cause::Old), Fate::Goes(Cause::RoomIsShort)]);
        assert_eq!(fates(Room::Asked), [Fate::Needed, Fate::Goes(Cause::Old), Fate::Goes(Cause::Asked)]);
        assert_eq!(fates(Room::ShortBy(1)), fates(Room::Enough), "what is old is room enough");
        // A clock that was put back makes nothing old.
        assert_eq!(gone(&[unused(0, -60, 1)], &rules(None, Room::Enough)), [0; 0]);
    }

    #[test]
    fn what_was_not_needed_for_longest_goes_first_as_a_whole_image_and_no_more_than_the_room_needs() {
        // Two layers of an image, one of another that was needed later, one of a third that was needed last.
        let things = [unused(0, 300, 40), unused(2, 100, 40), unused(1, 200, 40), unused(0, 300, 20)];
        let for_room = |bytes| gone(&things, &rules(None, Room::ShortBy(bytes)));
        assert_eq!(for_room(0), [0; 0]);
        assert_eq!(for_room(1), [0, 3], "half an image is of no use");
        assert_eq!(for_room(60), [0, 3]);
        assert_eq!(for_room(61), [0, 2, 3]);
        assert_eq!(for_room(101), [0, 1, 2, 3]);
        assert_eq!(for_room(1_000), [0, 1, 2, 3]);
        assert_eq!(gone(&things, &rules(None, Room::Short)), [0, 1, 2, 3]);
    }

    #[test]
    fn over_the_budget_the_oldest_go_until_it_is_kept_and_what_is_needed_counts_and_stays() {
        let needed = Thing { need: Need::Generation, ..unused(9, 9_000, 100) };
        let things = [unused(0, 300, 40), needed, unused(1, 200, 40), unused(2, 100, 40)];
        let within = |budget| gone(&things, &rules(Some(budget), Room::Enough));
        assert_eq!(within(220), [0; 0]);
        assert_eq!(within(219), [0]);
        assert_eq!(within(180), [0]);
        assert_eq!(within(179), [0, 2]);
        assert_eq!(within(100), [0, 2, 3]);
        assert_eq!(within(0), [0, 2, 3], "what a rollback needs is no matter of budgets");
        let fates = fates(&things, &rules(Some(219), Room::Enough));
        assert_eq!(fates[0], Fate::Goes(Cause::OverBudget));
        // What goes for its age counts no more.
        let with_old = [&things[..], &[unused(3, 2 * DAY as i64, 1_000)]].concat();
        assert_eq!(gone(&with_old, &rules(Some(220), Room::Enough)), [4]);
    }

    #[test]
    fn what_a_pull_goes_on_from_goes_last_and_only_for_room() {
        let awaited = Thing { need: Need::Pull, ..unused(7, 900, 50) };
        let things = [awaited, unused(0, 10, 50)];
        assert_eq!(gone(&things, &rules(Some(0), Room::Asked)), [1]);
        assert_eq!(gone(&things, &rules(None, Room::ShortBy(50))), [1]);
        assert_eq!(gone(&things, &rules(None, Room::ShortBy(51))), [0, 1]);
        let copy = Thing { unused_since: None, ..things[1] };
        assert_eq!(fates(&[copy], &rules(None, Room::Enough)), [Fate::Goes(Cause::MadeAgain)]);
    }
}
