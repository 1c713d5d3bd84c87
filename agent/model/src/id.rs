//! Names and identifiers, parsed once at the edge and never a bare `String` afterwards.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Why a name or identifier was refused. Carries the text as it was given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("{what} is empty")]
    Empty { what: &'static str },
    #[error("{what} `{text}` is longer than {max} characters")]
    TooLong { what: &'static str, text: String, max: usize },
    #[error(
        "{what} `{text}` may only have a-z, 0-9 and `-`, and begins and ends with a letter or digit (RFC 1123 label)"
    )]
    NotALabel { what: &'static str, text: String },
    #[error("digest `{text}` is not `sha256:` and 64 lower-case hexadecimal digits")]
    NotADigest { text: String },
}

/// Checks the RFC 1123 label rules that Kubernetes and Compose users know: names become host names and folders.
fn label(what: &'static str, text: &str) -> Result<String, IdError> {
    const MAX: usize = 63;
    if text.is_empty() {
        return Err(IdError::Empty { what });
    }
    if text.len() > MAX {
        return Err(IdError::TooLong { what, text: text.chars().take(MAX).collect(), max: MAX });
    }
    let bytes = text.as_bytes();
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let edges = alnum(bytes[0]) && alnum(bytes[bytes.len() - 1]);
    if !edges || !bytes.iter().all(|b| alnum(*b) || *b == b'-') {
        return Err(IdError::NotALabel { what, text: text.to_owned() });
    }
    Ok(text.to_owned())
}

macro_rules! label_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schemars(with = "String")]
        pub struct $name(String);

        impl $name {
            /// Parses a label of at most 63 characters (RFC 1123).
            pub fn parse(text: &str) -> Result<Self, IdError> {
                label($what, text).map(Self)
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::parse(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::parse(&text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

label_type!(
    /// The device's own name, unique in its fleet.
    DeviceId, "device"
);
label_type!(
    /// A group of devices that one manifest may select.
    GroupName, "group"
);
label_type!(
    /// One workload of a manifest; also its cgroup, folder and host name.
    WorkloadName, "workload"
);
label_type!(
    /// A named volume.
    VolumeName, "volume"
);
label_type!(
    /// A named network.
    NetworkName, "network"
);
label_type!(
    /// A named secret.
    SecretName, "secret"
);

/// A sha256 content digest, written `sha256:<64 hex>` (OCI image-spec, descriptor.md).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    pub const PREFIX: &'static str = "sha256:";

    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    pub fn parse(text: &str) -> Result<Self, IdError> {
        let bad = || IdError::NotADigest { text: text.chars().take(80).collect() };
        let hex_text = text.strip_prefix(Self::PREFIX).ok_or_else(bad)?;
        if hex_text.len() != 64 || hex_text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(bad());
        }
        let mut bytes = [0_u8; 32];
        hex::decode_to_slice(hex_text, &mut bytes).map_err(|_| bad())?;
        Ok(Self(bytes))
    }

    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits alone: a file name.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The first twelve digits, as people quote them.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", Self::PREFIX, hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        Self::parse(text)
    }
}

impl TryFrom<String> for Digest {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        Self::parse(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

/// A manifest's place in the order of a device's manifests: strictly rising, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Sequence(pub u64);

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_rfc_1123() {
        for good in ["web", "a", "web-1", "0x", &"a".repeat(63)] {
            assert!(WorkloadName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "../x", "a/b", &"a".repeat(64), "ä"] {
            assert!(WorkloadName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn digests_round_trip_and_refuse_other_spellings() {
        let digest = Digest::of(b"x");
        assert_eq!(Digest::parse(&digest.to_string()), Ok(digest));
        for bad in ["sha256:", "sha512:00", &digest.to_string().to_uppercase(), &digest.hex()] {
            assert!(Digest::parse(bad).is_err(), "{bad}");
        }
    }
}
