//! What one workload needs now: start, stop, kill, remove, or a reason to wait.

use edged_model::action::{Action, Plan, Wait};
use edged_model::generation::Generation;
use edged_model::id::{Digest, WorkloadName};
use edged_model::manifest::HealthAction;
use edged_model::observed::{Desired, Hold, Instance, InstanceState, Observed};
use edged_model::quantity::{Now, Span};
use edged_model::reason::{Code, Reason};
use edged_model::spec::Spec;
use edged_model::workload::Health;

use crate::order;
use crate::restart::{self, Verdict};
use crate::rollout;
use crate::room::{self, Change};
use crate::turns::Turns;

pub fn all(desired: &Desired, observed: &Observed, now: Now, plan: &mut Plan) {
    let active = desired.pointers.active.and_then(|sequence| desired.generations.get(&sequence));
    for (name, instance) in &observed.workloads {
        let is_wanted = active.is_some_and(|active| active.manifest.workloads.contains_key(name));
        if !is_wanted {
            leave(name, instance, now, plan);
        }
    }
    let Some(active) = active else { return };
    let mut turns = Turns::new(active, desired, observed);
    for name in order::start_order(&active.manifest) {
        let step = OneWorkload { active, name, workload: &active.manifest.workloads[name], desired, observed, now };
        step.plan(&mut turns, plan);
    }
}

/// A workload that the active generation does not have.
fn leave(name: &WorkloadName, instance: &Instance, now: Now, plan: &mut Plan) {
    match &instance.state {
        InstanceState::Running { .. } => {
            let why = Reason::new(Code::NotInManifest, format!("{name} is not in the manifest any more"));
            plan.actions.push(Action::Stop { workload: name.clone(), why });
        }
        InstanceState::Stopping { kill_at_boot_ms, why, .. } => stopping(name, *kill_at_boot_ms, why, now, plan),
        InstanceState::Ended | InstanceState::Absent => {
            plan.actions.push(Action::Remove { workload: name.clone() });
        }
        InstanceState::Starting { .. } => wait(plan, name, Code::NotInManifest, "it is just being started", None),
    }
}

fn stopping(name: &WorkloadName, kill_at: u64, why: &Reason, now: Now, plan: &mut Plan) {
    if now.boot_ms >= kill_at {
        plan.actions.push(Action::Kill { workload: name.clone(), why: why.clone() });
    } else {
        plan.waits.push(Wait { workload: Some(name.clone()), why: why.clone(), until_boot_ms: Some(kill_at) });
    }
}

fn wait(plan: &mut Plan, name: &WorkloadName, code: Code, text: &str, until_boot_ms: Option<u64>) {
    let why = Reason::new(code, format!("{name}: {text}"));
    plan.waits.push(Wait { workload: Some(name.clone()), why, until_boot_ms });
}

struct OneWorkload<'w> {
    active: &'w Generation,
    name: &'w WorkloadName,
    workload: &'w Spec,
    desired: &'w Desired,
    observed: &'w Observed,
    now: Now,
}

impl OneWorkload<'_> {
    fn plan(&self, turns: &mut Turns, plan: &mut Plan) {
        let absent = Instance::default();
        let instance = self.observed.workloads.get(self.name).unwrap_or(&absent);
        let wanted = self.workload.digest();
        match &instance.state {
            InstanceState::Absent => self.start_fresh(plan),
            InstanceState::Ended if instance.spec == Some(wanted) => self.start_again(instance, plan),
            InstanceState::Ended => self.start_fresh(plan),
            InstanceState::Starting { .. } => {
                wait(plan, self.name, Code::WaitingForTurn, "it is being started", None);
            }
            InstanceState::Running { .. } => self.keep_or_stop(instance, wanted, turns, plan),
            InstanceState::Stopping { kill_at_boot_ms, why, .. } => {
                stopping(self.name, *kill_at_boot_ms, why, self.now, plan);
            }
        }
    }

    fn hold(&self) -> Option<Hold> {
        self.desired.held.get(self.name).copied()
    }

    fn keep_or_stop(&self, instance: &Instance, wanted: Digest, turns: &mut Turns, plan: &mut Plan) {
        let name = self.name;
        let why = match self.hold() {
            Some(Hold::Stopped) => Reason::new(Code::OperatorStopped, format!("{name} was stopped by an operator"))
                .next(format!("`edgectl start {name}` starts it")),
            Some(Hold::Restart { .. }) => {
                Reason::new(Code::OperatorRestarted, format!("{name} is restarted by an operator"))
            }
            None if room::differs_in_limits(instance, self.workload) && self.resize(instance, plan) => return,
            None if instance.spec != Some(wanted) => {
                if !turns.take() {
                    return wait(plan, name, Code::WaitingForTurn, "it changes when the one before it is up", None);
                }
                Reason::new(Code::SpecChanged, format!("{name} changed in generation {}", self.active.sequence))
            }
            None => {
                let check = self.workload.health.as_ref();
                let restart = check.is_some_and(|check| check.action == HealthAction::Restart);
                if instance.health != Health::Unhealthy || !restart {
                    return;
                }
                Reason::new(Code::Unhealthy, format!("{name} does not answer its health check"))
            }
        };
        plan.actions.push(Action::Stop { workload: name.clone(), why });
    }

    /// Other limits for the run that is there: nobody is down for it, so it takes no turn; but what grows must fit.
    /// `false`: it has to be restarted.
    fn resize(&self, instance: &Instance, plan: &mut Plan) -> bool {
        let name = self.name;
        let change = room::change(name, instance, self.workload, self.desired);
        let missing = match change {
            Change::Shrinks => None,
            Change::Grows | Change::Mixed => room::missing(self.active, name, self.desired, self.observed, plan),
        };
        match missing {
            Some(_) if change == Change::Mixed => return false,
            Some(why) => plan.waits.push(Wait { workload: Some(name.clone()), why, until_boot_ms: None }),
            None => {
                let generation = self.active.sequence;
                let text = format!("{name} has other limits in generation {generation}");
                let why = Reason::new(Code::LimitsChanged, text);
                plan.actions.push(Action::Resize { workload: name.clone(), generation, why });
            }
        }
        true
    }

    fn start_again(&self, instance: &Instance, plan: &mut Plan) {
        let name = self.name;
        let why = instance.history.last_reason.clone();
        let why = why.unwrap_or_else(|| Reason::new(Code::Exited, format!("{name} ended")));
        match (self.hold(), restart::verdict(name, &self.workload.restart, &instance.history)) {
            (Some(Hold::Restart { .. }), _) | (None, Verdict::Now) => self.start(why, plan),
            (None, Verdict::At { boot_ms }) if boot_ms <= self.now.boot_ms => self.start(why, plan),
            (None, Verdict::At { boot_ms }) => {
                let left = Span::from_ms(boot_ms - self.now.boot_ms).human();
                let text = format!("{}; again in {left} (failure {} in a row)", why.text, instance.history.in_a_row);
                let why = Reason::new(Code::BackOff, text).next(why.next);
                plan.waits.push(Wait { workload: Some(name.clone()), why, until_boot_ms: Some(boot_ms) });
            }
            (None, Verdict::Never) => {
                let why = Reason::new(Code::PolicyNever, format!("{}; its restart policy ends here", why.text));
                plan.waits.push(Wait { workload: Some(name.clone()), why, until_boot_ms: None });
            }
            (Some(Hold::Stopped), _) => self.held(plan),
        }
    }

    fn held(&self, plan: &mut Plan) {
        let why = Reason::new(Code::OperatorStopped, format!("{} was stopped by an operator", self.name))
            .next(format!("`edgectl start {}` starts it", self.name));
        plan.waits.push(Wait { workload: Some(self.name.clone()), why, until_boot_ms: None });
    }

    fn start_fresh(&self, plan: &mut Plan) {
        if self.hold() == Some(Hold::Stopped) {
            return self.held(plan);
        }
        let text = format!("{} is in generation {}", self.name, self.active.sequence);
        self.start(Reason::new(Code::Activated, text), plan);
    }

    fn start(&self, why: Reason, plan: &mut Plan) {
        let image = &self.workload.image;
        let ordered = plan.actions.iter().any(|action| matches!(action, Action::Pull { image: i } if i == image));
        match rollout::has_image(image, self.name, self.observed, self.now, !ordered, plan) {
            Ok(true) => {}
            Ok(false) => return,
            Err(why) => {
                return plan.waits.push(Wait { workload: Some(self.name.clone()), why, until_boot_ms: None });
            }
        }
        let manifest = &self.active.manifest;
        let unmet = order::unmet(manifest, self.observed, self.name);
        if let Some(why) = unmet.or_else(|| order::moved(manifest, plan, self.name)) {
            return plan.waits.push(Wait { workload: Some(self.name.clone()), why, until_boot_ms: None });
        }
        if let Some(why) = room::missing(self.active, self.name, self.desired, self.observed, plan) {
            return plan.waits.push(Wait { workload: Some(self.name.clone()), why, until_boot_ms: None });
        }
        let generation = self.active.sequence;
        plan.actions.push(Action::Start { workload: self.name.clone(), generation, why });
    }
}
