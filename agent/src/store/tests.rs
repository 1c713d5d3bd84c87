use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use edged_model::api::Event;
use edged_model::generation::{Generation, GenerationState, Pointers};
use edged_model::id::Digest;
use edged_model::observed::Hold;
use edged_model::quantity::Timestamp;
use edged_model::reason::Reason;

use super::events::EVENTS_MAX;
use super::*;
use edged_model::manifest::Manifest;
use edged_model::reason::Code;

fn places(dir: &tempfile::TempDir) -> Places {
    Places::new(Some(dir.path()), None)
}

fn open(dir: &tempfile::TempDir) -> (Store, Opened) {
    Store::open(&places(dir), 3).unwrap()
}

fn generation(sequence: u64, state: GenerationState) -> Generation {
    Generation {
        state,
        ..Generation::received(
            Manifest { sequence: Sequence(sequence), ..Manifest::empty() },
            Digest::of(&sequence.to_be_bytes()),
            Timestamp(1),
        )
    }
}

fn put_active(store: &Store, sequence: u64) {
    let good = generation(sequence, GenerationState::Good);
    store.transition(&[good], Some((Sequence(sequence), b"envelope")), &pointers(sequence)).unwrap();
}

fn pointers(active: u64) -> Pointers {
    Pointers {
        active: Some(Sequence(active)),
        last_good: Some(Sequence(active)),
        highest_sequence: Sequence(active),
        ..Pointers::default()
    }
}

#[test]
fn what_was_acknowledged_is_there_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let (store, opened) = open(&dir);
    assert_eq!(opened, Opened::Fresh);
    let good = generation(7, GenerationState::Good);
    store.transition(std::slice::from_ref(&good), Some((Sequence(7), b"envelope")), &pointers(7)).unwrap();
    drop(store);
    let (store, opened) = open(&dir);
    assert_eq!(opened, Opened::Whole);
    assert_eq!(store.pointers().unwrap(), pointers(7));
    assert_eq!(store.generations().unwrap(), [good]);
    assert_eq!(store.envelope(Sequence(7)).unwrap().as_deref(), Some(&b"envelope"[..]));
}

#[test]
fn the_numbers_against_rollback_never_fall() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(&dir);
    store.transition(&[], None, &Pointers { highest_sequence: Sequence(9), ..Pointers::default() }).unwrap();
    store.transition(&[], None, &Pointers { highest_sequence: Sequence(2), ..Pointers::default() }).unwrap();
    assert_eq!(store.pointers().unwrap().highest_sequence, Sequence(9));
    store.raise_time_floor(Timestamp(50)).unwrap();
    assert_eq!(store.raise_time_floor(Timestamp(10)).unwrap(), Timestamp(50));
}

#[test]
fn the_outbox_drops_its_oldest_with_a_count() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(&dir);
    for n in 0..5_u8 {
        store.push_report(&[n], Durability::Soon).unwrap();
    }
    assert_eq!((store.waiting_reports().unwrap(), store.dropped_reports().unwrap()), (3, 2));
    let (number, oldest) = store.oldest_report().unwrap().unwrap();
    assert_eq!(oldest, [2]);
    store.remove_report(number).unwrap();
    assert_eq!(store.oldest_report().unwrap().unwrap().1, [3]);
}

/// A line of the story, the records beside it and the change it tells of cost one flush; and the last word holds.
#[test]
fn what_waits_for_company_is_one_write_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(&dir);
    put_active(&store, 1);
    let event = |text: &str| Event {
        number: 0,
        at: Timestamp(1),
        boot_id: "boot".into(),
        workload: None,
        generation: None,
        why: Reason::new(Code::Started, text),
        by: "planner".into(),
    };
    let name = WorkloadName::parse("web").unwrap();
    let history = |boot_id: String| SavedHistory { boot_id, ..SavedHistory::default() };
    let before = store.flushes();
    store.append_event(event("first"), Durability::Together).unwrap();
    // Of several pieces, and then of one: no piece of the first may stay.
    store.save_history(&name, &history("x".repeat(20_000)), Durability::Along).unwrap();
    store.save_history(&name, &history("short".into()), Durability::Along).unwrap();
    assert_eq!(store.flushes(), before);
    put_active(&store, 2);
    assert_eq!(store.flushes(), before + 1);
    let told = |store: &Store| {
        let events = store.events(9, |_| true).unwrap();
        events.into_iter().map(|event| event.why.text).collect::<Vec<_>>()
    };
    // Who reads the story reads what waits, too; counters alone are not worth a flush.
    store.append_event(event("second"), Durability::Together).unwrap();
    assert_eq!(told(&store), ["first", "second"]);
    assert_eq!(store.flushes(), before + 2);
    store.save_survived(&SavedSurvived::default()).unwrap();
    store.settle().unwrap();
    assert_eq!(store.flushes(), before + 2);
    store.append_event(event("third"), Durability::Together).unwrap();
    store.sync().unwrap();
    drop(store);
    let (store, opened) = open(&dir);
    assert_eq!(opened, Opened::Whole);
    assert_eq!(told(&store), ["first", "second", "third"]);
    assert_eq!(store.histories().unwrap(), [(name, history("short".into()))]);
    assert_eq!(store.survived().unwrap(), Some(SavedSurvived::default()));
}

#[test]
fn events_are_a_ring() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(&dir);
    let event = |text: String| Event {
        number: 0,
        at: Timestamp(0),
        boot_id: String::new(),
        workload: None,
        generation: None,
        why: Reason::new(Code::Boot, text),
        by: "test".to_owned(),
    };
    for n in 0..EVENTS_MAX + 5 {
        store.append_event(event(n.to_string()), Durability::Soon).unwrap();
    }
    let all = store.events(usize::MAX, |_| true).unwrap();
    assert_eq!(all.len() as u64, EVENTS_MAX);
    assert_eq!(all.last().unwrap().why.text, (EVENTS_MAX + 4).to_string());
}

#[test]
fn values_of_every_size_come_back_and_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(&dir);
    for size in [0, 1, 4000, 4096, 5000, 300_000, 1 << 20, 10_000, 3] {
        let envelope: Vec<u8> = (0..size).map(|n: u32| n.to_le_bytes()[1]).collect();
        let good = generation(7, GenerationState::Good);
        store.transition(&[good], Some((Sequence(7), &envelope)), &pointers(7)).unwrap();
        assert!(store.envelope(Sequence(7)).unwrap() == Some(envelope), "{size}");
    }
    assert_eq!(store.with_door(|door| door.records(trees::ENVELOPES)).unwrap().len(), 1);
    // What sled puts into files of their own is not synced by anybody: there must be none.
    assert_eq!(std::fs::read_dir(places(&dir).state().join("blobs")).unwrap().count(), 0);
}

#[test]
fn pointers_never_name_what_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(&dir);
    put_active(&store, 7);
    let refused = store.transition(&[], None, &Pointers { active: Some(Sequence(8)), ..pointers(7) });
    assert!(matches!(refused, Err(StoreError::NoSuchGeneration { sequence: Sequence(8) })));
    let without_envelope = store.transition(&[generation(8, GenerationState::Verified)], None, &pointers(8));
    assert!(matches!(without_envelope, Err(StoreError::NoSuchGeneration { .. })));
    assert_eq!(store.pointers().unwrap(), pointers(7));
    assert_eq!(store.generations().unwrap().len(), 1);
    let moved = store.move_generation(Sequence(7), GenerationState::RolledBack, None, Timestamp(9), &pointers(7));
    assert_eq!(moved.unwrap().state, GenerationState::RolledBack);
}

#[test]
fn only_the_newest_old_generations_stay() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(&dir);
    for n in 1..=30 {
        put_active(&store, n);
    }
    let known: Vec<u64> = store.generations().unwrap().iter().map(|generation| generation.sequence.0).collect();
    assert_eq!(known, (22..=30).collect::<Vec<_>>());
    assert_eq!(store.envelope(Sequence(3)).unwrap(), None);
}

#[test]
fn a_trust_root_never_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(&dir);
    store.set_trust_root(3, b"three").unwrap();
    assert!(matches!(store.set_trust_root(2, b"two"), Err(StoreError::TrustRollback { given: 2, highest: 3 })));
    assert_eq!(store.trust_root().unwrap().as_deref(), Some(&b"three"[..]));
}

#[test]
fn a_reset_of_the_workloads_lowers_nothing_and_is_known_until_it_is_over_by_either_copy() {
    let dir = tempfile::tempdir().unwrap();
    filled(&dir);
    let never_falls = |store: &Store, reset: Option<Reset>, told: &str| {
        let expected = Pointers { highest_sequence: Sequence(7), highest_trust_version: 4, ..Pointers::default() };
        assert_eq!((store.pointers().unwrap(), store.reset().unwrap()), (expected, reset), "{told}");
        assert_eq!((store.generations().unwrap(), store.envelope(Sequence(7)).unwrap()), (vec![], None), "{told}");
        assert_eq!(store.held().unwrap(), [], "{told}");
        assert_eq!(store.trust_root().unwrap().unwrap(), b"root", "{told}");
        assert_eq!(store.time_floor().unwrap(), Timestamp(1_000), "{told}");
        assert!(store.has_failed(Digest::of(b"bad")).unwrap() && store.next_report_number().unwrap() > 1, "{told}");
        assert!(matches!(store.set_trust_root(3, b"old"), Err(StoreError::TrustRollback { .. })), "{told}");
    };
    let wanted = Some(Reset { volumes: true });
    {
        let (store, _) = open(&dir);
        store.begin_reset(Reset { volumes: true }).unwrap();
        never_falls(&store, wanted, "as it was written");
    }
    std::fs::remove_dir_all(places(&dir).state()).unwrap();
    let (store, opened) = open(&dir);
    assert!(matches!(opened, Opened::Rebuilt { .. }), "{opened:?}");
    never_falls(&store, wanted, "from the second copy");
    store.end_reset().unwrap();
    never_falls(&store, None, "at the end");
    // Whatever a caller says.
    let low = generation(2, GenerationState::Good);
    store.transition(&[low], Some((Sequence(2), b"2")), &pointers(2)).unwrap();
    let now = store.pointers().unwrap();
    assert_eq!((now.highest_sequence, now.highest_trust_version), (Sequence(7), 4));
    assert_eq!(keep::load(&places(&dir).keep()).unwrap().unwrap().summary.reset, None);
}

#[test]
fn a_manifest_that_an_older_agent_took_in_the_middle_of_a_reset_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    filled(&dir);
    let (store, _) = open(&dir);
    assert_eq!(store.found_reset().unwrap(), FoundReset::None);
    let wanted = Reset { volumes: true };
    store.begin_reset(wanted).unwrap();
    assert_eq!(store.found_reset().unwrap(), FoundReset::Unfinished(wanted));
    assert_eq!(store.reset().unwrap(), Some(wanted), "it goes on");
    // An agent that does not know the mark.
    store.transition(&[generation(8, GenerationState::Received)], Some((Sequence(8), b"8")), &pointers(8)).unwrap();
    assert_eq!(store.found_reset().unwrap(), FoundReset::Overtaken(Sequence(8)));
    assert_eq!((store.reset().unwrap(), store.found_reset().unwrap()), (None, FoundReset::None));
    assert_eq!(store.generations().unwrap().len(), 1, "what was taken stays");
}

#[test]
fn a_second_agent_is_told_that_the_store_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, _) = open(&dir);
    let second = Store::open(&places(&dir), 3).map(|(_, opened)| opened);
    assert!(matches!(second, Err(StoreError::InUse { .. })), "{second:?}");
}

#[test]
fn a_format_of_the_future_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    {
        let (store, _) = open(&dir);
        put_active(&store, 7);
        let future = put(trees::META, meta::FORMAT, &99_u32).unwrap();
        store.commit(&store.lock(), &[future], Durability::Now).unwrap();
    }
    let opened = Store::open(&places(&dir), 3).map(|(_, opened)| opened);
    assert!(matches!(opened, Err(StoreError::OtherFormat { found: 99, known: 1 })), "{opened:?}");
    assert!(places(&dir).state().join("db").exists());
}

/// A power cut between the two copies: the database has the change, `keep/` does not yet.
#[test]
fn a_cut_between_the_two_copies_is_mended() {
    let dir = tempfile::tempdir().unwrap();
    let keep = places(&dir).keep();
    let old = {
        let (store, _) = open(&dir);
        put_active(&store, 7);
        let old = keep::load(&keep).unwrap().unwrap();
        put_active(&store, 8);
        old
    };
    keep::save(&keep, &old, true).unwrap();
    let (store, opened) = open(&dir);
    assert_eq!(opened, Opened::Whole);
    assert_eq!(store.pointers().unwrap(), pointers(8));
    assert_eq!(keep::load(&keep).unwrap().unwrap().summary.pointers, pointers(8));
}

/// Makes a store with some of everything.
fn filled(dir: &tempfile::TempDir) {
    let (store, _) = open(dir);
    let good = generation(7, GenerationState::Good);
    store.transition(&[good], Some((Sequence(7), &[5; 20_000])), &pointers(7)).unwrap();
    store.set_trust_root(4, b"root").unwrap();
    store.raise_time_floor(Timestamp(1_000)).unwrap();
    store.hold(&WorkloadName::parse("web").unwrap(), Some(Hold::Stopped)).unwrap();
    store.remember_failed(Digest::of(b"bad")).unwrap();
    assert_eq!(store.next_report_number().unwrap(), 1);
    for n in 0..200 {
        let name = WorkloadName::parse(&format!("w{n}")).unwrap();
        store.save_history(&name, &SavedHistory::default(), Durability::Soon).unwrap();
    }
    store.sync().unwrap();
}

/// What must have survived everything.
fn assert_kept(store: &Store, told: &str) {
    let expected = Pointers { highest_trust_version: 4, ..pointers(7) };
    assert_eq!(store.pointers().unwrap(), expected, "{told}");
    assert_eq!(store.envelope(Sequence(7)).unwrap().unwrap(), [5; 20_000], "{told}");
    assert_eq!(store.generation(Sequence(7)).unwrap().unwrap().state, GenerationState::Good, "{told}");
    assert_eq!(store.trust_root().unwrap().unwrap(), b"root", "{told}");
    assert_eq!(store.time_floor().unwrap(), Timestamp(1_000), "{told}");
    assert_eq!(store.held().unwrap().len(), 1, "{told}");
    assert!(store.has_failed(Digest::of(b"bad")).unwrap(), "{told}");
    assert!(store.next_report_number().unwrap() > 1, "{told}");
}

fn copy_of(source: &tempfile::TempDir) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-a").arg(source.path().join(".")).arg(dir.path()).status();
    assert!(copied.unwrap().success());
    dir
}

/// Cuts the file at `at`, or overwrites some bytes there.
fn damage(path: &Path, how: &str, at: u64) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    match how {
        "cut" => file.set_len(at).unwrap(),
        "flip" => file.write_all_at(&[0xee; 3], at).unwrap(),
        _ => file.write_all_at(&[0; 4096], at).unwrap(),
    }
}

/// The database's files, cut short or overwritten at many places: it is noticed, set aside and rebuilt, or read right;
/// it never panics, hangs, or forgets what matters.
#[test]
fn a_damaged_database_is_rebuilt_from_the_second_copy() {
    let source = tempfile::tempdir().unwrap();
    filled(&source);
    let length = std::fs::metadata(source.path().join("state/db")).unwrap().len();
    let mut damages: Vec<(&str, &str, u64)> = vec![("state/conf", "cut", 0), ("state/conf", "cut", 20)];
    damages.extend([("state/conf", "flip", 3), ("state/conf", "flip", 20)]);
    for step in 0..12 {
        for how in ["cut", "flip", "zero"] {
            damages.push(("state/db", how, length * step / 12 + step * 37));
        }
    }
    let mut rebuilt = 0;
    for (file, how, at) in damages {
        let dir = copy_of(&source);
        damage(&dir.path().join(file), how, at);
        let (store, opened) = open(&dir);
        assert_kept(&store, &format!("{file} {how} at {at} of {length}: {opened:?}"));
        drop(store);
        rebuilt += u32::from(matches!(opened, Opened::Rebuilt { .. }));
        let (store, opened) = open(&dir);
        assert_eq!(opened, Opened::Whole, "the second opening after {file} {how} at {at}");
        assert_kept(&store, "the second opening");
    }
    assert!(rebuilt > 5, "the damage must have been found at least sometimes: {rebuilt}");
}

#[test]
fn a_store_that_is_gone_is_rebuilt_and_old_wrecks_are_few() {
    let dir = tempfile::tempdir().unwrap();
    filled(&dir);
    std::fs::remove_dir_all(places(&dir).state()).unwrap();
    let (store, opened) = open(&dir);
    assert!(matches!(&opened, Opened::Rebuilt { aside: None, from_keep: true, .. }), "{opened:?}");
    assert!(opened_reason(&opened).is_some());
    assert_kept(&store, "gone");
    drop(store);
    for _ in 0..4 {
        damage(&places(&dir).state().join("db"), "cut", 100);
        assert_kept(&open(&dir).0, "again");
    }
    let wrecks = std::fs::read_dir(dir.path()).unwrap().flatten();
    let wrecks = wrecks.filter(|entry| entry.file_name().to_string_lossy().contains("damaged")).count();
    assert_eq!(wrecks, 2);
}

/// The second copy is the damaged one: it is written again from the database.
#[test]
fn a_damaged_second_copy_is_written_again() {
    let source = tempfile::tempdir().unwrap();
    filled(&source);
    for entry in std::fs::read_dir(places(&source).keep()).unwrap().flatten() {
        for how in ["cut", "flip"] {
            let dir = copy_of(&source);
            damage(&places(&dir).keep().join(entry.file_name()), how, 9);
            let (store, opened) = open(&dir);
            assert_eq!(opened, Opened::Whole, "{entry:?}");
            assert_kept(&store, "second copy damaged");
            drop(store);
            std::fs::remove_dir_all(places(&dir).state()).unwrap();
            assert_kept(&open(&dir).0, &format!("database gone after {how} of {entry:?}"));
        }
    }
}

#[test]
fn one_bad_record_does_not_take_the_others_along() {
    let dir = tempfile::tempdir().unwrap();
    filled(&dir);
    {
        let (store, _) = open(&dir);
        let bad = Change { tree: trees::HISTORY, key: "w7".to_owned(), sealed: Some(b"not what was written".to_vec()) };
        store.commit(&store.lock(), &[bad], Durability::Now).unwrap();
    }
    let (store, opened) = open(&dir);
    assert_eq!(opened, Opened::Mended { records: vec!["history/w7".to_owned()] });
    assert_eq!(store.histories().unwrap().len(), 199);
}

const CHILD_DIR: &str = "EDGED_TEST_STORE_CHILD";

/// Not a test of its own: what [`nothing_acknowledged_is_lost_when_killed`] kills.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Some(root) = std::env::var_os(CHILD_DIR) else { return };
    let (store, _) = Store::open(&Places::new(Some(Path::new(&root)), None), 1_000_000).unwrap();
    let first = store.pointers().unwrap().highest_sequence.0 + 1;
    for n in first.. {
        put_active(&store, n);
        let report = store.push_report(&n.to_be_bytes(), Durability::Now).unwrap();
        println!("\nacknowledged {n} {report}");
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut sequence, mut report) = (0_u64, 0_u64);
    for round in 0..12_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::child_that_writes_until_it_is_killed", "--nocapture"])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let wanted = sequence + 1 + round * 7 % 23;
        while sequence < wanted {
            let line = lines.next().expect("the child ended by itself").unwrap();
            if let Some((n, place)) = line.strip_prefix("acknowledged ").and_then(|rest| rest.split_once(' ')) {
                (sequence, report) = (n.parse().unwrap(), place.parse().unwrap());
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it still managed to say counts too.
        for line in lines.map_while(Result::ok) {
            if let Some((n, place)) = line.strip_prefix("acknowledged ").and_then(|rest| rest.split_once(' ')) {
                (sequence, report) = (n.parse().unwrap(), place.parse().unwrap());
            }
        }
        let (store, opened) = Store::open(&places(&dir), 1_000_000).unwrap();
        assert_eq!(opened, Opened::Whole, "round {round}");
        let found = store.pointers().unwrap();
        // The one in flight may be there or not, but never half.
        let active = found.active.unwrap();
        assert!((sequence..=sequence + 1).contains(&active.0), "round {round}: {sequence} acknowledged, {found:?}");
        assert_eq!((found.last_good, found.highest_sequence), (Some(active), active));
        assert_eq!(store.envelope(active).unwrap().as_deref(), Some(&b"envelope"[..]));
        assert!(store.waiting_reports().unwrap() >= report, "round {round}");
        sequence = active.0;
    }
}
