//! What is known of one workload: its phase, how it ended, its health, its restarts.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::quantity::{Bytes, Timestamp};

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "kind")]
pub enum ExitCause {
    Code {
        code: i32,
    },
    Signal {
        signal: i32,
        core_dumped: bool,
    },
    /// The kernel's OOM killer, seen in `memory.events`: told apart from a plain SIGKILL.
    OutOfMemory,
    /// It never ran: the step of the start that failed and the kernel's answer.
    NotStarted {
        stage: String,
        errno: i32,
    },
    /// It ended while nobody was there to see how.
    Unknown,
}

impl ExitCause {
    pub fn is_success(&self) -> bool {
        matches!(self, Self::Code { code: 0 })
    }
}

impl fmt::Display for ExitCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code { code } => write!(f, "exit {code}"),
            Self::Signal { signal, .. } => write!(f, "signal {signal}"),
            Self::OutOfMemory => f.write_str("out of memory"),
            // It did not come as far as a system call of its own.
            Self::NotStarted { stage, errno: 0 } => write!(f, "not started: {stage}"),
            Self::NotStarted { stage, errno } => write!(f, "not started: {stage}: errno {errno}"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// The end of one run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exit {
    pub cause: ExitCause,
    pub at: Timestamp,
    pub at_boot_ms: u64,
    /// How long the run lasted.
    pub ran_ms: u64,
    /// `memory.peak` of the run, where the kernel has it.
    pub peak_memory: Option<Bytes>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Health {
    /// It has no health check: running is all that is asked.
    #[default]
    Unchecked,
    /// Not answered yet, or inside the start period.
    Starting,
    Healthy,
    Unhealthy,
}

/// Where a workload is in its life. The word that `edgectl ps` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// In the manifest, not on the device yet.
    Pending,
    /// Its image is on the way.
    Pulling,
    /// Waits for a dependency, a turn or a back-off.
    Waiting,
    Starting,
    Running,
    Stopping,
    /// Ended, and by its policy stays so.
    Completed,
    /// Ended with a failure, and by its policy stays so.
    Failed,
    /// Stopped by an operator.
    Stopped,
    Paused,
}

/// What one probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    Passed,
    /// In words: `connection refused`, `status 503`, `exit 1`, `no answer in 3s`.
    Failed {
        why: String,
    },
}
