//! Status to report: pure.

use edged_model::api::{GenerationStatus, Status};
use edged_model::quantity::Bytes;
use edged_model::report::{GenerationReport, PULLS_MAX, PullReport, Report, Usage, WorkloadReport};

pub fn report(status: &Status, arch: &str, number: u64, dropped: u64) -> Report {
    let workload = |workload: &edged_model::api::WorkloadStatus| {
        let report = WorkloadReport {
            phase: workload.phase,
            health: workload.health,
            restarts: workload.restarts,
            oom_kills: workload.oom_kills,
            last_exit: workload.last_exit.clone(),
            why: workload.why.clone(),
            memory: Usage::known(workload.memory.map(whole_kibibytes), workload.memory_max),
            cpu_milli: Usage::known(workload.cpu_milli, workload.cpu_max_milli),
        };
        (workload.name.clone(), report)
    };
    Report {
        device: status.device.clone(),
        boot_id: status.boot_id.clone(),
        number,
        at: status.now,
        agent_version: status.agent_version.clone(),
        arch: arch.to_owned(),
        uptime_secs: status.uptime_secs,
        clock_source: status.clock_source.clone(),
        boot_cause: status.boot_cause,
        generation: status.generation.as_ref().map(generation),
        coming: status.candidate.as_ref().map(generation),
        workloads: status.workloads.iter().map(workload).collect(),
        pulls: status.pulls.iter().take(PULLS_MAX).map(pull).collect(),
        pulls_left_out: u32::try_from(status.pulls.len().saturating_sub(PULLS_MAX)).unwrap_or(u32::MAX),
        disk: Some(status.disk),
        pressure: status.pressure,
        refused: status.refused.clone(),
        upgrade: status.upgrade.clone(),
        trust: Some(status.trust.clone()),
        dropped,
    }
}

fn generation(status: &GenerationStatus) -> GenerationReport {
    GenerationReport {
        sequence: status.sequence,
        digest: status.digest,
        state: status.state,
        reason: status.reason.clone(),
    }
}

fn pull(status: &PullReport) -> PullReport {
    let [done, total] = [status.done, status.total].map(|bytes| bytes.map(whole_kibibytes));
    PullReport { done, total, ..status.clone() }
}

/// The kernel counts in pages anyway, and `19Mi` is shorter on the wire than the same in bytes.
fn whole_kibibytes(bytes: Bytes) -> Bytes {
    Bytes(bytes.0 >> 10 << 10)
}
