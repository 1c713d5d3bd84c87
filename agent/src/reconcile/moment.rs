//! Whether it suits to switch: the facts for the planner, and the operator's word that it does.

use std::collections::BTreeMap;

use edged_model::api::Answer;
use edged_model::generation::GenerationState;
use edged_model::id::Sequence;
use edged_model::moment::{LOCKS_VOLUME, UpdateLock};
use edged_model::quantity::Now;
use edged_model::reason::{Code, Reason};
use edged_plan::transition::Change;
use tokio::sync::{mpsc, oneshot};

use super::answer::{error, one};
use super::{Agent, Message};
use crate::observe::locks::{self, LockFile};

/// The locks that were seen, and until when each holds. On the clock that never jumps: only what a lock had used up
/// before this agent saw it is reckoned by the wall clock.
#[derive(Default)]
pub(super) struct Leases {
    held: BTreeMap<String, ((i64, i64), u64)>,
    is_looking: bool,
    seen_at_boot_ms: Option<u64>,
}

impl Leases {
    fn take(&mut self, files: Vec<LockFile>, now: Now) -> Vec<UpdateLock> {
        let before = std::mem::take(&mut self.held);
        for file in files {
            let until = match before.get(&file.name) {
                Some((modified, until)) if *modified == file.modified => *until,
                known => {
                    // One that was renewed under our eyes is as old as the last look at most.
                    let age_secs = if known.is_some() { 0 } else { now.wall.0.saturating_sub(file.modified.0) };
                    let age_ms = u64::try_from(age_secs).unwrap_or(0).saturating_mul(1000);
                    now.boot_ms.saturating_add(file.lease.ms.saturating_sub(age_ms))
                }
            };
            self.held.insert(file.name, (file.modified, until));
        }
        let lock = |(name, (_, until)): (&String, &((i64, i64), u64))| UpdateLock {
            name: name.clone(),
            until_boot_ms: *until,
        };
        self.held.iter().map(lock).collect()
    }
}

/// A look at the locks is old after this long.
const LOOK_EVERY_MS: u64 = 4_000;

impl Agent {
    /// While a generation waits to take over, somebody looks at the locks; until the first look it waits for that.
    pub(super) fn look_at_locks(&mut self, now: Now) {
        if self.candidate().is_none_or(|candidate| candidate.state != GenerationState::Staged) {
            self.world.observed.moment.locks_unseen = true;
            self.leases.seen_at_boot_ms = None;
            return;
        }
        let is_fresh = self.leases.seen_at_boot_ms.is_some_and(|at| now.boot_ms.saturating_sub(at) < LOOK_EVERY_MS);
        if is_fresh || std::mem::replace(&mut self.leases.is_looking, true) {
            return;
        }
        let (volume, inbox) = (self.start_context.places.volumes().join(LOCKS_VOLUME), self.inbox.clone());
        tokio::task::spawn_blocking(move || {
            let files = locks::look(&volume);
            // The loop has ended only when the agent ends.
            let _ = inbox.blocking_send(Message::Locks(files));
        });
    }

    pub(super) fn locks_seen(&mut self, files: Vec<LockFile>) {
        let now = self.now();
        self.leases.is_looking = false;
        self.leases.seen_at_boot_ms = Some(now.boot_ms);
        let moment = &mut self.world.observed.moment;
        (moment.locks, moment.locks_unseen) = (self.leases.take(files, now), false);
    }

    /// Why the candidate waits although it is staged.
    pub(super) fn moment_awaited(&self) -> Option<Reason> {
        let mut waits = self.plan.waits.iter();
        waits.find(|wait| wait.why.code == Code::WaitingForMoment).map(|wait| wait.why.clone())
    }

    /// `edgectl activate`: the generation on its way waits for nothing but its images.
    pub(super) fn activate(&mut self, answers: mpsc::Sender<Answer>, sequence: Option<Sequence>, by: &str) {
        let generation = match self.candidate() {
            _ if self.under_way.change => {
                return error(
                    &answers,
                    Reason::new(Code::Busy, "another change is being written").next("say it again"),
                );
            }
            Some(candidate) if sequence.is_none_or(|sequence| sequence == candidate.sequence) => candidate.clone(),
            Some(candidate) => {
                let text = format!("it is generation {} that is on its way", candidate.sequence);
                return error(&answers, Reason::new(Code::NoSuchGeneration, text));
            }
            None => {
                let why = Reason::new(Code::NoSuchGeneration, "no generation is on its way");
                return error(&answers, why.next("`edgectl rollback N` or `edgectl retry N` brings back a stored one"));
            }
        };
        let sequence = generation.sequence;
        let text = format!("generation {sequence} shall take over at once");
        self.tell(None, Some(sequence), &Reason::new(Code::OperatorActivate, text.clone()), by);
        let generation = edged_model::generation::Generation { wanted_now: true, ..generation };
        let change = Change { generations: vec![generation], pointers: self.world.desired.pointers };
        self.write_change(change, None, None, false);
        if !self.under_way.change {
            return error(&answers, Reason::new(Code::Busy, "the store is busy").next("say it again"));
        }
        let (reply, verdict) = oneshot::channel();
        self.under_way.acknowledge = Some((sequence, reply));
        tokio::spawn(async move {
            match verdict.await {
                Ok(Ok(_)) => one(&answers, Answer::Accepted { what: text }),
                Ok(Err(why)) => error(&answers, why),
                Err(_) => error(&answers, Reason::new(Code::Busy, "the agent is ending")),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::quantity::{Span, Timestamp};

    #[test]
    fn a_lease_runs_on_the_clock_that_never_jumps() {
        let file = |modified, secs| LockFile {
            name: "camera".to_owned(),
            modified: (modified, 0),
            lease: Span::from_secs(secs),
        };
        let now = |boot_secs: u64, wall| Now { boot_ms: boot_secs * 1000, wall: Timestamp(wall) };
        let until = |locks: Vec<UpdateLock>| locks.first().map(|lock| lock.until_boot_ms / 1000);
        let mut leases = Leases::default();
        assert_eq!(until(leases.take(vec![file(1000, 60)], now(5, 1010))), Some(55), "ten seconds were over");
        assert_eq!(until(leases.take(vec![file(1000, 60)], now(9, 9_999_999))), Some(55), "the clock jumped");
        assert_eq!(until(leases.take(vec![file(2000, 60)], now(20, 9_999_999))), Some(80), "renewed");
        assert_eq!(until(leases.take(vec![], now(21, 0))), None, "let go");
        assert_eq!(until(leases.take(vec![file(1000, 60)], now(30, 0))), Some(90), "the clock went back before it");
        assert_eq!(until(Leases::default().take(vec![file(1000, 60)], now(30, 5000))), Some(30), "long over");
    }
}
