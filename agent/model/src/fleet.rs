//! The JSON bodies of the fleet protocol and of the direct-push port: what is not a signed envelope. Shapes only;
//! `docs/fleet.md` has the addresses, headers and status codes.

use serde::{Deserialize, Serialize};

use crate::generation::GenerationState;
use crate::id::{DeviceId, Digest, GroupName, Sequence};
use crate::quantity::Timestamp;
use crate::reason::{Code, Reason};
use crate::report::Report;

/// The largest manifest or trust root that is taken over HTTP.
pub const MANIFEST_MAX_BYTES: usize = 1 << 20;
/// The largest report that is taken: thirty times what 20 workloads need.
pub const REPORT_MAX_BYTES: usize = 64 << 10;
/// The longest a manifest request may wait for a newer one, whatever `Prefer: wait=` asks (RFC 7240).
pub const WAIT_MAX_SECS: u64 = 300;
/// The newest trust root that a fleet has, by version: in the answers to polls.
pub const TRUST_HEADER: &str = "edged-trust-root";
/// Media type of a signed document (RFC 9052, section 2).
pub const COSE_MEDIA_TYPE: &str = "application/cose";

/// An error on the wire: `application/problem+json` (RFC 9457). `code` and `next` are those of a [`Reason`], where the
/// error is about a document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// Always `about:blank`: the status says what kind it is, `code` what exactly.
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    pub status: u16,
    pub detail: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// With `reportReplayed`: the number above which the fleet takes the next report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_number: Option<u64>,
}

impl Problem {
    pub fn new(status: u16, title: &str, detail: impl Into<String>) -> Self {
        Self {
            kind: "about:blank".to_owned(),
            title: title.to_owned(),
            status,
            detail: detail.into(),
            code: None,
            next: None,
            last_number: None,
        }
    }

    /// A refused document, in the words of its reason.
    pub fn refused(reason: &Reason) -> Self {
        let (status, title) = refusal_status(reason.code);
        let code = serde_cbor::value::to_value(reason.code).ok().and_then(|value| match value {
            serde_cbor::Value::Text(text) => Some(text),
            _ => None,
        });
        let next = (!reason.next.is_empty()).then(|| reason.next.clone());
        Self { code, next, ..Self::new(status, title, reason.text.clone()) }
    }
}

/// The HTTP status and title that a refusal answers with.
fn refusal_status(code: Code) -> (u16, &'static str) {
    match code {
        Code::NotCbor | Code::NotSigned | Code::TooDeep | Code::DuplicateKey | Code::Malformed | Code::UnknownField => {
            (400, "Bad Request")
        }
        Code::UnknownSigner | Code::BadSignature | Code::ThresholdNotMet | Code::WrongDevice => (403, "Forbidden"),
        Code::SequenceSeen | Code::SequenceLeaps | Code::TrustRollback => (409, "Conflict"),
        Code::TooLarge => (413, "Content Too Large"),
        Code::DiskFull | Code::DiskDoesNotFit => (507, "Insufficient Storage"),
        _ => (422, "Unprocessable Content"),
    }
}

/// `POST /v1/enroll`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EnrollRequest {
    pub device: DeviceId,
    /// The one-time token that an operator made.
    pub token: String,
    /// The device's public key: Ed25519, SPKI, PEM.
    pub public_key: String,
    /// The groups of the device's own configuration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupName>,
}

/// The answer to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Enrolled {
    pub device: DeviceId,
    /// sha256 of the key's SPKI DER.
    pub key_id: Digest,
    pub groups: Vec<GroupName>,
    pub since: Timestamp,
}

/// `POST /v1/tokens`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TokenRequest {
    /// Only this device may use it; absent: the first that comes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceId>,
    /// Replace the groups that the device names itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub groups: Option<Vec<GroupName>>,
    /// How long it is good for; default one day.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid_secs: Option<u64>,
}

/// The answer to it: the only time that the token is readable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Token {
    pub token: String,
    pub expires: Timestamp,
}

/// A manifest was taken: by the fleet endpoint (which only stores it; `state` is absent) or by the device itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Accepted {
    pub sequence: Sequence,
    pub digest: Digest,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<GenerationState>,
    /// What devices will object to, as far as the endpoint can see it without keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The fleet stored a trust root for its devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrustStored {
    pub version: u64,
    pub digest: Digest,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A device took a newer trust root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrustTaken {
    /// The version that is in force now.
    pub trust_root: u64,
}

/// A report was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReportAccepted {
    pub number: u64,
}

/// Which manifest a device gets from the fleet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ManifestSummary {
    /// `device` or `group:<name>`.
    pub scope: String,
    pub sequence: Sequence,
    pub digest: Digest,
    pub stored_at: Timestamp,
}

/// One device as the fleet knows it: an element of `GET /v1/devices`, the whole of `GET /v1/devices/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceStatus {
    pub device: DeviceId,
    pub groups: Vec<GroupName>,
    /// Absent: a manifest is stored for it, but it never enrolled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enrolled_at: Option<Timestamp>,
    /// Its enrolment or its last signed report: proved with its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<Timestamp>,
    /// When its manifest was last asked for. Anyone may ask, so this proves nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_poll: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<ManifestSummary>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<ReceivedReport>,
}

/// A report that was verified against the device's key when it came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReceivedReport {
    pub received_at: Timestamp,
    /// Length of the signed envelope.
    pub size_bytes: u64,
    #[serde(flatten)]
    pub report: Report,
}
