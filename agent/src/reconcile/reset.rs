//! An operator's `reset --workloads`: what manifests have brought goes; whom the device trusts, what it is and how far it
//! has come stay.
//!
//! ```text
//! asked ──> no generation, and a mark: one write ──> the planner stops and removes all ──> images, volumes ──> no mark
//! ```
//! An agent that finds the mark goes on after the first step. Nothing new is taken until the mark is gone: so it goes also
//! when something cannot be taken away after some tries, and that is told.

use edged_model::api::Answer;
use edged_model::generation::Pointers;
use edged_model::quantity::Bytes;
use edged_model::reason::{Code, Reason};
use edged_plan::garbage::Room;
use tokio::sync::mpsc;

use super::{Agent, Message, answer, clock};
use crate::crash_point;
use crate::execute::reset::{Gone, finish};
use crate::store::{FoundReset, Reset, inline_chain};

/// The key among what failed; no workload has such a name.
const RESET: &str = "(reset)";
/// What the status says was refused.
const WHAT: &str = "reset";

/// After so many tries, a quarter of a minute, what is left stays: a device that takes nothing new is worse.
const TRIES_MAX: u32 = 5;
/// And so long what still runs, or is on its way, is waited for.
const WAIT_MAX_MS: u64 = 900_000;
/// So many of what is left are named.
const NAMED_MAX: usize = 3;

/// A reset under way.
pub(super) struct UnderReset {
    wanted: Reset,
    step: Step,
    by: String,
    /// Tries of this agent that left something.
    failed: u32,
    since_boot_ms: u64,
    /// Of its last try.
    error: Option<String>,
    /// By all its tries.
    gone: Gone,
    /// Who asked, if it was not an agent before this one.
    reply: Option<mpsc::Sender<Answer>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    BeingWritten,
    /// The planner removes what runs.
    WorkloadsGo,
    RestGoes,
    /// What is left stays.
    GivenUp,
}

impl UnderReset {
    /// One that an agent before us began.
    pub(super) fn found(found: FoundReset) -> Option<Self> {
        let FoundReset::Unfinished(wanted) = found else { return None };
        Some(Self::new(wanted, Step::WorkloadsGo, "agent".to_owned(), None))
    }

    fn new(wanted: Reset, step: Step, by: String, reply: Option<mpsc::Sender<Answer>>) -> Self {
        Self { wanted, step, by, failed: 0, since_boot_ms: clock::boot_ms(), error: None, gone: Gone::default(), reply }
    }

    /// No generation is left, and no way back.
    pub(super) fn has_begun(&self) -> bool {
        self.step != Step::BeingWritten
    }

    fn is_last_try(&self) -> bool {
        self.failed + 1 >= TRIES_MAX || self.step == Step::GivenUp
    }

    /// Nothing more comes of waiting or trying.
    fn is_hopeless(&self, is_quiet: bool) -> bool {
        let waited_ms = clock::boot_ms().saturating_sub(self.since_boot_ms);
        self.failed >= TRIES_MAX || !is_quiet && waited_ms >= WAIT_MAX_MS
    }
}

/// What the story says of one that another agent's manifest has ended.
pub(super) fn overtaken(found: FoundReset) -> Option<Reason> {
    let FoundReset::Overtaken(sequence) = found else { return None };
    let text = format!("a reset of the workloads was not over when generation {sequence} came: it is not gone on with");
    Some(Reason::new(Code::OperatorReset, text).next("reset them again if they are to go"))
}

impl Agent {
    /// Why nothing new is taken, while that is so.
    pub(super) fn refused_by_reset(&self) -> Option<Reason> {
        let busy = || Reason::new(Code::Busy, "the workloads are being reset").next("try again when that is over");
        self.reset.as_ref().map(|_| busy())
    }

    pub(super) fn reset_workloads(&mut self, answers: mpsc::Sender<Answer>, wanted: Reset, by: String) {
        if self.under_way.change {
            let why = Reason::new(Code::Busy, "another change is being written").next("say it again");
            return answer::error(&answers, why);
        }
        let (sequence, volumes) = (self.world.desired.pointers.highest_sequence, volumes_too(wanted));
        let text =
            format!("all workloads and their images go{volumes}, as {by} asked; sequences up to {sequence} stay used");
        self.tell(None, None, &Reason::new(Code::OperatorReset, text), &by);
        let inbox = self.inbox.clone();
        let written = self.writes.submit(move |store| {
            crash_point::pass("reset-told");
            let result = store.begin_reset(wanted).map_err(|error| inline_chain(&error));
            crash_point::pass("reset-begun");
            let _ = inbox.blocking_send(Message::ResetBegun(result));
        });
        if let Err(busy) = written {
            return answer::error(&answers, Reason::new(Code::Busy, busy.to_string()).next("say it again"));
        }
        self.under_way.change = true;
        self.reset = Some(UnderReset::new(wanted, Step::BeingWritten, by, Some(answers)));
    }

    pub(super) fn reset_begun(&mut self, result: Result<Pointers, String>) {
        self.under_way.change = false;
        match result {
            Ok(pointers) => {
                let desired = &mut self.world.desired;
                desired.pointers = pointers;
                desired.generations.clear();
                desired.held.clear();
                self.world.observed.active_since_boot_ms = None;
                self.world.observed.all_well_since_boot_ms = None;
                if let Some(reset) = &mut self.reset {
                    reset.step = Step::WorkloadsGo;
                }
            }
            Err(error) => {
                let why = Reason::new(Code::DiskFull, format!("the workloads are not reset: {error}"));
                self.tell(None, None, &why, "agent");
                if let Some(reply) = self.reset.take().and_then(|reset| reset.reply) {
                    answer::error(&reply, why);
                }
            }
        }
        if let Some(offer) = self.under_way.offer.take() {
            self.offer(offer);
        }
    }

    /// Looked at whenever something has happened: the workloads are gone, and nobody is at the images.
    pub(super) fn reset_on(&mut self) {
        let under_way = &self.under_way;
        let is_quiet = self.world.observed.workloads.is_empty()
            && !under_way.is_fetching()
            && under_way.starts.is_empty()
            && under_way.removals.is_empty()
            && under_way.ends.is_empty()
            && !under_way.change
            && !self.staging.under_way
            && !self.collected.under_way;
        let may = under_way.failed.get(RESET).is_none_or(|backoff| backoff.is_over(clock::boot_ms()));
        let Some(reset) = self.reset.as_ref().filter(|reset| reset.step == Step::WorkloadsGo && may) else { return };
        if reset.is_hopeless(is_quiet) {
            return self.give_reset_up(is_quiet);
        }
        if !is_quiet {
            return;
        }
        let (volumes, is_last) = (reset.wanted.volumes, reset.is_last_try());
        // No generation is left: this needs nothing.
        let wish = self.wish(Room::Asked, false);
        let (context, store, inbox) = (self.start_context.clone(), self.store.clone(), self.inbox.clone());
        let work = move || {
            let gone = finish(&context, &store, &wish, volumes).map_err(|error| inline_chain(&error))?;
            if gone.left.is_empty() || is_last {
                store.end_reset().map_err(|error| inline_chain(&error))?;
                crash_point::pass("reset-ended");
            }
            Ok(gone)
        };
        // After what waits to be written: the record of an image that has just come would outlive it.
        let runtime = tokio::runtime::Handle::current();
        let begun = self.writes.submit(move |_| {
            drop(runtime.spawn(async move {
                let ended = come_back(work).await;
                let _ = inbox.send(Message::ResetEnded(ended)).await;
            }));
        });
        if let (Ok(()), Some(reset)) = (&begun, &mut self.reset) {
            reset.step = Step::RestGoes;
            // Nothing is fetched, loaded or collected beside it.
            self.collected.under_way = true;
        }
        self.warn_if_busy(begun);
    }

    /// Takes the mark away, whatever is left: a device that takes nothing new is worse.
    fn give_reset_up(&mut self, is_quiet: bool) {
        let running = self.world.observed.workloads.keys().map(|name| format!("{name} does not end"));
        let mut left: Vec<String> = running.collect();
        if left.is_empty() && !is_quiet {
            left.push("what is fetched, started or written does not end".to_owned());
        }
        let Some(reset) = &mut self.reset else { return };
        left.extend(reset.error.clone());
        reset.step = Step::GivenUp;
        let inbox = self.inbox.clone();
        let written = self.writes.submit(move |store| {
            let ended = store.end_reset().map_err(|error| inline_chain(&error));
            let gone = Gone { left, ..Gone::default() };
            let _ = inbox.blocking_send(Message::ResetEnded(ended.map(|()| gone)));
        });
        if written.is_err()
            && let Some(reset) = &mut self.reset
        {
            reset.step = Step::WorkloadsGo;
        }
        self.warn_if_busy(written);
    }

    pub(super) fn reset_ended(&mut self, result: Result<Gone, String>) {
        let Some(mut reset) = self.reset.take() else { return };
        if reset.step == Step::RestGoes {
            self.collected.under_way = false;
        }
        let result = result.and_then(|gone| {
            let is_over = gone.left.is_empty() || reset.is_last_try();
            let images = Bytes(reset.gone.images.0.saturating_add(gone.images.0));
            reset.gone = Gone { images, volumes: reset.gone.volumes + gone.volumes, left: gone.left };
            if is_over { Ok(()) } else { Err(named(&reset.gone.left)) }
        });
        match result {
            Ok(()) => {
                self.under_way.failed.remove(RESET);
                self.images.clear();
                self.world.observed.images.clear();
                self.collected.no_room.clear();
                self.pull_tries.clear();
                self.refused.take_if(|refusal| refusal.what == WHAT);
                let text = told(reset.wanted, &reset.gone);
                let mut why = Reason::new(Code::OperatorReset, text.clone());
                if !reset.gone.left.is_empty() {
                    why = why.next("put right what keeps it and reset again; `edgectl df` shows what lies there");
                    self.refuse(WHAT, &why);
                }
                self.tell(None, None, &why, &reset.by);
                if let Some(reply) = reset.reply {
                    answer::one(&reply, Answer::Accepted { what: text });
                }
            }
            Err(error) => {
                self.try_later(RESET);
                reset.failed = reset.failed.saturating_add(1);
                reset.error = Some(error.clone());
                let text = format!("the reset of the workloads is not over: {error}");
                let why = Reason::new(Code::DiskFull, text).next("it is tried again");
                tracing::warn!("{why}");
                // Once for each agent, whether or not somebody waits for it.
                if reset.failed == 1 {
                    self.refuse(WHAT, &why);
                    self.tell(None, None, &why, "agent");
                }
                if let Some(reply) = reset.reply.take() {
                    answer::error(&reply, why);
                }
                self.reset = Some(UnderReset { step: Step::WorkloadsGo, ..reset });
            }
        }
    }
}

fn volumes_too(wanted: Reset) -> &'static str {
    if wanted.volumes { " with all volumes" } else { "" }
}

fn told(wanted: Reset, gone: &Gone) -> String {
    let volumes = match (wanted.volumes, gone.volumes) {
        (false, _) => "volumes stay".to_owned(),
        (true, 1) => "with 1 volume".to_owned(),
        (true, n) => format!("with {n} volumes"),
    };
    let all = format!("the workloads and {} of images are gone, {volumes}", gone.images.human());
    if gone.left.is_empty() { all } else { format!("{all}; but some is left: {}", named(&gone.left)) }
}

fn named(left: &[String]) -> String {
    let named = left.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join("; ");
    match left.len().saturating_sub(NAMED_MAX) {
        0 => named,
        more => format!("{named}; and {more} more"),
    }
}

/// Work that blocks. One that panics comes back too: nothing else may wait for it for ever.
async fn come_back<T: Send + 'static>(work: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(format!("it did not come to its end: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_panics_comes_back_as_a_failure() {
        assert_eq!(come_back(|| Ok(3)).await, Ok(3));
        let fallen = come_back(|| -> Result<(), String> { panic!("a fault of its own") }).await;
        assert!(fallen.unwrap_err().contains("panicked"));
    }

    #[test]
    fn of_much_that_is_left_some_is_named_and_the_rest_counted() {
        let left: Vec<String> = (1..=5).map(|n| n.to_string()).collect();
        assert_eq!((named(&left[..2]), named(&left)), ("1; 2".to_owned(), "1; 2; 3; and 2 more".to_owned()));
    }
}
