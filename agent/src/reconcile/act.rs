//! Actions are given to tasks, and what comes back is taken into the world. Each is ordered once while it is under way.

use edged_model::action::Action;
use edged_model::generation::GenerationState;
use edged_model::id::{Sequence, WorkloadName};
use edged_model::observed::Hold;
use edged_model::quantity::Now;
use edged_model::reason::{Code, Reason};
use edged_model::spec::Spec;
use edged_model::workload::{Exit, ExitCause};
use edged_plan::transition;
use edged_plan::world::Began;

use super::reset::UnderReset;
use super::store_thread::Busy;
use super::{Agent, Message, Run, StartFailure, StartUnderWay, clock, resize, suspect};
use crate::crash_point;
use crate::execute::{isolate, place, start, stop};
use crate::observe::logs::Clocks;
use crate::report::Taken;
use crate::runtime::keeper_link::{LaunchError, Launched};
use crate::store::{Durability, SavedHistory, inline_chain};

/// The key of generations' changes among what failed; no workload has such a name.
const CHANGE: &str = "(change)";

impl Agent {
    pub(super) fn try_later(&mut self, what: &str) {
        self.under_way.failed.entry(what.to_owned()).or_default().failed(clock::boot_ms());
    }

    pub(super) async fn act(&mut self, action: Action, now: Now) {
        match action {
            Action::Pull { image } => self.pull(image),
            Action::Start { workload, generation, why } => self.start(workload, generation, &why, now),
            Action::Resize { workload, generation, .. } => self.resize(workload, generation),
            Action::Stop { workload, why } => self.stop(&workload, &why, now).await,
            Action::Kill { workload, why } => self.kill(&workload, &why).await,
            Action::Remove { workload } => self.remove(workload),
            Action::Transition { generation, to, why } => self.change(generation, to, &why, now),
        }
    }

    fn start(&mut self, workload: WorkloadName, generation: Sequence, why: &Reason, now: Now) {
        let Some(manifest) = self.world.desired.generations.get(&generation).map(|g| g.manifest.clone()) else {
            return;
        };
        let Some(spec) = manifest.workloads.get(&workload).cloned() else { return };
        let Some(image) = self.images.get(&spec.image).cloned() else { return };
        // Its last end is still being written: until then the keeper has it in its table.
        if self.under_way.starts.contains_key(&workload) || self.under_way.ends.contains(&workload) {
            return;
        }
        let oom_kills_before = self.start_context.cgroups.open(workload.as_str()).usage().oom_kills;
        self.under_way.starts.insert(workload.clone(), StartUnderWay { oom_kills_before, ended_already: None });
        tracing::debug!(%workload, "start: {why}");
        self.world.starting(&workload, spec.digest(), now);
        crash_point::pass("start-ordered");
        let (context, link, inbox) = (self.start_context.clone(), self.link.clone(), self.inbox.clone());
        let started = Box::new(spec.clone());
        tokio::spawn(async move {
            let name = workload.clone();
            let (note, cpu_milli) = (resize::note(&spec), start::cpu_milli(&spec));
            let prepared = tokio::task::spawn_blocking(move || {
                let launch = isolate::Launch { name: &name, workload: &spec, manifest: &manifest, image: &image };
                isolate::run(&context, &launch, note)
            });
            let result = match prepared.await {
                Ok(Ok(prepared)) => {
                    crash_point::pass("start-prepared");
                    let launched = link.launch(prepared.spec, prepared.fds).await.map_err(StartFailure::Launch);
                    crash_point::pass("start-unlimited");
                    if launched.is_ok()
                        && let Err(error) = prepared.cgroup.limit_cpu(cpu_milli)
                    {
                        tracing::error!(%workload, "it does not run without its limit: {}", inline_chain(&error));
                        let _ = link.signal(workload.as_str(), nix::sys::signal::Signal::SIGKILL as i32).await;
                    }
                    launched
                }
                Ok(Err(reason)) => Err(StartFailure::Reason(reason)),
                Err(error) => Err(StartFailure::Reason(Reason::new(Code::StartFailed, error.to_string()))),
            };
            crash_point::pass("start-answered");
            // The loop has ended only when the agent ends.
            let _ = inbox.send(Message::Started { workload, spec: started, result }).await;
        });
    }

    pub(super) async fn started(&mut self, name: WorkloadName, spec: &Spec, result: Result<Launched, StartFailure>) {
        let start = self.under_way.starts.remove(&name);
        let (oom_kills_before, ended_already) =
            start.map_or((0, None), |start| (start.oom_kills_before, start.ended_already));
        self.under_way.signalled.remove(&name);
        let now = self.now();
        match result {
            Ok(launched) => {
                self.take_outputs(&name, launched.outputs);
                let began = Began {
                    pid: launched.pid,
                    since_boot_ms: launched.boot_ms,
                    spec: spec.digest(),
                    frame: Some(spec.digest_without_limits()),
                    stop_timeout_ms: spec.stop_timeout.ms,
                    checked: spec.health.is_some(),
                };
                self.world.began(&name, &began);
                self.restart_was_tried(&name);
                let stop_signal = stop::signal(spec, self.images.get(&spec.image));
                self.watch(&name, launched.pid, stop_signal, Some(oom_kills_before)).await;
                let text = format!("{name} runs (pid {})", launched.pid);
                self.tell(
                    Some(&name),
                    self.world.desired.pointers.active,
                    &Reason::new(Code::Started, text),
                    "planner",
                );
                self.save_history(&name, Durability::Along);
                crash_point::pass("start-taken");
                if let Some(exit) = ended_already.filter(|exit| exit.pid == launched.pid) {
                    self.exited(exit).await;
                }
            }
            Err(failure) => {
                let is_unread = suspect::is_unread(&failure, spec);
                let (stage, errno) = match failure {
                    // An end has no room for what to do about it but its words.
                    StartFailure::Reason(reason) if reason.next.is_empty() => (reason.text, 0),
                    StartFailure::Reason(reason) => (format!("{}: {}", reason.text, reason.next), 0),
                    StartFailure::Launch(LaunchError::Failed { stage, errno }) => (stage, errno),
                    StartFailure::Launch(LaunchError::Link(error)) => (inline_chain(&error), 0),
                };
                self.world.not_started(&name, spec.digest());
                // It is asked for once: what fails now goes the way of every failure, back-off included.
                self.restart_was_tried(&name);
                let cause = ExitCause::NotStarted { stage, errno };
                let exit = Exit { cause, at: now.wall, at_boot_ms: now.boot_ms, ran_ms: 0, peak_memory: None };
                self.ended(&name, exit);
                if is_unread {
                    self.suspect(&name);
                }
            }
        }
    }

    pub(super) fn take_outputs(&self, name: &WorkloadName, outputs: Vec<std::os::fd::OwnedFd>) {
        use edged_model::api::Stream;
        let clocks = Clocks { unix_ms: clock::unix_ms, boot_ms: clock::boot_ms };
        for (stream, fd) in [Stream::Stdout, Stream::Stderr].into_iter().zip(outputs) {
            if let Err(error) = self.logs.pump(name, stream, fd, clocks) {
                tracing::error!(workload = %name, "its output cannot be read: {error}");
            }
        }
    }

    /// What a living run needs from us: its wall's counters, its probe, its ports.
    /// `oom_kills_before`: `None` for a run that was adopted; what it had before nobody counts again.
    pub(super) async fn watch(
        &mut self,
        name: &WorkloadName,
        pid: i32,
        stop_signal: i32,
        oom_kills_before: Option<u64>,
    ) {
        let cgroup = self.start_context.cgroups.open(name.as_str());
        let oom_kills_before = oom_kills_before.unwrap_or_else(|| cgroup.usage().oom_kills);
        let probe = self.probe_task(name, pid);
        let run = Run {
            cgroup,
            oom_kills_before,
            stop_signal,
            probe,
            look: None,
            cpu_milli: None,
            comes_behind: None,
            probes: crate::observe::took::Times::default(),
        };
        if let Some(old) = self.runs.insert(name.clone(), run) {
            old.probe.inspect(tokio::task::JoinHandle::abort);
        }
        let Some(spec) = self.active().and_then(|active| active.manifest.workloads.get(name)).cloned() else { return };
        if let Some(netns) = start::netns_path(&self.start_context.places, name, spec.network_mode)
            && let Err(error) = self.ports.publish(name, &spec.ports, &netns).await
        {
            let text = format!("the ports of {name} cannot be opened: {error}");
            self.tell(Some(name), None, &Reason::new(Code::StartFailed, text), "agent");
        }
    }

    async fn stop(&mut self, name: &WorkloadName, why: &Reason, now: Now) {
        self.let_go_on(name);
        let number = self.runs.get(name).map_or(nix::sys::signal::Signal::SIGTERM as i32, |run| run.stop_signal);
        self.tell(Some(name), self.world.desired.pointers.active, why, "planner");
        self.world.stopping(name, why, now);
        self.save_history(name, Durability::Along);
        crash_point::pass("stop-told");
        if let Err(error) = self.link.signal(name.as_str(), number).await {
            tracing::warn!(workload = %name, "stop: {}", inline_chain(&error));
        }
        crash_point::pass("stop-signalled");
    }

    async fn kill(&mut self, name: &WorkloadName, why: &Reason) {
        if !self.under_way.signalled.insert(name.clone()) {
            return;
        }
        let text = format!("{name} did not stop in its time and is killed ({})", why.text);
        self.tell(Some(name), None, &Reason::new(why.code, text), "planner");
        if let Some(Err(error)) = self.runs.get(name).map(|run| run.cgroup.lift_cpu_limit()) {
            tracing::warn!(workload = %name, "its end may take long: {}", inline_chain(&error));
        }
        if let Err(error) = self.link.signal(name.as_str(), nix::sys::signal::Signal::SIGKILL as i32).await {
            tracing::warn!(workload = %name, "kill: {}", inline_chain(&error));
        }
        crash_point::pass("kill-signalled");
    }

    fn remove(&mut self, workload: WorkloadName) {
        let may = self.under_way.failed.get(workload.as_str()).is_none_or(|backoff| backoff.is_over(clock::boot_ms()));
        if !may || !self.under_way.removals.insert(workload.clone()) {
            return;
        }
        self.ports.close(&workload);
        self.runs.remove(&workload);
        let (context, inbox, store) = (self.start_context.clone(), self.inbox.clone(), self.store.clone());
        tokio::task::spawn_blocking(move || {
            let cgroup = context.cgroups.open(workload.as_str());
            let mut failed = cgroup.remove().err().map(|error| inline_chain(&error));
            crash_point::pass("cgroup-removed");
            failed = failed.or(isolate::remove(&context, &workload).err().map(|error| inline_chain(error.as_ref())));
            crash_point::pass("namespace-removed");
            failed = failed.or(place::remove(&context.places, &workload).err().map(|error| inline_chain(&error)));
            crash_point::pass("place-removed");
            failed = failed.or(store.forget_workload(&workload).err().map(|error| inline_chain(&error)));
            crash_point::pass("workload-forgotten");
            let _ = inbox.blocking_send(Message::Removed { workload, failed });
        });
    }

    pub(super) fn removed(&mut self, workload: &WorkloadName, failed: Option<String>) {
        self.under_way.removals.remove(workload);
        match failed {
            None => {
                self.under_way.failed.remove(workload.as_str());
                self.world.observed.workloads.remove(workload);
                // With a reset they may go too, and it says that.
                let stays = if self.reset.is_some() { "" } else { "; its volumes stay" };
                let text = format!("{workload} was removed{stays}");
                self.tell(Some(workload), None, &Reason::new(Code::NotInManifest, text), "planner");
            }
            // The reset tries it again with the rest, so many times, and tells what is left.
            Some(error) if self.reset.as_ref().is_some_and(UnderReset::has_begun) => {
                tracing::warn!(%workload, "remove: {error}");
                self.world.observed.workloads.remove(workload);
            }
            Some(error) => {
                self.try_later(workload.as_str());
                tracing::warn!(%workload, "remove: {error}");
            }
        }
    }

    pub(super) fn change(&mut self, generation: Sequence, to: GenerationState, why: &Reason, now: Now) {
        let may = self.under_way.failed.get(CHANGE).is_none_or(|backoff| backoff.is_over(now.boot_ms));
        if self.under_way.change || !may {
            return;
        }
        if to == GenerationState::Staged && !self.has_copies(generation, now) {
            return;
        }
        let Some(change) = transition::step(&self.world.desired, &self.world.observed, generation, to, why, now.wall)
        else {
            return;
        };
        self.tell(None, Some(generation), why, "planner");
        let failed_digest = self.world.desired.generations.get(&generation).map(|generation| generation.digest);
        let is_failure = matches!(to, GenerationState::RolledBack | GenerationState::Rejected);
        if is_failure {
            self.refuse(&format!("generation {generation}"), why);
        }
        let remember = failed_digest.filter(|_| is_failure);
        let activated = matches!(to, GenerationState::Activating | GenerationState::RolledBack);
        self.write_change(change, None, remember, activated);
    }

    /// Writes a change and tells the loop when it is on the disk: only then does it count.
    pub(super) fn write_change(
        &mut self,
        change: transition::Change,
        envelope: Option<(Sequence, Vec<u8>)>,
        failed_digest: Option<edged_model::id::Digest>,
        activated: bool,
    ) {
        // What is flushed anyway takes them along.
        self.keep_counters();
        let inbox = self.inbox.clone();
        let submitted = self.writes.submit(move |store| {
            let envelope = envelope.as_ref().map(|(sequence, bytes)| (*sequence, bytes.as_slice()));
            let remembered = failed_digest.map_or(Ok(()), |digest| store.remember_failed(digest));
            crash_point::pass("failure-remembered");
            let written = remembered.and_then(|()| store.transition(&change.generations, envelope, &change.pointers));
            let failed = written.err().map(|error| inline_chain(&error));
            crash_point::pass("change-written");
            let _ = inbox.blocking_send(Message::Changed { change: Box::new(change), failed, activated });
        });
        self.under_way.change = submitted.is_ok();
        self.warn_if_busy(submitted);
    }

    pub(super) fn changed(&mut self, change: transition::Change, failed: Option<String>, activated: bool) {
        self.under_way.change = false;
        self.change_written(change, failed, activated);
        if let Some(offer) = self.under_way.offer.take() {
            self.offer(offer);
        }
    }

    fn change_written(&mut self, change: transition::Change, failed: Option<String>, activated: bool) {
        let offered = self.under_way.acknowledge.take();
        let why = failed.map(|error| {
            // Nothing was acted on; the planner orders it again.
            self.try_later(CHANGE);
            Reason::new(Code::DiskFull, format!("a generation's state cannot be written: {error}"))
        });
        if let Some((sequence, reply)) = offered {
            let _ = reply.send(why.clone().map_or(Ok(Taken::Generation(sequence)), Err));
        }
        if let Some(why) = why {
            return self.tell(None, None, &why, "agent");
        }
        self.under_way.failed.remove(CHANGE);
        for changed in &change.generations {
            let before = self.world.desired.generations.get(&changed.sequence).map(|before| before.state);
            if before != Some(changed.state) {
                self.count_end_of(changed.state);
            }
        }
        let now = self.now();
        let desired = &mut self.world.desired;
        desired.pointers = change.pointers;
        desired.generations.extend(change.generations.into_iter().map(|generation| (generation.sequence, generation)));
        transition::forget_old(desired, &self.world.observed);
        if activated {
            self.world.observed.active_since_boot_ms = Some(now.boot_ms);
            self.world.observed.all_well_since_boot_ms = None;
            for name in self.world.desired.held.keys().cloned().collect::<Vec<_>>() {
                self.hold(&name, None);
            }
        }
        crash_point::pass("change-taken");
    }

    /// An operator's word, remembered.
    pub(super) fn hold(&mut self, name: &WorkloadName, hold: Option<Hold>) {
        match hold {
            Some(hold) => self.world.desired.held.insert(name.clone(), hold),
            None => self.world.desired.held.remove(name),
        };
        let key = name.clone();
        let written = self.writes.submit(move |store| {
            if let Err(error) = store.hold(&key, hold) {
                tracing::error!("hold: {}", inline_chain(&error));
            }
        });
        self.warn_if_busy(written);
    }

    pub(super) fn save_history(&mut self, name: &WorkloadName, durability: Durability) {
        let instance = self.world.instance(name);
        let saved =
            SavedHistory { spec: instance.spec, history: instance.history.clone(), boot_id: self.boot_id.clone() };
        let key = name.clone();
        let written = self.writes.submit(move |store| {
            if let Err(error) = store.save_history(&key, &saved, durability) {
                tracing::error!("history: {}", inline_chain(&error));
            }
        });
        self.warn_if_busy(written);
    }

    pub(super) fn warn_if_busy(&self, written: Result<(), Busy>) {
        if let Err(busy) = written {
            self.counters.a_write_was_dropped();
            tracing::error!("{busy}");
        }
    }
}
