//! Other limits for a workload that runs: written into its cgroup, then noted with the keeper, and only then part of the
//! world. An agent that ends in between finds the old note, and does it again.

use edged_model::id::{Digest, Sequence, WorkloadName};
use edged_model::observed::InstanceState;
use edged_model::reason::{Code, Reason};
use edged_model::spec::Spec;

use super::{Agent, Message};
use crate::crash_point;
use crate::execute::start;
use crate::store::{Durability, inline_chain};

/// What the keeper keeps with a run: what it runs as, and the same without its limits.
pub(super) fn note(spec: &Spec) -> String {
    format!("{} {}", spec.digest(), spec.digest_without_limits())
}

/// [`note`] back again. A run of an earlier version has no second word.
pub(super) fn noted(note: &str) -> (Digest, Option<Digest>) {
    let (spec, frame) = note.split_once(' ').unwrap_or((note, ""));
    (Digest::parse(spec).unwrap_or_else(|_| Digest::of(b"")), Digest::parse(frame).ok())
}

impl Agent {
    pub(super) fn resize(&mut self, workload: WorkloadName, generation: Sequence) {
        let manifest = self.world.desired.generations.get(&generation).map(|generation| &generation.manifest);
        let Some(spec) = manifest.and_then(|manifest| manifest.workloads.get(&workload)).cloned() else { return };
        let runs = matches!(self.world.instance(&workload).state, InstanceState::Running { .. });
        if !runs || self.under_way.resizes.contains_key(&workload) {
            return;
        }
        self.under_way.resizes.insert(workload.clone(), None);
        self.world.resizing(&workload, spec.digest());
        let limits = start::limits(&spec, self.start_context.places.data());
        let cgroup = self.start_context.cgroups.open(workload.as_str());
        let (link, inbox) = (self.link.clone(), self.inbox.clone());
        tokio::spawn(async move {
            let set = tokio::task::spawn_blocking(move || cgroup.resize(&limits)).await;
            let result = match set {
                Ok(Ok(())) => {
                    crash_point::pass("limits-set");
                    link.note(workload.as_str(), note(&spec)).await.map_err(|error| inline_chain(&error))
                }
                Ok(Err(error)) => Err(inline_chain(&error)),
                Err(error) => Err(error.to_string()),
            };
            crash_point::pass("limits-noted");
            // The loop has ended only when the agent ends.
            let _ = inbox.send(Message::Resized { workload, spec: Box::new(spec), result }).await;
        });
    }

    pub(super) async fn resized(&mut self, name: WorkloadName, spec: &Spec, result: Result<(), String>) {
        let ended_already = self.under_way.resizes.remove(&name).flatten();
        let text = match result {
            Ok(()) => {
                self.world.resized(&name, spec.digest());
                if let Some(run) = self.runs.get_mut(&name) {
                    run.comes_behind = None;
                }
                let memory = spec.resources.memory.unwrap_or_default().human();
                let (cpu, pids) = (spec.resources.cpu.unwrap_or_default(), spec.resources.pids);
                format!("{name} runs on with other limits: memory {memory}, cpu {cpu}, {pids} processes")
            }
            Err(why) => {
                self.world.not_resized(&name);
                format!("{name} must be restarted for its new limits: {why}")
            }
        };
        let active = self.world.desired.pointers.active;
        self.tell(Some(&name), active, &Reason::new(Code::LimitsChanged, text), "planner");
        self.save_history(&name, Durability::Along);
        crash_point::pass("limits-told");
        if let Some(exit) = ended_already {
            self.exited(exit).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read_again_and_an_older_note_too() {
        let web = Spec::from(edged_model::manifest::Workload::of_image("r.example/web:1"));
        assert_eq!(noted(&note(&web)), (web.digest(), Some(web.digest_without_limits())));
        assert_eq!(noted(&web.digest().to_string()), (web.digest(), None));
        assert_eq!(noted("").1, None);
    }
}
