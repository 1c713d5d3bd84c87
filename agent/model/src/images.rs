//! What is on the disk of images and volumes: answers to `edgectl image`, `images` and `volumes`.

use serde::{Deserialize, Serialize};

use crate::id::{Digest, Sequence, VolumeName, WorkloadName};
use crate::quantity::Bytes;
use crate::reason::Reason;

/// An image that is on the disk, on its way, or could not be had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageInfo {
    /// As manifests spell it; one that was loaded has its digest as a name.
    pub names: Vec<String>,
    /// Of the image manifest, once it is on the disk.
    pub digest: Option<Digest>,
    pub state: ImageState,
    /// All its layers, on the disk.
    pub size: Bytes,
    /// Of that, what no other image has.
    pub own: Bytes,
    /// Lowest first.
    pub layers: Vec<LayerInfo>,
    /// Generations that need it and are still to come back to: it is not taken away.
    pub generations: Vec<Sequence>,
    pub workloads: Vec<WorkloadName>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ImageState {
    Ready,
    Pulling { done: Bytes, total: Bytes },
    Failed(Reason),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerInfo {
    /// Chain id: the name of its directory.
    pub chain: Digest,
    pub size: Bytes,
    /// Of that, what the kernel checks whenever it is read (fs-verity).
    #[serde(default)]
    pub protected: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeInfo {
    pub name: VolumeName,
    pub size: Bytes,
    pub generations: Vec<Sequence>,
    pub workloads: Vec<WorkloadName>,
}

/// An image that an operator brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadedImage {
    /// What a manifest may call it.
    pub names: Vec<String>,
    pub digest: Digest,
    pub layers: u64,
}

/// One layer held against the table that was written when it was unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckedLayer {
    pub chain: Digest,
    /// Of a copy, the first of the ids that it was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<u32>,
    /// Images that have it.
    pub images: Vec<String>,
    pub entries: u64,
    /// Of contents that were read.
    pub read: Bytes,
    /// Of files that the kernel checks whenever it reads them (fs-verity), by what was made when they were unpacked.
    #[serde(default)]
    pub protected: Bytes,
    /// What is not as it was unpacked; at most a few are named. Empty: all is.
    pub damage: Vec<String>,
    /// Not all contents were read: there was no time, or an older edged unpacked it and wrote no table.
    pub unread: bool,
}
