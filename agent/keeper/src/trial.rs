//! A newer program takes over: what is decided about it, with no system call ([`crate::program`] has those).
//!
//! ```text
//!  asked ──> tried in a child ──no──> refused: what runs goes on
//!                  └──yes──> executed, on trial ──a minute, and settled──> proved
//!                                  └──the third fall──> the former program, with the table; refused
//! ```
//! A fall is an end of its agent that nobody ordered, or a hang. A boot in the middle of a trial (the power was cut, the
//! machine hung) goes on with it, and too many of those are as bad as falls. A program that was refused is not tried again
//! until another file lies there, or somebody insists.

use edged_model::keeper::{FileId, RefusedProgram, ReplyBody};
use serde::{Deserialize, Serialize};

use crate::decide::{Act, End, send};
use crate::table::{AgentLife, Table};

/// The agent of a new program may fall so often.
const FALLS: u32 = 3;
/// An agent that has run this long and has settled proves its program.
const PROVED_MS: u64 = 60_000;
/// One whose planner is never done proves it after this long.
const PROVED_UNSETTLED_MS: u64 = 600_000;
/// To set the former program aside and start the new one once.
const TRY_MS: u64 = 10_000;
/// What was tried is executed soon, or tried again.
const READY_MS: u64 = 30_000;

/// What a program prints that can take over, before its version.
pub const READY: &str = "ready to take over: edged ";

/// Who wants a program tried, and what for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// The request that waits for an answer.
    pub request: Option<u64>,
    pub then: Then,
    /// Also if it was refused before.
    pub again: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Then {
    Wait,
    Execute { agent_too: bool },
}

/// A child tries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trying {
    pub pid: i32,
    pub file: FileId,
    pub asked: Asked,
    pub kill_at_boot_ms: u64,
    pub is_killed: bool,
}

/// Tried: it can take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// `None`: it is the very program that runs.
    pub file: Option<FileId>,
    pub until_boot_ms: u64,
}

/// The program that runs has to prove itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// The name of the one that comes back.
    pub former: String,
    pub file: Option<FileId>,
    pub since_boot_ms: u64,
    pub falls: u32,
    /// Its agent has said so.
    pub is_settled: bool,
}

/// All of it, in the keeper's table.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Upgrade {
    pub trying: Option<Trying>,
    pub ready: Option<Ready>,
    pub trial: Option<Trial>,
    pub refused: Option<RefusedProgram>,
}

/// What came of looking at the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Looked {
    Same,
    /// A child of ours tries it.
    Trying {
        pid: i32,
        file: FileId,
    },
    /// Somebody must insist.
    RefusedBefore,
    Unusable {
        why: String,
    },
}

pub fn ask(table: &mut Table, asked: Asked, acts: &mut Vec<Act>) {
    // On the way down nothing new is begun.
    let why = match (&table.down, table.upgrade.trying) {
        (Some(_), _) => "the machine is going down",
        (None, Some(_)) => "a newer program is being tried already",
        (None, None) => {
            let mut refused = None;
            if let Some(before) = &mut table.upgrade.refused {
                // Whoever insists has the file forgotten as its bytes are ([`crate::program::look`]).
                before.file.take_if(|_| asked.again);
                refused = before.file;
            }
            return acts.push(Act::LookAtProgram { asked, refused, is_on_trial: table.upgrade.trial.is_some() });
        }
    };
    match asked.request {
        Some(id) => send(acts, id, ReplyBody::Refused { why: why.to_owned() }),
        None => acts.push(Act::Say(format!("no upgrade: {why}"))),
    }
}

pub fn looked(table: &mut Table, asked: Asked, looked: Looked, now: u64, acts: &mut Vec<Act>) {
    match looked {
        Looked::Same => can_take_over(table, asked, None, now, acts),
        Looked::Trying { pid, file } => {
            let kill_at_boot_ms = now.saturating_add(TRY_MS);
            table.upgrade.trying = Some(Trying { pid, file, asked, kill_at_boot_ms, is_killed: false });
        }
        Looked::RefusedBefore => {
            let before = table.upgrade.refused.as_ref().map(|refused| refused.why.clone()).unwrap_or_default();
            cannot(table, asked, None, format!("this program was refused before: {before}"), acts);
        }
        Looked::Unusable { why } => cannot(table, asked, None, why, acts),
    }
}

/// The child that tried it has ended; what it said.
pub fn tried(table: &mut Table, end: End, words: &str, now: u64, acts: &mut Vec<Act>) {
    let Some(Trying { file, asked, is_killed, .. }) = table.upgrade.trying.take() else { return };
    let last = words.lines().next_back().unwrap_or_default().trim();
    if end.code == Some(0) && last.starts_with(READY) {
        return can_take_over(table, asked, Some(file), now, acts);
    }
    let how = match (end.code, end.signal) {
        _ if is_killed => format!("it is not done after {} s", TRY_MS / 1000),
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "its end is unknown".to_owned(),
    };
    let said = if last.is_empty() { String::new() } else { format!(", and it said `{last}`") };
    cannot(table, asked, Some(file), format!("it was tried in a child and cannot take over: {how}{said}"), acts);
}

fn can_take_over(table: &mut Table, asked: Asked, file: Option<FileId>, now: u64, acts: &mut Vec<Act>) {
    if let Some(id) = asked.request {
        send(acts, id, ReplyBody::Done);
    }
    match asked.then {
        Then::Wait => table.upgrade.ready = Some(Ready { file, until_boot_ms: now.saturating_add(READY_MS) }),
        Then::Execute { agent_too } => take_over(table, file, agent_too, now, acts),
    }
}

fn take_over(table: &mut Table, file: Option<FileId>, agent_too: bool, now: u64, acts: &mut Vec<Act>) {
    if table.down.is_some() {
        return;
    }
    table.upgrade.ready = None;
    if file.is_some() {
        // Who is on trial itself does not vouch for another: the proved one stays the one that comes back.
        let former = table.upgrade.trial.take().map_or_else(|| format!("edged {}", version()), |trial| trial.former);
        table.upgrade.refused = None;
        table.upgrade.trial = Some(Trial { former, file, since_boot_ms: now, falls: 0, is_settled: false });
    }
    acts.push(Act::ExecAgain { file, agent_too });
}

/// The agent's word. What it had tried a moment ago is executed at once.
pub fn upgrade(table: &mut Table, id: u64, now: u64, acts: &mut Vec<Act>) {
    match table.upgrade.ready {
        Some(Ready { file, until_boot_ms }) if now < until_boot_ms && table.down.is_none() => {
            send(acts, id, ReplyBody::Done);
            take_over(table, file, true, now, acts);
        }
        _ => ask(table, Asked { request: Some(id), then: Then::Execute { agent_too: true }, again: false }, acts),
    }
}

fn cannot(table: &mut Table, asked: Asked, file: Option<FileId>, why: String, acts: &mut Vec<Act>) {
    let program = table.program.as_deref().unwrap_or("the program");
    let why = format!("{program} is not taken: {why}");
    acts.push(Act::Say(why.clone()));
    if table.upgrade.trial.is_none() {
        acts.push(Act::DropFormer);
    }
    if asked.again
        && let Some(refused) = &mut table.upgrade.refused
    {
        refused.file = refused.file.or(file);
    }
    match asked.request {
        Some(id) => send(acts, id, ReplyBody::Refused { why }),
        // Nobody waits for the answer of a signal: the story will have it.
        None => {
            let file = file.or(table.upgrade.refused.as_ref().and_then(|refused| refused.file));
            table.upgrade.refused = Some(RefusedProgram { why, has_run: false, is_told: false, file });
        }
    }
}

/// The kernel did not take what had been tried.
pub fn not_executed(table: &mut Table, why: &str, acts: &mut Vec<Act>) {
    let file = table.upgrade.trial.take().and_then(|trial| trial.file);
    let asked = Asked { request: None, then: Then::Wait, again: false };
    cannot(table, asked, file, format!("it cannot be executed: {why}"), acts);
}

/// A boot, and the former program still lies there: its successor has not proved itself. `boots` counts this one.
pub fn booted(table: &mut Table, boots: u32, now: u64, acts: &mut Vec<Act>) {
    let former = "the former edged".to_owned();
    table.upgrade.trial = Some(Trial { former, file: None, since_boot_ms: now, falls: 0, is_settled: false });
    if boots > FALLS {
        go_back(table, &format!("it was started {} times and never proved itself", boots - 1), now, acts);
    } else {
        acts.push(Act::Say(format!("edged {} is on trial still, at its start number {boots}", version())));
    }
}

/// An agent has ended, or could not be started.
pub fn fell(table: &mut Table, started_boot_ms: u64, how: &str, now: u64, acts: &mut Vec<Act>) {
    let Some(trial) = &mut table.upgrade.trial else { return };
    // The agent of the program before, which was replaced.
    if started_boot_ms < trial.since_boot_ms {
        return;
    }
    trial.falls += 1;
    if trial.falls >= FALLS {
        let why = format!("its agent fell {} times, the last time with {how}", trial.falls);
        go_back(table, &why, now, acts);
    }
}

pub fn go_back(table: &mut Table, why: &str, now: u64, acts: &mut Vec<Act>) {
    let Some(trial) = table.upgrade.trial.take() else { return };
    let program = table.program.as_deref().unwrap_or("edged");
    let why = format!("edged {} ({program}) is sent away: {why}; {} runs again", version(), trial.former);
    acts.push(Act::Say(why.clone()));
    table.upgrade = Upgrade {
        refused: Some(RefusedProgram { why, has_run: true, is_told: false, file: trial.file }),
        ..Upgrade::default()
    };
    // The one that comes back has not failed.
    table.agent.failures_in_a_row = 0;
    if let AgentLife::Waiting { until_boot_ms } = &mut table.agent.life {
        // By the next image, not in the table that this one writes.
        *until_boot_ms = now.saturating_add(1);
    }
    acts.push(Act::GoBack);
}

/// Another agent begins anew.
pub fn started(table: &mut Table) {
    if let Some(trial) = &mut table.upgrade.trial {
        trial.is_settled = false;
    }
}

pub fn settled(table: &mut Table) {
    if let Some(trial) = &mut table.upgrade.trial {
        trial.is_settled = true;
    }
}

/// When the program will have proved itself, if its agent runs on.
fn proved_at_boot_ms(table: &Table) -> Option<u64> {
    let trial = table.upgrade.trial.as_ref()?;
    let AgentLife::Running { started_boot_ms, .. } = table.agent.life else { return None };
    let is_its_own = started_boot_ms >= trial.since_boot_ms;
    let after = if trial.is_settled { PROVED_MS } else { PROVED_UNSETTLED_MS };
    is_its_own.then(|| started_boot_ms.saturating_add(after))
}

pub fn due(table: &mut Table, now: u64, acts: &mut Vec<Act>) {
    if let Some(trying) = table.upgrade.trying.as_mut().filter(|trying| !trying.is_killed)
        && trying.kill_at_boot_ms <= now
    {
        trying.is_killed = true;
        acts.push(Act::KillProcess { pid: trying.pid });
    }
    if proved_at_boot_ms(table).is_some_and(|at| at <= now) {
        table.upgrade.trial = None;
        acts.push(Act::Say(format!("edged {} has proved itself", version())));
        acts.push(Act::DropFormer);
    }
}

pub fn wake_at_boot_ms(table: &Table) -> u64 {
    let trying = table.upgrade.trying.filter(|trying| !trying.is_killed).map(|trying| trying.kill_at_boot_ms);
    proved_at_boot_ms(table).into_iter().chain(trying).min().unwrap_or(u64::MAX)
}

pub fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}

#[cfg(test)]
mod tests;
