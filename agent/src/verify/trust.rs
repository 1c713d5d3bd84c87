//! Trust roots: how the factory's is read and how a newer one is believed. A new root needs a threshold of the old
//! root's keys and of its own; its version only rises.

use std::collections::BTreeSet;

use edged_model::cbor;
use edged_model::envelope::{self, EnvelopeError, Kind, Unverified};
use edged_model::id::Digest;
use edged_model::keys::PublicKey;
use edged_model::quantity::Timestamp;
use edged_model::reason::{Code, Reason};
use edged_model::trust::{KeyId, RoleName, TrustRoot};

/// The Ed25519 keys of a role. Keys of another kind (ECDSA image keys) are not among them.
pub fn role_keys(root: &TrustRoot, role: RoleName) -> Vec<PublicKey> {
    role_spki(root, role).iter().filter_map(|der| PublicKey::from_spki(der).ok()).collect()
}

/// All keys of a role as SPKI DER.
pub fn role_spki(root: &TrustRoot, role: RoleName) -> Vec<Vec<u8>> {
    spki(root, root.roles.get(&role).map(|role| role.keys.as_slice()).unwrap_or_default())
}

/// Those of a root's keys as SPKI DER.
pub fn spki(root: &TrustRoot, ids: &[KeyId]) -> Vec<Vec<u8>> {
    ids.iter().filter_map(|id| root.keys.get(id)).filter_map(|text| hex::decode(text).ok()).collect()
}

/// The root that came with the device. It must be whole and signed by its own root keys; it is where trust begins, so
/// its expiry is not judged here (a device may lie on a shelf for years): an expired one can still be rotated from.
pub fn factory(bytes: &[u8]) -> Result<TrustRoot, Reason> {
    envelope::open(bytes, Kind::TrustRoot).map_err(|error| error.reason("trust root"))?;
    let (opened, unbelieved) = draft(bytes)?;
    sound(&unbelieved)?;
    met(&opened, &unbelieved, "its own")?;
    Ok(unbelieved)
}

/// What a trust root says, believed by nobody: it may still wait for its signers. Its own keys are inside: it is read
/// first, and believed only if they signed it.
pub fn draft(bytes: &[u8]) -> Result<(Unverified, TrustRoot), Reason> {
    let opened = envelope::open_draft(bytes, Kind::TrustRoot).map_err(|error| error.reason("trust root"))?;
    let signed = opened.signed_by(&[]).map_err(|error| error.reason("trust root"))?;
    let root = cbor::decode(&signed.payload).map_err(|error| error.reason("trust root"))?;
    Ok((opened, root))
}

/// Who of a root's `root` role has signed a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tally {
    /// Of the root whose keys were counted.
    pub version: u64,
    pub threshold: u32,
    pub signed: Vec<KeyId>,
    /// Those of the role that have not.
    pub missing: Vec<KeyId>,
}

pub fn tally(opened: &Unverified, by: &TrustRoot) -> Result<Tally, EnvelopeError> {
    let role = by.roles.get(&RoleName::Root);
    let signed = opened.signed_by(&role_keys(by, RoleName::Root))?.signers;
    let all = role.map(|role| role.keys.clone()).unwrap_or_default();
    let missing = all.into_iter().filter(|id| !signed.contains(id)).collect();
    Ok(Tally { version: by.version, threshold: role.map_or(1, |role| role.threshold), signed, missing })
}

/// A newer root, believed because the old one's keys say so. Versions may be left out, as long as the keys of the root
/// in force signed the new one.
pub fn rotate(old: &TrustRoot, bytes: &[u8], now: Timestamp) -> Result<TrustRoot, Reason> {
    let new = successor(old, bytes)?;
    in_force(&new, now)?;
    Ok(new)
}

/// How far a chain of roots led.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Followed {
    /// The newest root that may be in force, and its place in the chain.
    pub root: Option<TrustRoot>,
    pub at: usize,
    /// Why it led no further.
    pub refused: Option<Reason>,
}

/// Several roots in turn, for a device that missed some: each must follow from the one before, and only the last is in
/// force, so only its expiry counts. What comes before an error is not lost with it.
pub fn chain<'b>(old: &TrustRoot, envelopes: impl IntoIterator<Item = &'b [u8]>, now: Timestamp) -> Followed {
    let mut followed = Followed { root: None, at: 0, refused: None };
    let mut newest = old.clone();
    for (at, bytes) in envelopes.into_iter().enumerate() {
        match successor(&newest, bytes) {
            Ok(next) => newest = next,
            Err(why) => return Followed { refused: Some(why), ..followed },
        }
        match in_force(&newest, now) {
            Ok(()) => followed = Followed { root: Some(newest.clone()), at, refused: None },
            // It may lead to one that has not.
            Err(why) => followed.refused = Some(why),
        }
    }
    followed
}

/// A newer root that the old one's keys and its own have signed; its expiry is not looked at.
pub fn successor(old: &TrustRoot, bytes: &[u8]) -> Result<TrustRoot, Reason> {
    let new = factory(bytes)?;
    if new.version <= old.version {
        let text = format!("trust root version {} is not above {}, the one in force", new.version, old.version);
        return Err(Reason::new(Code::TrustRollback, text)
            .next("make the next one from the one in force (`edgectl trust rotate --from`)"));
    }
    let opened = envelope::open(bytes, Kind::TrustRoot).map_err(|error| error.reason("trust root"))?;
    met(&opened, old, &format!("version {}'s", old.version))?;
    Ok(new)
}

fn in_force(root: &TrustRoot, now: Timestamp) -> Result<(), Reason> {
    if root.expires > now {
        return Ok(());
    }
    let text = format!("trust root version {} expired at {}; it is {now}", root.version, root.expires);
    Err(Reason::new(Code::Expired, text).next("make a newer one (`edgectl trust rotate`)"))
}

/// Every role is there, its keys are, and its threshold can be met with keys of a kind that its signatures have.
pub fn sound(root: &TrustRoot) -> Result<(), Reason> {
    let malformed = |text: String| Err(Reason::new(Code::Malformed, text).next("make it again (`edgectl trust init`)"));
    if root.version == 0 {
        return malformed("trust root: versions begin with 1".to_owned());
    }
    for (id, text) in &root.keys {
        if hex::decode(text).map(|der| Digest::of(&der)).as_ref() != Ok(id) {
            return malformed(format!("trust root: key {} is not what its name says", id.short()));
        }
    }
    for name in RoleName::ALL {
        let bad = |why: &str| malformed(format!("trust root: role {name:?} {why}"));
        let Some(role) = root.roles.get(&name) else { return bad("is missing") };
        if role.keys.iter().any(|id| !root.keys.contains_key(id)) {
            return bad("names a key that is not there");
        }
        let distinct: BTreeSet<_> = role.keys.iter().collect();
        if role.threshold == 0 || role.threshold as usize > distinct.len() {
            return bad(&format!("asks for {} signatures and has {} keys", role.threshold, distinct.len()));
        }
        // Envelopes are signed with Ed25519 alone; images may be signed with ECDSA too.
        if name != RoleName::Image && role_keys(root, name).len() != role.keys.len() {
            return bad("has a key that is not Ed25519");
        }
    }
    super::image_policy::sound(root)
}

fn met(opened: &Unverified, by: &TrustRoot, whose: &str) -> Result<(), Reason> {
    let Tally { threshold, signed, missing, .. } = tally(opened, by).map_err(|error| error.reason("trust root"))?;
    // A root without roles is the one of a device that has none: nothing can follow from it.
    if threshold > 0 && signed.len() >= threshold as usize {
        return Ok(());
    }
    let text = format!("trust root: signed by {} of the {threshold} keys of {whose} root role", signed.len());
    let still = (threshold as usize).saturating_sub(signed.len());
    let names = missing.iter().map(Digest::short).collect::<Vec<_>>().join(", ");
    Err(Reason::new(Code::ThresholdNotMet, text)
        .next(format!("{still} of {names} must sign it too (`edgectl trust sign`)")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::keys::SecretKey;
    use edged_model::trust::Role;

    fn key(n: u8) -> SecretKey {
        SecretKey::from_seed(&[n; 32])
    }

    fn root(version: u64, keys: &[u8], threshold: u32) -> TrustRoot {
        let public: Vec<_> = keys.iter().map(|n| key(*n).public()).collect();
        let ids: Vec<_> = public.iter().map(|key| key.id().unwrap()).collect();
        TrustRoot {
            version,
            expires: Timestamp(1_000),
            keys: public.iter().map(|key| (key.id().unwrap(), hex::encode(key.to_spki().unwrap()))).collect(),
            roles: RoleName::ALL.map(|name| (name, Role { keys: ids.clone(), threshold })).into(),
            images: Vec::new(),
        }
    }

    fn signed(root: &TrustRoot, by: &[u8]) -> Vec<u8> {
        let keys: Vec<_> = by.iter().map(|n| key(*n)).collect();
        envelope::sign(Kind::TrustRoot, cbor::encode(root).unwrap(), &keys).unwrap()
    }

    #[test]
    fn a_root_stands_on_its_own_keys() {
        assert!(factory(&signed(&root(1, &[1, 2], 2), &[1, 2])).is_ok());
        assert_eq!(factory(&signed(&root(1, &[1, 2], 2), &[1])).unwrap_err().code, Code::ThresholdNotMet);
        assert_eq!(factory(&signed(&root(1, &[1], 2), &[1])).unwrap_err().code, Code::Malformed);
    }

    #[test]
    fn a_new_root_needs_the_old_keys_and_its_own() {
        let old = root(1, &[1], 1);
        let next = root(2, &[2], 1);
        let now = Timestamp(0);
        assert!(rotate(&old, &signed(&next, &[1, 2]), now).is_ok());
        assert_eq!(rotate(&old, &signed(&next, &[2]), now).unwrap_err().code, Code::ThresholdNotMet);
        assert_eq!(rotate(&old, &signed(&next, &[1]), now).unwrap_err().code, Code::ThresholdNotMet);
        assert_eq!(rotate(&next, &signed(&root(2, &[2], 1), &[2]), now).unwrap_err().code, Code::TrustRollback);
        assert_eq!(rotate(&old, &signed(&next, &[1, 2]), Timestamp(1_000)).unwrap_err().code, Code::Expired);
    }

    #[test]
    fn a_chain_is_followed_link_by_link() {
        let [one, two, three] = [root(1, &[1], 1), root(2, &[2], 1), root(3, &[3], 1)];
        let expired = TrustRoot { expires: Timestamp(1), ..two };
        let links = [signed(&expired, &[1, 2]), signed(&three, &[2, 3])];
        let links: Vec<&[u8]> = links.iter().map(Vec::as_slice).collect();
        let now = Timestamp(10);
        let refused = |links: &[&[u8]]| {
            let followed = chain(&one, links.iter().copied(), now);
            assert_eq!(followed.root, None);
            followed.refused.unwrap().code
        };
        let whole = chain(&one, links.iter().copied(), now);
        let all = Followed { root: Some(three.clone()), at: 1, refused: None };
        assert_eq!(whole, all, "only the last one's expiry counts");
        assert_eq!(refused(&links[1..]), Code::ThresholdNotMet);
        assert_eq!(refused(&[links[1], links[0]]), Code::ThresholdNotMet);
        assert_eq!(refused(&links[..1]), Code::Expired);
        // A link may be left out when the keys in force signed the later one.
        assert_eq!(rotate(&one, &signed(&three, &[1, 3]), now), Ok(three.clone()));
        // What is broken at the end does not keep what was good from the device.
        let broken = chain(&one, links.iter().copied().chain([b"rubbish".as_slice()]), now);
        assert_eq!((broken.root, broken.at), (Some(three), 1));
        assert!(broken.refused.is_some());
    }

    #[test]
    fn an_expired_root_can_still_be_followed() {
        let old = TrustRoot { expires: Timestamp(1), ..root(1, &[1], 1) };
        assert!(rotate(&old, &signed(&root(2, &[2], 1), &[1, 2]), Timestamp(10)).is_ok());
    }

    #[test]
    fn a_threshold_is_met_by_different_keys_only() {
        let old = root(1, &[1, 2], 2);
        let next = root(2, &[1, 2], 2);
        let now = Timestamp(0);
        assert_eq!(rotate(&old, &signed(&next, &[1, 1]), now).unwrap_err().code, Code::ThresholdNotMet);
        assert!(rotate(&old, &signed(&next, &[1, 2]), now).is_ok());
    }

    #[test]
    fn what_cannot_work_is_not_sound() {
        let code = |root: &TrustRoot| factory(&signed(root, &[1])).unwrap_err().code;
        assert_eq!(code(&root(0, &[1], 1)), Code::Malformed);
        assert_eq!(code(&root(1, &[1], 0)), Code::Malformed);
        let mut missing = root(1, &[1], 1);
        missing.roles.remove(&RoleName::Image);
        assert_eq!(code(&missing), Code::Malformed);
        let mut renamed = root(1, &[1], 1);
        renamed.keys.values_mut().for_each(|spki| *spki = "00".to_owned());
        assert_eq!(code(&renamed), Code::Malformed);
        // A key of another kind may sign images, and nothing else.
        let mut other = root(1, &[1], 1);
        let id = Digest::of(b"\x30\x00");
        other.keys.insert(id, "3000".to_owned());
        other.roles.insert(RoleName::Image, Role { keys: vec![id], threshold: 1 });
        assert!(factory(&signed(&other, &[1])).is_ok());
        other.roles.insert(RoleName::Manifest, Role { keys: vec![id], threshold: 1 });
        assert_eq!(code(&other), Code::Malformed);
    }

    #[test]
    fn a_device_without_a_root_takes_none_over_the_wire() {
        let none = TrustRoot::none();
        assert_eq!(
            rotate(&none, &signed(&root(1, &[1], 1), &[1]), Timestamp(0)).unwrap_err().code,
            Code::ThresholdNotMet
        );
    }

    proptest::proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..512)) {
            let _ = factory(&bytes);
            let _ = factory(&envelope::sign(Kind::TrustRoot, bytes, &[key(1)]).unwrap());
        }
    }
}
