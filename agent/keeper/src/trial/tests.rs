//! The cases of an upgrade, one after the other.

use edged_model::keeper::{Request, RequestBody};

use super::*;
use crate::decide::{Event, Wish, decide};

const FILE: FileId = FileId { device: 1, inode: 2, bytes: 3, modified_s: 4, modified_ns: 5 };

fn end(code: i32) -> End {
    End { code: Some(code), signal: None, core_dumped: false }
}

fn table() -> Table {
    let mut table = Table::new(false, 10_000);
    table.program = Some("/bin/edged".to_owned());
    let _ = decide(&mut table, Event::Tick, 0);
    let _ = decide(&mut table, Event::AgentStarted { pid: 10 }, 0);
    table
}

fn request(table: &mut Table, body: RequestBody, now: u64) -> Vec<Act> {
    decide(table, Event::Request(Request { id: 7, body }), now)
}

fn try_it(table: &mut Table, now: u64) -> Asked {
    let acts = decide(table, Event::Asked(Wish::Upgrade), now);
    let [Act::LookAtProgram { asked, .. }] = acts[..] else { panic!("{acts:?}") };
    assert!(decide(table, Event::Looked { asked, looked: Looked::Trying { pid: 50, file: FILE } }, now).is_empty());
    asked
}

/// The new image, its former agent replaced.
fn on_trial() -> Table {
    let mut table = table();
    try_it(&mut table, 1_000);
    let words = format!("a warning\n{READY}0.2.0\n");
    let acts = decide(&mut table, Event::Tried { end: end(0), words }, 1_100);
    assert_eq!(acts, [Act::ExecAgain { file: Some(FILE), agent_too: true }]);
    let _ = decide(&mut table, Event::AgentOutdated, 1_200);
    let _ = decide(&mut table, Event::Reaped { pid: 10, end: end(0) }, 1_210);
    assert_eq!(table.upgrade.trial.as_ref().unwrap().falls, 0, "that one was told to go");
    table
}

fn live(table: &mut Table, pid: i32, from: u64) {
    let _ = decide(table, Event::Tick, from);
    let _ = decide(table, Event::AgentStarted { pid }, from);
}

#[test]
fn three_falls_bring_the_former_program_back() {
    let mut table = on_trial();
    for (n, pid) in [(1, 11), (2, 12)] {
        live(&mut table, pid, 2_000 * n);
        let acts = decide(&mut table, Event::Reaped { pid, end: end(1) }, 2_000 * n + 5);
        assert!(!acts.contains(&Act::GoBack), "{acts:?}");
    }
    live(&mut table, 13, 6_000);
    let acts = decide(&mut table, Event::Reaped { pid: 13, end: end(1) }, 6_005);
    assert!(acts.contains(&Act::GoBack), "{acts:?}");
    let refused = table.upgrade.refused.as_ref().unwrap();
    assert!(refused.why.contains("fell 3 times, the last time with exit code 1 after 5 ms"), "{refused:?}");
    assert_eq!((refused.has_run, refused.file, table.agent.failures_in_a_row), (true, Some(FILE), 0));
    assert_eq!(table.upgrade.trial, None);
}

#[test]
fn a_hang_is_a_fall_and_so_is_a_start_that_fails() {
    let mut table = on_trial();
    let mut now = 2_000;
    for pid in [11, 12] {
        live(&mut table, pid, now);
        now += edged_model::keeper::HEARTBEAT_TIMEOUT_MS + 1;
        assert!(decide(&mut table, Event::Tick, now).contains(&Act::KillProcess { pid }));
        let killed = End { code: None, signal: Some(9), core_dumped: false };
        let _ = decide(&mut table, Event::Reaped { pid, end: killed }, now);
        now += 500;
    }
    let _ = decide(&mut table, Event::Tick, now);
    let acts = decide(&mut table, Event::AgentNotStarted { why: "no memory".to_owned() }, now);
    assert!(acts.contains(&Act::GoBack), "{acts:?}");
}

#[test]
fn a_minute_of_an_agent_that_has_settled_is_enough_and_ten_of_one_that_has_not() {
    for (settles, after) in [(true, 60_000), (false, 600_000)] {
        let mut table = on_trial();
        live(&mut table, 11, 2_000);
        if settles {
            let _ = request(&mut table, RequestBody::Settled, 2_500);
        }
        for now in (2_000..2_000 + after).step_by(1_000) {
            let acts = request(&mut table, RequestBody::Heartbeat, now);
            assert!(!acts.contains(&Act::DropFormer), "{now}");
        }
        assert_eq!(table.wake_at_boot_ms(), 2_000 + after);
        assert!(decide(&mut table, Event::Tick, 2_000 + after).contains(&Act::DropFormer));
        // Three falls are its own business now.
        for (n, pid) in [(1, 11), (2, 12), (3, 13)] {
            let now = 700_000 + 20_000 * n;
            let acts = decide(&mut table, Event::Reaped { pid, end: end(1) }, now);
            assert!(!acts.contains(&Act::GoBack), "{acts:?}");
            live(&mut table, pid + 1, now + 15_000);
        }
    }
}

#[test]
fn what_cannot_take_over_is_refused_with_its_words() {
    let mut table = table();
    let acts = request(&mut table, RequestBody::Rehearse { again: false }, 5);
    let [Act::LookAtProgram { asked, .. }] = acts[..] else { panic!("{acts:?}") };
    let _ = decide(&mut table, Event::Looked { asked, looked: Looked::Trying { pid: 50, file: FILE } }, 5);
    // One at a time.
    let busy = request(&mut table, RequestBody::Rehearse { again: false }, 6);
    assert!(matches!(&busy[..], [Act::Send { body: ReplyBody::Refused { .. }, .. }]), "{busy:?}");
    assert_eq!(decide(&mut table, Event::Tick, 5 + TRY_MS), [Act::KillProcess { pid: 50 }]);
    assert_eq!(decide(&mut table, Event::Tick, 6 + TRY_MS), [], "once");
    let killed = End { code: None, signal: Some(9), core_dumped: false };
    let acts = decide(&mut table, Event::Tried { end: killed, words: "hm\n".to_owned() }, 7 + TRY_MS);
    let why = "/bin/edged is not taken: it was tried in a child and cannot take over: it is not done after 10 s, and it said `hm`";
    let refused = ReplyBody::Refused { why: why.to_owned() };
    assert!(acts.contains(&Act::Send { id: 7, body: refused, outputs_of: None }), "{acts:?}");
    // Who sent a signal reads it in the story.
    try_it(&mut table, 20_000);
    let _ = decide(&mut table, Event::Tried { end: end(2), words: String::new() }, 20_001);
    assert!(table.upgrade.refused.as_ref().unwrap().why.ends_with("cannot take over: exit code 2"));
}

#[test]
fn what_was_refused_is_refused_until_somebody_insists() {
    let mut table = table();
    try_it(&mut table, 1_000);
    let _ = decide(&mut table, Event::Tried { end: end(2), words: String::new() }, 1_001);
    for (again, known) in [(false, Some(FILE)), (true, None), (false, None)] {
        let acts = request(&mut table, RequestBody::Rehearse { again }, 2_000);
        let [Act::LookAtProgram { refused, .. }] = acts[..] else { panic!("{acts:?}") };
        assert_eq!(refused, known, "{again}");
    }
    // Whoever insists and is refused as well has changed nothing.
    let acts = request(&mut table, RequestBody::Rehearse { again: true }, 3_000);
    let [Act::LookAtProgram { asked, .. }] = acts[..] else { panic!("{acts:?}") };
    let _ = decide(&mut table, Event::Looked { asked, looked: Looked::Trying { pid: 51, file: FILE } }, 3_000);
    let _ = decide(&mut table, Event::Tried { end: end(2), words: String::new() }, 3_001);
    assert_eq!(table.upgrade.refused.unwrap().file, Some(FILE));
}

#[test]
fn what_was_tried_is_executed_at_once_and_not_on_the_way_down() {
    let mut table = table();
    table.upgrade.ready = Some(Ready { file: Some(FILE), until_boot_ms: 100 });
    let mut down = table.clone();
    assert!(
        request(&mut table, RequestBody::Upgrade, 50).contains(&Act::ExecAgain { file: Some(FILE), agent_too: true })
    );
    let _ = decide(&mut down, Event::Asked(Wish::Stop), 40);
    let acts = request(&mut down, RequestBody::Upgrade, 50);
    assert!(matches!(&acts[..], [Act::Send { body: ReplyBody::Refused { .. }, .. }]), "{acts:?}");
    // The kernel refuses it after all.
    let acts = decide(&mut table, Event::NotExecuted { why: "ENOEXEC".to_owned() }, 51);
    assert!(acts.contains(&Act::DropFormer) && table.upgrade.trial.is_none(), "{acts:?}");
}

#[test]
fn boots_in_the_middle_of_a_trial_are_counted() {
    let mut table = table();
    let _ = decide(&mut table, Event::BootedOnTrial { boots: FALLS }, 0);
    assert!(table.upgrade.trial.is_some());
    let acts = decide(&mut table, Event::BootedOnTrial { boots: FALLS + 1 }, 0);
    assert!(acts.contains(&Act::GoBack), "{acts:?}");
    // A fault of the keeper itself needs no second one.
    let mut table = on_trial();
    assert!(decide(&mut table, Event::Fault, 5_000).contains(&Act::GoBack));
    assert!(!decide(&mut table, Event::Fault, 5_001).contains(&Act::GoBack));
}
