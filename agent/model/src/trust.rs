//! The trust root: who may sign what. Roles and thresholds as TUF has them; versions only rise.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::Digest;
use crate::quantity::Timestamp;

/// A key's name: the sha256 of its SPKI DER, as `openssl pkey -pubin -outform DER | sha256sum` prints it.
pub type KeyId = Digest;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RoleName {
    /// Signs trust roots.
    Root,
    /// Signs device manifests.
    Manifest,
    /// Signs images.
    Image,
}

impl RoleName {
    pub const ALL: [Self; 3] = [Self::Root, Self::Manifest, Self::Image];
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Role {
    pub keys: Vec<KeyId>,
    /// How many different keys of the role must have signed.
    pub threshold: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrustRoot {
    /// Rises by one with each root; a lower one than the highest seen is refused.
    pub version: u64,
    pub expires: Timestamp,
    /// Public keys as SPKI DER in hexadecimal, by key id.
    pub keys: BTreeMap<KeyId, String>,
    pub roles: BTreeMap<RoleName, Role>,
}

impl TrustRoot {
    /// That of a device that has none: nobody is believed, and nothing can follow from it.
    pub const fn none() -> Self {
        Self { version: 0, expires: Timestamp(0), keys: BTreeMap::new(), roles: BTreeMap::new() }
    }
}
