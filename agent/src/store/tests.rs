use super::*;
use edged_model::generation::GenerationState;
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
        sequence: Sequence(sequence),
        digest: Digest::of(&sequence.to_be_bytes()),
        manifest: Manifest { sequence: Sequence(sequence), ..Manifest::empty() },
        state,
        since: Timestamp(1),
        reason: None,
    }
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
    store.transition(&[good.clone()], Some((Sequence(7), b"envelope")), &pointers(7)).unwrap();
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
        store.push_report(&[n]).unwrap();
    }
    assert_eq!((store.waiting_reports().unwrap(), store.dropped_reports().unwrap()), (3, 2));
    let (number, oldest) = store.oldest_report().unwrap().unwrap();
    assert_eq!(oldest, [2]);
    store.remove_report(number).unwrap();
    assert_eq!(store.oldest_report().unwrap().unwrap().1, [3]);
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

/// Every file of the database, cut short or overwritten at several places: it is noticed, set aside and rebuilt, or
/// read right; it never panics, hangs, or forgets the numbers.
#[test]
fn a_damaged_database_is_rebuilt_from_the_second_copy() {
    let source = tempfile::tempdir().unwrap();
    {
        let (store, _) = open(&source);
        let good = generation(7, GenerationState::Good);
        store.transition(&[good], Some((Sequence(7), &[5; 20_000])), &pointers(7)).unwrap();
        for n in 0..200 {
            let name = WorkloadName::parse(&format!("w{n}")).unwrap();
            store.save_history(&name, &SavedHistory::default(), Durability::Soon).unwrap();
        }
        store.sync().unwrap();
    }
    let db = source.path().join("state/db");
    let length = std::fs::metadata(&db).unwrap().len();
    let damages: [(&str, u64); 6] =
        [("cut", 0), ("cut", length / 2), ("cut", 64), ("flip", 0), ("flip", length / 3), ("flip", 300)];
    for (how, at) in damages {
        let dir = tempfile::tempdir().unwrap();
        let copied = std::process::Command::new("cp").arg("-a").arg(source.path().join(".")).arg(dir.path()).status();
        assert!(copied.unwrap().success());
        let file = std::fs::File::options().write(true).open(dir.path().join("state/db")).unwrap();
        match how {
            "cut" => file.set_len(at).unwrap(),
            _ => std::os::unix::fs::FileExt::write_all_at(&file, &[0xee; 512], at).unwrap(),
        }
        let (store, opened) = open(&dir);
        assert_eq!(store.pointers().unwrap(), pointers(7), "{how} at {at}: {opened:?}");
    }
}
