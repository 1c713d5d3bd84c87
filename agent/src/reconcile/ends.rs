//! The end of a run: why, what follows, and when the keeper may forget it.

use edged_model::id::WorkloadName;
use edged_model::keeper::ChildExit;
use edged_model::manifest::Restart;
use edged_model::observed::{Hold, InstanceState};
use edged_model::quantity::Bytes;
use edged_model::workload::{Exit, ExitCause};
use edged_plan::restart;

use super::{Agent, Message, health, suspect};
use crate::crash_point;
use crate::store::{Durability, inline_chain};

impl Agent {
    /// The keeper says that a child ended.
    pub(super) async fn exited(&mut self, exit: ChildExit) {
        let key = exit.key.clone();
        let starting = WorkloadName::parse(&key).ok().and_then(|name| self.under_way.starts.get_mut(&name));
        if let Some(start) = starting {
            start.ended_already = Some(exit);
            return;
        }
        // What it ran as at last is told by the answer that is on its way.
        let resizing = WorkloadName::parse(&key).ok().and_then(|name| self.under_way.resizes.get_mut(&name));
        if let Some(ended_already) = resizing {
            *ended_already = Some(exit);
            return;
        }
        if !health::finish(&self.execs, &exit)
            && let Ok(name) = WorkloadName::parse(&key)
        {
            crash_point::pass("end-seen");
            let cause = self.cause(&name, &exit);
            let since = match self.world.instance(&name).state {
                InstanceState::Running { since_boot_ms, .. } => since_boot_ms,
                _ => exit.boot_ms,
            };
            let peak = self.runs.get(&name).and_then(|run| run.cgroup.usage().memory_peak_bytes).map(Bytes);
            let exit = Exit {
                cause,
                at: self.now().wall,
                at_boot_ms: exit.boot_ms,
                ran_ms: exit.boot_ms.saturating_sub(since),
                peak_memory: peak,
            };
            let may_be_unread = suspect::may_be_unread(&exit.cause);
            self.ended(&name, exit);
            if may_be_unread {
                self.suspect(&name);
            }
            // Before it is started again.
            self.look_at_what_the_scrub_found();
            if !self.starts_at_once(&name) {
                return self.forget_when_written(name).await;
            }
        }
        self.forget(&key).await;
    }

    /// Whether the next plan starts it again: then nothing waits for the disk.
    fn starts_at_once(&self, name: &WorkloadName) -> bool {
        let workload = self.active().and_then(|active| active.manifest.workloads.get(name));
        let instance = self.world.observed.workloads.get(name);
        workload.zip(instance).is_some_and(|(workload, instance)| {
            restart::verdict(name, &workload.restart, &instance.history) == restart::Verdict::Now
        })
    }

    /// The keeper remembers an end until it is on the disk: a job that is done is not done again because the agent ended
    /// between the two.
    async fn forget_when_written(&mut self, name: WorkloadName) {
        let (inbox, key) = (self.inbox.clone(), name.clone());
        let submitted = self.writes.submit(move |store| {
            if let Err(error) = store.sync() {
                tracing::error!("the end of {key} is not on the disk: {}", inline_chain(&error));
            }
            // The loop has ended only when the agent ends.
            let _ = inbox.blocking_send(Message::EndWritten { workload: key });
        });
        match submitted {
            Ok(()) => drop(self.under_way.ends.insert(name)),
            Err(busy) => {
                self.warn_if_busy(Err(busy));
                self.forget(name.as_str()).await;
            }
        }
    }

    pub(super) async fn end_written(&mut self, name: &WorkloadName) {
        self.under_way.ends.remove(name);
        crash_point::pass("end-written");
        self.forget(name.as_str()).await;
    }

    pub(super) async fn forget(&self, key: &str) {
        if let Err(error) = self.link.forget(key).await {
            tracing::warn!(key, "forget: {}", inline_chain(&error));
        }
        crash_point::pass("end-forgotten");
    }

    pub(super) fn restart_was_tried(&mut self, name: &WorkloadName) {
        if matches!(self.world.desired.held.get(name), Some(Hold::Restart { .. })) {
            self.hold(name, None);
        }
    }

    fn cause(&self, name: &WorkloadName, exit: &ChildExit) -> ExitCause {
        let oom = self.runs.get(name).is_some_and(|run| run.cgroup.usage().oom_kills > run.oom_kills_before);
        match (exit.code, exit.signal) {
            (Some(0), _) => ExitCause::Code { code: 0 },
            _ if oom => ExitCause::OutOfMemory,
            (Some(code), _) => ExitCause::Code { code },
            (None, Some(signal)) => ExitCause::Signal { signal, core_dumped: exit.core_dumped },
            (None, None) => ExitCause::Unknown,
        }
    }

    pub(super) fn ended(&mut self, name: &WorkloadName, exit: Exit) {
        let policy = self.active().and_then(|active| active.manifest.workloads.get(name));
        let policy = policy.map_or_else(Restart::default, |workload| workload.restart.clone());
        if let Some(probe) = self.runs.get_mut(name).and_then(|run| run.probe.take()) {
            probe.abort();
        }
        self.under_way.signalled.remove(name);
        let by = if exit.cause == ExitCause::OutOfMemory { "kernel" } else { "workload" };
        let why = self.world.ended(name, exit, &policy);
        let generation = self.world.desired.pointers.active;
        // The record of the end makes durable what was written before it.
        self.save_history(name, Durability::Along);
        self.tell(Some(name), generation, &why, by);
        crash_point::pass("end-told");
    }
}
