//! A generation: one verified manifest and how far the device has come with it.
//!
//! ```text
//! Received ─> Verified ─> Staged ─> Activating ─> Probation ─> Good ─> Superseded
//!     │           │          │           │            │
//!     └───────────┴──────────┴─> Rejected └────────────┴─> RolledBack
//! ```

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::id::{Digest, Sequence, WorkloadName};
use crate::manifest::Manifest;
use crate::quantity::Timestamp;
use crate::reason::Reason;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum GenerationState {
    Received,
    /// Signature, device, sequence and expiry hold. Images are being fetched.
    Verified,
    /// Every image is on disk and verified, quotas and disk fit. Nothing running was touched.
    Staged,
    /// What changed is being stopped and started.
    Activating,
    /// All runs; being watched.
    Probation,
    /// The one a rollback would come back to.
    Good,
    /// A newer one is good.
    Superseded,
    Rejected,
    RolledBack,
}

/// What the store keeps of one generation. `digest` is that of the signed envelope as it came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Generation {
    pub sequence: Sequence,
    pub digest: Digest,
    pub manifest: Manifest,
    pub state: GenerationState,
    pub since: Timestamp,
    pub reason: Option<Reason>,
    /// Workloads that were not well when this generation took over, and that it has just as the last good one has them:
    /// what becomes of them is not its fault, and to go back would not help them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub ailing: BTreeSet<WorkloadName>,
    /// An operator said so: it waits for no window, lock or boot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub wanted_now: bool,
    /// The boot in which it came: what `apply: next-boot` waits to be over.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub received_boot: String,
}

impl Generation {
    /// One that has just come.
    pub fn received(manifest: Manifest, digest: Digest, since: Timestamp) -> Self {
        Self {
            sequence: manifest.sequence,
            digest,
            manifest,
            state: GenerationState::Received,
            since,
            reason: None,
            ailing: BTreeSet::new(),
            wanted_now: false,
            received_boot: String::new(),
        }
    }
}

/// Which generation is which. Moved in one store transaction that is flushed before the first container is touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pointers {
    /// What the device works towards now.
    pub active: Option<Sequence>,
    /// What it returns to.
    pub last_good: Option<Sequence>,
    /// What is being fetched, next in turn.
    pub candidate: Option<Sequence>,
    /// Never lowered (anti-rollback).
    pub highest_sequence: Sequence,
    /// Never lowered (anti-rollback).
    pub highest_trust_version: u64,
}

impl Pointers {
    /// The generations that are still to be come back to: whatever they need stays.
    pub fn needed(&self) -> impl Iterator<Item = Sequence> + use<> {
        [self.active, self.last_good, self.candidate].into_iter().flatten()
    }
}
