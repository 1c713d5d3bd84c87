//! What must hold, whatever happens. Each law in words, and in a way of its own: none asks the planner's own functions.

use edged_model::action::{Action, Plan};
use edged_model::generation::{Generation, GenerationState};
use edged_model::id::WorkloadName;
use edged_model::manifest::{DependsOn, Resources, RestartPolicy, Workload};
use edged_model::observed::{Hold, ImageStatus, Instance, InstanceState};
use edged_model::quantity::{Now, Timestamp};
use edged_model::reason::Code;
use edged_model::spec::Spec;
use edged_model::workload::Health;

use crate::world::Sim;

type Law = Result<(), String>;

fn law(holds: bool, says: impl FnOnce() -> String) -> Law {
    if holds { Ok(()) } else { Err(says()) }
}

/// The planner is pure, and the calendar is nothing to it: a clock that jumps changes no plan.
pub fn same_question_same_answer(sim: &Sim, plan: &Plan) -> Law {
    let now = sim.now();
    let elsewhere = Now { wall: Timestamp(now.wall.0 - 1_000_000_000), ..now };
    let again = edged_plan::plan(&sim.world.desired, &sim.world.observed, elsewhere);
    law(again == *plan, || format!("the same world at another date has another plan:\n{plan:?}\n{again:?}"))
}

pub fn of_an_action(sim: &Sim, plan: &Plan, action: &Action) -> Law {
    match action {
        Action::Stop { workload, why } => of_a_stop(sim, workload, why.code),
        Action::Start { workload, .. } => of_a_start(sim, workload),
        Action::Resize { workload, .. } => of_a_resize(sim, workload),
        Action::Transition { generation, to, .. } => {
            let generation = &sim.world.desired.generations[generation];
            of_a_transition(sim, plan, generation, *to)
        }
        Action::Pull { .. } | Action::Kill { .. } | Action::Remove { .. } => Ok(()),
    }
}

fn wanted<'s>(sim: &'s Sim, name: &WorkloadName) -> Option<&'s Spec> {
    sim.active()?.manifest.workloads.get(name)
}

fn is_as_wanted(instance: &Instance, workload: &Spec) -> bool {
    instance.spec == Some(workload.digest())
}

/// What did not change is not stopped, but by an operator or for its bad health; what changed is stopped in turn.
fn of_a_stop(sim: &Sim, name: &WorkloadName, why: Code) -> Law {
    let instance = &sim.world.observed.workloads[name];
    let Some(workload) = wanted(sim, name) else {
        return law(why == Code::NotInManifest, || format!("{name} is in no manifest and stopped as {why:?}"));
    };
    match why {
        Code::SpecChanged => {
            law(!is_as_wanted(instance, workload), || format!("{name} did not change and is stopped as if it had"))?;
            let resizable = instance.frame == Some(workload.digest_without_limits());
            law(!resizable, || format!("{name} is stopped where its limits could have been changed"))?;
            let max = sim.active().map_or(1, |active| active.manifest.update.max_unavailable);
            let in_between = sim.active().into_iter().flat_map(|active| active.manifest.workloads.keys()).filter(|n| {
                *n != name
                    && sim.world.observed.workloads.get(*n).is_some_and(|i| match &i.state {
                        InstanceState::Stopping { why, .. } => why.code == Code::SpecChanged,
                        InstanceState::Starting { .. } => i.spec.is_some(),
                        _ => false,
                    })
            });
            let others = in_between.count();
            law(others < max as usize, || format!("{name} is taken down while {others} are, and {max} may be"))
        }
        Code::Unhealthy => {
            law(instance.health == Health::Unhealthy, || format!("{name} is well and stopped as unwell"))
        }
        Code::OperatorStopped | Code::OperatorRestarted => {
            let held = sim.world.desired.held.contains_key(name);
            law(held, || format!("{name} is stopped in the name of an operator who did not ask"))
        }
        other => Err(format!("{name} is stopped for {other:?}")),
    }
}

/// A workload starts when what it depends on has got that far in this generation, and not while an operator holds it.
fn of_a_start(sim: &Sim, name: &WorkloadName) -> Law {
    let Some(workload) = wanted(sim, name) else { return Err(format!("{name} starts and is in no manifest")) };
    law(sim.world.desired.held.get(name) != Some(&Hold::Stopped), || format!("{name} starts though it is held"))?;
    let ready = matches!(sim.world.observed.images.get(&workload.image), Some(ImageStatus::Ready { .. }));
    law(ready, || format!("{name} starts without its image"))?;
    for (need, condition) in &workload.depends_on {
        let needed = wanted(sim, need).ok_or_else(|| format!("{need} is not there"))?;
        let instance = sim.world.observed.workloads.get(need);
        let met = instance.is_some_and(|instance| {
            let running = matches!(instance.state, InstanceState::Running { .. });
            is_as_wanted(instance, needed)
                && match condition {
                    DependsOn::Started => running,
                    DependsOn::Healthy => running && matches!(instance.health, Health::Healthy | Health::Unchecked),
                    DependsOn::Completed => {
                        let exit = instance.history.last_exit.as_ref();
                        instance.state == InstanceState::Ended && exit.is_some_and(|exit| exit.cause.is_success())
                    }
                }
        });
        law(met, || format!("{name} starts before {need} is {condition:?}: {instance:?}"))?;
    }
    Ok(())
}

/// Limits are changed while a workload runs only if nothing else changed.
fn of_a_resize(sim: &Sim, name: &WorkloadName) -> Law {
    let Some(workload) = wanted(sim, name) else { return Err(format!("{name} is resized and is in no manifest")) };
    let Some((_, runs)) = sim.living().find(|(living, _)| *living == name) else {
        // It has ended, and the agent has not heard of it yet.
        return Ok(());
    };
    let limits = |w: &Workload| Workload { resources: Resources::default(), ..w.clone() };
    law(limits(runs) == limits(workload), || format!("{name} changed in more than its limits and is not restarted"))
}

/// All walls together fit the device while one of them is moved, too.
pub fn of_a_resized(sim: &Sim, name: &WorkloadName, spec: &Spec) -> Law {
    let others = sim.living().filter(|(living, _)| *living != name).map(|(_, spec)| spec);
    let memory: u64 = others.chain([spec]).filter_map(|s| s.resources.memory).map(|m| m.0).sum();
    let total = sim.world.observed.capacity.memory_total.0;
    law(memory <= total, || format!("with more for {name} the living need {memory} of {total}"))
}

/// No generation is active before it is complete, and one that failed never is again (unless an operator says so: then
/// it is a candidate anew).
fn of_a_transition(sim: &Sim, plan: &Plan, generation: &Generation, to: GenerationState) -> Law {
    let from = generation.state;
    let sequence = generation.sequence;
    let is_over = matches!(from, GenerationState::RolledBack | GenerationState::Rejected | GenerationState::Superseded);
    law(!is_over, || format!("generation {sequence} is {from:?} and shall be {to:?}"))?;
    match to {
        GenerationState::Activating => {
            for (name, workload) in &generation.manifest.workloads {
                let ready = matches!(sim.world.observed.images.get(&workload.image), Some(ImageStatus::Ready { .. }));
                law(ready, || format!("generation {sequence} takes over without the image of {name}"))?;
            }
        }
        GenerationState::Good => {
            for (name, workload) in &generation.manifest.workloads {
                let held = sim.world.desired.held.get(name) == Some(&Hold::Stopped);
                let here = sim.world.observed.workloads.get(name);
                let as_wanted = held || here.is_some_and(|instance| is_as_wanted(instance, workload));
                law(as_wanted, || format!("generation {sequence} is good, and {name} is another: {here:?}"))?;
            }
        }
        GenerationState::RolledBack => {
            let to_blame = generation.manifest.workloads.iter().any(|(name, workload)| {
                let here = sim.world.observed.workloads.get(name);
                let is_well = here.is_some_and(|instance| {
                    let lives = matches!(instance.state, InstanceState::Running { .. });
                    let unwell = matches!(instance.health, Health::Unhealthy | Health::Starting);
                    is_as_wanted(instance, workload) && lives && !unwell && instance.history.in_a_row == 0
                });
                !is_well && !generation.ailing.contains(name)
            });
            law(to_blame, || format!("generation {sequence} goes back for what ailed before it"))?;
            let good = sim.world.desired.pointers.last_good;
            law(good.is_some_and(|good| good != sequence), || format!("generation {sequence} goes back to {good:?}"))?;
        }
        _ => {}
    }
    let switches = matches!(to, GenerationState::Activating | GenerationState::RolledBack);
    let alone = plan.actions.iter().all(|action| match action {
        Action::Transition { .. } | Action::Pull { .. } => true,
        Action::Start { .. }
        | Action::Resize { .. }
        | Action::Stop { .. }
        | Action::Kill { .. }
        | Action::Remove { .. } => false,
    });
    law(!switches || alone, || format!("a switch to {sequence} and what depends on it are ordered at once: {plan:?}"))
}

/// One run of a workload at a time, no job that is done a second time, and all walls together fit the device at every moment.
pub fn of_a_launch(sim: &Sim, name: &WorkloadName, spec: &Spec) -> Law {
    law(sim.living().all(|(living, _)| living != name), || format!("{name} is started beside a living one"))?;
    law(sim.done.get(name) != Some(&spec.digest()), || format!("{name} was done, and nobody asked for it again"))?;
    let memory: u64 =
        sim.living().map(|(_, spec)| spec).chain([spec]).filter_map(|s| s.resources.memory).map(|m| m.0).sum();
    let total = sim.world.observed.capacity.memory_total.0;
    law(memory <= total, || format!("with {name} the living need {memory} of {total}"))
}

/// Whoever is wanted and does not run is being started, or waits with a reason.
pub fn nobody_is_forgotten(sim: &Sim, plan: &Plan) -> Law {
    let switching = plan.actions.iter().any(|action| matches!(action, Action::Transition { .. }));
    let Some(active) = sim.active().filter(|_| !switching) else { return Ok(()) };
    for name in active.manifest.workloads.keys() {
        let state = sim.world.observed.workloads.get(name).map(|instance| &instance.state);
        let cared_for = match state {
            Some(InstanceState::Running { .. }) => true,
            Some(InstanceState::Starting { .. }) => sim.is_starting(name),
            _ => {
                plan.waits.iter().any(|wait| wait.workload.as_ref() == Some(name))
                    || plan.actions.iter().any(|action| match action {
                        Action::Start { workload, .. }
                        | Action::Stop { workload, .. }
                        | Action::Kill { workload, .. } => workload == name,
                        _ => false,
                    })
            }
        };
        law(cared_for, || format!("{name} is {state:?}, and nobody says why"))?;
    }
    Ok(())
}

/// What a calm world comes to: every workload of the active generation runs as it is wanted, or has ended by its
/// policy, or is held, or cannot be helped; nothing else runs; no generation is half-way; the plan is empty.
pub fn it_has_converged(sim: &Sim, plan: &Plan) -> Law {
    law(plan.actions.is_empty(), || format!("a quiet world has a plan: {:?}", plan.actions))?;
    let desired = &sim.world.desired;
    law(desired.pointers.candidate.is_none(), || format!("a candidate is left: {:?}", desired.pointers))?;
    let Some(active) = sim.active() else {
        return law(sim.living().next().is_none(), || "something runs, and nothing is wanted".to_owned());
    };
    for (name, spec) in sim.living() {
        let same = active.manifest.workloads.get(name) == Some(spec);
        law(same, || format!("{name} runs as another generation has it"))?;
    }
    let helpless = |name: &WorkloadName| is_helpless(sim, active, name);
    for (name, workload) in &active.manifest.workloads {
        let job = workload.restart.policy != RestartPolicy::Always;
        let runs = sim.living().any(|(living, _)| living == name);
        let ended = sim.world.observed.workloads.get(name).is_some_and(|i| i.state == InstanceState::Ended);
        law(runs || (job && ended) || helpless(name), || {
            format!("{name} does not run: {:?}", sim.world.observed.workloads.get(name))
        })?;
    }
    // A generation that cannot become good goes back, if there is where to.
    let nowhere = desired.pointers.last_good.is_none();
    let settled = active.state == GenerationState::Good || (nowhere && active.manifest.workloads.keys().any(helpless));
    law(settled, || format!("generation {} stays {:?}: {:?}", active.sequence, active.state, plan.waits))
}

/// Held by an operator, broken by its maker, ended for good with a failure, never to have its image, or in need of such.
fn is_helpless(sim: &Sim, active: &Generation, name: &WorkloadName) -> bool {
    let workload = &active.manifest.workloads[name];
    let instance = sim.world.observed.workloads.get(name);
    let failed = workload.restart.policy == RestartPolicy::Never
        && instance.and_then(|i| i.history.last_exit.as_ref()).is_some_and(|exit| !exit.cause.is_success());
    sim.world.desired.held.get(name) == Some(&Hold::Stopped)
        || Sim::is_broken(workload)
        || failed
        || workload.depends_on.keys().any(|need| is_helpless(sim, active, need))
}
