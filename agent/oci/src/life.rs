//! The process itself: scheduler, I/O priority, personality, labels, hooks. Numbers are the kernel's.

use edged_model::keeper::{Hook, Scheduler, SecurityLabel};
use oci_spec::runtime::{
    Hooks, IOPriorityClass, Linux, LinuxIOPriority, LinuxPersonalityDomain, LinuxSchedulerFlag, LinuxSchedulerPolicy,
    Process, Spec,
};

use crate::spec::SpecError;

/// sched_setattr(2), linux/sched.h.
pub fn scheduler(wanted: &oci_spec::runtime::Scheduler) -> Result<Scheduler, SpecError> {
    let policy = match wanted.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(SpecError::Unsupported { field: "process.scheduler.policy", value: "SCHED_ISO".to_owned() });
        }
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flags = wanted.flags().iter().flatten().fold(0, |all, flag| {
        all | match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x01,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
            LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
        }
    });
    let priority = wanted.priority().unwrap_or(0);
    Ok(Scheduler {
        policy,
        flags,
        nice: wanted.nice().unwrap_or(0),
        priority: u32::try_from(priority)
            .map_err(|_| SpecError::Invalid { field: "process.scheduler.priority", value: priority.to_string() })?,
        runtime_ns: wanted.runtime().unwrap_or(0),
        deadline_ns: wanted.deadline().unwrap_or(0),
        period_ns: wanted.period().unwrap_or(0),
    })
}

/// ioprio_set(2): class above bit 13, level below.
pub fn io_priority(wanted: &LinuxIOPriority) -> Result<u32, SpecError> {
    let class = match wanted.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match u32::try_from(wanted.priority()) {
        Ok(level @ 0..=7) => Ok(class << 13 | level),
        _ => {
            let value = wanted.priority().to_string();
            Err(SpecError::Invalid { field: "process.ioPriority.priority", value })
        }
    }
}

/// personality(2).
pub fn personality(linux: &Linux) -> Result<Option<u32>, SpecError> {
    let Some(wanted) = linux.personality() else { return Ok(None) };
    if let Some(flag) = wanted.flags().iter().flatten().next() {
        return Err(SpecError::Unsupported { field: "linux.personality.flags", value: flag.clone() });
    }
    Ok(Some(match wanted.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    }))
}

pub fn label(process: &Process) -> Result<Option<SecurityLabel>, SpecError> {
    let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    match (filled(process.apparmor_profile()), filled(process.selinux_label())) {
        (Some(profile), None) => Ok(Some(SecurityLabel::AppArmor(profile))),
        (None, Some(context)) => Ok(Some(SecurityLabel::SeLinux(context))),
        (None, None) => Ok(None),
        (Some(_), Some(context)) => {
            let value = format!("{context} beside an AppArmor profile");
            Err(SpecError::Unsupported { field: "process.selinuxLabel", value })
        }
    }
}

/// The hooks of one point in a container's life.
pub fn hooks(
    spec: &Spec,
    point: impl Fn(&Hooks) -> &Option<Vec<oci_spec::runtime::Hook>>,
) -> Result<Vec<Hook>, SpecError> {
    let hooks = spec.hooks().iter().flat_map(|hooks| point(hooks).iter().flatten());
    hooks.map(hook).collect()
}

fn hook(hook: &oci_spec::runtime::Hook) -> Result<Hook, SpecError> {
    if !hook.path().is_absolute() {
        return Err(SpecError::Invalid { field: "hooks.path", value: hook.path().display().to_string() });
    }
    let timeout_ms = match hook.timeout() {
        None => 0,
        Some(seconds) => u64::try_from(seconds)
            .ok()
            .filter(|seconds| *seconds > 0)
            .ok_or(SpecError::Invalid { field: "hooks.timeout", value: seconds.to_string() })?,
    };
    Ok(Hook {
        path: hook.path().to_string_lossy().into_owned(),
        args: hook.args().clone().unwrap_or_default(),
        env: hook.env().clone().unwrap_or_default(),
        timeout_ms: timeout_ms.saturating_mul(1000),
    })
}
