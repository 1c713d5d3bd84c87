//! Trust roots at the fleet: stored as they came, told to whoever waits, and nothing about them is for the fleet to decide.

#[expect(dead_code, reason = "the other half of the tests uses the rest")]
mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use edged_model::cbor;
use edged_model::envelope::{self, Kind};
use edged_model::fleet::{TRUST_HEADER, TrustStored};
use edged_model::quantity::Timestamp;
use edged_model::trust::{Role, RoleName, TrustRoot};
use support::{Server, key, manifest};

fn root(version: u64, by: u8) -> Vec<u8> {
    let public = key(1).public();
    let id = public.id().unwrap();
    let root = TrustRoot {
        version,
        expires: "2126-01-01T00:00:00Z".parse::<Timestamp>().unwrap(),
        keys: BTreeMap::from([(id, hex::encode(public.to_spki().unwrap()))]),
        roles: RoleName::ALL.map(|name| (name, Role { keys: vec![id], threshold: 1 })).into(),
        images: Vec::new(),
    };
    envelope::sign(Kind::TrustRoot, cbor::encode(&root).unwrap(), &[key(by)]).unwrap()
}

#[test]
fn roots_come_back_as_they_were_and_one_after_the_other() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path());
    assert_eq!(server.get("/v1/trust/1", &[]).problem().code.as_deref(), Some("noTrustRoot"));
    for version in [1, 2, 4] {
        let stored: TrustStored = server.operator("PUT", &format!("/v1/trust/{version}"), &root(version, 1)).json();
        assert_eq!((stored.version, stored.warnings.len()), (version, 0));
    }
    assert_eq!(server.get("/v1/trust/2", &[]).body, root(2, 1));
    assert_eq!(server.get("/v1/trust/3", &[]).body, root(4, 1), "one that was left out");
    assert_eq!(server.get("/v1/trust/5", &[]).status, 404);

    let stranger: TrustStored = server.operator("PUT", "/v1/trust/5", &root(5, 2)).json();
    assert!(stranger.warnings[0].contains("signed by 0 of the 1 root keys"), "{:?}", stranger.warnings);
    let wrong = server.operator("PUT", "/v1/trust/7", &root(6, 1)).problem();
    assert!(wrong.status == 400 && wrong.detail.contains("version 6") && wrong.detail.contains("version 7"));
    assert_eq!(server.operator("PUT", "/v1/trust/8", &manifest(("device", "pump-1"), 8)).status, 400);
    assert_eq!(server.operator("PUT", "/v1/trust/x", b"").problem().code.as_deref(), Some("badName"));
    assert_eq!(server.send("PUT", "/v1/trust/6", &[], &root(6, 1)).status, 401);
    assert_eq!(server.get("/v1/trust/6", &[]).status, 404);
}

#[test]
fn every_device_that_waits_hears_of_a_newer_root() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path());
    let path = "/v1/devices/pump-1/manifest";
    assert_eq!(server.get(path, &[]).header(TRUST_HEADER), "");
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| server.get(path, &[("prefer", "wait=25")]));
        // However the two meet: before, it is in the first answer; after, it wakes.
        server.operator("PUT", "/v1/trust/2", &root(2, 1));
        let answer = waiting.join().unwrap();
        if answer.header(TRUST_HEADER).is_empty() {
            panic!("{}: not told", answer.status);
        }
    });
    assert!(begun.elapsed() < Duration::from_secs(40));
    server.operator("PUT", path, &manifest(("device", "pump-1"), 1));
    let answer = server.get(path, &[]);
    assert_eq!((answer.status, answer.header(TRUST_HEADER)), (200, "2"));
}

#[test]
fn a_database_of_the_first_format_is_brought_along() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    std::fs::create_dir_all(&data).unwrap();
    let old = rusqlite::Connection::open(data.join("fleet.db")).unwrap();
    old.execute_batch(include_str!("../src/db/schema.sql")).unwrap();
    old.execute("INSERT INTO devices (id, groups) VALUES ('old', 'pumps')", []).unwrap();
    old.pragma_update(None, "user_version", 1).unwrap();
    drop(old);
    let server = Server::start(directory.path());
    assert_eq!(server.operator("GET", "/v1/devices/old", b"").status, 200);
    assert_eq!(server.operator("PUT", "/v1/trust/1", &root(1, 1)).status, 200);
}
