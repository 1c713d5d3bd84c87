//! The life of generations: stage the candidate without touching what runs, switch, watch, keep or go back.

use std::collections::BTreeSet;

use edged_model::action::{Action, Plan, Wait};
use edged_model::generation::{Generation, GenerationState};
use edged_model::id::{Sequence, WorkloadName};
use edged_model::manifest::Manifest;
use edged_model::observed::{Desired, Hold, ImageStatus, InstanceState, Observed};
use edged_model::quantity::Now;
use edged_model::reason::{Code, Reason};
use edged_model::workload::Health;

use crate::fit;
use crate::restart::{self, Verdict};

fn generation(desired: &Desired, sequence: Option<Sequence>) -> Option<&Generation> {
    desired.generations.get(&sequence?)
}

fn transition(plan: &mut Plan, generation: Sequence, to: GenerationState, why: Reason) {
    plan.actions.push(Action::Transition { generation, to, why });
}

/// Brings the candidate from Verified to Activating.
pub fn candidate(desired: &Desired, observed: &Observed, now: Now, plan: &mut Plan) {
    let Some(candidate) = generation(desired, desired.pointers.candidate) else { return };
    let sequence = candidate.sequence;
    match candidate.state {
        GenerationState::Received | GenerationState::Verified => {
            match stage(&candidate.manifest, observed, now, plan) {
                Ok(true) => {
                    let why = Reason::new(Code::Activated, format!("generation {sequence} is on disk and fits"));
                    transition(plan, sequence, GenerationState::Staged, why);
                }
                Ok(false) => {}
                Err(why) => transition(plan, sequence, GenerationState::Rejected, why),
            }
        }
        GenerationState::Staged => {
            if let Some(wait) = crate::moment::waits(candidate, desired, &observed.moment, now) {
                return plan.waits.push(wait);
            }
            let why = Reason::new(Code::Activated, format!("generation {sequence} takes over"));
            transition(plan, sequence, GenerationState::Activating, why);
        }
        GenerationState::Activating
        | GenerationState::Probation
        | GenerationState::Good
        | GenerationState::Superseded
        | GenerationState::Rejected
        | GenerationState::RolledBack => {}
    }
}

/// Orders the pulls that are missing; true when nothing is. An error that time cannot mend rejects the generation.
fn stage(manifest: &Manifest, observed: &Observed, now: Now, plan: &mut Plan) -> Result<bool, Reason> {
    fit::fits(manifest, &observed.capacity)?;
    let mut complete = true;
    let mut seen = std::collections::BTreeSet::new();
    for (name, workload) in &manifest.workloads {
        complete &= has_image(&workload.image, name, observed, now, seen.insert(&workload.image), plan)?;
    }
    Ok(complete)
}

/// Whether the image is there; if not, orders the pull (once per plan) or waits.
pub(crate) fn has_image(
    image: &str,
    name: &WorkloadName,
    observed: &Observed,
    now: Now,
    may_order: bool,
    plan: &mut Plan,
) -> Result<bool, Reason> {
    let mut wait = |why, until_boot_ms| plan.waits.push(Wait { workload: Some(name.clone()), why, until_boot_ms });
    match observed.images.get(image) {
        Some(ImageStatus::Ready { .. }) => return Ok(true),
        Some(ImageStatus::Pulling { done, total }) => {
            let text = format!("{name} waits for its image: {} of {}", done.human(), total.human());
            wait(Reason::new(Code::WaitingForImage, text), None);
        }
        Some(ImageStatus::Failed { reason, permanent: true, .. }) => return Err(reason.clone()),
        Some(ImageStatus::Failed { reason, retry_at_boot_ms, .. }) if now.boot_ms < *retry_at_boot_ms => {
            wait(reason.clone(), Some(*retry_at_boot_ms));
        }
        Some(ImageStatus::Failed { .. }) | None => {
            if may_order {
                plan.actions.push(Action::Pull { image: image.to_owned() });
            }
            wait(Reason::new(Code::WaitingForImage, format!("{name} waits for its image")), None);
        }
    }
    Ok(false)
}

/// What runs, what it would return to and what is ready to take over have their images on the disk, whether anything is to be
/// started from them now or not: one that was taken away because it was damaged is fetched again while there is a network.
pub fn restock(desired: &Desired, observed: &Observed, now: Now, plan: &mut Plan) {
    let pointers = &desired.pointers;
    let candidate = generation(desired, pointers.candidate).filter(|one| one.state == GenerationState::Staged);
    let kept = [generation(desired, pointers.active), generation(desired, pointers.last_good), candidate];
    let workloads = kept.into_iter().flatten().flat_map(|generation| generation.manifest.workloads.values());
    let images: BTreeSet<&str> = workloads.map(|workload| workload.image.as_str()).collect();
    for image in images {
        let is_ordered = plan.actions.iter().any(|action| matches!(action, Action::Pull { image: i } if i == image));
        match observed.images.get(image) {
            Some(
                ImageStatus::Ready { .. } | ImageStatus::Pulling { .. } | ImageStatus::Failed { permanent: true, .. },
            ) => {}
            Some(ImageStatus::Failed { reason, retry_at_boot_ms, .. }) if now.boot_ms < *retry_at_boot_ms => {
                let until_boot_ms = Some(*retry_at_boot_ms);
                plan.waits.push(Wait { workload: None, why: reason.clone(), until_boot_ms });
            }
            Some(ImageStatus::Failed { .. }) | None if !is_ordered => {
                plan.actions.push(Action::Pull { image: image.to_owned() });
            }
            Some(ImageStatus::Failed { .. }) | None => {}
        }
    }
}

/// Watches the active generation: Activating, Probation, Good or back.
pub fn active(desired: &Desired, observed: &Observed, now: Now, plan: &mut Plan) {
    let Some(active) = generation(desired, desired.pointers.active) else { return };
    let sequence = active.sequence;
    let probation = active.manifest.update.probation;
    match active.state {
        GenerationState::Activating if all_started(active, desired, observed) => {
            let text = format!("every workload of generation {sequence} was started");
            transition(plan, sequence, GenerationState::Probation, Reason::new(Code::Activated, text));
        }
        GenerationState::Activating | GenerationState::Probation => {
            let well_at = observed.all_well_since_boot_ms.map(|since| since.saturating_add(probation.ms));
            if active.state == GenerationState::Probation && well_at.is_some_and(|at| at <= now.boot_ms) {
                let text = format!("all was well for {}", probation.human());
                return transition(plan, sequence, GenerationState::Good, Reason::new(Code::BecameGood, text));
            }
            let since = observed.active_since_boot_ms.unwrap_or(now.boot_ms);
            let deadline = since.saturating_add(active.manifest.update.deadline.ms.max(probation.ms));
            let failure = failure(active, observed).or_else(|| late(active, desired, observed, now, deadline));
            let can_go_back = desired.pointers.last_good.is_some_and(|good| good != sequence);
            match failure {
                Some(why) if can_go_back => {
                    transition(plan, sequence, GenerationState::RolledBack, why);
                }
                failure => {
                    let text = format!("generation {sequence} is on probation");
                    let why = failure.unwrap_or_else(|| Reason::new(Code::WaitingForTurn, text));
                    let until = well_at.into_iter().chain([deadline]).filter(|at| *at > now.boot_ms).min();
                    plan.waits.push(Wait { workload: None, why, until_boot_ms: until });
                }
            }
        }
        GenerationState::Received
        | GenerationState::Verified
        | GenerationState::Staged
        | GenerationState::Good
        | GenerationState::Superseded
        | GenerationState::Rejected
        | GenerationState::RolledBack => {}
    }
}

/// A workload that failed too often in a row, and was well before.
fn failure(active: &Generation, observed: &Observed) -> Option<Reason> {
    active.manifest.workloads.iter().find_map(|(name, workload)| {
        let instance = observed.workloads.get(name)?;
        let history = &instance.history;
        let is_this_spec = instance.spec == Some(workload.digest());
        let is_to_blame = is_this_spec && !active.ailing.contains(name);
        (is_to_blame && history.in_a_row > workload.restart.attempts).then(|| {
            let last = history.last_reason.as_ref().map_or("unknown", |reason| &reason.text);
            let text = format!("{name} failed {} times in a row: {last}", history.in_a_row);
            Reason::new(Code::ProbationFailed, text).next(format!("see `edgectl logs {name}`"))
        })
    })
}

fn late(active: &Generation, desired: &Desired, observed: &Observed, now: Now, deadline: u64) -> Option<Reason> {
    if now.boot_ms < deadline {
        return None;
    }
    let unwell = unwell(active, desired, observed)?;
    let span = active.manifest.update.deadline.human();
    Some(Reason::new(Code::ProbationFailed, format!("{unwell} was not well within {span}")))
}

fn all_started(active: &Generation, desired: &Desired, observed: &Observed) -> bool {
    active.manifest.workloads.iter().all(|(name, workload)| {
        desired.held.contains_key(name)
            || observed.workloads.get(name).is_some_and(|instance| {
                instance.spec == Some(workload.digest())
                    && matches!(instance.state, InstanceState::Running { .. } | InstanceState::Ended)
            })
    })
}

/// The first workload of the active generation that is not well and was before it; `None` when all are.
pub fn unwell<'g>(active: &'g Generation, desired: &Desired, observed: &Observed) -> Option<&'g WorkloadName> {
    let mut names = active.manifest.workloads.iter();
    names.find_map(|(name, workload)| {
        if desired.held.get(name) == Some(&Hold::Stopped) || active.ailing.contains(name) {
            return None;
        }
        let well = observed.workloads.get(name).is_some_and(|instance| {
            instance.spec == Some(workload.digest())
                && match instance.state {
                    InstanceState::Running { .. } => {
                        matches!(instance.health, Health::Healthy | Health::Unchecked)
                    }
                    InstanceState::Ended => {
                        let done = restart::verdict(name, &workload.restart, &instance.history) == Verdict::Never;
                        let exit = instance.history.last_exit.as_ref();
                        done && exit.is_some_and(|exit| exit.cause.is_success())
                    }
                    InstanceState::Absent | InstanceState::Starting { .. } | InstanceState::Stopping { .. } => false,
                }
        });
        (!well).then_some(name)
    })
}

/// Whether all workloads of the active generation are well.
pub fn all_well(desired: &Desired, observed: &Observed) -> bool {
    generation(desired, desired.pointers.active).is_some_and(|active| unwell(active, desired, observed).is_none())
}
