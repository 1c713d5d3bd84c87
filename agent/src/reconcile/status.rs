//! What `edgectl status` and the fleet are told: derived from the world, kept nowhere.

use std::time::Duration;

use edged_model::api::{GenerationStatus, Inspect, Status, WorkloadStatus};
use edged_model::generation::Generation;
use edged_model::id::WorkloadName;
use edged_model::manifest::Workload;
use edged_model::observed::{ImageStatus, InstanceState};
use edged_model::quantity::{Bytes, Timestamp};
use edged_model::reason::Reason;
use edged_model::report::{DiskReport, PullReport};
use edged_plan::phase::phase_of;

use super::{Agent, Look, Run, clock};
use crate::execute::start::cpu_milli;
use crate::observe::{ProbeOutcome, disk, pressure};
use crate::runtime::cgroup::{CPU_PERIOD_US, Cgroup, CgroupError};
use crate::store::inline_chain;

pub(super) fn generation_status(generation: &Generation) -> GenerationStatus {
    GenerationStatus {
        sequence: generation.sequence,
        digest: generation.digest,
        state: generation.state,
        since: generation.since,
        reason: generation.reason.clone(),
    }
}

/// What is remembered of an image's pulls until it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tries {
    pub(super) since: Timestamp,
    pub(super) failed: u32,
    pub(super) last_failure: Option<Reason>,
}

/// Of its limit of time in the cgroup.
const PERIOD_MS: u64 = CPU_PERIOD_US / 1000;

impl Run {
    /// CPU use since the last look. Who had to wait in half of the periods since uses its limit up and comes behind those who
    /// do not: all limits together fit into the device, so that within a period it has as much as before.
    fn look(&mut self, limit_milli: Option<u64>) -> Result<(), CgroupError> {
        let throttled_periods = self.cgroup.throttled().map(|throttled| throttled.throttled_periods);
        let now = Look { at_boot_ms: clock::boot_ms(), cpu_us: self.cgroup.usage().cpu_us, throttled_periods };
        let Some(before) = self.look.replace(now) else { return Ok(()) };
        let passed_ms = now.at_boot_ms.saturating_sub(before.at_boot_ms).max(1);
        self.cpu_milli = Some(now.cpu_us.saturating_sub(before.cpu_us) / passed_ms);
        let periods = now.throttled_periods.zip(before.throttled_periods);
        let Some((limit_milli, (is, was))) = limit_milli.zip(periods) else { return Ok(()) };
        let uses_it_up = is.saturating_sub(was) * PERIOD_MS * 2 >= passed_ms;
        // What the kernel refused once is said again with the next change.
        if self.comes_behind.replace(uses_it_up) == Some(uses_it_up) {
            return Ok(());
        }
        self.cgroup.weigh(if uses_it_up { limit_milli / 10 } else { limit_milli })
    }
}

impl Agent {
    pub(super) fn status(&self) -> Status {
        let desired = &self.world.desired;
        let of = |sequence: Option<_>| desired.generations.get(&sequence?).map(generation_status);
        let mut candidate = of(desired.pointers.candidate);
        if let (Some(candidate), Some(why)) = (&mut candidate, self.moment_awaited()) {
            candidate.reason = Some(why);
        }
        let workloads = self.active().map(|active| {
            active.manifest.workloads.iter().map(|(name, workload)| self.workload_status(name, workload)).collect()
        });
        let memory = pressure::memory();
        let none = DiskReport { total: Bytes(0), free: Bytes(0) };
        Status {
            device: self.device.clone(),
            agent_version: crate::VERSION.to_owned(),
            boot_id: self.boot_id.clone(),
            uptime_secs: clock::boot_ms() / 1000,
            now: self.now().wall,
            clock_source: self.clock_source().to_owned(),
            generation: of(desired.pointers.active),
            candidate,
            workloads: workloads.unwrap_or_default(),
            pulls: self.pulls(),
            boot_cause: self.boot_cause,
            fleet: self.fleet.status(self.config.fleet.url.clone(), &self.store),
            disk: disk::space(self.start_context.places.data()).unwrap_or(none),
            memory_total: memory.map_or(Bytes(0), |memory| memory.total),
            memory_available: memory.map_or(Bytes(0), |memory| memory.available),
            pressure: pressure::read(),
            supervisor: if self.is_device { pressure::own() } else { None },
            refused: self.refused.clone(),
            upgrade: self.upgrade.clone(),
            trust: self.trust_report(),
            survived: self.survived(),
            scrub: self.scrub_status(),
        }
    }

    /// What is fetched for a generation that counts, or waits to be.
    fn pulls(&self) -> Vec<PullReport> {
        let now = self.now();
        let mut pulls = Vec::new();
        for (image, status) in &self.world.observed.images {
            let names_it = |generation: &Generation| {
                generation.manifest.workloads.values().any(|workload| workload.image == *image)
            };
            let generations = self.needed_generations().map(|(_, generation)| generation);
            let newest =
                generations.filter(|generation| names_it(generation)).map(|generation| generation.sequence).max();
            let (Some(generation), Some(tries)) = (newest, self.pull_tries.get(image)) else { continue };
            let (done, total, retry_at) = match status {
                ImageStatus::Pulling { total: Bytes(0), .. } => (None, None, None),
                ImageStatus::Pulling { done, total } => (Some(*done), Some(*total), None),
                ImageStatus::Failed { permanent: true, .. } => (None, None, None),
                ImageStatus::Failed { retry_at_boot_ms, .. } => {
                    let in_secs = retry_at_boot_ms.saturating_sub(now.boot_ms) / 1000;
                    (None, None, Some(Timestamp(now.wall.0.saturating_add_unsigned(in_secs))))
                }
                ImageStatus::Ready { .. } => continue,
            };
            let Tries { since, failed: failures, last_failure: why } = tries.clone();
            pulls.push(PullReport { image: image.clone(), generation, since, done, total, failures, why, retry_at });
        }
        pulls
    }

    pub(super) fn workload_status(&self, name: &WorkloadName, workload: &Workload) -> WorkloadStatus {
        let instance = self.world.observed.workloads.get(name);
        let (phase, why) = phase_of(name, workload, instance, &self.world.desired, &self.plan);
        let history = instance.map(|instance| instance.history.clone()).unwrap_or_default();
        let running = match instance.map(|instance| &instance.state) {
            Some(InstanceState::Running { pid, since_boot_ms }) => Some((*pid, *since_boot_ms)),
            _ => None,
        };
        let run = running.and_then(|_| self.runs.get(name));
        WorkloadStatus {
            name: name.clone(),
            image: workload.image.clone(),
            phase,
            health: instance.map(|instance| instance.health).unwrap_or_default(),
            pid: running.map(|(pid, _)| pid),
            up_secs: running.map(|(_, since)| clock::boot_ms().saturating_sub(since) / 1000),
            restarts: history.total,
            oom_kills: history.oom_kills,
            last_exit: history.last_exit.as_ref().map(|exit| exit.cause.clone()),
            memory: run.map(|run| Bytes(run.cgroup.usage().memory_bytes)),
            memory_max: workload.resources.memory,
            cpu_milli: run.and_then(|run| run.cpu_milli),
            cpu_max_milli: workload.resources.cpu.map(|cpu| cpu.0),
            address: None,
            log_lines_dropped: self.logs.dropped_of(name),
            why: self.paused(name).or(why).or_else(|| history.last_reason.filter(|_| history.in_a_row > 0)),
        }
    }

    pub(super) fn inspect(&self, name: &WorkloadName) -> Option<Inspect> {
        let workload = self.active()?.manifest.workloads.get(name)?;
        let instance = self.world.observed.workloads.get(name);
        let cgroup = self.runs.get(name).map(|run| &run.cgroup);
        Some(Inspect {
            status: self.workload_status(name, workload),
            spec: workload.clone(),
            history: instance.map(|instance| instance.history.clone()).unwrap_or_default(),
            image_digest: self.images.get(&workload.image).map(|image| image.digest),
            cgroup: cgroup.map(|cgroup| cgroup.path().display().to_string()),
            limits: cgroup.map(|cgroup| cgroup.limits().into_iter().collect()).unwrap_or_default(),
            probe: self.runs.get(name).and_then(|run| run.probes.took()),
            throttled: cgroup.and_then(Cgroup::throttled),
        })
    }

    /// A probe was answered. One that failed says nothing of how quick the workload is.
    pub(super) fn took(&mut self, name: &WorkloadName, outcome: &ProbeOutcome, took: Duration) {
        if let (ProbeOutcome::Passed, Some(run)) = (outcome, self.runs.get_mut(name)) {
            run.probes.add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        }
    }

    /// What each run used since the last look, and who comes behind whom by that.
    pub(super) fn sample(&mut self) {
        let desired = &self.world.desired;
        let active = desired.pointers.active.and_then(|active| desired.generations.get(&active));
        for (name, run) in &mut self.runs {
            let spec = active.and_then(|active| active.manifest.workloads.get(name));
            if let Err(error) = run.look(spec.map(|spec| cpu_milli(spec))) {
                tracing::warn!(workload = %name, "its weight: {}", inline_chain(&error));
            }
        }
    }

    /// When the next report is due; `None`: nobody hears them.
    pub(super) fn report_at_boot_ms(&self) -> Option<u64> {
        self.config.fleet.url.as_ref().map(|_| self.fleet.due_at_boot_ms(self.config.fleet.report_interval))
    }

    /// Reports to the fleet when something changed, or when the last report is old.
    pub(super) fn report_if_due(&mut self) {
        if self.config.fleet.url.is_none() {
            return;
        }
        let Some(due) = self.fleet.due(clock::boot_ms(), self.config.fleet.report_interval) else { return };
        let status = self.status();
        let fleet = self.fleet.clone();
        let written = self.writes.submit(move |store| {
            if let Err(why) = fleet.put(store, &status, due) {
                tracing::error!("report: {why}");
            }
        });
        if let Err(busy) = written {
            tracing::error!("{busy}");
        }
    }
}
