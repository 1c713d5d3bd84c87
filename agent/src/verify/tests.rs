use std::collections::BTreeMap;

use super::*;
use edged_model::keys::SecretKey;
use edged_model::manifest::Workload;
use edged_model::trust::Role;
use serde_cbor::Value;

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
        images: Vec::new(),
    }
}

fn facts() -> DeviceFacts {
    DeviceFacts {
        id: DeviceId::parse("pump-1").unwrap(),
        groups: vec![GroupName::parse("pumps").unwrap()],
        highest_sequence: Sequence(4),
        newest_digest: None,
        now: Timestamp(1_000),
        knows_time: true,
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
        m.workloads.insert(name, edged_model::manifest::Workload::of_image("r.example/i:1").into());
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
    assert!(reason.text.ends_with("sequense: unknown field; did you mean `sequence`?"), "{reason}");
}

#[test]
fn cut_anywhere_it_is_refused() {
    let bytes = signed(&good(), 1);
    for end in 0..bytes.len() {
        assert!(manifest(&bytes[..end], &root(), &facts()).is_err(), "{end}");
    }
}

/// A payload that no encoder of ours makes, signed by the right key.
fn signed_bytes(payload: Vec<u8>) -> Vec<u8> {
    envelope::sign(Kind::Manifest, payload, &[key(1)]).unwrap()
}

fn reason_of(bytes: &[u8]) -> Reason {
    manifest(bytes, &root(), &facts()).unwrap_err()
}

/// `good()` as a CBOR value, changed.
fn changed(change: impl FnOnce(&mut BTreeMap<Value, Value>)) -> Vec<u8> {
    let Value::Map(mut map) = serde_cbor::value::to_value(with_web()).unwrap() else { panic!() };
    change(&mut map);
    signed_bytes(serde_cbor::to_vec(&Value::Map(map)).unwrap())
}

fn with_web() -> Manifest {
    let mut web = Workload::of_image("registry.example:5000/web:1");
    web.resources.memory = Some("16Mi".parse().unwrap());
    web.resources.cpu = Some("100m".parse().unwrap());
    Manifest { workloads: [("web".parse().unwrap(), web.into())].into(), ..good() }
}

fn entry<'v>(map: &'v mut BTreeMap<Value, Value>, key: &str) -> &'v mut BTreeMap<Value, Value> {
    match map.get_mut(&Value::Text(key.to_owned())) {
        Some(Value::Map(map)) => map,
        other => panic!("{key}: {other:?}"),
    }
}

#[test]
fn a_misspelt_workload_field_is_named_with_its_place() {
    let bytes = changed(|map| {
        let resources = entry(entry(entry(map, "workloads"), "web"), "resources");
        resources.insert(Value::Text("memroy".to_owned()), Value::Text("16Mi".to_owned()));
    });
    let reason = reason_of(&bytes);
    assert_eq!(reason.code, Code::UnknownField);
    let wanted = "workloads.web.resources.memroy: unknown field; did you mean `memory`?";
    assert!(reason.text.ends_with(wanted), "{reason}");
}

#[test]
fn the_same_key_twice_is_refused_even_when_signed() {
    // {"apiVersion": "edge/v1", "apiVersion": "edge/v1"}
    let pair = [b"\x6aapiVersion".as_slice(), b"\x67edge/v1"].concat();
    let payload = [b"\xa2".as_slice(), &pair, &pair].concat();
    assert_eq!(reason_of(&signed_bytes(payload)).code, Code::DuplicateKey);
}

#[test]
fn hostile_payloads_are_refused_even_when_signed() {
    let nested = [vec![0x81; 10_000], vec![0x00]].concat();
    assert_eq!(reason_of(&signed_bytes(nested)).code, Code::TooDeep);
    let claims = vec![0x7b, 0x10, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(reason_of(&signed_bytes(claims)).code, Code::NotCbor);
    assert_eq!(reason_of(&vec![0x40; 2 << 20]).code, Code::TooLarge);
    let long = [cbor::encode(&good()).unwrap(), vec![0x00]].concat();
    assert_eq!(reason_of(&signed_bytes(long)).code, Code::Malformed);
    let as_array = changed(|map| {
        let update = map.get_mut(&Value::Text("update".to_owned())).unwrap();
        let texts = ["30s", "300s"].map(|text| Value::Text(text.to_owned()));
        *update = Value::Array(texts.into_iter().chain([Value::Integer(1)]).collect());
    });
    assert_eq!(reason_of(&as_array).code, Code::Malformed);
}

#[test]
fn a_document_of_another_kind_is_no_manifest() {
    let payload = cbor::encode(&good()).unwrap();
    let root = envelope::sign(Kind::TrustRoot, payload.clone(), &[key(1)]).unwrap();
    assert_eq!(code_of(&root), Code::Malformed);
    let report = envelope::sign1(Kind::Report, payload, &key(1)).unwrap();
    assert_eq!(code_of(&report), Code::NotSigned);
}

#[test]
fn a_changed_content_is_told_apart_from_a_stranger() {
    let mut bytes = signed(&good(), 1);
    let at = bytes.windows(6).position(|window| window == b"pump-1").unwrap();
    bytes[at + 5] = b'2';
    assert_eq!(code_of(&bytes), Code::BadSignature);
    let stranger = reason_of(&signed(&good(), 2));
    let id = key(2).public().id().unwrap().short();
    assert!(stranger.code == Code::UnknownSigner && stranger.text.contains(&id), "{stranger}");
}

#[test]
fn a_threshold_counts_different_keys() {
    let mut root = root();
    let second = key(2).public();
    root.keys.insert(second.id().unwrap(), hex::encode(second.to_spki().unwrap()));
    let role = root.roles.get_mut(&RoleName::Manifest).unwrap();
    *role = Role { keys: vec![role.keys[0], second.id().unwrap()], threshold: 2 };
    let payload = cbor::encode(&good()).unwrap();
    let signed_with = |keys: &[u8]| {
        let keys: Vec<_> = keys.iter().map(|n| key(*n)).collect();
        envelope::sign(Kind::Manifest, payload.clone(), &keys).unwrap()
    };
    assert_eq!(manifest(&signed_with(&[1, 1]), &root, &facts()).unwrap_err().code, Code::ThresholdNotMet);
    assert_eq!(manifest(&signed_with(&[1, 3]), &root, &facts()).unwrap_err().code, Code::ThresholdNotMet);
    let Ok(Verdict::Accepted(verified)) = manifest(&signed_with(&[2, 3, 1]), &root, &facts()) else { panic!() };
    assert_eq!(verified.signers.len(), 2);
}

#[test]
fn an_expired_trust_root_lets_no_new_manifest_in() {
    let root = TrustRoot { expires: Timestamp(1_000), ..root() };
    let reason = manifest(&signed(&good(), 1), &root, &facts()).unwrap_err();
    assert_eq!(reason.code, Code::Expired);
    assert!(reason.text.contains("trust root version 1"), "{reason}");
}

#[test]
fn no_manifest_leads_the_time_beyond_the_end_of_the_root_nor_a_day_from_a_time_that_is_known() {
    let of = |issued: i64, knows_time: bool| {
        let manifest = Manifest { issued: Timestamp(issued), expires: Timestamp(i64::MAX), ..good() };
        super::manifest(&signed(&manifest, 1), &root(), &DeviceFacts { knows_time, ..facts() }).map(drop)
    };
    for knows_time in [true, false] {
        for issued in [root().expires.0, 7_258_118_400, i64::MAX - 1] {
            let why = of(issued, knows_time).unwrap_err();
            assert_eq!(why.code, Code::NotYetIssued, "{issued}: {why}");
            assert!(why.text.contains("trust root version 1 ends at 1970-01-12T13:46:40Z"), "{why}");
        }
    }
    assert_eq!(of(1_000 + 86_400, true), Ok(()), "clocks differ, and so do time zones that were meant");
    let why = of(1_000 + 86_401, true).unwrap_err();
    assert_eq!(
        (why.code, why.text.as_str()),
        (Code::NotYetIssued, "manifest 5 is issued at 1970-01-02T00:16:41Z; it is 1970-01-01T00:16:40Z here")
    );
    assert!(why.next.contains("date of today") && why.next.contains("time servers"), "{why}");
    // Two years on a shelf, or no battery: what is right may look as if it came from the future.
    assert_eq!(of(root().expires.0 - 1, false), Ok(()));
}

#[test]
fn no_one_manifest_uses_up_the_sequences() {
    let of = |sequence: u64, highest: u64| {
        let manifest = Manifest { sequence: Sequence(sequence), ..good() };
        let facts = DeviceFacts { highest_sequence: Sequence(highest), ..facts() };
        super::manifest(&signed(&manifest, 1), &root(), &facts).map(drop).map_err(|why| why.code)
    };
    let last = validate::MOST_SEQUENCE;
    assert_eq!(of(last, 4), Err(Code::SequenceLeaps));
    assert_eq!(of(last, 0), Err(Code::SequenceLeaps), "not even the first");
    assert_eq!(of(last + 1, 4), Err(Code::InvalidManifest));
    // Dates to the second, of one year and of the next; microseconds since 1970 on a new device.
    assert_eq!(of(20_270_101_000_000, 20_261_231_235_959), Ok(()));
    assert_eq!(of(1_793_000_000_000_000, 0), Ok(()));
    assert_eq!(of(4 + (1 << 40), 4), Ok(()));
    assert_eq!(of(5 + (1 << 40), 4), Err(Code::SequenceLeaps));
    assert_eq!(of(last, last - 1), Ok(()));
}

#[test]
fn refusals_tell_the_numbers_and_what_to_do() {
    let with = |change: fn(&mut Manifest)| {
        let mut manifest = good();
        change(&mut manifest);
        reason_of(&signed(&manifest, 1)).to_string()
    };
    assert_eq!(
        with(|m| m.sequence = Sequence(3)),
        "manifest sequence 3 is not above 4, the highest seen (sign it again with a higher sequence (`--sequence 5`))"
    );
    assert_eq!(
        with(|m| m.expires = Timestamp(999)),
        "manifest 5 expired at 1970-01-01T00:16:39Z; it is 1970-01-01T00:16:40Z (sign it again with a later `expires`)"
    );
    assert_eq!(
        with(|m| m.device = Some(DeviceId::parse("pump-2").unwrap())),
        "manifest 5 is for device pump-2; this is device pump-1 in group pumps (push it to the device that it names)"
    );
    let two = |m: &mut Manifest| m.group = Some(GroupName::parse("pumps").unwrap());
    assert!(with(two).contains("`device` and `group` exclude each other"), "{}", with(two));
    assert!(with(|m| m.device = None).contains("must say whom this is for"));
}

proptest::proptest! {
    #[test]
    fn no_input_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..1024)) {
        let _ = manifest(&bytes, &root(), &facts());
        let _ = manifest(&signed_bytes(bytes), &root(), &facts());
    }

    #[test]
    fn no_change_of_a_good_one_is_believed(at in 0_usize..400, to in proptest::prelude::any::<u8>()) {
        let mut bytes = signed(&good(), 1);
        let at = at % bytes.len();
        proptest::prop_assume!(bytes[at] != to);
        bytes[at] = to;
        proptest::prop_assert!(manifest(&bytes, &root(), &facts()).is_err());
    }
}
