//! What takes the disk, and what becomes of it: answers to `edgectl df` and `edgectl prune`.

use serde::{Deserialize, Serialize};

use crate::api::GenerationRole;
use crate::id::{Digest, Sequence, WorkloadName};
use crate::quantity::{Bytes, Timestamp};
use crate::scrub::ScrubStatus;

/// What takes the disk, by what it is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskUse {
    pub total: Bytes,
    pub free: Bytes,
    /// What no pull may take.
    pub reserve: Bytes,
    /// What images may take while some of it is needed by no generation (`images.budget`); absent: what there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Bytes>,
    /// Of the layers, what the kernel checks whenever it is read (fs-verity); nothing where it checks none.
    #[serde(default)]
    pub protected: Option<Bytes>,
    #[serde(default)]
    pub scrub: ScrubStatus,
    /// Every file below the data directory is in one of them.
    pub parts: Vec<DiskPart>,
    /// What edged did not put there; the largest, as many as fit on a screen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unknown: Vec<UnknownFile>,
    /// What came with images, each with what keeps it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub items: Vec<DiskItem>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskPart {
    /// `layers`, `documents`, `workloads`, `volumes`, `logs`, `state`, …; last `other`: what edged does not know.
    pub what: String,
    pub count: u64,
    /// As the file system charges it, each file once however many names it has.
    pub size: Bytes,
    /// Of that, what `prune` would give back.
    pub reclaimable: Bytes,
}

/// A file or a whole directory, by its path below the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UnknownFile {
    pub path: String,
    pub size: Bytes,
}

/// What a collection took away, or would.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pruned {
    pub dry_run: bool,
    pub items: Vec<DiskItem>,
    pub size: Bytes,
    /// Of a dry run: what would stay.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stays: Vec<DiskItem>,
}

/// A thing on the disk that came with an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskItem {
    /// `layer`, `layer copy`, `document` or `partial layer`.
    pub kind: String,
    pub digest: Digest,
    /// Of a copy, the first of the ids that it was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<u32>,
    pub size: Bytes,
    /// The image that brought it, if it is still known; of several, one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// An agent before this was told says nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fate: Option<ItemFate>,
}

/// Whether a thing stays, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ItemFate {
    /// It stays for them.
    Needed {
        by: Vec<NeededBy>,
    },
    /// Bytes on their way to them; they go only when the room is needed.
    Awaited {
        by: Vec<NeededBy>,
    },
    /// Nobody needs it, and it stays for a while.
    Young {
        unused: Unused,
        until: Timestamp,
    },
    Goes {
        unused: Unused,
        cause: Cause,
    },
}

/// A generation that is still to come back to, and which of its workloads need a thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NeededBy {
    pub generation: Sequence,
    pub role: GenerationRole,
    pub workloads: Vec<WorkloadName>,
}

/// Since when nobody needs a thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Unused {
    pub since: Timestamp,
    /// The last that needed it; absent: none that is remembered, and it came to the disk then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Sequence>,
}

/// Why a thing goes that nobody needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Cause {
    /// It is made again without a network.
    MadeAgain,
    /// It was there for as long as `images.keep-unused` says.
    Old,
    /// All images together take more than `images.budget`.
    OverBudget,
    /// A pull needs the room.
    RoomIsShort,
    /// An operator says so.
    Asked,
}
