//! Trust roots: how the factory's is read and how a newer one is believed. A new root needs a threshold of the old
//! root's keys and of its own; its version only rises.

use edged_model::cbor;
use edged_model::envelope::{self, Kind};
use edged_model::keys::PublicKey;
use edged_model::quantity::Timestamp;
use edged_model::reason::{Code, Reason};
use edged_model::trust::{RoleName, TrustRoot};

/// The Ed25519 keys of a role. Keys of another kind (ECDSA image keys) are not among them.
pub fn role_keys(root: &TrustRoot, role: RoleName) -> Vec<PublicKey> {
    role_spki(root, role).iter().filter_map(|der| PublicKey::from_spki(der).ok()).collect()
}

/// All keys of a role as SPKI DER.
pub fn role_spki(root: &TrustRoot, role: RoleName) -> Vec<Vec<u8>> {
    let ids = root.roles.get(&role).map(|role| role.keys.as_slice()).unwrap_or_default();
    ids.iter().filter_map(|id| root.keys.get(id)).filter_map(|text| hex::decode(text).ok()).collect()
}

/// The root that came with the device. It must be whole and signed by its own root keys; it is where trust begins, so
/// its expiry is not judged (a device may lie on a shelf for years).
pub fn factory(bytes: &[u8]) -> Result<TrustRoot, Reason> {
    let opened = envelope::open(bytes, Kind::TrustRoot).map_err(|error| error.reason("trust root"))?;
    // Its own keys are inside: read first, believed only if they signed it.
    let unbelieved: TrustRoot = {
        let signed = opened.signed_by(&[]).map_err(|error| error.reason("trust root"))?;
        cbor::decode(&signed.payload).map_err(|error| error.reason("trust root"))?
    };
    sound(&unbelieved)?;
    met(&opened, &unbelieved, "its own")?;
    Ok(unbelieved)
}

/// A newer root, believed because the old one's keys say so.
pub fn rotate(old: &TrustRoot, bytes: &[u8], now: Timestamp) -> Result<TrustRoot, Reason> {
    let new = factory(bytes)?;
    if new.version <= old.version {
        let text = format!("trust root version {} is not above {}", new.version, old.version);
        return Err(Reason::new(Code::TrustRollback, text));
    }
    if new.expires <= now {
        let text = format!("trust root version {} expired at {}; it is {now}", new.version, new.expires);
        return Err(Reason::new(Code::Expired, text));
    }
    let opened = envelope::open(bytes, Kind::TrustRoot).map_err(|error| error.reason("trust root"))?;
    met(&opened, old, "the old root's")?;
    Ok(new)
}

/// Every role is there, its keys are, and its threshold can be met.
fn sound(root: &TrustRoot) -> Result<(), Reason> {
    for name in RoleName::ALL {
        let bad = |why: &str| Err(Reason::new(Code::Malformed, format!("trust root: role {name:?} {why}")));
        let Some(role) = root.roles.get(&name) else { return bad("is missing") };
        if role.keys.iter().any(|id| !root.keys.contains_key(id)) {
            return bad("names a key that is not there");
        }
        let distinct: std::collections::BTreeSet<_> = role.keys.iter().collect();
        if role.threshold == 0 || role.threshold as usize > distinct.len() {
            return bad("has a threshold that its keys cannot meet");
        }
    }
    for (id, text) in &root.keys {
        if hex::decode(text).map(|der| edged_model::id::Digest::of(&der)).as_ref() != Ok(id) {
            return Err(Reason::new(Code::Malformed, format!("trust root: key {} is not what its name says", id.short())));
        }
    }
    Ok(())
}

fn met(opened: &envelope::Unverified, by: &TrustRoot, whose: &str) -> Result<(), Reason> {
    let threshold = by.roles.get(&RoleName::Root).map_or(1, |role| role.threshold);
    let signed = opened.signed_by(&role_keys(by, RoleName::Root)).map_err(|error| error.reason("trust root"))?;
    if signed.signers.len() >= threshold as usize {
        return Ok(());
    }
    let text = format!("trust root: signed by {} of the {threshold} keys of {whose} root role", signed.signers.len());
    Err(Reason::new(Code::ThresholdNotMet, text))
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
}
