//! An operator's `reset --workloads`: what manifests have brought goes; whom the device trusts, what it is and how far it
//! has come stay.
//!
//! ```text
//! asked ──> no generation, and a mark: one write ──> the planner stops and removes all ──> images, volumes ──> no mark
//! ```
//! An agent that finds the mark goes on after the first step. Nothing new is taken until the mark is gone.

use edged_model::api::Answer;
use edged_model::generation::Pointers;
use edged_model::reason::{Code, Reason};
use edged_plan::garbage::Room;
use tokio::sync::mpsc;

use super::{Agent, Message, answer, clock};
use crate::crash_point;
use crate::execute::reset::{Gone, finish};
use crate::store::{Reset, inline_chain};

/// The key among what failed; no workload has such a name.
const RESET: &str = "(reset)";

/// A reset under way.
pub(super) struct UnderReset {
    wanted: Reset,
    step: Step,
    by: String,
    /// Who asked, if it was not an agent before this one.
    reply: Option<mpsc::Sender<Answer>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    BeingWritten,
    /// The planner removes what runs.
    WorkloadsGo,
    RestGoes,
}

impl UnderReset {
    /// One that an agent before us began.
    pub(super) fn found(wanted: Reset) -> Self {
        Self { wanted, step: Step::WorkloadsGo, by: "agent".to_owned(), reply: None }
    }
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
        self.reset = Some(UnderReset { wanted, step: Step::BeingWritten, by, reply: Some(answers) });
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
        let Some(reset) = self.reset.as_ref().filter(|reset| reset.step == Step::WorkloadsGo && is_quiet && may) else {
            return;
        };
        let volumes = reset.wanted.volumes;
        // No generation is left: this needs nothing.
        let wish = self.wish(Room::Asked, false);
        let (context, store, inbox) = (self.start_context.clone(), self.store.clone(), self.inbox.clone());
        let work = move || {
            let gone = finish(&context, &store, &wish, volumes).map_err(|error| inline_chain(&error));
            let ended = gone.and_then(|gone| store.end_reset().map(|()| gone).map_err(|error| inline_chain(&error)));
            crash_point::pass("reset-ended");
            let _ = inbox.blocking_send(Message::ResetEnded(ended));
        };
        // After what waits to be written: the record of an image that has just come would outlive it.
        let runtime = tokio::runtime::Handle::current();
        let begun = self.writes.submit(move |_| drop(runtime.spawn_blocking(work)));
        if let (Ok(()), Some(reset)) = (&begun, &mut self.reset) {
            reset.step = Step::RestGoes;
            // Nothing is fetched, loaded or collected beside it.
            self.collected.under_way = true;
        }
        self.warn_if_busy(begun);
    }

    pub(super) fn reset_ended(&mut self, result: Result<Gone, String>) {
        self.collected.under_way = false;
        let Some(mut reset) = self.reset.take() else { return };
        match result {
            Ok(gone) => {
                self.under_way.failed.remove(RESET);
                self.images.clear();
                self.world.observed.images.clear();
                self.collected.no_room.clear();
                let text = told(reset.wanted, gone);
                self.tell(None, None, &Reason::new(Code::OperatorReset, text.clone()), &reset.by);
                if let Some(reply) = reset.reply {
                    answer::one(&reply, Answer::Accepted { what: text });
                }
            }
            Err(error) => {
                self.try_later(RESET);
                let text = format!("the reset of the workloads is not over: {error}");
                let why = Reason::new(Code::DiskFull, text).next("it is tried again");
                // Once: whoever asked has heard it then.
                if let Some(reply) = reset.reply.take() {
                    self.tell(None, None, &why, "agent");
                    answer::error(&reply, why);
                } else {
                    tracing::warn!("{why}");
                }
                self.reset = Some(UnderReset { step: Step::WorkloadsGo, ..reset });
            }
        }
    }
}

fn volumes_too(wanted: Reset) -> &'static str {
    if wanted.volumes { " with all volumes" } else { "" }
}

fn told(wanted: Reset, gone: Gone) -> String {
    let volumes = match (wanted.volumes, gone.volumes) {
        (false, _) => "volumes stay".to_owned(),
        (true, 1) => "with 1 volume".to_owned(),
        (true, n) => format!("with {n} volumes"),
    };
    format!("the workloads and {} of images are gone, {volumes}", gone.images.human())
}
