//! A newer edged takes over in place: it is asked who it is, the keeper tries it in a child, and if it can take over the
//! keeper executes it with the table of its children and starts its agent. No workload notices; what ends meanwhile is in
//! the table. What the keeper decides about a program on trial or refused is told here.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use edged_model::api::Answer;
use edged_model::reason::{Code, Reason};
use nix::sys::signal::{SIGTERM, SigSet};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::answer::{error, one};
use super::{Agent, Message, clock};
use crate::report::News;
use crate::runtime::keeper_link::{LinkError, Program};
use crate::store::inline_chain;

/// A program that is asked for its version and does not answer is none.
const ANSWER_MS: u64 = 5_000;
/// The operator hears of it before this agent ends.
const TELL: Duration = Duration::from_secs(1);
/// Less than the keeper waits before it kills.
const LAST_LINES: Duration = Duration::from_millis(500);

/// What `program --version` says, if it is an edged that runs on this machine. Blocking.
fn version_of(program: &Path) -> Result<String, Reason> {
    let bad = |why: String| {
        let text = format!("{} is no edged that runs here: {why}", program.display());
        Reason::new(Code::UpgradeRefused, text).next("put the right file there, under that name in one step (mv)")
    };
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| bad(error.to_string()))?;
    let deadline = clock::boot_ms() + ANSWER_MS;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if clock::boot_ms() < deadline => std::thread::park_timeout(Duration::from_millis(20)),
            _ => {
                // It is gone, or goes now.
                let _ = child.kill();
                let _ = child.wait();
                return Err(bad("it does not tell its version".to_owned()));
            }
        }
    };
    let mut said = String::new();
    let read = child.stdout.take().map(|stdout| stdout.take(200).read_to_string(&mut said));
    match said.trim().strip_prefix("edged ").filter(|_| status.success() && read.is_some_and(|read| read.is_ok())) {
        Some(version) => Ok(version.to_owned()),
        None => Err(bad(format!("asked for its version it says `{}` ({status})", said.trim()))),
    }
}

fn not_taken(why: String) -> Reason {
    Reason::new(Code::UpgradeRefused, why).next("put another file there, or insist: edgectl upgrade --again")
}

/// For the status and the story: what the keeper says about its program, if anything.
fn reason(program: &Program) -> Option<Reason> {
    if let Some(former) = &program.on_trial_after {
        let text = format!("edged {} is on trial after {former}", crate::VERSION);
        let next = "nothing is to be done: it has proved itself after a minute, or the one before comes back";
        return Some(Reason::new(Code::UpgradeOnTrial, text).next(next));
    }
    let refused = program.refused.as_ref()?;
    let why = not_taken(refused.why.clone());
    Some(if refused.has_run { Reason { code: Code::UpgradeReturned, ..why } } else { why })
}

/// The keeper's word that an agent of another version is to follow this one.
pub(super) struct Ended(Option<Signal>);

impl Ended {
    pub fn listen() -> Self {
        let signal = signal(SignalKind::terminate()).and_then(|signal| {
            // The keeper takes its own signals by descriptor, and a program inherits what is blocked where it began.
            SigSet::from(SIGTERM).thread_unblock()?;
            Ok(signal)
        });
        Self(signal.map_err(|error| tracing::warn!("no SIGTERM will be heard: {error}")).ok())
    }

    pub async fn by_the_keeper(&mut self) {
        match &mut self.0 {
            Some(signal) => drop(signal.recv().await),
            None => std::future::pending().await,
        }
    }
}

impl Agent {
    /// Lines that were read and not written would be lost; all else is for the next agent as it is.
    pub(super) async fn end_for_another(self) {
        let logs = self.logs.clone();
        let _ = tokio::time::timeout(LAST_LINES, tokio::task::spawn_blocking(move || logs.end())).await;
    }

    /// At the start and with every beat: a signal may have asked for an upgrade, and nobody waited for the answer.
    pub(super) async fn look_at_program(&mut self) {
        let program = match self.link.program().await {
            Ok(program) => program,
            Err(error) => return tracing::warn!("the keeper's program: {}", inline_chain(&error)),
        };
        let why = reason(&program);
        if why == self.upgrade {
            return;
        }
        self.upgrade = why;
        self.fleet.changed(News::Fresh);
        if let (Some(refused), Some(why)) = (program.refused.filter(|refused| !refused.is_told), self.upgrade.clone()) {
            if refused.has_run {
                self.count(|survived| &mut survived.upgrades_returned);
            }
            self.tell(None, None, &why, "keeper");
            self.keep_counters();
            // Told when it is on the disk: an agent that dies now leaves it to the next one.
            let (link, runtime) = (self.link.clone(), tokio::runtime::Handle::current());
            let written = self.writes.submit(move |store| match store.sync() {
                Ok(()) => drop(runtime.spawn(async move { link.refusal_told().await })),
                Err(error) => tracing::error!("sync: {}", inline_chain(&error)),
            });
            self.warn_if_busy(written);
        }
    }

    /// Says once that the planner has nothing to do but wait.
    pub(super) async fn settle_once(&mut self) {
        if self.is_settled || !self.plan.actions.is_empty() {
            return;
        }
        match self.link.settled().await {
            Ok(()) => self.is_settled = true,
            Err(error) => tracing::warn!("settled: {}", inline_chain(&error)),
        }
    }

    pub(super) fn upgrade(&self, answers: mpsc::Sender<Answer>, again: bool, by: String) {
        let (link, inbox) = (self.link.clone(), self.inbox.clone());
        tokio::spawn(async move {
            let program = match link.program().await {
                Ok(Program { place: Some(program), .. }) => program,
                Ok(Program { place: None, .. }) => {
                    let text = "the keeper that runs cannot be upgraded in place".to_owned();
                    return error(&answers, Reason::new(Code::UpgradeRefused, text).next("restart edged"));
                }
                Err(why) => return error(&answers, Reason::new(Code::UpgradeRefused, inline_chain(&why))),
            };
            let asked = program.clone();
            let version = tokio::task::spawn_blocking(move || version_of(&asked)).await;
            let version = match version {
                Ok(Ok(version)) => version,
                Ok(Err(why)) => return error(&answers, why),
                Err(why) => return error(&answers, Reason::new(Code::UpgradeRefused, why.to_string())),
            };
            match link.rehearse(again).await {
                Ok(()) => {}
                Err(LinkError::Refused { why }) => return error(&answers, not_taken(why)),
                Err(why) => return error(&answers, Reason::new(Code::UpgradeRefused, inline_chain(&why))),
            }
            let text = format!("edged {version} ({}) takes over from {}", program.display(), crate::VERSION);
            one(&answers, Answer::Accepted { what: text.clone() });
            // Until the connection has taken it; one that hangs is not waited for.
            let _ = tokio::time::timeout(TELL, answers.closed()).await;
            // The loop has ended only when the agent ends.
            let _ = inbox.send(Message::Upgrade { text, by }).await;
        });
    }

    /// The story is on the disk before this agent ends.
    pub(super) fn upgrade_now(&self, text: String, by: &str) {
        self.tell(None, None, &Reason::new(Code::Upgrade, text), by);
        let (link, runtime) = (self.link.clone(), tokio::runtime::Handle::current());
        let written = self.writes.submit(move |store| {
            if let Err(error) = store.sync() {
                tracing::error!("sync: {}", inline_chain(&error));
            }
            runtime.spawn(async move {
                if let Err(error) = link.upgrade().await {
                    tracing::error!("upgrade: {}", inline_chain(&error));
                }
            });
        });
        self.warn_if_busy(written);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_edged_is_taken_for_one() {
        let why = |program: &str| version_of(Path::new(program)).unwrap_err().text;
        assert!(why("/nonexistent").contains("No such file"), "{}", why("/nonexistent"));
        assert!(why("/bin/true").contains("it says"), "{}", why("/bin/true"));
        assert!(why("/etc/passwd").contains("Permission denied"), "{}", why("/etc/passwd"));
    }
}
