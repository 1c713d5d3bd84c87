//! The operator's verbs about generations. The store knows more of them than the loop: it is read on another thread, and
//! what was read comes back as a message.

use edged_model::api::{Answer, GenerationInfo, GenerationRole};
use edged_model::difference::differences;
use edged_model::generation::{Generation, GenerationState, Pointers};
use edged_model::id::Sequence;
use edged_model::reason::{Code, Reason};
use edged_plan::transition;
use tokio::sync::{mpsc, oneshot};

use super::status::generation_status;
use super::{Agent, Message};
use crate::report::Taken;
use crate::store::{Store, StoreError, inline_chain};

/// A stored generation that an operator wants again.
pub(super) struct Again {
    generation: Generation,
    by: String,
    why: Code,
    reply: oneshot::Sender<Result<Taken, Reason>>,
}

fn unreadable(error: &StoreError) -> Reason {
    Reason::new(Code::StoreRebuilt, format!("the store cannot be read: {}", inline_chain(error)))
}

fn no_such(sequence: Sequence) -> Reason {
    Reason::new(Code::NoSuchGeneration, format!("generation {sequence} is not stored here any more"))
        .next("`edgectl generations` lists those that are; any other has to be signed and pushed anew")
}

fn failed(generation: &Generation) -> bool {
    matches!(generation.state, GenerationState::RolledBack | GenerationState::Rejected)
}

fn list(store: &Store) -> Result<Vec<GenerationInfo>, StoreError> {
    let pointers = store.pointers()?;
    let info = |generation: Generation| {
        let sequence = Some(generation.sequence);
        let role = match sequence {
            _ if sequence == pointers.active => Some(GenerationRole::Active),
            _ if sequence == pointers.last_good => Some(GenerationRole::LastGood),
            _ if sequence == pointers.candidate => Some(GenerationRole::Candidate),
            _ => None,
        };
        Ok(GenerationInfo {
            status: generation_status(&generation),
            role,
            workloads: generation.manifest.workloads.len() as u64,
            refused: failed(&generation) && store.has_failed(generation.digest)?,
            stored: store.envelope(generation.sequence)?.is_some(),
        })
    };
    store.generations()?.into_iter().map(info).collect()
}

/// Where a rollback goes: to the generation named, else to the newest before the active one that did not fail.
fn rollback_target(all: &[Generation], pointers: &Pointers, to: Option<Sequence>) -> Result<Generation, Reason> {
    let active = pointers.active;
    let Some(to) = to else {
        let earlier = |generation: &&Generation| active.is_some_and(|active| generation.sequence < active);
        let found = all.iter().rev().filter(earlier).find(|generation| !failed(generation));
        let none = || Reason::new(Code::NoSuchGeneration, "there is no earlier generation to go back to");
        return found.cloned().ok_or_else(none);
    };
    let generation = all.iter().find(|generation| generation.sequence == to).ok_or_else(|| no_such(to))?;
    if failed(generation) {
        let text = format!("generation {to} failed here before");
        return Err(Reason::new(Code::RolledBack, text).next(format!("`edgectl retry {to}` tries it again")));
    }
    Ok(generation.clone())
}

fn retry_target(all: &[Generation], sequence: Option<Sequence>) -> Result<Generation, Reason> {
    let mut newest_first = all.iter().rev();
    let found = match sequence {
        None => newest_first.find(|generation| failed(generation)),
        Some(sequence) => {
            let found = newest_first.find(|generation| generation.sequence == sequence);
            Some(found.ok_or_else(|| no_such(sequence))?)
        }
    };
    match found {
        Some(generation) if failed(generation) => Ok(generation.clone()),
        Some(generation) => {
            let sequence = generation.sequence;
            let text = format!("generation {sequence} did not fail");
            Err(Reason::new(Code::NoSuchGeneration, text).next(format!("`edgectl rollback {sequence}` goes there")))
        }
        None => Err(Reason::new(Code::NoSuchGeneration, "no generation that failed is stored here")),
    }
}

/// Reads on a blocking thread and answers.
fn answer_from(
    store: &Store,
    answers: mpsc::Sender<Answer>,
    read: impl FnOnce(&Store) -> Result<Answer, Reason> + Send + 'static,
) {
    let store = store.clone();
    tokio::task::spawn_blocking(move || {
        let answer = read(&store);
        let is_good = answer.is_ok();
        // Who asked may have gone.
        let _ = answers.blocking_send(answer.unwrap_or_else(Answer::Error));
        if is_good {
            let _ = answers.blocking_send(Answer::End);
        }
    });
}

impl Agent {
    pub(super) fn list_generations(&self, answers: mpsc::Sender<Answer>) {
        let awaited = self.moment_awaited();
        answer_from(&self.store, answers, move |store| {
            let mut all = list(store).map_err(|error| unreadable(&error))?;
            // The store knows that it is staged, the plan what it waits for.
            let mut coming = all.iter_mut().filter(|info| info.role == Some(GenerationRole::Candidate));
            if let (Some(info), Some(why)) = (coming.next(), awaited) {
                info.status.reason = Some(why);
            }
            Ok(Answer::Generations(all))
        });
    }

    pub(super) fn diff(&self, answers: mpsc::Sender<Answer>, from: Sequence, to: Sequence) {
        answer_from(&self.store, answers, move |store| {
            let read = |sequence| {
                let generation = store.generation(sequence).map_err(|error| unreadable(&error))?;
                generation.ok_or_else(|| no_such(sequence))
            };
            Ok(Answer::Diff(differences(&read(from)?.manifest, &read(to)?.manifest)))
        });
    }

    /// `rollback` and `retry`: finds the generation in the store, and comes back with it to the loop.
    pub(super) fn want_again(&self, answers: mpsc::Sender<Answer>, why: Code, sequence: Option<Sequence>, by: String) {
        let (store, inbox) = (self.store.clone(), self.inbox.clone());
        tokio::spawn(async move {
            let read = tokio::task::spawn_blocking(move || {
                let facts = store.generations().and_then(|all| Ok((all, store.pointers()?)));
                let (all, pointers) = facts.map_err(|error| unreadable(&error))?;
                let generation = match why {
                    Code::OperatorRetry => retry_target(&all, sequence)?,
                    _ => rollback_target(&all, &pointers, sequence)?,
                };
                let envelope = store.envelope(generation.sequence).map_err(|error| unreadable(&error))?;
                envelope.map(|_| generation.clone()).ok_or_else(|| no_such(generation.sequence))
            });
            let ending = || Reason::new(Code::Busy, "the agent is ending");
            let found = read.await.unwrap_or_else(|_| Err(ending()));
            let verdict = match found {
                Ok(generation) => {
                    let (reply, verdict) = oneshot::channel();
                    let again = Box::new(Again { generation, by, why, reply });
                    match inbox.send(Message::Again(again)).await {
                        Ok(()) => verdict.await.unwrap_or_else(|_| Err(ending())),
                        Err(_) => Err(ending()),
                    }
                }
                Err(why) => Err(why),
            };
            let answer = match verdict {
                Ok(taken) => Answer::Accepted { what: format!("{taken} comes again") },
                Err(why) => Answer::Error(why),
            };
            let is_good = matches!(answer, Answer::Accepted { .. });
            let _ = answers.send(answer).await;
            if is_good {
                let _ = answers.send(Answer::End).await;
            }
        });
    }

    /// It takes the way of every new generation: staged, activated, watched, and back if it does not become well.
    pub(super) fn again(&mut self, again: Again) {
        let Again { generation, by, why, reply } = again;
        let sequence = generation.sequence;
        let pointers = self.world.desired.pointers;
        let refusal = if let Some(reset) = self.refused_by_reset() {
            Some(reset)
        } else if self.under_way.change {
            Some(Reason::new(Code::Busy, "another change is being written").next("say it again"))
        } else if pointers.active == Some(sequence) {
            Some(Reason::new(Code::NoSuchGeneration, format!("generation {sequence} is the active one")))
        } else if pointers.candidate == Some(sequence) {
            Some(Reason::new(Code::Busy, format!("generation {sequence} is on its way already")))
        } else {
            edged_plan::fit::fits(&generation.manifest, &self.world.observed.capacity).err()
        };
        if let Some(refusal) = refusal {
            // Who asked may have gone.
            let _ = reply.send(Err(refusal));
            return;
        }
        let text = format!("generation {sequence} is wanted again by {by}");
        let why = Reason::new(why, text);
        self.tell(None, Some(sequence), &why, &by);
        self.try_images_anew(&generation.manifest);
        let digest = generation.digest;
        let generation = Generation { reason: Some(why), wanted_now: true, ..generation };
        let change = transition::received(&self.world.desired, generation, self.now().wall);
        let forgotten = self.writes.submit(move |store| {
            if let Err(error) = store.forget_failed(digest) {
                tracing::error!("a failed digest: {}", inline_chain(&error));
            }
        });
        self.warn_if_busy(forgotten);
        self.write_change(change, None, None, false);
        if self.under_way.change {
            self.under_way.acknowledge = Some((sequence, reply));
        } else {
            let _ = reply.send(Err(Reason::new(Code::Busy, "the store is busy").next("say it again")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::id::Digest;
    use edged_model::manifest::Manifest;
    use edged_model::quantity::Timestamp;

    fn generation(n: u64, state: GenerationState) -> Generation {
        let digest = Digest::of(&n.to_le_bytes());
        let (sequence, manifest) = (Sequence(n), Manifest::empty());
        Generation { sequence, state, ..Generation::received(manifest, digest, Timestamp(0)) }
    }

    #[test]
    fn a_rollback_goes_to_the_newest_earlier_one_that_did_not_fail() {
        use GenerationState::{Good, RolledBack, Superseded};
        let all =
            [generation(1, Superseded), generation(2, Superseded), generation(3, RolledBack), generation(4, Good)];
        let pointers = Pointers { active: Some(Sequence(4)), ..Pointers::default() };
        let to = |sequence: Option<u64>| {
            rollback_target(&all, &pointers, sequence.map(Sequence)).map(|g| g.sequence.0).map_err(|why| why.code)
        };
        assert_eq!(to(None), Ok(2));
        assert_eq!(to(Some(1)), Ok(1));
        assert_eq!(to(Some(3)), Err(Code::RolledBack), "that is what `retry` is for");
        assert_eq!(to(Some(9)), Err(Code::NoSuchGeneration));
        let retry = |sequence: Option<u64>| {
            retry_target(&all, sequence.map(Sequence)).map(|g| g.sequence.0).map_err(|why| why.code)
        };
        assert_eq!((retry(None), retry(Some(3))), (Ok(3), Ok(3)));
        assert_eq!((retry(Some(4)), retry(Some(9))), (Err(Code::NoSuchGeneration), Err(Code::NoSuchGeneration)));
    }
}
