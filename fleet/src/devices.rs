//! Documents that come in, checked as far as an endpoint without trust keys can: a manifest is an envelope with a
//! manifest in it, a report is signed by the key that its device enrolled with, a key is a key. Pure: bytes in, rows out.

use edged_model::cbor;
use edged_model::envelope::{self, EnvelopeError, Kind, Unverified};
use edged_model::fleet::{DeviceStatus, EnrollRequest, ReceivedReport};
use edged_model::id::{DeviceId, Digest, GroupName, Sequence};
use edged_model::keys::PublicKey;
use edged_model::quantity::Timestamp;
use edged_model::reason::{Code, Reason};
use edged_model::report::Report;
use edged_model::trust::{RoleName, TrustRoot};
use serde::Deserialize;

use crate::db::{DbError, DeviceRow, Enrollment, NewManifest, NewTrustRoot, ReportRow, Scope};

/// The part of a manifest that matters here. The rest is between its signer and the device.
#[derive(Debug, Deserialize)]
struct Selector {
    #[serde(default)]
    device: Option<DeviceId>,
    #[serde(default)]
    group: Option<GroupName>,
    sequence: Sequence,
}

/// A manifest as it will be stored, and what its devices will object to.
#[derive(Debug)]
pub struct CheckedManifest {
    pub manifest: NewManifest,
    pub warnings: Vec<String>,
}

/// Refuses what is no signed manifest at all. Who signed it is for the device to judge.
pub fn check_manifest(scope: &Scope, envelope: Vec<u8>, now: Timestamp) -> Result<CheckedManifest, Reason> {
    let opened = envelope::open(&envelope, Kind::Manifest).map_err(|error| error.reason("manifest"))?;
    let claimed = opened.claimed_signers().len();
    let digest = opened.digest;
    let content = opened.signed_by(std::iter::empty()).map_err(|error| error.reason("manifest"))?;
    let selector: Selector = cbor::decode(&content.payload).map_err(|error| error.reason("manifest"))?;
    let mut warnings = Vec::new();
    if claimed == 0 {
        warnings.push("no signature names its key: devices will refuse it".to_owned());
    }
    warnings.extend(selector_warning(scope, &selector));
    let manifest = NewManifest { sequence: selector.sequence, digest, envelope, now };
    Ok(CheckedManifest { manifest, warnings })
}

/// Refuses what is no trust root, or not the version it is stored as. Whom it names is for devices to judge; that its own
/// keys have signed it can be seen by anybody.
pub fn check_trust_root(
    version: u64,
    envelope: Vec<u8>,
    now: Timestamp,
) -> Result<(NewTrustRoot, Vec<String>), Reason> {
    let opened = envelope::open(&envelope, Kind::TrustRoot).map_err(|error| error.reason("trust root"))?;
    let content = opened.signed_by(std::iter::empty()).map_err(|error| error.reason("trust root"))?;
    let root: TrustRoot = cbor::decode(&content.payload).map_err(|error| error.reason("trust root"))?;
    if root.version != version || version == 0 || version > i64::MAX.unsigned_abs() {
        let text = format!("trust root: it is version {}, and was sent as version {version}", root.version);
        return Err(Reason::new(Code::Malformed, text).next("send it with `edgectl push`"));
    }
    let mut warnings = Vec::new();
    let (signed, needed) = own_signatures(&opened, &root);
    if signed < needed {
        warnings.push(format!("signed by {signed} of the {needed} root keys that it asks for: devices will refuse it"));
    }
    if root.expires <= now {
        warnings.push(format!("it expired at {}: it only leads to a newer one", root.expires));
    }
    Ok((NewTrustRoot { version, digest: opened.digest, envelope, now }, warnings))
}

fn own_signatures(opened: &Unverified, root: &TrustRoot) -> (usize, usize) {
    let Some(role) = root.roles.get(&RoleName::Root) else { return (0, 1) };
    let spki = role.keys.iter().filter_map(|id| hex::decode(root.keys.get(id)?).ok());
    let keys: Vec<PublicKey> = spki.filter_map(|der| PublicKey::from_spki(&der).ok()).collect();
    (opened.signed_by(&keys).map_or(0, |signed| signed.signers.len()), role.threshold as usize)
}

fn selector_warning(scope: &Scope, selector: &Selector) -> Option<String> {
    let fits = match scope {
        Scope::Device(device) => selector.device.as_ref() == Some(device) || selector.group.is_some(),
        Scope::Group(group) => selector.group.as_ref() == Some(group),
    };
    if fits {
        return None;
    }
    let (kind, stored) = match scope {
        Scope::Device(device) => ("device", device.as_str()),
        Scope::Group(group) => ("group", group.as_str()),
    };
    let named = match (&selector.device, &selector.group) {
        (Some(device), _) => format!("device `{device}`"),
        (None, Some(group)) => format!("group `{group}`"),
        (None, None) => "nobody".to_owned(),
    };
    Some(format!("stored for {kind} `{stored}`, but it is for {named}: devices will refuse it"))
}

/// What devices will say to a sequence that does not rise.
pub fn sequence_warning(before: Option<Sequence>, now: Sequence) -> Option<String> {
    let before = before.filter(|before| now <= *before)?;
    Some(format!("sequence {now} is not above {before}, which was stored before: devices that saw {before} refuse it"))
}

/// Reads a report that `key_pem` signed and that speaks of `device`.
pub fn check_report(
    device: &DeviceId,
    key_pem: &str,
    envelope: Vec<u8>,
    now: Timestamp,
) -> Result<(Report, ReportRow), Reason> {
    let key = PublicKey::from_pem(key_pem)
        .map_err(|error| Reason::new(Code::Malformed, format!("the key of device `{device}`: {error}")))?;
    let payload = envelope::verify1(&envelope, Kind::Report, &key).map_err(|error| match error {
        EnvelopeError::Unsigned => {
            let text = format!("report: not signed by the key that device `{device}` enrolled with");
            Reason::new(Code::BadSignature, text)
        }
        error => error.reason("report"),
    })?;
    let report: Report = cbor::decode(&payload).map_err(|error| error.reason("report"))?;
    if report.device != *device {
        let text = format!("report: sent for device `{device}`, but it speaks of `{}`", report.device);
        return Err(Reason::new(Code::WrongDevice, text));
    }
    // From the document, not from the type: fields of a newer agent are kept.
    let json: serde_json::Value = cbor::decode(&payload).map_err(|error| error.reason("report"))?;
    let row = ReportRow { number: report.number, received_at: now, envelope, json: json.to_string() };
    Ok((report, row))
}

/// Parses the device's key; the token is hashed, so that it is nowhere kept.
pub fn check_enrollment(request: EnrollRequest) -> Result<Enrollment, Reason> {
    let bad = |error: edged_model::keys::KeyError| {
        Reason::new(Code::Malformed, format!("publicKey of device `{}`: {error}", request.device))
            .next("send an Ed25519 public key as SPKI PEM")
    };
    let key = PublicKey::from_pem(&request.public_key).map_err(bad)?;
    Ok(Enrollment {
        key_id: key.id().map_err(bad)?,
        public_key_pem: key.to_pem().map_err(bad)?,
        token_hash: Digest::of(request.token.trim().as_bytes()),
        device: request.device,
        groups: request.groups,
    })
}

/// A row as the operator sees it.
pub fn status(row: DeviceRow) -> Result<DeviceStatus, DbError> {
    Ok(DeviceStatus {
        report: row.last_report.as_ref().map(received).transpose()?,
        device: row.device,
        groups: row.groups,
        key_id: row.key_id,
        enrolled_at: row.enrolled_at,
        last_seen: row.last_seen,
        last_poll: row.last_poll,
        manifest: row.manifest,
    })
}

pub fn received(row: &ReportRow) -> Result<ReceivedReport, DbError> {
    let report = serde_json::from_str(&row.json)
        .map_err(|error| DbError::Damaged { what: "report", text: error.to_string() })?;
    Ok(ReceivedReport { received_at: row.received_at, size_bytes: row.envelope.len() as u64, report })
}
