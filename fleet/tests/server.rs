//! The whole server over real TLS: what devices and operators can do, and what they cannot.

mod support;

use std::time::{Duration, Instant};

use edged_model::cbor;
use edged_model::envelope::{self, Kind};
use edged_model::fleet::{Accepted, DeviceStatus, Enrolled, ReceivedReport};
use edged_model::id::Digest;
use support::{OPERATOR, Server, key, manifest, report};

const DEVICE: &str = "/v1/devices/pump-1";
const MANIFEST: &str = "/v1/devices/pump-1/manifest";
const REPORTS: &str = "/v1/devices/pump-1/reports";

fn etag(envelope: &[u8]) -> String {
    format!("\"{}\"", Digest::of(envelope))
}

#[test]
fn a_manifest_is_handed_out_as_it_came_and_only_when_it_is_new() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path());
    assert_eq!(server.get(MANIFEST, &[]).problem().code.as_deref(), Some("noManifest"));

    let first = manifest(("device", "pump-1"), 1);
    let stored: Accepted = server.operator("PUT", MANIFEST, &first).json();
    assert_eq!((stored.sequence.0, stored.digest, stored.warnings.len()), (1, Digest::of(&first), 0));

    let answer = server.get(MANIFEST, &[]);
    assert_eq!((answer.status, &answer.body), (200, &first));
    assert_eq!(answer.header("etag"), etag(&first));
    for known in [etag(&first), format!("W/{}", etag(&first)), format!("\"x\", {}", etag(&first)), "*".to_owned()] {
        let answer = server.get(MANIFEST, &[("if-none-match", &known)]);
        assert_eq!((answer.status, answer.header("etag")), (304, etag(&first).as_str()), "{known}");
    }
    assert_eq!(server.get(MANIFEST, &[("if-none-match", "\"other\"")]).status, 200);
}

#[test]
fn a_waiting_device_is_woken_by_its_manifest_and_by_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path());
    server.enrolled("pump-1", &["pumps"], &key(7));
    let first = manifest(("group", "pumps"), 1);
    server.operator("PUT", "/v1/groups/pumps/manifest", &first);

    let known = etag(&first);
    let wait = |seconds: &str| {
        server.get(MANIFEST, &[("if-none-match", &known), ("prefer", &format!("respond-async, wait={seconds}"))])
    };
    let answer = wait("1");
    assert_eq!((answer.status, answer.header("preference-applied")), (304, "wait=1"));
    assert_eq!(wait("99999999999999999999999").status, 304, "a wait that is no number is no wait");

    let begun = Instant::now();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| wait("25"));
        server.operator("PUT", "/v1/devices/pump-2/manifest", &manifest(("device", "pump-2"), 5));
        server.operator("PUT", "/v1/groups/valves/manifest", &manifest(("group", "valves"), 5));
        let second = manifest(("group", "pumps"), 2);
        server.operator("PUT", "/v1/groups/pumps/manifest", &second);
        let answer = waiting.join().unwrap();
        assert_eq!((answer.status, answer.body), (200, second));
    });
    assert!(begun.elapsed() < Duration::from_secs(20), "woken after {:?}", begun.elapsed());
}

#[test]
fn a_device_without_any_manifest_waits_for_its_first() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path());
    let envelope = manifest(("device", "pump-1"), 1);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| server.get(MANIFEST, &[("prefer", "wait=25")]));
        server.operator("PUT", MANIFEST, &envelope);
        let answer = waiting.join().unwrap();
        assert_eq!((answer.status, &answer.body), (200, &envelope));
    });
}

#[test]
fn its_own_manifest_comes_before_those_of_its_groups() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path());
    server.enrolled("pump-1", &["a", "b"], &key(7));
    let (a, b) = (manifest(("group", "a"), 9), manifest(("group", "b"), 10));
    server.operator("PUT", "/v1/groups/a/manifest", &a);
    server.operator("PUT", "/v1/groups/b/manifest", &b);
    assert_eq!(server.get(MANIFEST, &[]).body, b, "the highest sequence among the groups");
    assert_eq!(server.operator("PUT", "/v1/devices/pump-1/groups", b"[\"a\"]").status, 204);
    assert_eq!(server.get(MANIFEST, &[]).body, a);
    let own = manifest(("device", "pump-1"), 2);
    server.operator("PUT", MANIFEST, &own);
    assert_eq!(server.get(MANIFEST, &[]).body, own);
    let status: DeviceStatus = server.operator("GET", DEVICE, b"").json();
    assert_eq!(status.manifest.unwrap().scope, "device");
}

#[test]
fn what_is_no_signed_manifest_is_refused_with_its_reason() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path());
    let good = manifest(("device", "pump-1"), 1);
    let unsigned = cbor::encode(&serde_json::json!({"sequence": 1})).unwrap();
    let no_sequence = envelope::sign(Kind::Manifest, cbor::encode(&serde_json::json!({})).unwrap(), &[key(1)]).unwrap();
    let mut longer = good.clone();
    longer.push(0);
    let huge = vec![0_u8; 3 << 20];
    let cases: [(&str, &[u8], u16); 8] = [
        ("nothing", b"", 400),
        ("text", b"apiVersion: edge/v1\n", 400),
        ("bare CBOR", &unsigned, 400),
        ("a report", &report("pump-1", 1, &key(7)), 400),
        ("cut short", &good[..good.len() - 1], 400),
        ("a byte more", &longer, 400),
        ("no sequence", &no_sequence, 400),
        ("too large", &huge, 413),
    ];
    for (what, body, status) in cases {
        let answer = server.operator("PUT", MANIFEST, body);
        assert_eq!(answer.status, status, "{what}: {}", String::from_utf8_lossy(&answer.body));
        let problem = answer.problem();
        assert!(problem.code.is_some() && !problem.detail.is_empty(), "{what}: {problem:?}");
    }
    assert_eq!(server.get(MANIFEST, &[]).status, 404, "nothing of it was stored");
}

#[test]
fn the_operator_is_warned_of_what_devices_will_refuse() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path());
    server.operator("PUT", MANIFEST, &manifest(("device", "pump-1"), 5));
    let lower: Accepted = server.operator("PUT", MANIFEST, &manifest(("device", "pump-1"), 5)).json();
    assert!(lower.warnings[0].contains("not above 5"), "{:?}", lower.warnings);
    let other: Accepted = server.operator("PUT", MANIFEST, &manifest(("device", "pump-2"), 6)).json();
    assert!(other.warnings[0].contains("pump-2"), "{:?}", other.warnings);
}

#[test]
fn the_operators_side_needs_the_operators_token() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path());
    let envelope = manifest(("device", "pump-1"), 1);
    for (method, path) in [
        ("PUT", MANIFEST),
        ("PUT", "/v1/groups/pumps/manifest"),
        ("PUT", "/v1/devices/pump-1/groups"),
        ("GET", "/v1/devices"),
        ("GET", DEVICE),
        ("DELETE", DEVICE),
        ("GET", REPORTS),
        ("POST", "/v1/tokens"),
    ] {
        for wrong in ["", "Bearer wrong", "Basic eDp5", &format!("Bearer {OPERATOR}x")] {
            let answer = server.send(method, path, &[("authorization", wrong)], &envelope);
            assert_eq!(answer.status, 401, "{method} {path} `{wrong}`");
            assert_eq!(answer.problem().code.as_deref(), Some("notOperator"));
            assert_eq!(answer.header("www-authenticate"), "Bearer");
        }
    }
    assert_eq!(server.get(MANIFEST, &[]).status, 404, "nothing was stored");
    assert_eq!(server.get("/v2/anything", &[]).problem().status, 404);
    assert_eq!(server.send("PATCH", DEVICE, &[], b"").problem().status, 405);
    assert_eq!(server.get("/v1/devices/Not_a_name/manifest", &[]).problem().code.as_deref(), Some("badName"));
    assert_eq!(server.get("/healthz", &[]).status, 200);
}

#[test]
fn enrolment_takes_a_token_once_and_a_key_for_good() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path());
    let refused = |device: &str, token: &str, n: u8| {
        let answer = server.enroll(device, &[], token, &key(n));
        (answer.status, answer.problem().code.unwrap_or_default())
    };
    assert_eq!(refused("pump-1", "no-such-token", 7), (403, "tokenRefused".to_owned()));

    let token = server.token(&serde_json::json!({"device": "pump-1", "groups": ["pumps"]}));
    assert_eq!(refused("pump-2", &token, 7), (403, "tokenRefused".to_owned()), "bound to another device");
    let answer = server.enroll("pump-1", &["its-own-wish"], &token, &key(7));
    assert_eq!(answer.status, 201);
    let enrolled: Enrolled = answer.json();
    assert_eq!(enrolled.key_id, key(7).public().id().unwrap());
    assert_eq!(enrolled.groups, ["pumps".parse().unwrap()], "the operator's word on groups counts");

    let again = server.enroll("pump-1", &[], &token, &key(7));
    assert_eq!((again.status, again.json::<Enrolled>()), (200, enrolled), "a lost answer is asked for again");
    assert_eq!(refused("pump-1", &token, 8), (409, "otherKey".to_owned()));
    let fresh = server.token(&serde_json::json!({}));
    assert_eq!(refused("pump-1", &fresh, 8), (409, "otherKey".to_owned()), "a fresh token changes no key");
    assert_eq!(server.enroll("pump-2", &[], &fresh, &key(8)).status, 201, "and was not used up by that");

    // The device was replaced: the operator says so.
    assert_eq!(server.operator("DELETE", DEVICE, b"").status, 204);
    assert_eq!(refused("pump-1", &token, 9), (403, "tokenRefused".to_owned()), "an old token opens nothing");
    server.enrolled("pump-1", &[], &key(9));

    let expired = server.token(&serde_json::json!({"validSecs": 0}));
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.enroll("pump-3", &[], &expired, &key(10)).status == 201 {
        // In the second it was made it is still good; then the device is forgotten and it is tried again.
        assert!(Instant::now() < deadline, "the token never expired");
        server.operator("DELETE", "/v1/devices/pump-3", b"");
    }
    for body in [&b"{}"[..], b"{", b"[]", br#"{"device":"a","token":"b","publicKey":"c"}"#] {
        assert_eq!(server.send("POST", "/v1/enroll", &[], body).problem().status, 400);
    }
}

#[test]
fn reports_are_taken_from_the_enrolled_key_once_each() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path());
    let send = |body: &[u8]| server.send("POST", REPORTS, &[], body);
    let problem = |body: &[u8]| {
        let problem = send(body).problem();
        (problem.status, problem.code.unwrap_or_default())
    };
    assert_eq!(problem(&report("pump-1", 1, &key(7))), (403, "notEnrolled".to_owned()));
    server.enrolled("pump-1", &[], &key(7));

    let first = report("pump-1", 1, &key(7));
    assert_eq!(send(&first).status, 202);
    assert_eq!(problem(&first), (409, "reportReplayed".to_owned()));
    assert_eq!(send(&report("pump-1", 5, &key(7))).status, 202);
    let replayed = send(&report("pump-1", 4, &key(7))).problem();
    assert_eq!((replayed.status, replayed.last_number), (409, Some(5)), "the device learns where to go on");

    assert_eq!(problem(&report("pump-1", 6, &key(8))), (403, "badSignature".to_owned()));
    assert_eq!(problem(&report("pump-2", 6, &key(7))), (403, "wrongDevice".to_owned()));
    let mut changed = report("pump-1", 6, &key(7));
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    assert!(matches!(send(&changed).status, 400 | 403));
    assert_eq!(send(b"garbage").problem().status, 400);
    assert_eq!(send(&manifest(("device", "pump-1"), 1)).problem().status, 400);
    assert_eq!(problem(&vec![0; (64 << 10) + 1]), (413, "tooLarge".to_owned()));

    let status: DeviceStatus = server.operator("GET", DEVICE, b"").json();
    let last = status.report.unwrap();
    assert_eq!((last.report.number, status.last_seen), (5, Some(last.received_at)));
    assert_eq!(last.report.workloads.len(), 1);
    let all: Vec<ReceivedReport> = server.operator("GET", &format!("{REPORTS}?limit=9"), b"").json();
    assert_eq!(all.iter().map(|received| received.report.number).collect::<Vec<_>>(), [5, 1]);
    let one: Vec<ReceivedReport> = server.operator("GET", &format!("{REPORTS}?limit=1"), b"").json();
    assert_eq!(one.len(), 1);
    assert_eq!(server.operator("GET", &format!("{REPORTS}?limit=x"), b"").problem().status, 400);
}

#[test]
fn many_at_once_and_each_number_is_taken_once() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path());
    server.enrolled("pump-1", &[], &key(7));
    let envelope = report("pump-1", 1, &key(7));
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let senders: Vec<_> =
            (0..16).map(|_| scope.spawn(|| server.send("POST", REPORTS, &[], &envelope).status)).collect();
        let waiters: Vec<_> =
            (0..16).map(|_| scope.spawn(|| server.get(MANIFEST, &[("prefer", "wait=25")]).status)).collect();
        let statuses = senders.into_iter().map(|sender| sender.join().unwrap()).collect();
        server.operator("PUT", MANIFEST, &manifest(("device", "pump-1"), 1));
        assert!(waiters.into_iter().all(|waiter| waiter.join().unwrap() == 200), "every one is woken");
        statuses
    });
    assert_eq!(statuses.iter().filter(|status| **status == 202).count(), 1, "{statuses:?}");
    assert_eq!(statuses.iter().filter(|status| **status == 409).count(), 15, "{statuses:?}");
}

#[test]
fn a_restart_forgets_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let envelope = manifest(("device", "pump-1"), 3);
    let token = {
        let server = Server::start(directory.path());
        server.enrolled("pump-1", &["pumps"], &key(7));
        server.operator("PUT", MANIFEST, &envelope);
        assert_eq!(server.send("POST", REPORTS, &[], &report("pump-1", 2, &key(7))).status, 202);
        server.token(&serde_json::json!({}))
    };
    let server = Server::start(directory.path());
    assert_eq!(server.get(MANIFEST, &[]).body, envelope);
    assert_eq!(server.send("POST", REPORTS, &[], &report("pump-1", 2, &key(7))).status, 409);
    assert_eq!(server.send("POST", REPORTS, &[], &report("pump-1", 3, &key(7))).status, 202);
    assert_eq!(server.enroll("pump-2", &[], &token, &key(8)).status, 201);
    let all: Vec<DeviceStatus> = server.operator("GET", "/v1/devices", b"").json();
    assert_eq!(all.iter().map(|status| status.device.as_str()).collect::<Vec<_>>(), ["pump-1", "pump-2"]);
    let rest: Vec<DeviceStatus> = server.operator("GET", "/v1/devices?after=pump-1&limit=5", b"").json();
    assert_eq!(rest.len(), 1);
}
