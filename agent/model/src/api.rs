//! What `edgectl` asks and the agent answers: CBOR documents, each behind a 4-byte big-endian length, over the local
//! socket, an SSH pipe or the framed mode of the serial line. One request, then answers until `End` or `Error`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::difference::Difference;
use crate::disk::{DiskUse, Pruned};
use crate::generation::GenerationState;
use crate::id::{DeviceId, Digest, Sequence, WorkloadName};
use crate::images::{CheckedLayer, ImageInfo, LoadedImage, VolumeInfo};
use crate::observed::RestartHistory;
use crate::quantity::{Bytes, Timestamp};
use crate::reason::Reason;
use crate::report::{BootCause, DiskReport, Pressure, PullReport, Refusal, TrustReport};
use crate::scrub::ScrubStatus;
use crate::survived::Survived;
use crate::workload::{ExitCause, Health, Phase};

/// The largest frame either side accepts.
pub const MAX_FRAME_BYTES: usize = 2 << 20;

/// Typed at the line console: from here on frames.
pub const FRAMES_WANTED: &str = "edged-frames 1";
/// The console's word that the next byte is a frame's. It is not what a console echoes.
pub const FRAMES_READY: &str = "\r\nedged-frames 1 ready\r\n";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Request {
    Version,
    Status,
    Inspect {
        workload: WorkloadName,
    },
    Logs {
        workload: WorkloadName,
        follow: bool,
        tail: Option<u32>,
    },
    Events {
        follow: bool,
        workload: Option<WorkloadName>,
        tail: Option<u32>,
    },
    Start {
        workload: WorkloadName,
    },
    Stop {
        workload: WorkloadName,
    },
    Restart {
        workload: WorkloadName,
    },
    /// Freezes a running workload where it is.
    Pause {
        workload: WorkloadName,
    },
    Resume {
        workload: WorkloadName,
    },
    /// A command in a running workload; only over the local socket, which carries descriptors.
    Exec {
        workload: WorkloadName,
        wish: ExecWish,
    },
    Generations,
    /// What takes the disk.
    Df,
    /// The images on the disk and on their way.
    Images,
    /// The named volumes.
    Volumes,
    /// Takes images from a layout or an archive at a path of the device.
    LoadImages {
        path: String,
        only: Option<String>,
        tag: Option<String>,
    },
    /// Holds the layers against what was unpacked.
    CheckImages {
        image: Option<String>,
    },
    /// Takes away what no generation needs, young or not.
    Prune {
        dry_run: bool,
    },
    /// Takes away everything that manifests have brought, but for the volumes unless they are named.
    ResetWorkloads {
        volumes: bool,
    },
    /// What differs between two manifests.
    Diff {
        from: Sequence,
        to: Sequence,
    },
    /// Back to a generation that is still stored; to the one before the active one if none is named.
    Rollback {
        to: Option<Sequence>,
    },
    /// Once more a generation that failed: the one named, or the newest.
    Retry {
        sequence: Option<Sequence>,
    },
    /// Lets a generation that is on its way take over as soon as it is staged: the one named, or the one there is.
    Activate {
        sequence: Option<Sequence>,
    },
    /// A signed envelope, as pushed.
    Apply {
        #[serde(with = "crate::keeper::serde_bytes_vec")]
        envelope: Vec<u8>,
    },
    PowerOff,
    Reboot,
    /// Keeper and agent are replaced by the program that lies where theirs came from; workloads run on.
    Upgrade,
    /// The same, also if that program was refused before.
    UpgradeAgain,
}

impl Request {
    /// Whether it only looks: what a read-only console allows.
    pub fn is_read(&self) -> bool {
        match self {
            Self::Version
            | Self::Status
            | Self::Inspect { .. }
            | Self::Logs { .. }
            | Self::Events { .. }
            | Self::Df
            | Self::Images
            | Self::Volumes
            | Self::CheckImages { .. }
            | Self::Prune { dry_run: true }
            | Self::Diff { .. }
            | Self::Generations => true,
            Self::Start { .. }
            | Self::Stop { .. }
            | Self::Restart { .. }
            | Self::Pause { .. }
            | Self::Resume { .. }
            | Self::Rollback { .. }
            | Self::Retry { .. }
            | Self::Activate { .. }
            | Self::Exec { .. }
            | Self::Apply { .. }
            | Self::Prune { dry_run: false }
            | Self::LoadImages { .. }
            | Self::ResetWorkloads { .. }
            | Self::PowerOff
            | Self::Reboot
            | Self::Upgrade
            | Self::UpgradeAgain => false,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    Version(VersionInfo),
    Status(Box<Status>),
    Inspect(Box<Inspect>),
    Log(LogLine),
    Event(Event),
    Generations(Vec<GenerationInfo>),
    Diff(Vec<Difference>),
    Df(DiskUse),
    Pruned(Pruned),
    Images(Vec<ImageInfo>),
    Volumes(Vec<VolumeInfo>),
    /// How far a long verb is; more answers follow.
    Progress {
        done: Bytes,
        total: Bytes,
    },
    Loaded(Vec<LoadedImage>),
    Checked(Vec<CheckedLayer>),
    Accepted {
        what: String,
    },
    /// The command runs. Descriptors: its terminal's master, or the other ends of stdin, stdout and stderr.
    ExecStarted,
    /// Its exit code, or 128 and the signal.
    ExecEnded {
        code: i32,
    },
    Error(Reason),
    End,
}

/// The one byte that a client sends while its command runs in a terminal: it leaves, and the command goes on.
pub const DETACH: u8 = b'd';

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExecWish {
    pub command: Vec<String>,
    /// Beyond the workload's own.
    pub env: Vec<String>,
    /// With a terminal of this size.
    pub terminal: Option<TerminalSize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TerminalSize {
    pub rows: u16,
    pub columns: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VersionInfo {
    pub agent: String,
    pub keeper: String,
    pub arch: String,
}

/// All that `edgectl status` and `edgectl ps` print.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub device: DeviceId,
    pub agent_version: String,
    pub boot_id: String,
    pub uptime_secs: u64,
    pub now: Timestamp,
    pub clock_source: String,
    /// Absent on a host, where edged is not what boots.
    pub boot_cause: Option<BootCause>,
    pub generation: Option<GenerationStatus>,
    /// A newer one that is on its way.
    pub candidate: Option<GenerationStatus>,
    pub workloads: Vec<WorkloadStatus>,
    /// Images on their way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pulls: Vec<PullReport>,
    pub fleet: FleetStatus,
    pub disk: DiskReport,
    pub memory_total: Bytes,
    pub memory_available: Bytes,
    /// Absent on a host, where edged has no group of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supervisor: Option<OwnMemory>,
    pub pressure: Option<Pressure>,
    pub refused: Option<Refusal>,
    /// A newer edged that is on trial, or was not taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<Reason>,
    #[serde(default)]
    pub trust: TrustReport,
    #[serde(default)]
    pub survived: Survived,
    #[serde(default)]
    pub scrub: ScrubStatus,
}

/// What the agent itself takes of its own limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OwnMemory {
    /// What cannot be taken back, and so not the caches of files.
    pub memory: Bytes,
    /// With all caches, since its group was made, which is since the boot.
    pub memory_peak: Option<Bytes>,
    pub memory_max: Option<Bytes>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GenerationStatus {
    pub sequence: Sequence,
    pub digest: Digest,
    pub state: GenerationState,
    pub since: Timestamp,
    pub reason: Option<Reason>,
}

/// One line of `edgectl generations`. Without the manifest: many of them would not fit into a frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GenerationInfo {
    #[serde(flatten)]
    pub status: GenerationStatus,
    pub role: Option<GenerationRole>,
    pub workloads: u64,
    /// It failed here and is not tried again until an operator says so.
    pub refused: bool,
    /// Its manifest is stored as it was signed: a rollback can go there.
    pub stored: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum GenerationRole {
    Active,
    /// Where a failed update goes back to; the active one may be it too, and is called active then.
    LastGood,
    Candidate,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FleetStatus {
    pub url: Option<String>,
    pub last_contact: Option<Timestamp>,
    pub waiting_reports: u64,
    /// Dropped from a full outbox, of which no report that arrived has told.
    #[serde(default)]
    pub dropped_untold: u64,
    pub problem: Option<Reason>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadStatus {
    pub name: WorkloadName,
    pub image: String,
    pub phase: Phase,
    pub health: Health,
    pub pid: Option<i32>,
    pub up_secs: Option<u64>,
    pub restarts: u32,
    pub oom_kills: u32,
    pub last_exit: Option<ExitCause>,
    pub memory: Option<Bytes>,
    pub memory_max: Option<Bytes>,
    pub cpu_milli: Option<u64>,
    pub cpu_max_milli: Option<u64>,
    pub address: Option<String>,
    /// Lines of its log that came faster than the disk takes them, since this agent runs.
    #[serde(default)]
    pub log_lines_dropped: u64,
    /// What it waits for, or why it ended; the words of the planner.
    pub why: Option<Reason>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Inspect {
    pub status: WorkloadStatus,
    pub spec: crate::spec::Spec,
    pub history: RestartHistory,
    pub image_digest: Option<Digest>,
    pub cgroup: Option<String>,
    /// The limits as the kernel has them: file name to content.
    pub limits: BTreeMap<String, String>,
    /// How long its probe took, of the last times it passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<Took>,
    /// How often its limit of processor time made it wait; nothing while it has no group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttled: Option<Throttled>,
}

/// What `cpu.max` did to a workload since its group was made (admin-guide/cgroup-v2.rst, `cpu.stat`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Throttled {
    /// Periods of 100 ms in which it ran.
    pub periods: u64,
    /// Those in which it had used up its share and waited for the next.
    pub throttled_periods: u64,
    /// How long it waited, added up over the processors: may be more than the time that passed.
    pub throttled_ms: u64,
}

/// How long something took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Took {
    /// All there were; the last 256 of them count for the rest.
    pub times: u64,
    pub median_us: u64,
    /// Ninety-nine of a hundred took no longer.
    pub p99_us: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Stream {
    Stdout,
    Stderr,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogLine {
    pub at_unix_ms: i64,
    pub stream: Stream,
    pub text: String,
}

/// One durable line of the device's story.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    pub number: u64,
    pub at: Timestamp,
    pub boot_id: String,
    pub workload: Option<WorkloadName>,
    pub generation: Option<Sequence>,
    pub why: Reason,
    /// Who asked: `planner`, `operator uid=0`, `fleet`, `kernel`.
    pub by: String,
}
