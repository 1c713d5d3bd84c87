//! The device's report to the fleet: CBOR under `COSE_Sign1` with the device's own key. At most 2 KiB for 20 workloads,
//! so absent values are left out. A fleet endpoint older than the agent skips the fields it does not know.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::generation::GenerationState;
use crate::id::{DeviceId, Digest, Sequence, WorkloadName};
use crate::quantity::{Bytes, Timestamp};
use crate::reason::Reason;
use crate::workload::{ExitCause, Health, Phase};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub device: DeviceId,
    /// `/proc/sys/kernel/random/boot_id`: changes with each boot.
    pub boot_id: String,
    /// Rises by one with each report of this device; the fleet refuses a replayed one.
    pub number: u64,
    pub at: Timestamp,
    pub agent_version: String,
    pub arch: String,
    pub uptime_secs: u64,
    /// `ntp` (somebody outside confirmed it), `system` (nobody did) or `floor` (the clock is known to be wrong).
    pub clock_source: String,
    /// Absent on a host, where edged is not what boots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_cause: Option<BootCause>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<GenerationReport>,
    /// A newer one that is on its way, and what it waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coming: Option<GenerationReport>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub workloads: BTreeMap<WorkloadName, WorkloadReport>,
    /// Images on their way, at most [`PULLS_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pulls: Vec<PullReport>,
    /// Further images on their way.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pulls_left_out: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskReport>,
    /// `some avg10` of memory, cpu and io pressure in hundredths of a percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pressure: Option<Pressure>,
    /// What was refused last, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refusal>,
    /// A newer edged that is on trial, or was not taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<Reason>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<TrustReport>,
    /// Reports dropped from a full outbox, counted over the device's whole life: a difference between two is a gap.
    #[serde(default)]
    pub dropped: u64,
}

/// Why the machine was started this time, as far as the boot before left traces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum BootCause {
    /// There was none before.
    First,
    /// It had been switched off or rebooted in order.
    Requested,
    /// Nobody petted the watchdog: the machine hung.
    Watchdog,
    /// The kernel panicked, and said so where it is kept over a reset.
    Panic,
    /// No farewell and no other trace: the power went, or somebody pressed reset.
    PowerLoss,
}

impl std::fmt::Display for BootCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::First => "this is its first boot",
            Self::Requested => "it had been switched off in order",
            Self::Watchdog => "its watchdog reset it: it had hung",
            Self::Panic => "its kernel had panicked",
            Self::PowerLoss => "its power had gone, or it was reset",
        })
    }
}

/// What the device believes, and until when.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrustReport {
    /// Version of the trust root in force; 0: there is none.
    pub root: u64,
    pub root_expires: Timestamp,
    /// Of the active manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest_expires: Option<Timestamp>,
    /// What of it has expired, will soon, or cannot be used.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub concerns: Vec<Reason>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GenerationReport {
    pub sequence: Sequence,
    pub digest: Digest,
    pub state: GenerationState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadReport {
    pub phase: Phase,
    #[serde(default, skip_serializing_if = "is_unchecked")]
    pub health: Health,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub restarts: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub oom_kills: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<ExitCause>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<Reason>,
    /// `memory.current` in whole kibibytes, and `memory.max`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Usage<Bytes>>,
    /// Thousandths of a core over the time since the last report, and `cpu.max`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_milli: Option<Usage<u64>>,
}

/// Images on their way that a report names.
pub const PULLS_MAX: usize = 8;

/// An image that is on its way to a generation, or could not be had yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PullReport {
    pub image: String,
    /// The newest that needs it.
    pub generation: Sequence,
    /// When this agent first tried.
    pub since: Timestamp,
    /// Of the layers as they travel. While it waits for its next try, and before it is known what there is to fetch, absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done: Option<Bytes>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<Bytes>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failures: u32,
    /// Why the last try that ended came to nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<Reason>,
    /// The next try, where it waits for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Timestamp>,
}

/// In a sentence, with its image as short as people quote it.
impl std::fmt::Display for PullReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named = self.image.rsplit_once('@').and_then(|(name, digest)| Some((name, Digest::parse(digest).ok()?)));
        match named {
            Some((name, digest)) => write!(f, "{name}@{}", digest.short())?,
            None => f.write_str(&self.image)?,
        }
        match (self.done, self.total, self.retry_at) {
            (Some(done), Some(total), _) => write!(f, " {} of {}", done.human(), total.human())?,
            (_, _, Some(at)) => write!(f, " is tried again at {at}")?,
            _ => f.write_str(" is looked for")?,
        }
        write!(f, ", for generation {}, since {}", self.generation, self.since)?;
        match (&self.why, self.failures) {
            (Some(why), 1) => write!(f, "; failed once: {why}"),
            (Some(why), failures) => write!(f, "; failed {failures} times: {why}"),
            (None, _) => Ok(()),
        }
    }
}

/// What is used and where the wall is: on the wire `[used, max]`, because twenty workloads have to fit into 2 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(Option<T>, Option<T>)", into = "(Option<T>, Option<T>)")]
#[serde(bound(serialize = "T: Serialize + Clone", deserialize = "T: Deserialize<'de>"))]
pub struct Usage<T> {
    pub used: Option<T>,
    pub max: Option<T>,
}

impl<T> Usage<T> {
    /// `None` when nothing is known of either.
    pub fn known(used: Option<T>, max: Option<T>) -> Option<Self> {
        if used.is_none() && max.is_none() { None } else { Some(Self { used, max }) }
    }
}

impl<T> From<(Option<T>, Option<T>)> for Usage<T> {
    fn from((used, max): (Option<T>, Option<T>)) -> Self {
        Self { used, max }
    }
}

impl<T> From<Usage<T>> for (Option<T>, Option<T>) {
    fn from(usage: Usage<T>) -> Self {
        (usage.used, usage.max)
    }
}

fn is_unchecked(health: &Health) -> bool {
    *health == Health::Unchecked
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskReport {
    pub total: Bytes,
    pub free: Bytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pressure {
    pub memory: u32,
    pub cpu: u32,
    pub io: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    pub at: Timestamp,
    /// The digest of the document that was refused, or the image's name.
    pub what: String,
    pub why: Reason,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reason::Code;

    #[test]
    fn a_pull_in_a_sentence() {
        let digest = Digest::of(b"x");
        let begun = PullReport {
            image: format!("r.example/app@{digest}"),
            generation: Sequence(4),
            since: Timestamp(1_700_000_000),
            done: None,
            total: None,
            failures: 0,
            why: None,
            retry_at: None,
        };
        let end = ", for generation 4, since 2023-11-14T22:13:20Z";
        assert_eq!(begun.to_string(), format!("r.example/app@2d711642b726 is looked for{end}"));
        let half = PullReport { done: Some(Bytes::mebi(1)), total: Some(Bytes::mebi(2)), ..begun.clone() };
        assert_eq!(half.to_string(), format!("r.example/app@2d711642b726 1Mi of 2Mi{end}"));
        let why = Some(Reason::new(Code::RegistryUnavailable, "r.example answers 503"));
        let image = "r.example/app:1".to_owned();
        let failed = PullReport { image, failures: 2, why, retry_at: Some(Timestamp(1_700_000_060)), ..begun };
        assert_eq!(
            failed.to_string(),
            format!(
                "r.example/app:1 is tried again at 2023-11-14T22:14:20Z{end}; failed 2 times: r.example answers 503"
            )
        );
    }
}
