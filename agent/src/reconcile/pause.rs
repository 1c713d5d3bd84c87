//! `edgectl pause` and `resume`: the freezer of a workload's cgroup. The kernel keeps the word; an agent that starts anew
//! finds it there. What stops a workload lets it go on first, so that it hears the signal.

use edged_model::api::Answer;
use edged_model::id::WorkloadName;
use edged_model::observed::InstanceState;
use edged_model::reason::{Code, Reason};
use tokio::sync::mpsc;

use super::Agent;
use crate::store::inline_chain;

impl Agent {
    pub(super) fn pause(&mut self, answers: &mpsc::Sender<Answer>, name: &WorkloadName, frozen: bool, by: &str) {
        let answer = match self.try_pause(name, frozen) {
            Ok(reason) => {
                self.tell(Some(name), self.world.desired.pointers.active, &reason, by);
                Answer::Accepted { what: reason.text }
            }
            Err(reason) => Answer::Error(reason),
        };
        // The channel of a new call is empty, so both fit.
        let _ = answers.try_send(answer);
        let _ = answers.try_send(Answer::End);
    }

    fn try_pause(&mut self, name: &WorkloadName, frozen: bool) -> Result<Reason, Reason> {
        if self.active().is_none_or(|active| !active.manifest.workloads.contains_key(name)) {
            return Err(self.no_such(name));
        }
        let runs = matches!(self.world.instance(name).state, InstanceState::Running { .. });
        let (Some(run), true) = (self.runs.get(name), runs) else {
            return Err(Reason::new(Code::NotRunning, format!("{name} does not run")));
        };
        if run.cgroup.is_frozen() == frozen {
            let text = if frozen { "is paused already" } else { "is not paused" };
            return Err(Reason::new(Code::NotRunning, format!("{name} {text}")));
        }
        run.cgroup.freeze(frozen).map_err(|error| {
            Reason::new(Code::NotAllowedHere, format!("{name} cannot be paused: {}", inline_chain(&error)))
        })?;
        Ok(if frozen {
            Reason::new(Code::OperatorPaused, format!("{name} is paused"))
        } else {
            Reason::new(Code::OperatorResumed, format!("{name} goes on"))
        })
    }

    pub(super) fn is_paused(&self, name: &WorkloadName) -> bool {
        self.runs.get(name).is_some_and(|run| run.cgroup.is_frozen())
    }

    /// Before a signal that it must hear.
    pub(super) fn let_go_on(&self, name: &WorkloadName) {
        let Some(run) = self.runs.get(name).filter(|run| run.cgroup.is_frozen()) else { return };
        if let Err(error) = run.cgroup.freeze(false) {
            tracing::warn!(workload = %name, "resume: {}", inline_chain(&error));
        }
    }

    /// Why a paused workload stands still, for its status.
    pub(super) fn paused(&self, name: &WorkloadName) -> Option<Reason> {
        let why = Reason::new(Code::OperatorPaused, format!("{name} is paused by an operator"));
        self.is_paused(name).then(|| why.next(format!("`edgectl resume {name}` lets it go on")))
    }
}
