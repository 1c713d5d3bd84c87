//! The scrub: all layers read slowly and held against what was unpacked, again and again. What it has done is kept on the
//! disk and shown to people in the same words.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::id::Digest;
use crate::quantity::{Bytes, Span, Timestamp};

/// One time through all layers; under way, or over.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ScrubPass {
    pub began: Timestamp,
    /// Absent while it is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Timestamp>,
    /// Looked at.
    pub layers: u64,
    /// From the disk.
    pub read: Bytes,
    /// Of that, what the kernel checked too (fs-verity).
    pub protected: Bytes,
    /// Layers that are not what was unpacked.
    pub damaged: u64,
    /// Layers that an edged without tables unpacked: they cannot be checked.
    pub unchecked: u64,
}

/// What is kept over restarts and boots.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ScrubRecord {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<ScrubPass>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub now: Option<ScrubUnderWay>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ScrubUnderWay {
    pub pass: ScrubPass,
    /// Layers that it has behind it.
    pub done: BTreeSet<Digest>,
    /// Where in a layer it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<ScrubPlace>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ScrubPlace {
    pub layer: Digest,
    /// Contents of it that were read.
    pub contents: u64,
}

/// Why nothing is read now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ScrubPause {
    /// The agent has just begun, and the device perhaps too.
    Beginning,
    /// An image is on its way.
    Pull,
    /// A generation is staged or switched to.
    Switch,
    /// A generation has to prove itself.
    Probation,
    /// Workloads are started or stopped.
    Start,
    /// Layers are checked or collected.
    Check,
    /// Others wait for the disk or for memory (PSI).
    Pressure,
}

impl std::fmt::Display for ScrubPause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Beginning => "the agent has just begun",
            Self::Pull => "an image is fetched",
            Self::Switch => "a generation is on its way",
            Self::Probation => "the generation is on probation",
            Self::Start => "a workload is started or stopped",
            Self::Check => "layers are checked or collected",
            Self::Pressure => "others wait for the disk or for memory",
        })
    }
}

/// For whoever asks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ScrubStatus {
    /// A pass is begun this often; absent: never (`images.scrub = "off"`).
    pub every: Option<Span>,
    /// The last one that ended.
    pub last: Option<ScrubPass>,
    /// The one under way.
    pub now: Option<ScrubPass>,
    /// Of how many layers.
    pub of_layers: u64,
    /// When the next one begins, if none is under way; past or absent: as soon as nothing stands in its way.
    pub next: Option<Timestamp>,
    /// Why the one under way stands still.
    pub paused: Option<ScrubPause>,
}
