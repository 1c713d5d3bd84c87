//! Laws by random histories, and the cases that have a story.

use edged_model::keeper::{ChildState, Stdio};
use proptest::prelude::*;

use super::*;
use crate::table::Petting;

fn running_table(device: bool) -> Table {
    let mut table = Table::new(device, 10_000);
    assert_eq!(decide(&mut table, Event::Tick, 0), [Act::StartAgent]);
    assert!(decide(&mut table, Event::AgentStarted { pid: 10 }, 0).is_empty());
    table
}

fn request(table: &mut Table, id: u64, body: RequestBody, now: u64) -> Vec<Act> {
    decide(table, Event::Request(Request { id, body }), now)
}

fn spec(key: &str) -> Box<LaunchSpec> {
    Box::new(LaunchSpec { key: key.to_owned(), stdio: Stdio::Pipes, ..LaunchSpec::default() })
}

fn run_child(table: &mut Table, key: &str, pid: i32, now: u64) {
    let acts = request(table, 7, RequestBody::Launch(spec(key)), now);
    assert_eq!(acts, [Act::Launch { request: 7, spec: spec(key) }]);
    let _ = decide(
        table,
        Event::Cloned { request: 7, key: key.into(), note: "n".into(), stop: StopPlan::default(), pid },
        now,
    );
    let acts = decide(table, Event::ExecReached { key: key.into() }, now);
    let body = ReplyBody::Launched { key: key.into(), pid, boot_ms: now };
    assert_eq!(acts, [Act::Send { id: 7, body, outputs_of: Some(key.into()) }]);
}

fn code(code: i32) -> End {
    End { code: Some(code), signal: None, core_dumped: false }
}

#[test]
fn an_exit_is_kept_until_it_is_forgotten() {
    let mut table = running_table(false);
    run_child(&mut table, "web", 20, 5);
    let acts = decide(&mut table, Event::Reaped { pid: 20, end: code(3) }, 9);
    let exit = ChildExit { key: "web".into(), pid: 20, code: Some(3), signal: None, core_dumped: false, boot_ms: 9 };
    let told = Act::Send { id: 0, body: ReplyBody::Exited(exit.clone()), outputs_of: None };
    assert_eq!(acts, [Act::ClosePidfd { key: "web".into() }, told]);
    // The pid may be somebody else's by now.
    assert!(decide(&mut table, Event::Reaped { pid: 20, end: code(0) }, 9).is_empty());
    let acts = request(&mut table, 8, RequestBody::List, 10);
    let state = ChildState {
        key: "web".into(),
        pid: 20,
        started_boot_ms: 5,
        note: "n".into(),
        exit: Some(exit),
        stop: StopPlan::default(),
    };
    assert_eq!(acts[1], Act::Send { id: 8, body: ReplyBody::Child(state), outputs_of: Some("web".into()) });
    let acts = request(&mut table, 9, RequestBody::Forget { key: "web".into() }, 11);
    assert_eq!(acts[0], Act::Close { key: "web".into() });
    assert!(table.children.is_empty());
}

#[test]
fn a_failed_launch_is_told_when_nothing_is_left_of_it() {
    let mut table = running_table(false);
    let _ = request(&mut table, 7, RequestBody::Launch(spec("web")), 0);
    let _ = decide(
        &mut table,
        Event::Cloned { request: 7, key: "web".into(), note: String::new(), stop: StopPlan::default(), pid: 20 },
        0,
    );
    let failed = Event::StepFailed { key: "web".into(), stage: "mounts".into(), errno: 19 };
    assert!(decide(&mut table, failed, 1).is_empty());
    let acts = decide(&mut table, Event::Reaped { pid: 20, end: code(127) }, 2);
    let body = ReplyBody::LaunchFailed { key: "web".into(), stage: "mounts".into(), errno: 19 };
    assert_eq!(acts, [Act::Close { key: "web".into() }, Act::Send { id: 7, body, outputs_of: None }]);
    assert!(table.children.is_empty());
}

/// The agent died between its order and the answer: the next one is told of the child, not of somebody else's request.
#[test]
fn a_launch_whose_agent_is_gone_is_the_next_ones_child() {
    for fails in [false, true] {
        let mut table = running_table(false);
        let _ = request(&mut table, 7, RequestBody::Launch(spec("web")), 0);
        let cloned =
            Event::Cloned { request: 7, key: "web".into(), note: "n".into(), stop: StopPlan::default(), pid: 20 };
        let _ = decide(&mut table, cloned, 0);
        if fails {
            let _ = decide(&mut table, Event::StepFailed { key: "web".into(), stage: "mounts".into(), errno: 19 }, 1);
        }
        let _ = decide(
            &mut table,
            Event::Reaped { pid: 10, end: End { code: None, signal: Some(9), core_dumped: false } },
            1,
        );
        let _ = decide(&mut table, Event::AgentStarted { pid: 11 }, 2);
        let acts = request(&mut table, 1, RequestBody::List, 3);
        let state = ChildState {
            key: "web".into(),
            pid: 20,
            started_boot_ms: 0,
            note: "n".into(),
            exit: None,
            stop: StopPlan::default(),
        };
        assert_eq!(acts[1], Act::Send { id: 1, body: ReplyBody::Child(state), outputs_of: Some("web".into()) });
        if !fails {
            assert!(decide(&mut table, Event::ExecReached { key: "web".into() }, 4).is_empty(), "nobody asked");
        }
        let acts = decide(&mut table, Event::Reaped { pid: 20, end: code(127) }, 5);
        assert!(
            acts.iter()
                .any(|act| matches!(act, Act::Send { id: 0, body: ReplyBody::Exited(exit), .. } if exit.pid == 20)),
            "{acts:?}"
        );
        assert!(request(&mut table, 2, RequestBody::Forget { key: "web".into() }, 6).len() == 2);
    }
}

#[test]
fn a_running_child_is_not_forgotten_and_no_key_runs_twice() {
    let mut table = running_table(false);
    run_child(&mut table, "web", 20, 0);
    for body in [RequestBody::Forget { key: "web".into() }, RequestBody::Launch(spec("web"))] {
        let acts = request(&mut table, 8, body, 1);
        assert!(matches!(&acts[..], [Act::Send { id: 8, body: ReplyBody::Refused { .. }, .. }]), "{acts:?}");
    }
    assert_eq!(table.children.len(), 1);
}

#[test]
fn a_silent_agent_is_killed_and_another_one_started_at_once() {
    let mut table = running_table(false);
    assert!(decide(&mut table, Event::Tick, HEARTBEAT_TIMEOUT_MS).is_empty());
    let acts = request(&mut table, 1, RequestBody::Heartbeat, HEARTBEAT_TIMEOUT_MS);
    assert!(acts.is_empty());
    let late = 2 * HEARTBEAT_TIMEOUT_MS + 1;
    assert!(decide(&mut table, Event::Tick, late).contains(&Act::KillProcess { pid: 10 }));
    let killed = End { code: None, signal: Some(9), core_dumped: false };
    let acts = decide(&mut table, Event::Reaped { pid: 10, end: killed }, late);
    assert!(acts.contains(&Act::StartAgent), "{acts:?}");
}

#[test]
fn an_agent_that_closes_its_socket_may_end_by_itself_first() {
    let mut table = running_table(false);
    assert!(decide(&mut table, Event::AgentClosed, 100).is_empty());
    assert!(decide(&mut table, Event::Tick, 99 + CLOSING_MS).is_empty());
    assert!(decide(&mut table, Event::Tick, 100 + CLOSING_MS).contains(&Act::KillProcess { pid: 10 }));
    let mut table = running_table(false);
    let _ = decide(&mut table, Event::AgentClosed, 100);
    let acts = decide(&mut table, Event::Reaped { pid: 10, end: code(1) }, 101);
    assert!(matches!(&acts[..], [Act::Say(how), Act::StartAgent] if how.contains("exit code 1")), "{acts:?}");
}

#[test]
fn a_device_goes_down_in_order_and_a_second_wish_is_haste() {
    let mut table = running_table(true);
    run_child(&mut table, "web", 20, 0);
    let acts = decide(&mut table, Event::Asked(Wish::PowerOff), 1);
    assert_eq!(acts[1..], [Act::KillProcess { pid: 10 }, Act::End { key: "web".into(), signal: 15 }]);
    let _ = decide(&mut table, Event::Reaped { pid: 10, end: code(0) }, 2);
    assert!(decide(&mut table, Event::Tick, 3).is_empty());
    assert_eq!(decide(&mut table, Event::Asked(Wish::PowerOff), 4), [Act::SignalChildren { signal: KILL }]);
    let acts = decide(&mut table, Event::Reaped { pid: 20, end: code(0) }, 5);
    let way = Way::Machine(ShutdownHow::PowerOff);
    assert_eq!(acts[2..], [Act::KillAll, Act::Leave { way }]);
    assert!(decide(&mut table, Event::Tick, 6).is_empty(), "it leaves once");
}

#[test]
fn who_depends_on_others_ends_first_and_each_has_its_own_time() {
    let mut table = running_table(true);
    for (key, pid, order, timeout_ms) in [("db", 20, 0, 5_000), ("web", 21, 1, 1_000), ("api", 22, 1, 2_000)] {
        run_child(&mut table, key, pid, 0);
        let child = table.children.get_mut(key).unwrap();
        child.stop = StopPlan { signal: 3, timeout_ms, order };
    }
    let end = |key: &str, signal| Act::End { key: key.into(), signal };
    let acts = decide(&mut table, Event::Asked(Wish::PowerOff), 0);
    assert_eq!(acts[2..], [end("api", 3), end("web", 3)]);
    let _ = decide(&mut table, Event::Reaped { pid: 10, end: code(0) }, 1);
    assert_eq!(table.wake_at_boot_ms(), 1_000, "web's time is over first");
    assert_eq!(decide(&mut table, Event::Tick, 1_000), [end("web", 9)]);
    assert!(decide(&mut table, Event::Tick, 1_001).is_empty(), "it is killed once");
    let acts = decide(&mut table, Event::Reaped { pid: 21, end: code(0) }, 1_002);
    assert!(!acts.iter().any(|act| matches!(act, Act::End { .. })), "api has its time: {acts:?}");
    let acts = decide(&mut table, Event::Reaped { pid: 22, end: code(0) }, 1_500);
    assert!(acts.contains(&end("db", 3)), "{acts:?}");
    assert_eq!(decide(&mut table, Event::Tick, 6_500), [end("db", 9)]);
    // Something that will not die holds the machine no longer than the bound.
    assert_eq!(decide(&mut table, Event::Tick, 10_000), [Act::SignalChildren { signal: KILL }]);
}

#[test]
fn exit_on_a_host_leaves_the_workloads_alone() {
    let mut table = running_table(false);
    run_child(&mut table, "web", 20, 0);
    let acts = request(&mut table, 1, RequestBody::Shutdown { how: ShutdownHow::Exit }, 1);
    assert!(!acts.iter().any(|act| matches!(act, Act::SignalChildren { .. } | Act::End { .. })), "{acts:?}");
    let acts = decide(&mut table, Event::Reaped { pid: 10, end: code(0) }, 2);
    assert_eq!(acts, [Act::Leave { way: Way::KeeperAlone }]);
}

#[test]
fn a_hosts_clock_is_never_touched() {
    let clock = [RequestBody::MoveClock { unix_ms: i64::MAX }, RequestBody::TimeFloor { unix_seconds: i64::MAX }];
    for body in clock {
        let sets_it = |device| {
            let acts = request(&mut running_table(device), 1, body.clone(), 1);
            acts.iter().any(|act| matches!(act, Act::MoveClock { .. } | Act::KeepTimeFloor { .. }))
        };
        assert!(sets_it(true) && !sets_it(false), "{body:?}");
    }
}

#[test]
fn the_watchdog_is_left_alone_when_the_agent_is_hopeless() {
    let mut table = running_table(true);
    table.watchdog = Some(Petting { every_ms: 5_000, next_boot_ms: 0 });
    assert_eq!(decide(&mut table, Event::Tick, 0), [Act::PetWatchdog]);
    assert!(decide(&mut table, Event::Tick, 4_999).is_empty());
    table.agent.failures_in_a_row = HOPELESS;
    assert!(decide(&mut table, Event::Tick, 5_000).is_empty());
}

fn any_key() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "b", "c/exec-1"]).prop_map(str::to_owned)
}

fn any_body() -> impl Strategy<Value = RequestBody> {
    prop_oneof![
        Just(RequestBody::Heartbeat),
        Just(RequestBody::List),
        Just(RequestBody::Version),
        Just(RequestBody::Upgrade),
        any_key().prop_map(|key| RequestBody::Launch(spec(&key))),
        (any_key(), any::<i32>()).prop_map(|(key, signal)| RequestBody::Signal { key, signal }),
        any_key().prop_map(|key| RequestBody::Forget { key }),
        any::<i64>().prop_map(|unix_seconds| RequestBody::TimeFloor { unix_seconds }),
        any::<i64>().prop_map(|unix_ms| RequestBody::MoveClock { unix_ms }),
        prop::sample::select(vec![ShutdownHow::Exit, ShutdownHow::PowerOff])
            .prop_map(|how| RequestBody::Shutdown { how }),
    ]
}

fn any_event() -> impl Strategy<Value = Event> {
    let pid = 10..16_i32;
    let stage = || "mounts".to_owned();
    prop_oneof![
        3 => Just(Event::Tick),
        1 => prop::sample::select(vec![Wish::Stop, Wish::PowerOff, Wish::Reboot, Wish::Again]).prop_map(Event::Asked),
        4 => (pid.clone(), 0..3_i32).prop_map(|(pid, number)| Event::Reaped { pid, end: code(number) }),
        6 => (1..9_u64, any_body()).prop_map(|(id, body)| Event::Request(Request { id, body })),
        1 => Just(Event::Unreadable { why: "x".to_owned() }),
        2 => pid.clone().prop_map(|pid| Event::AgentStarted { pid }),
        1 => Just(Event::AgentNotStarted { why: "x".to_owned() }),
        1 => Just(Event::AgentDeaf { why: "x" }),
        1 => Just(Event::AgentClosed),
        3 => (any_key(), pid).prop_map(|(key, pid)| Event::Cloned { request: 1, key, note: String::new(), stop: StopPlan::default(), pid }),
        1 => any_key().prop_map(move |key| Event::NotCloned { request: 1, key, stage: stage(), errno: 1 }),
        4 => any_key().prop_map(|key| Event::ExecReached { key }),
        2 => any_key().prop_map(move |key| Event::StepFailed { key, stage: stage(), errno: 1 }),
    ]
}

proptest! {
    /// Whatever happens, in whatever order: no panic, the table stays bounded, no ended child is lost but by `Forget`,
    /// every request but a heartbeat is answered at most once, and it never leaves without having been asked.
    #[test]
    fn every_history_is_survived(device: bool, history in prop::collection::vec((any_event(), 0..40_000_u64), 0..60)) {
        let mut table = Table::new(device, 1_000);
        let mut now = 0_u64;
        let mut leaves = 0;
        for (event, later) in history {
            now += later;
            let ended: Vec<_> = table.children.iter().filter(|(_, child)| !child.is_living()).map(|(k, _)| k.clone()).collect();
            let forgets = matches!(&event, Event::Request(Request { body: RequestBody::Forget { .. }, .. }));
            let replaces = matches!(&event, Event::Cloned { .. });
            let acts = decide(&mut table, event, now);
            leaves += acts.iter().filter(|act| matches!(act, Act::Leave { .. })).count();
            prop_assert!(leaves == 0 || table.down.is_some());
            prop_assert!(leaves <= 1);
            if !forgets && !replaces {
                for key in ended {
                    prop_assert!(table.children.contains_key(&key));
                }
            }
            prop_assert!(table.wake_at_boot_ms() > now || table.watchdog.is_some() || table.down.is_some());
        }
    }

    /// The way down always ends: with children that never die, at the latest after both graces.
    #[test]
    fn the_way_down_has_an_end(device: bool, living in 0..5_i32) {
        let mut table = running_table(device);
        for number in 0..living {
            run_child(&mut table, &format!("w{number}"), 100 + number, 0);
        }
        let _ = decide(&mut table, Event::Asked(Wish::Stop), 1);
        let _ = decide(&mut table, Event::Tick, 1 + 10_000);
        let acts = decide(&mut table, Event::Tick, 1 + 10_000 + FORCED_MS);
        prop_assert!(acts.iter().any(|act| matches!(act, Act::Leave { .. })), "{:?}", acts);
    }
}

/// Agents that start and then hang, one after the other: each is killed for its silence and followed by the next, and the
/// watchdog is petted meanwhile; but not for ever, because then the machine itself may be what is wrong.
#[test]
fn agents_that_only_hang_have_the_machine_reset_in_the_end() {
    let mut table = Table::new(true, 10_000);
    table.watchdog = Some(Petting { every_ms: 1_000, next_boot_ms: 0 });
    let (mut now, mut hung, mut last_petted) = (0, 0, 0);
    while now < 7_200_000 {
        let mut acts = decide(&mut table, Event::Tick, now);
        while let Some(act) = acts.pop() {
            match act {
                Act::StartAgent => acts.extend(decide(&mut table, Event::AgentStarted { pid: 10 }, now)),
                Act::KillProcess { pid } => {
                    hung += 1;
                    acts.extend(decide(&mut table, Event::Reaped { pid, end: code(1) }, now));
                }
                Act::PetWatchdog => last_petted = now,
                _ => {}
            }
        }
        now += 500;
    }
    assert!(hung >= HOPELESS, "the keeper never gives up starting them: {hung}");
    // Long enough for a disk that is checked, short enough for a device that nobody can reach.
    assert!((1_200_000..2_700_000).contains(&last_petted), "petted until {last_petted} ms");
}
