//! What must hold whatever comes over the agent's socket, as a function that any fuzzer can drive. Nothing is performed.

use edged_model::keeper::{LaunchSpec, ReplyBody, Request, RequestBody, StopPlan};

use crate::decide::{Act, End, Event, decide, heard};
use crate::table::Table;

/// A device's table with a child in each state: on its way, running, ended.
fn table() -> Table {
    let mut table = Table::new(true, 10_000);
    let mut feed = |event| drop(decide(&mut table, event, 1));
    feed(Event::AgentStarted { pid: 10 });
    for (key, pid) in [("starting", 20), ("running", 21), ("ended", 22)] {
        let spec = Box::new(LaunchSpec { key: key.to_owned(), ..LaunchSpec::default() });
        feed(Event::Request(Request { id: 1, body: RequestBody::Launch(spec) }));
        let (key, note) = (key.to_owned(), String::new());
        feed(Event::Cloned { request: 1, key, note, stop: StopPlan::default(), pid });
    }
    feed(Event::ExecReached { key: "running".to_owned() });
    feed(Event::ExecReached { key: "ended".to_owned() });
    feed(Event::Reaped { pid: 22, end: End { code: Some(0), signal: None, core_dumped: false } });
    table
}

/// One message. It is read or refused; who asked is answered, once; nobody who runs is started again or forgotten; what is
/// signalled is there.
///
/// # Panics
/// If one of these promises is broken.
pub fn message(bytes: &[u8]) {
    let (mut table, before) = (table(), table());
    let event = heard(bytes);
    let asked = match &event {
        Event::Request(request) => Some(request.clone()),
        _ => None,
    };
    let acts = decide(&mut table, event, 2);
    let answers = acts.iter().filter_map(|act| match act {
        Act::Send { id, body, .. } => Some((*id, body)),
        Act::Signal { id, .. } => Some((*id, &ReplyBody::Done)),
        // Answered when it has been looked at.
        Act::LookAtProgram { asked, .. } => Some((asked.request?, &ReplyBody::Done)),
        Act::Launch { request, .. } => Some((*request, &ReplyBody::Done)),
        _ => None,
    });
    let answers: Vec<_> = answers.collect();
    match &asked {
        None => assert!(matches!(answers[..], [(0, ReplyBody::Refused { .. })]), "{answers:?}"),
        Some(Request { id, body }) => {
            let wanted = match body {
                RequestBody::Heartbeat => 0,
                RequestBody::List => 1 + before.children.keys().filter(|key| key.as_str() != "starting").count(),
                _ => 1,
            };
            assert!(answers.len() == wanted && answers.iter().all(|(of, _)| of == id), "{asked:?}: {answers:?}");
        }
    }
    for (key, child) in before.children.iter().filter(|(_, child)| child.is_living()) {
        assert_eq!(table.children.get(key).map(|after| after.pid), Some(child.pid), "{key} after {asked:?}");
    }
    for act in &acts {
        match act {
            Act::Launch { spec, .. } => assert!(!before.children.contains_key(&spec.key), "{} twice", spec.key),
            Act::Signal { key, signal, .. } => {
                let living = before.children.get(key).is_some_and(crate::table::Child::is_living);
                assert!(living && (1..=64).contains(signal), "signal {signal} for {key}");
            }
            _ => {}
        }
    }
    // It goes on, whatever that was.
    let _ = decide(&mut table, Event::Tick, u64::MAX);
}
