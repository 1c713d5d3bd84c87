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
    /// What images must have, by the beginning of their names. What none speaks of is the device's own policy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<ImageRule>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Require {
    Signature,
    /// A digest in the signed manifest is enough.
    Digest,
}

/// What images whose names begin so must have; the longest prefix counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ImageRule {
    /// `registry.example:5000/team`, whole parts; empty: every image. `oci:` is what lies in layouts.
    pub prefix: String,
    pub require: Require,
    /// Whose signatures count; none: those of the `image` role.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<KeyId>,
    /// How many of them; 1 with keys of its own, else the role's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<u32>,
    /// The name that was signed along with the digest (`cosign sign --sign-container-identity`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// What was signed along with it (`cosign sign -a key=value`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl ImageRule {
    /// For every image.
    pub const fn new(require: Require) -> Self {
        Self {
            prefix: String::new(),
            require,
            keys: Vec::new(),
            threshold: None,
            identity: None,
            annotations: BTreeMap::new(),
        }
    }
}

impl TrustRoot {
    /// That of a device that has none: nobody is believed, and nothing can follow from it.
    pub const fn none() -> Self {
        Self { version: 0, expires: Timestamp(0), keys: BTreeMap::new(), roles: BTreeMap::new(), images: Vec::new() }
    }
}
