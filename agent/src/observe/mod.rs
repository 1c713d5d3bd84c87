//! Stage: the kernel, the keeper and the probes become [`Event`]s. Events are the only way the world reaches the
//! planner. Nothing here decides.

use edged_model::id::WorkloadName;
use edged_model::keeper::ChildExit;

/// Space on the data disk.
pub mod disk;
/// What the kernel says of damaged files.
pub mod kernel_log;
/// The locks with which workloads ask for peace.
pub mod locks;
/// How much of what is printed is kept.
pub mod log_budget;
/// The workload's output: bounded segments on disk, followers in memory.
pub mod logs;
/// Memory, CPU and I/O pressure of the machine.
pub mod pressure;
/// Whether a workload answers.
pub mod probes;
/// How long things took.
pub mod took;

/// What the world may say.
#[derive(Debug)]
pub enum Event {
    /// A run ended; the keeper remembers it until it is told to forget.
    Exited(ChildExit),
    Probed {
        workload: WorkloadName,
        pid: i32,
        outcome: ProbeOutcome,
    },
}

pub use edged_model::workload::ProbeOutcome;
