//! What the planner may order. Each action is idempotent: ordered twice, it is done once.

use serde::{Deserialize, Serialize};

use crate::generation::GenerationState;
use crate::id::{Sequence, WorkloadName};
use crate::reason::Reason;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Fetch, verify and unpack an image.
    Pull { image: String },
    /// Create what is missing (upper, cgroup, network) and start it. `first` tells a fresh start from a restart.
    Start { workload: WorkloadName, generation: Sequence, why: Reason },
    /// Give a running workload the limits of this generation; nothing else changed.
    Resize { workload: WorkloadName, generation: Sequence, why: Reason },
    /// Send the stop signal; SIGKILL follows after the timeout.
    Stop { workload: WorkloadName, why: Reason },
    /// The timeout is over.
    Kill { workload: WorkloadName, why: Reason },
    /// Take away what a workload that is in no generation any more has left (never volumes).
    Remove { workload: WorkloadName },
    /// Write a generation's new state (and the pointers that go with it) and flush, before anything else is done.
    Transition { generation: Sequence, to: GenerationState, why: Reason },
}

/// Not an action: why nothing is done about a workload now, and when to look again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    pub workload: Option<WorkloadName>,
    pub why: Reason,
    /// When time alone changes it; else an event does.
    pub until_boot_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[must_use = "an unread plan is not carried out"]
pub struct Plan {
    pub actions: Vec<Action>,
    pub waits: Vec<Wait>,
}

impl Plan {
    /// When the planner wants to be asked again even if nothing happens.
    pub fn wake_at_boot_ms(&self) -> Option<u64> {
        self.waits.iter().filter_map(|wait| wait.until_boot_ms).min()
    }
}
