//! Stage: bytes become a believed manifest, or a reason. Nothing of a document is acted on before it is verified.
//!
//! The order of the checks: size and strict CBOR, COSE, kind, signatures against the trust root's threshold, the root's
//! own expiry, content, device or group, sequence, expiry, the date of issue, and last what must hold beyond the shape.

/// Image signatures as cosign writes them.
pub mod cosign;
/// What runs out.
pub mod expiry;
/// Which signatures an image must have.
pub mod image_policy;
/// Trust roots: the first one, and from one to the next.
pub mod trust;

use edged_model::cbor;
use edged_model::envelope::{self, Kind, Signed, Unverified};
use edged_model::id::{DeviceId, Digest, GroupName, Sequence};
use edged_model::manifest::Manifest;
use edged_model::quantity::Timestamp;
use edged_model::reason::{Code, Reason};
use edged_model::trust::{KeyId, RoleName, TrustRoot};
use edged_model::validate::{self, MOST_SEQUENCE};

/// What of the device the checks depend on.
#[derive(Debug, Clone)]
pub struct DeviceFacts {
    pub id: DeviceId,
    pub groups: Vec<GroupName>,
    /// Highest sequence ever accepted.
    pub highest_sequence: Sequence,
    /// The manifest that has it: the same bytes again are no replay.
    pub newest_digest: Option<Digest>,
    /// max(clock, time floor).
    pub now: Timestamp,
    /// Somebody outside has confirmed that time since the agent began. Else the device may wake up in 1970, or after years
    /// on a shelf, and what it takes for the future may be yesterday.
    pub knows_time: bool,
}

/// A signer's clock may be this much ahead of a device's that knows the time.
const AHEAD_MAX_SECS: i64 = 86_400;
/// A sequence may leave out this many. One that nothing could follow would hold the device for good, and the highest seen is
/// never lowered: so whoever stole a manifest key needs thousands of manifests for that, not one. Wide enough for a device
/// that lay on a shelf for years, where sequences are dates down to the second (a hundred years) or milliseconds (34).
const LEAP_MAX: u64 = 1 << 40;
/// A device that had none before begins wherever its fleet is, as long as there is as much room behind it.
const FIRST_MAX: u64 = MOST_SEQUENCE / 2;

/// A manifest that was believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedManifest {
    pub manifest: Manifest,
    pub digest: Digest,
    pub signers: Vec<KeyId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Accepted(Box<VerifiedManifest>),
    /// The very manifest the device already has.
    Known {
        digest: Digest,
    },
}

/// Checks a pushed or fetched envelope.
pub fn manifest(bytes: &[u8], root: &TrustRoot, facts: &DeviceFacts) -> Result<Verdict, Reason> {
    let opened = envelope::open(bytes, Kind::Manifest).map_err(|error| error.reason("manifest"))?;
    let digest = opened.digest;
    let signed = by_manifest_keys(&opened, root)?;
    // What is signed under a root is believed as long as the root is in force. What runs already goes on running.
    if root.expires <= facts.now {
        let text = format!("trust root version {} expired at {}; it is {}", root.version, root.expires, facts.now);
        return Err(Reason::new(Code::Expired, text).next("bring a newer trust root (`edgectl trust rotate`)"));
    }
    let manifest: Manifest =
        cbor::decode(&signed.payload).map_err(|error| error.reason(&format!("manifest {}", digest.short())))?;
    if facts.newest_digest == Some(digest) {
        return Ok(Verdict::Known { digest });
    }
    for_this_device(&manifest, facts)?;
    above_highest(&manifest, facts)?;
    within_a_leap(&manifest, facts)?;
    not_expired(&manifest, facts)?;
    issued_by_now(&manifest, root, facts)?;
    if let Some(reason) = validate::reason(&validate::problems(&manifest)) {
        return Err(reason);
    }
    Ok(Verdict::Accepted(Box::new(VerifiedManifest { manifest, digest, signers: signed.signers })))
}

/// The content, if a threshold of the manifest role's keys signed it.
fn by_manifest_keys(opened: &Unverified, root: &TrustRoot) -> Result<Signed, Reason> {
    let name = opened.digest.short();
    let keys = trust::role_keys(root, RoleName::Manifest);
    let signed = opened.signed_by(&keys).map_err(|error| error.reason("manifest"))?;
    if signed.signers.is_empty() {
        let claimed = opened.claimed_signers();
        // Named, but false: the content or the signature was changed. Else the signer is a stranger.
        let known = keys.iter().filter_map(|key| key.id().ok()).find(|id| claimed.contains(id));
        return Err(match known {
            Some(id) => {
                let text = format!("manifest {name}: the signature of key {} does not fit its content", id.short());
                Reason::new(Code::BadSignature, text).next("it was changed after it was signed: sign it again")
            }
            None => {
                let by = claimed.iter().map(Digest::short).collect::<Vec<_>>().join(", ");
                let text = format!(
                    "manifest {name}: signed by {by}, which is no manifest key of trust root version {}",
                    root.version
                );
                Reason::new(Code::UnknownSigner, text).next("sign it with a key of the trust root's `manifest` role")
            }
        });
    }
    let threshold = root.roles.get(&RoleName::Manifest).map_or(1, |role| role.threshold);
    if signed.signers.len() < threshold as usize {
        let text =
            format!("manifest {name}: signed by {} of the {threshold} keys that are needed", signed.signers.len());
        return Err(Reason::new(Code::ThresholdNotMet, text).next("sign it with more keys (`--key` once for each)"));
    }
    Ok(signed)
}

fn for_this_device(manifest: &Manifest, facts: &DeviceFacts) -> Result<(), Reason> {
    let (whom, is_ours) = match (&manifest.device, &manifest.group) {
        (Some(device), None) => (format!("device {device}"), *device == facts.id),
        (None, Some(group)) => (format!("group {group}"), facts.groups.contains(group)),
        // Not one or the other: what it says is told by the later check, for the device it names.
        (Some(device), Some(group)) => {
            (format!("device {device} and group {group}"), *device == facts.id || facts.groups.contains(group))
        }
        (None, None) => return Ok(()),
    };
    if is_ours {
        return Ok(());
    }
    let groups = match facts.groups.as_slice() {
        [] => "no group".to_owned(),
        groups => format!("group {}", groups.iter().map(GroupName::as_str).collect::<Vec<_>>().join(", ")),
    };
    let text = format!("manifest {} is for {whom}; this is device {} in {groups}", manifest.sequence, facts.id);
    Err(Reason::new(Code::WrongDevice, text).next("push it to the device that it names"))
}

fn above_highest(manifest: &Manifest, facts: &DeviceFacts) -> Result<(), Reason> {
    let (sequence, highest) = (manifest.sequence, facts.highest_sequence);
    if sequence > highest {
        return Ok(());
    }
    let text = format!("manifest sequence {sequence} is not above {highest}, the highest seen");
    Err(Reason::new(Code::SequenceSeen, text)
        .next(format!("sign it again with a higher sequence (`--sequence {}`)", highest.0.saturating_add(1))))
}

fn within_a_leap(manifest: &Manifest, facts: &DeviceFacts) -> Result<(), Reason> {
    let (sequence, highest) = (manifest.sequence, facts.highest_sequence);
    let most = if highest == Sequence(0) { FIRST_MAX } else { highest.0.saturating_add(LEAP_MAX) };
    // What is beyond all bounds is told by the later check, as the workstation tells it.
    if sequence.0 <= most || sequence.0 > MOST_SEQUENCE {
        return Ok(());
    }
    let text = format!("manifest sequence {sequence} is too far above {highest}, the highest seen: {most} is the most");
    Err(Reason::new(Code::SequenceLeaps, text).next("sign it with a sequence that is near the highest seen"))
}

fn not_expired(manifest: &Manifest, facts: &DeviceFacts) -> Result<(), Reason> {
    if manifest.expires > facts.now {
        return Ok(());
    }
    let text = format!("manifest {} expired at {}; it is {}", manifest.sequence, manifest.expires, facts.now);
    Err(Reason::new(Code::Expired, text).next("sign it again with a later `expires`"))
}

/// The time floor follows `issued` and never falls, so no manifest may lift it beyond the end of the root that vouches for
/// it: a device that believed it is after that end could neither verify another manifest nor speak with anybody. Where the
/// device knows what time it is, it is not led a day away from that.
fn issued_by_now(manifest: &Manifest, root: &TrustRoot, facts: &DeviceFacts) -> Result<(), Reason> {
    let (sequence, issued) = (manifest.sequence, manifest.issued);
    let refuse = |text| {
        let next = "sign it with the date of today; if it has that, look at the device's clock and its time servers";
        Err(Reason::new(Code::NotYetIssued, text).next(next))
    };
    if issued >= root.expires {
        let (version, end) = (root.version, root.expires);
        return refuse(format!(
            "manifest {sequence} is issued at {issued}; trust root version {version} ends at {end}"
        ));
    }
    if facts.knows_time && issued.0 > facts.now.0.saturating_add(AHEAD_MAX_SECS) {
        return refuse(format!("manifest {sequence} is issued at {issued}; it is {} here", facts.now));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
