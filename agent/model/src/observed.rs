//! The world as the planner sees it: built from events by `reconcile::world`, never read by the planner itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::generation::{Generation, Pointers};
use crate::id::{Digest, Sequence, WorkloadName};
use crate::moment::Moment;
use crate::quantity::{Bytes, MilliCpu};
use crate::reason::Reason;
use crate::workload::{Exit, Health};

/// What the device shall become: the generations that matter and the operator's own wishes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Desired {
    pub pointers: Pointers,
    /// Active, last good and candidate, as far as they exist.
    pub generations: BTreeMap<Sequence, Generation>,
    /// Workloads an operator stopped by hand; kept until he starts them or a new generation arrives.
    pub held: BTreeMap<WorkloadName, Hold>,
}

/// An operator's word about one workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Hold {
    Stopped,
    /// Stop the run that began before this time and start it again; cleared when that was tried.
    #[serde(rename_all = "camelCase")]
    Restart {
        asked_boot_ms: u64,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    pub workloads: BTreeMap<WorkloadName, Instance>,
    /// By the image text of the manifest.
    pub images: BTreeMap<String, ImageStatus>,
    pub capacity: Capacity,
    /// When the active generation began to be enforced in this boot, and since when all of it has been well.
    pub active_since_boot_ms: Option<u64>,
    pub all_well_since_boot_ms: Option<u64>,
    /// Whether it suits to switch.
    pub moment: Moment,
}

/// What the device has to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capacity {
    pub memory_total: Bytes,
    pub memory_reserve: Bytes,
    pub cpu_total: MilliCpu,
    pub cpu_reserve: MilliCpu,
    pub disk_free: Bytes,
    pub disk_reserve: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageStatus {
    /// Being fetched.
    Pulling { done: Bytes, total: Bytes },
    /// On disk, verified, unpacked. `digest` is the image manifest's.
    Ready { digest: Digest },
    /// Could not be had; tried again after `retry_at_boot_ms`. `permanent`: trying again cannot help (bad signature).
    Failed { reason: Reason, attempts: u32, retry_at_boot_ms: u64, permanent: bool },
}

/// One workload as it is on the device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Instance {
    pub state: InstanceState,
    /// The digest of the specification it was created from; `None` until it was first started.
    pub spec: Option<Digest>,
    /// The same without its limits (`Workload::digest_without_limits`); `None`: not known, or its limits cannot be
    /// changed while it runs.
    pub frame: Option<Digest>,
    /// The specification whose limits it is being given.
    pub resizing: Option<Digest>,
    /// That specification's own word on how to stop it (the new manifest may say something else).
    pub stop_timeout_ms: u64,
    pub health: Health,
    pub history: RestartHistory,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum InstanceState {
    #[default]
    Absent,
    /// The order to start was given; the keeper has not answered yet.
    Starting {
        since_boot_ms: u64,
        /// What is being started: the manifest may change before the answer comes.
        spec: Digest,
    },
    Running {
        pid: i32,
        since_boot_ms: u64,
    },
    /// The stop signal was sent; SIGKILL follows at the deadline.
    Stopping {
        pid: i32,
        kill_at_boot_ms: u64,
        why: Reason,
    },
    Ended,
}

/// What the restart policy needs to remember. Survives the agent: it is in the store.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RestartHistory {
    /// All restarts since the specification was first started.
    pub total: u32,
    /// Failures in a row, without a stable run between them.
    pub in_a_row: u32,
    pub oom_kills: u32,
    pub last_exit: Option<Exit>,
    /// Why the last run ended or was ended, in words.
    pub last_reason: Option<Reason>,
    /// Why the present run was told to end: kept, so that an agent that was restarted meanwhile does not take its end for
    /// a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ordered: Option<Ordered>,
}

/// An end that was ordered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ordered {
    pub why: Reason,
    /// A run that began later is not meant.
    pub at_boot_ms: u64,
}
