//! `(table, event, now) -> acts`: every decision of the keeper, with no system call in it. It is total: each event has
//! an answer in each state. [`crate::serve`] performs the acts and does nothing else.

use edged_model::keeper::{
    ChildExit, FileId, HEARTBEAT_TIMEOUT_MS, LaunchSpec, ReplyBody, Request, RequestBody, ShutdownHow, StopPlan,
};

use crate::agent::{count_failure, restart_delay_ms};
use crate::table::{AgentLife, Child, Down, Life, MAX_CHILDREN, NOBODY, Phase, Table, Way};
use crate::trial::{self, Asked, Looked, Then, version};

/// Grace for the kernel to take away what was killed.
pub const FORCED_MS: u64 = 2_000;

/// From a closed socket to the end of the process.
const CLOSING_MS: u64 = 1_000;

/// An agent that ends this often in a row will not mend by being started again: then the watchdog may have the machine.
const HOPELESS: u32 = 50;

/// What came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Time has passed.
    Tick,
    Asked(Wish),
    Reaped {
        pid: i32,
        end: End,
    },
    Request(Request),
    /// A message that is no request.
    Unreadable {
        why: String,
    },
    AgentStarted {
        pid: i32,
    },
    AgentNotStarted {
        why: String,
    },
    /// It has closed its socket.
    AgentClosed,
    /// It is of the version before this one.
    AgentOutdated,
    /// It reads or says nothing that could be understood.
    AgentDeaf {
        why: &'static str,
    },
    Cloned {
        request: u64,
        key: String,
        note: String,
        stop: StopPlan,
        pid: i32,
    },
    NotCloned {
        request: u64,
        key: String,
        stage: String,
        errno: i32,
    },
    ExecReached {
        key: String,
    },
    StepFailed {
        key: String,
        stage: String,
        errno: i32,
    },
    /// At the program that lies in our place.
    Looked {
        asked: Asked,
        looked: Looked,
    },
    /// The child that tried it has ended.
    Tried {
        end: End,
        words: String,
    },
    NotExecuted {
        why: String,
    },
    /// A boot, with the former program set aside still.
    BootedOnTrial {
        boots: u32,
    },
    /// The keeper itself failed.
    Fault,
}

/// What a signal to the keeper means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    Stop,
    PowerOff,
    Reboot,
    /// Execute the program again, and leave the agent.
    Again,
    /// Execute the program again, and replace the agent.
    Upgrade,
}

/// wait(2)'s status, taken apart. Neither code nor signal: it was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub core_dumped: bool,
}

/// What to do about it, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    Say(String),
    /// To the agent; with the outputs of that child beside it.
    Send {
        id: u64,
        body: ReplyBody,
        outputs_of: Option<String>,
    },
    /// The descriptors are those of the request.
    Launch {
        request: u64,
        spec: Box<LaunchSpec>,
    },
    /// Answers `id` by what came of it.
    Signal {
        id: u64,
        key: String,
        signal: i32,
    },
    SignalChildren {
        signal: i32,
    },
    /// On the way down: nobody asks for an answer.
    End {
        key: String,
        signal: i32,
    },
    /// Whatever is left on a device, orphans and their children too.
    KillAll,
    /// The child has ended: its pidfd is of no use any more.
    ClosePidfd {
        key: String,
    },
    /// Nothing of it is needed any more.
    Close {
        key: String,
    },
    StartAgent,
    /// It is crash-only; this gives it a moment to write down what it has read.
    EndAgent {
        pid: i32,
    },
    /// The agent, or the child that tries a newer program.
    KillProcess {
        pid: i32,
    },
    KeepTimeFloor {
        unix_seconds: i64,
    },
    MoveClock {
        unix_ms: i64,
    },
    PetWatchdog,
    /// Is another program there, and can it take over?
    LookAtProgram {
        asked: Asked,
        refused: Option<FileId>,
        is_on_trial: bool,
    },
    /// `file`: the new program as it was tried; `None`: the same again. `agent_too`: the next image replaces the agent by one
    /// of its own.
    ExecAgain {
        file: Option<FileId>,
        agent_too: bool,
    },
    /// The former program takes its place again, and the table.
    GoBack,
    /// It is not needed any more.
    DropFormer,
    Leave {
        way: Way,
    },
}

/// The same number everywhere (signal(7)).
const KILL: i32 = 9;

/// What a message on the agent's socket says: a request, or why it is none.
pub fn heard(bytes: &[u8]) -> Event {
    match edged_model::cbor::read_quickly(bytes) {
        Ok(request) => Event::Request(request),
        Err(error) => Event::Unreadable { why: format!("not a request: {error}") },
    }
}

#[must_use]
pub fn decide(table: &mut Table, event: Event, now: u64) -> Vec<Act> {
    let mut acts = Vec::new();
    match event {
        Event::Tick => {}
        Event::Asked(wish) => asked(table, wish, now, &mut acts),
        Event::Reaped { pid, end } => reaped(table, pid, end, now, &mut acts),
        Event::Request(request) => answer(table, request, now, &mut acts),
        Event::Unreadable { why } => refuse(&mut acts, 0, why),
        Event::AgentStarted { pid } => {
            table.forget_requests();
            trial::started(table);
            table.agent.life = AgentLife::Running { pid, started_boot_ms: now, heard_boot_ms: now };
        }
        Event::AgentNotStarted { why } => {
            table.agent.failures_in_a_row = table.agent.failures_in_a_row.saturating_add(1);
            // There was no process that could have ended: never at once, or this would be a loop.
            let delay = restart_delay_ms(table.agent.failures_in_a_row).max(100);
            acts.push(Act::Say(format!("the agent cannot be started: {why}; again in {delay} ms")));
            table.agent.life = AgentLife::Waiting { until_boot_ms: now.saturating_add(delay) };
            trial::fell(table, now, &why, now, &mut acts);
        }
        Event::AgentClosed => {
            if let AgentLife::Running { pid, started_boot_ms, .. } = table.agent.life {
                let kill_at_boot_ms = now.saturating_add(CLOSING_MS);
                table.agent.life = AgentLife::Closed { pid, started_boot_ms, kill_at_boot_ms };
            }
        }
        Event::AgentOutdated => {
            if let AgentLife::Running { pid, started_boot_ms, .. } = table.agent.life {
                acts.push(Act::Say("the agent is of the version before: it is replaced".to_owned()));
                acts.push(Act::EndAgent { pid });
                let kill_at_boot_ms = now.saturating_add(CLOSING_MS);
                table.agent.life = AgentLife::Closed { pid, started_boot_ms, kill_at_boot_ms };
            }
        }
        Event::AgentDeaf { why } => kill_agent(table, why, now, &mut acts),
        Event::Cloned { request, key, note, stop, pid } => {
            let life = Life::Launching { request };
            table.children.insert(
                key,
                Child { pid, started_boot_ms: now, note, life, stop, asked_boot_ms: None, is_killed: false },
            );
        }
        Event::NotCloned { request, key, stage, errno } => {
            send(&mut acts, request, ReplyBody::LaunchFailed { key, stage, errno });
        }
        Event::ExecReached { key } => exec_reached(table, key, &mut acts),
        Event::StepFailed { key, stage, errno } => {
            if let Some(Child { life, .. }) = table.children.get_mut(&key)
                && let Life::Launching { request } = *life
            {
                *life = Life::Failed { request, stage, errno };
            }
        }
        Event::Looked { asked, looked } => trial::looked(table, asked, looked, now, &mut acts),
        Event::Tried { end, words } => trial::tried(table, end, &words, now, &mut acts),
        Event::NotExecuted { why } => trial::not_executed(table, &why, &mut acts),
        Event::BootedOnTrial { boots } => trial::booted(table, boots, now, &mut acts),
        Event::Fault => trial::go_back(table, "the keeper itself failed", now, &mut acts),
    }
    due(table, now, &mut acts);
    acts
}

pub fn send(acts: &mut Vec<Act>, id: u64, body: ReplyBody) {
    acts.push(Act::Send { id, body, outputs_of: None });
}

fn refuse(acts: &mut Vec<Act>, id: u64, why: String) {
    send(acts, id, ReplyBody::Refused { why });
}

fn exec_reached(table: &mut Table, key: String, acts: &mut Vec<Act>) {
    let Some(child) = table.children.get_mut(&key) else { return };
    if let Life::Launching { request } = child.life {
        child.life = Life::Running;
        if request == NOBODY {
            return;
        }
        let body = ReplyBody::Launched { key: key.clone(), pid: child.pid, boot_ms: child.started_boot_ms };
        acts.push(Act::Send { id: request, body, outputs_of: Some(key) });
    }
}

fn asked(table: &mut Table, wish: Wish, now: u64, acts: &mut Vec<Act>) {
    match wish {
        Wish::Again | Wish::Upgrade => {
            let then = Then::Execute { agent_too: wish == Wish::Upgrade };
            trial::ask(table, Asked { request: None, then, again: false }, acts);
        }
        Wish::Stop if table.device => go_down(table, Way::Machine(ShutdownHow::Reboot), now, acts),
        Wish::Reboot if table.device => go_down(table, Way::Machine(ShutdownHow::Reboot), now, acts),
        Wish::PowerOff if table.device => go_down(table, Way::Machine(ShutdownHow::PowerOff), now, acts),
        Wish::Stop | Wish::Reboot | Wish::PowerOff => go_down(table, Way::Everything, now, acts),
    }
}

fn reaped(table: &mut Table, pid: i32, end: End, now: u64, acts: &mut Vec<Act>) {
    if table.agent.life.pid() == Some(pid) {
        return agent_ended(table, end, now, acts);
    }
    // An orphan: reaping it was all there was to do.
    let Some(key) = table.key_of_pid(pid).map(str::to_owned) else { return };
    let Some(child) = table.children.get_mut(&key) else { return };
    let End { code, signal, core_dumped } = end;
    let exit = ChildExit { key: key.clone(), pid, code, signal, core_dumped, boot_ms: now };
    match std::mem::replace(&mut child.life, Life::Ended(exit.clone())) {
        Life::Failed { request, stage, errno } if request != NOBODY => {
            table.children.remove(&key);
            acts.push(Act::Close { key: key.clone() });
            send(acts, request, ReplyBody::LaunchFailed { key, stage, errno });
        }
        // Dead without a word: killed on its way to exec.
        Life::Launching { request } if request != NOBODY => {
            table.children.remove(&key);
            acts.push(Act::Close { key: key.clone() });
            let stage = match signal {
                Some(signal) => format!("killed by signal {signal} before exec"),
                None => "ended before exec".to_owned(),
            };
            send(acts, request, ReplyBody::LaunchFailed { key, stage, errno: 0 });
        }
        Life::Launching { .. } | Life::Failed { .. } | Life::Running | Life::Ended(_) => {
            acts.push(Act::ClosePidfd { key });
            send(acts, 0, ReplyBody::Exited(exit));
        }
    }
}

fn agent_ended(table: &mut Table, end: End, now: u64, acts: &mut Vec<Act>) {
    let (AgentLife::Running { started_boot_ms, .. }
    | AgentLife::Closed { started_boot_ms, .. }
    | AgentLife::Dying { started_boot_ms, .. }) = table.agent.life
    else {
        return;
    };
    if table.down.is_some() {
        table.agent.life = AgentLife::Retired;
        return;
    }
    let ran_ms = now.saturating_sub(started_boot_ms);
    table.agent.failures_in_a_row = count_failure(table.agent.failures_in_a_row, ran_ms);
    let delay = restart_delay_ms(table.agent.failures_in_a_row);
    let how = match (end.code, end.signal) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown".to_owned(),
    };
    acts.push(Act::Say(format!("the agent ended ({how}) after {ran_ms} ms; again in {delay} ms")));
    table.agent.life = AgentLife::Waiting { until_boot_ms: now.saturating_add(delay) };
    trial::fell(table, started_boot_ms, &format!("{how} after {ran_ms} ms"), now, acts);
}

fn kill_agent(table: &mut Table, why: &str, now: u64, acts: &mut Vec<Act>) {
    let (AgentLife::Running { pid, started_boot_ms, .. } | AgentLife::Closed { pid, started_boot_ms, .. }) =
        table.agent.life
    else {
        return;
    };
    acts.push(Act::Say(format!("the agent {why}: it is killed")));
    acts.push(Act::KillProcess { pid });
    table.agent.life = AgentLife::Dying { pid, started_boot_ms, since_boot_ms: now };
}

fn answer(table: &mut Table, request: Request, now: u64, acts: &mut Vec<Act>) {
    let id = request.id;
    match request.body {
        RequestBody::Heartbeat => {
            if let AgentLife::Running { heard_boot_ms, .. } = &mut table.agent.life {
                *heard_boot_ms = now;
            }
        }
        RequestBody::Launch(spec) => match may_launch(table, &spec) {
            Ok(()) => acts.push(Act::Launch { request: id, spec }),
            Err(why) => refuse(acts, id, why),
        },
        RequestBody::Signal { key, signal } => match table.children.get(&key) {
            None => refuse(acts, id, format!("`{key}` is not there")),
            Some(_) if !(1..=64).contains(&signal) => refuse(acts, id, format!("there is no signal {signal}")),
            // It has ended; the agent has been told or is about to be.
            Some(child) if !child.is_living() => send(acts, id, ReplyBody::Done),
            Some(_) => acts.push(Act::Signal { id, key, signal }),
        },
        RequestBody::Note { key, note } => match table.children.get_mut(&key) {
            None => refuse(acts, id, format!("`{key}` is not there")),
            Some(child) => {
                child.note = note;
                send(acts, id, ReplyBody::Done);
            }
        },
        RequestBody::List => list(table, id, acts),
        RequestBody::Forget { key } => {
            if table.children.get(&key).is_some_and(|child| !child.is_living()) {
                table.children.remove(&key);
                acts.push(Act::Close { key });
                send(acts, id, ReplyBody::Done);
            } else if table.children.contains_key(&key) {
                refuse(acts, id, format!("`{key}` still runs"));
            } else {
                send(acts, id, ReplyBody::Done);
            }
        }
        RequestBody::Shutdown { how } => match (table.device, how) {
            (true, ShutdownHow::Exit) => refuse(acts, id, "on a device the keeper ends with the machine".to_owned()),
            (true, how) => {
                send(acts, id, ReplyBody::Done);
                go_down(table, Way::Machine(how), now, acts);
            }
            (false, how) => {
                send(acts, id, ReplyBody::Done);
                let way = if how == ShutdownHow::Exit { Way::KeeperAlone } else { Way::Everything };
                go_down(table, way, now, acts);
            }
        },
        RequestBody::TimeFloor { unix_seconds } => {
            // A host's clock is not ours.
            if table.device {
                acts.push(Act::KeepTimeFloor { unix_seconds });
            }
            send(acts, id, ReplyBody::Done);
        }
        RequestBody::MoveClock { unix_ms } => {
            if table.device {
                acts.push(Act::MoveClock { unix_ms });
            }
            send(acts, id, ReplyBody::Done);
        }
        RequestBody::Version => {
            let on_trial_after = table.upgrade.trial.as_ref().map(|trial| trial.former.clone());
            let (program, refused) = (table.program.clone(), table.upgrade.refused.clone());
            send(acts, id, ReplyBody::Version { version: version(), program, on_trial_after, refused });
        }
        RequestBody::Rehearse { again } => {
            trial::ask(table, Asked { request: Some(id), then: Then::Wait, again }, acts);
        }
        RequestBody::Upgrade => trial::upgrade(table, id, now, acts),
        RequestBody::Settled => {
            trial::settled(table);
            send(acts, id, ReplyBody::Done);
        }
        RequestBody::RefusalTold => {
            if let Some(refused) = &mut table.upgrade.refused {
                refused.is_told = true;
            }
            send(acts, id, ReplyBody::Done);
        }
    }
}

fn may_launch(table: &Table, spec: &LaunchSpec) -> Result<(), String> {
    if table.down.is_some() {
        return Err("the machine is going down".to_owned());
    }
    if table.children.contains_key(&spec.key) {
        return Err(format!("`{}` is there already", spec.key));
    }
    if table.children.len() >= MAX_CHILDREN {
        return Err(format!("there are {MAX_CHILDREN} children already"));
    }
    match &spec.join {
        Some(key) if !table.children.get(key).is_some_and(|child| child.life == Life::Running) => {
            Err(format!("`{key}` does not run"))
        }
        _ => Ok(()),
    }
}

fn list(table: &Table, id: u64, acts: &mut Vec<Act>) {
    let states: Vec<_> = table.children.iter().filter_map(|(key, child)| child.state(key)).collect();
    let children = u32::try_from(states.len()).unwrap_or(u32::MAX);
    send(acts, id, ReplyBody::Table { children, keeper_version: version() });
    for state in states {
        let outputs_of = Some(state.key.clone());
        acts.push(Act::Send { id, body: ReplyBody::Child(state), outputs_of });
    }
}

fn go_down(table: &mut Table, way: Way, now: u64, acts: &mut Vec<Act>) {
    match &mut table.down {
        // Asked twice is asked for haste.
        Some(Down { phase: Phase::Asked { kill_at_boot_ms }, .. }) => *kill_at_boot_ms = now,
        Some(Down { phase: Phase::Forced { .. } | Phase::Left, .. }) => {}
        None => {
            acts.push(Act::Say(format!("going down: {way:?}")));
            let kill_at_boot_ms = now.saturating_add(table.stop_timeout_ms);
            table.down = Some(Down { way, phase: Phase::Asked { kill_at_boot_ms } });
            // First the agent, or it would start again what we stop. It is crash-only: nothing is lost.
            match table.agent.life {
                AgentLife::Running { pid, started_boot_ms, .. } | AgentLife::Closed { pid, started_boot_ms, .. } => {
                    acts.push(Act::KillProcess { pid });
                    table.agent.life = AgentLife::Dying { pid, started_boot_ms, since_boot_ms: now };
                }
                AgentLife::Waiting { .. } => table.agent.life = AgentLife::Retired,
                AgentLife::Starting | AgentLife::Dying { .. } | AgentLife::Retired => {}
            }
        }
    }
}

/// What the clock asks for, whatever the event was.
fn due(table: &mut Table, now: u64, acts: &mut Vec<Act>) {
    match table.agent.life {
        AgentLife::Waiting { until_boot_ms } if until_boot_ms <= now => {
            table.agent.life = if table.down.is_some() { AgentLife::Retired } else { AgentLife::Starting };
            if table.down.is_none() {
                acts.push(Act::StartAgent);
            }
        }
        AgentLife::Running { heard_boot_ms, .. } if is_silent(heard_boot_ms, now) => {
            kill_agent(table, "gives no sign of life", now, acts);
        }
        AgentLife::Closed { kill_at_boot_ms, .. } if kill_at_boot_ms <= now => {
            kill_agent(table, "has closed its socket and does not end", now, acts);
        }
        AgentLife::Running { .. }
        | AgentLife::Closed { .. }
        | AgentLife::Waiting { .. }
        | AgentLife::Starting
        | AgentLife::Dying { .. }
        | AgentLife::Retired => {}
    }
    trial::due(table, now, acts);
    pet(table, now, acts);
    down(table, now, acts);
}

fn is_silent(since: u64, now: u64) -> bool {
    now.saturating_sub(since) > HEARTBEAT_TIMEOUT_MS
}

fn pet(table: &mut Table, now: u64, acts: &mut Vec<Act>) {
    let well = table.down.is_some()
        || table.agent.failures_in_a_row < HOPELESS
            && match table.agent.life {
                AgentLife::Running { heard_boot_ms, .. } => !is_silent(heard_boot_ms, now),
                AgentLife::Dying { since_boot_ms, .. } => !is_silent(since_boot_ms, now),
                // It is being replaced: a wait is shorter than any sensible watchdog.
                AgentLife::Closed { .. } | AgentLife::Waiting { .. } | AgentLife::Starting | AgentLife::Retired => true,
            };
    let Some(petting) = &mut table.watchdog else { return };
    if petting.next_boot_ms <= now {
        petting.next_boot_ms = now.saturating_add(petting.every_ms);
        if well {
            acts.push(Act::PetWatchdog);
        }
    }
}

/// Asks the living children of the highest order to end, and kills those that had their time. The next order comes when
/// none of this one lives.
fn end_in_order(table: &mut Table, now: u64, acts: &mut Vec<Act>) {
    let highest = table.living().map(|(_, child)| child.stop.order).max();
    let of_this_order = |child: &Child| child.is_living() && Some(child.stop.order) == highest;
    for (key, child) in table.children.iter_mut().filter(|(_, child)| of_this_order(child)) {
        let signal = match child.kill_at_boot_ms() {
            None if child.asked_boot_ms.is_none() => {
                child.asked_boot_ms = Some(now);
                child.stop.signal
            }
            Some(kill_at) if kill_at <= now => {
                child.is_killed = true;
                KILL
            }
            _ => continue,
        };
        acts.push(Act::End { key: key.clone(), signal });
    }
}

fn down(table: &mut Table, now: u64, acts: &mut Vec<Act>) {
    let Some(Down { way, phase }) = table.down else { return };
    let waits_for_agent = match table.agent.life {
        AgentLife::Running { .. } | AgentLife::Closed { .. } | AgentLife::Dying { .. } | AgentLife::Starting => true,
        AgentLife::Waiting { .. } | AgentLife::Retired => false,
    };
    let any_living = waits_for_agent || way != Way::KeeperAlone && table.living().next().is_some();
    let next = match phase {
        Phase::Left => return,
        Phase::Asked { .. } | Phase::Forced { .. } if !any_living => Phase::Left,
        Phase::Forced { leave_at_boot_ms } if leave_at_boot_ms <= now => Phase::Left,
        Phase::Asked { kill_at_boot_ms } if kill_at_boot_ms <= now => {
            if way != Way::KeeperAlone {
                acts.push(Act::SignalChildren { signal: KILL });
            }
            Phase::Forced { leave_at_boot_ms: now.saturating_add(FORCED_MS) }
        }
        Phase::Asked { .. } => {
            if way != Way::KeeperAlone {
                end_in_order(table, now, acts);
            }
            phase
        }
        Phase::Forced { .. } => phase,
    };
    if next == Phase::Left {
        if let Way::Machine(_) = way {
            acts.push(Act::KillAll);
        }
        acts.push(Act::Leave { way });
    }
    table.down = Some(Down { way, phase: next });
}

#[cfg(test)]
mod tests;
