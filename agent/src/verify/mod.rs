//! Stage: bytes become a believed manifest, or a reason. Nothing of a document is acted on before it is verified.
//!
//! The order of the checks: size and strict CBOR, COSE, kind, signatures against the trust root's threshold, content,
//! device or group, sequence, expiry, and last what must hold beyond the shape.

/// Image signatures as cosign writes them.
pub mod cosign;
/// Trust roots: the first one, and from one to the next.
pub mod trust;

use edged_model::cbor;
use edged_model::envelope::{self, Kind};
use edged_model::id::{DeviceId, Digest, GroupName, Sequence};
use edged_model::manifest::Manifest;
use edged_model::quantity::Timestamp;
use edged_model::reason::{Code, Reason};
use edged_model::trust::{KeyId, RoleName, TrustRoot};
use edged_model::validate;

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
}

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
    Known { digest: Digest },
}

/// Checks a pushed or fetched envelope.
pub fn manifest(bytes: &[u8], root: &TrustRoot, facts: &DeviceFacts) -> Result<Verdict, Reason> {
    let opened = envelope::open(bytes, Kind::Manifest).map_err(|error| error.reason("manifest"))?;
    let digest = opened.digest;
    let keys = trust::role_keys(root, RoleName::Manifest);
    let signed = opened.signed_by(&keys).map_err(|error| error.reason("manifest"))?;
    if signed.signers.is_empty() {
        let by = opened.claimed_signers().iter().map(Digest::short).collect::<Vec<_>>().join(", ");
        return Err(Reason::new(Code::UnknownSigner, format!("manifest {}: no signature by a manifest key of the trust root (claims to be by {by})", digest.short()))
            .next("sign it with a key of the trust root's `manifest` role"));
    }
    let threshold = root.roles.get(&RoleName::Manifest).map_or(1, |role| role.threshold);
    if signed.signers.len() < threshold as usize {
        let text = format!("manifest {}: signed by {} of the {threshold} keys that are needed", digest.short(), signed.signers.len());
        return Err(Reason::new(Code::ThresholdNotMet, text));
    }
    let manifest: Manifest = cbor::decode(&signed.payload).map_err(|error| error.reason("manifest"))?;
    if facts.newest_digest == Some(digest) {
        return Ok(Verdict::Known { digest });
    }
    for_this_device(&manifest, facts)?;
    let sequence = manifest.sequence;
    if sequence <= facts.highest_sequence {
        let text = format!("manifest sequence {sequence} is not above {}, the highest seen", facts.highest_sequence);
        return Err(Reason::new(Code::SequenceSeen, text).next("sign it again with a higher sequence"));
    }
    if manifest.expires <= facts.now {
        let text = format!("manifest {sequence} expired at {}; it is {}", manifest.expires, facts.now);
        return Err(Reason::new(Code::Expired, text).next("sign it again with a later `expires`"));
    }
    if let Some(reason) = validate::reason(&validate::problems(&manifest)) {
        return Err(reason);
    }
    Ok(Verdict::Accepted(Box::new(VerifiedManifest { manifest, digest, signers: signed.signers })))
}

fn for_this_device(manifest: &Manifest, facts: &DeviceFacts) -> Result<(), Reason> {
    let (whom, is_ours) = match (&manifest.device, &manifest.group) {
        (Some(device), _) => (format!("device {device}"), *device == facts.id),
        (None, Some(group)) => (format!("group {group}"), facts.groups.contains(group)),
        (None, None) => ("nobody".to_owned(), false),
    };
    if is_ours {
        return Ok(());
    }
    Err(Reason::new(Code::WrongDevice, format!("manifest {} is for {whom}; this is device {}", manifest.sequence, facts.id)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::keys::SecretKey;
    use edged_model::trust::Role;

    fn key(n: u8) -> SecretKey {
        SecretKey::from_seed(&[n; 32])
    }

    fn root() -> TrustRoot {
        let public = key(1).public();
        let id = public.id().unwrap();
        TrustRoot {
            version: 1,
            expires: Timestamp(1_000_000),
            keys: [(id, hex::encode(public.to_spki().unwrap()))].into(),
            roles: RoleName::ALL.map(|name| (name, Role { keys: vec![id], threshold: 1 })).into(),
        }
    }

    fn facts() -> DeviceFacts {
        DeviceFacts {
            id: DeviceId::parse("pump-1").unwrap(),
            groups: vec![GroupName::parse("pumps").unwrap()],
            highest_sequence: Sequence(4),
            newest_digest: None,
            now: Timestamp(1_000),
        }
    }

    fn good() -> Manifest {
        Manifest {
            device: Some(DeviceId::parse("pump-1").unwrap()),
            sequence: Sequence(5),
            issued: Timestamp(500),
            expires: Timestamp(2_000),
            ..Manifest::empty()
        }
    }

    fn signed(manifest: &Manifest, by: u8) -> Vec<u8> {
        envelope::sign(Kind::Manifest, cbor::encode(manifest).unwrap(), &[key(by)]).unwrap()
    }

    fn code_of(bytes: &[u8]) -> Code {
        manifest(bytes, &root(), &facts()).unwrap_err().code
    }

    #[test]
    fn a_good_manifest_is_believed_and_known_afterwards() {
        let bytes = signed(&good(), 1);
        let Ok(Verdict::Accepted(verified)) = manifest(&bytes, &root(), &facts()) else { panic!() };
        assert_eq!(verified.manifest, good());
        let again = DeviceFacts { newest_digest: Some(verified.digest), highest_sequence: Sequence(5), ..facts() };
        assert_eq!(manifest(&bytes, &root(), &again), Ok(Verdict::Known { digest: verified.digest }));
    }

    #[test]
    fn each_refusal_has_its_own_code() {
        assert_eq!(code_of(b"{\"json\": true}"), Code::NotCbor);
        assert_eq!(code_of(&cbor::encode(&good()).unwrap()), Code::NotSigned);
        assert_eq!(code_of(&signed(&good(), 2)), Code::UnknownSigner);
        assert_eq!(code_of(&vec![0x81; 10_000]), Code::TooDeep);
        assert_eq!(code_of(&[0x5b, 0x10, 0, 0, 0, 0, 0, 0, 0]), Code::NotCbor);
        let with = |change: fn(&mut Manifest)| {
            let mut manifest = good();
            change(&mut manifest);
            code_of(&signed(&manifest, 1))
        };
        assert_eq!(with(|m| m.sequence = Sequence(4)), Code::SequenceSeen);
        assert_eq!(with(|m| m.expires = Timestamp(999)), Code::Expired);
        assert_eq!(with(|m| m.device = Some(DeviceId::parse("pump-2").unwrap())), Code::WrongDevice);
        assert_eq!(with(|m| m.api_version = "edge/v2".to_owned()), Code::InvalidManifest);
        let unlimited = |m: &mut Manifest| {
            let name = edged_model::id::WorkloadName::parse("web").unwrap();
            m.workloads.insert(name, edged_model::manifest::Workload::of_image("r.example/i:1"));
        };
        assert_eq!(with(unlimited), Code::MissingLimit);
    }

    #[test]
    fn a_group_manifest_is_for_its_members() {
        let group = |name: &str| Manifest { device: None, group: Some(GroupName::parse(name).unwrap()), ..good() };
        assert!(manifest(&signed(&group("pumps"), 1), &root(), &facts()).is_ok());
        assert_eq!(code_of(&signed(&group("kiosks"), 1)), Code::WrongDevice);
    }

    #[test]
    fn an_unknown_field_is_named_with_the_nearest_known_one() {
        let mut value = serde_cbor::value::to_value(good()).unwrap();
        let serde_cbor::Value::Map(map) = &mut value else { panic!() };
        map.insert(serde_cbor::Value::Text("sequense".to_owned()), serde_cbor::Value::Integer(1));
        let bytes = envelope::sign(Kind::Manifest, serde_cbor::to_vec(&value).unwrap(), &[key(1)]).unwrap();
        let reason = manifest(&bytes, &root(), &facts()).unwrap_err();
        assert_eq!(reason.code, Code::UnknownField);
        assert!(reason.text.contains("`sequense`; did you mean `sequence`?"), "{reason}");
    }

    #[test]
    fn cut_anywhere_it_is_refused() {
        let bytes = signed(&good(), 1);
        for end in 0..bytes.len() {
            assert!(manifest(&bytes[..end], &root(), &facts()).is_err(), "{end}");
        }
    }
}
