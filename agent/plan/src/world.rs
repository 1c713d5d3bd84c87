//! Events become [`Observed`]: how an event of the world changes what the planner is shown.

use edged_model::id::{Digest, WorkloadName};
use edged_model::manifest::{Health as HealthCheck, Restart};
use edged_model::observed::{Desired, Hold, Instance, InstanceState, Observed, Ordered, RestartHistory};
use edged_model::quantity::Now;
use edged_model::reason::{Code, Reason};
use edged_model::workload::{Exit, ExitCause, Health};

use edged_model::workload::ProbeOutcome;

/// What is wanted, what is seen, and the probe failures counted so far.
#[derive(Debug, Default)]
pub struct World {
    pub desired: Desired,
    pub observed: Observed,
    probes: std::collections::BTreeMap<WorkloadName, ProbeCount>,
}

/// Failures in a row of one run.
#[derive(Debug, Default)]
struct ProbeCount {
    failed_in_a_row: u32,
}

/// A run that began, as the keeper tells it.
#[derive(Debug, Clone)]
pub struct Began {
    pub pid: i32,
    pub since_boot_ms: u64,
    pub spec: Digest,
    /// [`Instance::frame`].
    pub frame: Option<Digest>,
    pub stop_timeout_ms: u64,
    pub checked: bool,
}

impl World {
    pub fn instance(&mut self, name: &WorkloadName) -> &mut Instance {
        self.observed.workloads.entry(name.clone()).or_default()
    }

    /// The order to start was given.
    pub fn starting(&mut self, name: &WorkloadName, spec: Digest, now: Now) {
        self.instance(name).state = InstanceState::Starting { since_boot_ms: now.boot_ms, spec };
    }

    /// The start failed: what follows counts for the specification that was tried, not for the one before it.
    pub fn not_started(&mut self, name: &WorkloadName, spec: Digest) {
        let instance = self.instance(name);
        if instance.spec != Some(spec) {
            instance.history = RestartHistory::default();
        }
        instance.history.ordered = None;
        instance.spec = Some(spec);
    }

    /// The program runs (exec was reached, or a living one was adopted).
    pub fn began(&mut self, name: &WorkloadName, began: &Began) {
        self.probes.remove(name);
        let instance = self.instance(name);
        if instance.spec != Some(began.spec) {
            instance.history = RestartHistory::default();
        } else if instance.history.last_exit.is_some() {
            instance.history.total += 1;
        }
        instance.history.ordered = None;
        instance.spec = Some(began.spec);
        instance.frame = began.frame;
        instance.stop_timeout_ms = began.stop_timeout_ms;
        instance.health = if began.checked { Health::Starting } else { Health::Unchecked };
        instance.state = InstanceState::Running { pid: began.pid, since_boot_ms: began.since_boot_ms };
    }

    /// Whether the operator's wish to restart `name` was fulfilled by a run that began at this time: an agent that ended
    /// before it could write that down must not restart it twice.
    pub fn was_restarted(&self, name: &WorkloadName, since_boot_ms: u64) -> bool {
        matches!(self.desired.held.get(name), Some(Hold::Restart { asked_boot_ms }) if *asked_boot_ms < since_boot_ms)
    }

    /// Whether this end is written down already: the agent before us ended before the keeper could be told to forget it.
    pub fn knows_end(&self, name: &WorkloadName, at_boot_ms: u64) -> bool {
        let known = self.observed.workloads.get(name).and_then(|instance| instance.history.last_exit.as_ref());
        known.is_some_and(|exit| exit.at_boot_ms == at_boot_ms)
    }

    /// A living run found after the agent itself was restarted: nothing began, so nothing is counted.
    pub fn adopted(&mut self, name: &WorkloadName, began: &Began) {
        let checked = began.checked;
        let instance = self.instance(name);
        // What is written down may be of the run before.
        instance.history.ordered =
            instance.history.ordered.take_if(|ordered| ordered.at_boot_ms >= began.since_boot_ms);
        instance.spec = Some(began.spec);
        instance.frame = began.frame;
        instance.stop_timeout_ms = began.stop_timeout_ms;
        instance.health = if checked { Health::Starting } else { Health::Unchecked };
        instance.state = InstanceState::Running { pid: began.pid, since_boot_ms: began.since_boot_ms };
    }

    /// The order to change its limits was given.
    pub fn resizing(&mut self, name: &WorkloadName, spec: Digest) {
        self.instance(name).resizing = Some(spec);
    }

    /// A living run has other limits now, and is as `spec` says. What failed before it failed under other walls.
    pub fn resized(&mut self, name: &WorkloadName, spec: Digest) {
        let instance = self.instance(name);
        let ordered = instance.history.ordered.take();
        instance.history = RestartHistory { ordered, ..RestartHistory::default() };
        instance.spec = Some(spec);
        instance.resizing = None;
    }

    /// Its limits cannot be changed while it runs: it is restarted in its turn.
    pub fn not_resized(&mut self, name: &WorkloadName) {
        let instance = self.instance(name);
        (instance.frame, instance.resizing) = (None, None);
    }

    /// The stop signal was sent.
    pub fn stopping(&mut self, name: &WorkloadName, why: &Reason, now: Now) {
        let instance = self.instance(name);
        if let InstanceState::Running { pid, .. } = instance.state {
            let kill_at_boot_ms = now.boot_ms.saturating_add(instance.stop_timeout_ms);
            instance.state = InstanceState::Stopping { pid, kill_at_boot_ms, why: why.clone() };
            instance.history.ordered = Some(Ordered { why: why.clone(), at_boot_ms: now.boot_ms });
        }
    }

    /// A run ended. Returns the reason to write down.
    pub fn ended(&mut self, name: &WorkloadName, exit: Exit, policy: &Restart) -> Reason {
        self.probes.remove(name);
        let instance = self.instance(name);
        // From the history, not from the state: an agent that was restarted meanwhile knows it too.
        let ordered = instance.history.ordered.take().map(|ordered| ordered.why);
        instance.state = InstanceState::Ended;
        instance.health = Health::Unchecked;
        let history = &mut instance.history;
        if exit.cause == ExitCause::OutOfMemory {
            history.oom_kills += 1;
        }
        // What was ordered by us is no failure of the program, unless the order was given because it was unwell.
        let counts = ordered.as_ref().is_none_or(|why| why.code == Code::Unhealthy);
        if exit.ran_ms >= policy.stable_after.ms {
            history.in_a_row = 0;
        }
        if counts {
            history.in_a_row = history.in_a_row.saturating_add(1);
        }
        let reason = match ordered {
            Some(why) => why,
            None => exit_reason(name, &exit),
        };
        history.last_exit = Some(exit);
        history.last_reason = Some(reason.clone());
        reason
    }

    /// A probe answered or did not. Returns a reason when the health changed.
    pub fn probed(
        &mut self,
        name: &WorkloadName,
        pid: i32,
        check: &HealthCheck,
        outcome: &ProbeOutcome,
        now: Now,
    ) -> Option<Reason> {
        let count = self.probes.entry(name.clone()).or_default();
        let instance = self.observed.workloads.get_mut(name)?;
        let InstanceState::Running { pid: running, since_boot_ms } = instance.state else { return None };
        if running != pid {
            return None;
        }
        let before = instance.health;
        match outcome {
            ProbeOutcome::Passed => {
                count.failed_in_a_row = 0;
                instance.health = Health::Healthy;
                (before != Health::Healthy)
                    .then(|| Reason::new(Code::BecameHealthy, format!("{name} answers its health check")))
            }
            ProbeOutcome::Failed { why } => {
                let in_start_period = now.boot_ms < since_boot_ms.saturating_add(check.start_period.ms);
                if before == Health::Starting && in_start_period {
                    return None;
                }
                count.failed_in_a_row = count.failed_in_a_row.saturating_add(1);
                if count.failed_in_a_row < check.retries.max(1) || before == Health::Unhealthy {
                    return None;
                }
                instance.health = Health::Unhealthy;
                let text = format!("{name} failed its health check {} times: {why}", count.failed_in_a_row);
                Some(Reason::new(Code::Unhealthy, text).next(format!("look at `edgectl logs {name}`")))
            }
        }
    }
}

/// The end of a run in words.
fn exit_reason(name: &WorkloadName, exit: &Exit) -> Reason {
    let peak = exit.peak_memory.map(|peak| format!(", peak memory {}", peak.human())).unwrap_or_default();
    let ran = edged_model::quantity::Span::from_ms(exit.ran_ms).human();
    match &exit.cause {
        ExitCause::Code { code } => {
            Reason::new(Code::Exited, format!("{name} ended with exit code {code} after {ran}{peak}"))
        }
        ExitCause::Signal { signal, .. } => {
            Reason::new(Code::Signalled, format!("{name} was ended by {} after {ran}{peak}", signal_name(*signal)))
        }
        ExitCause::OutOfMemory => {
            Reason::new(Code::OutOfMemory, format!("{name} reached its memory limit and was killed after {ran}{peak}"))
                .next("raise resources.memory or find the leak")
        }
        ExitCause::NotStarted { stage, errno } => {
            if *errno == 0 {
                return Reason::new(Code::StartFailed, stage.clone());
            }
            let error = std::io::Error::from_raw_os_error(*errno);
            Reason::new(Code::StartFailed, format!("{name} could not be started: {stage}: {error}"))
        }
        ExitCause::Unknown => Reason::new(Code::Exited, format!("{name} ended while the agent was away")),
    }
}

/// `SIGTERM` for 15: signal(7), the numbers of x86 and ARM.
fn signal_name(signal: i32) -> String {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM",
        "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF",
        "WINCH", "IO", "PWR", "SYS",
    ];
    let name = usize::try_from(signal).ok().and_then(|signal| NAMES.get(signal.checked_sub(1)?));
    name.map_or_else(|| format!("signal {signal}"), |name| format!("SIG{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::quantity::{Span, Timestamp};

    fn name() -> WorkloadName {
        WorkloadName::parse("web").unwrap()
    }

    fn began(spec: &[u8]) -> Began {
        Began { pid: 7, since_boot_ms: 1000, spec: Digest::of(spec), frame: None, stop_timeout_ms: 10, checked: true }
    }

    fn exit(ran_ms: u64, cause: ExitCause) -> Exit {
        Exit { cause, at: Timestamp(0), at_boot_ms: 0, ran_ms, peak_memory: None }
    }

    fn check() -> HealthCheck {
        HealthCheck {
            probe: edged_model::manifest::Probe::Tcp { port: 1 },
            start_period: Span::from_secs(10),
            interval: Span::from_secs(1),
            timeout: Span::from_secs(1),
            retries: 2,
            action: edged_model::manifest::HealthAction::Restart,
        }
    }

    #[test]
    fn failures_add_up_until_a_stable_run() {
        let mut world = World::default();
        let policy = Restart::default();
        for expected in [1, 2, 3] {
            world.began(&name(), &began(b"a"));
            world.ended(&name(), exit(5, ExitCause::Code { code: 1 }), &policy);
            assert_eq!(world.instance(&name()).history.in_a_row, expected);
        }
        world.began(&name(), &began(b"a"));
        world.ended(&name(), exit(policy.stable_after.ms, ExitCause::Code { code: 1 }), &policy);
        assert_eq!(world.instance(&name()).history.in_a_row, 1);
        assert_eq!(world.instance(&name()).history.total, 3);
    }

    #[test]
    fn what_was_ordered_is_no_failure() {
        let mut world = World::default();
        world.began(&name(), &began(b"a"));
        world.stopping(&name(), &Reason::new(Code::OperatorStopped, "by hand"), Now::default());
        let why =
            world.ended(&name(), exit(5, ExitCause::Signal { signal: 15, core_dumped: false }), &Restart::default());
        assert_eq!((why.code, world.instance(&name()).history.in_a_row), (Code::OperatorStopped, 0));
    }

    #[test]
    fn failures_in_the_start_period_do_not_count_and_old_runs_are_ignored() {
        let mut world = World::default();
        world.began(&name(), &began(b"a"));
        let failed = ProbeOutcome::Failed { why: "refused".to_owned() };
        let at = |boot_ms| Now { boot_ms, wall: Timestamp(0) };
        assert_eq!(world.probed(&name(), 7, &check(), &failed, at(2_000)), None);
        assert_eq!(world.probed(&name(), 8, &check(), &failed, at(20_000)), None, "another run's probe");
        assert_eq!(world.probed(&name(), 7, &check(), &failed, at(20_000)), None, "first of two");
        let why = world.probed(&name(), 7, &check(), &failed, at(21_000)).unwrap();
        assert_eq!((why.code, world.instance(&name()).health), (Code::Unhealthy, Health::Unhealthy));
        assert!(world.probed(&name(), 7, &check(), &ProbeOutcome::Passed, at(22_000)).is_some());
        assert_eq!(world.instance(&name()).health, Health::Healthy);
    }
}
