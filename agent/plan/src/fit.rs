//! Does a manifest fit this device? The sum of the memory walls must fit beside the reserve, so must the CPU.

use edged_model::manifest::Manifest;
use edged_model::observed::Capacity;
use edged_model::quantity::{Bytes, MilliCpu};
use edged_model::reason::{Code, Reason};

/// `Err` with the three numbers when it does not fit, or when a wall is missing.
pub fn fits(manifest: &Manifest, capacity: &Capacity) -> Result<(), Reason> {
    let (mut memory, mut cpu) = (0_u64, 0_u64);
    for (name, workload) in &manifest.workloads {
        let missing = |limit: &str| {
            Reason::new(Code::MissingLimit, format!("workload {name} has no {limit} limit"))
                .next(format!("set workloads.{name}.resources.{limit}"))
        };
        memory = memory.saturating_add(workload.resources.memory.ok_or_else(|| missing("memory"))?.0);
        cpu = cpu.saturating_add(workload.resources.cpu.ok_or_else(|| missing("cpu"))?.0);
    }
    let free = capacity.memory_total.0.saturating_sub(capacity.memory_reserve.0);
    if memory > free {
        let text = format!(
            "the workloads need {} of memory, the device has {} ({} in all, {} in reserve)",
            Bytes(memory).human(),
            Bytes(free).human(),
            capacity.memory_total.human(),
            capacity.memory_reserve.human()
        );
        return Err(Reason::new(Code::QuotaDoesNotFit, text).next("lower resources.memory or run less here"));
    }
    let free = capacity.cpu_total.0.saturating_sub(capacity.cpu_reserve.0);
    if cpu > free {
        let text = format!(
            "the workloads need {} of CPU, the device has {} ({} in all, {} in reserve)",
            MilliCpu(cpu),
            MilliCpu(free),
            capacity.cpu_total,
            capacity.cpu_reserve
        );
        return Err(Reason::new(Code::QuotaDoesNotFit, text).next("lower resources.cpu or run less here"));
    }
    Ok(())
}
