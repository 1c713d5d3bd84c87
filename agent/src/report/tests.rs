//! The device's side against the real fleet endpoint, over TLS with a private CA, with a real store.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use edged_model::fleet::{Accepted, DeviceStatus, ReceivedReport, Token};
use edged_model::workload::Phase;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::runtime::Runtime;

use super::*;
use crate::config::{Api, Places};

const OPERATOR: &str = "0123456789abcdef-operator";
const DEADLINE: Duration = Duration::from_secs(60);

fn clock() -> Timestamp {
    edge_fleet::system_clock()
}

/// Polls until `what` has a value.
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = look() {
            return value;
        }
        assert!(begun.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        #[expect(clippy::disallowed_methods, reason = "between two looks at a condition")]
        std::thread::sleep(Duration::from_millis(20));
    }
}

struct Fleet_ {
    address: SocketAddr,
    runtime: Runtime,
}

impl Fleet_ {
    /// The endpoint on the data in `directory`, on `port` (0: a free one).
    fn start(directory: &Path, port: u16) -> Self {
        if !directory.join("ca.pem").exists() {
            let ca_key = KeyPair::generate().unwrap();
            let mut ca = CertificateParams::new(Vec::new()).unwrap();
            ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            std::fs::write(directory.join("ca.pem"), ca.self_signed(&ca_key).unwrap().pem()).unwrap();
            let issuer = Issuer::new(ca, ca_key);
            let key = KeyPair::generate().unwrap();
            let own = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
            std::fs::write(directory.join("server.crt"), own.pem()).unwrap();
            std::fs::write(directory.join("server.key"), key.serialize_pem()).unwrap();
            std::fs::write(directory.join("operator"), OPERATOR).unwrap();
        }
        let app = edge_fleet::App::open(&directory.join("fleet"), Some(&directory.join("operator")), clock).unwrap();
        let config =
            edge_fleet::tls::server_config(&directory.join("server.crt"), &directory.join("server.key")).unwrap();
        let runtime = Runtime::new().unwrap();
        let listener =
            until("the port is free", || runtime.block_on(tokio::net::TcpListener::bind(("127.0.0.1", port))).ok());
        let address = listener.local_addr().unwrap();
        let router = edge_fleet::http::router(Arc::new(app));
        runtime.spawn(edge_fleet::tls::serve(listener, config, router, std::future::pending()));
        Self { address, runtime }
    }

    fn stop(self) {
        self.runtime.shutdown_background();
    }

    fn operator<T: serde::de::DeserializeOwned>(&self, directory: &Path, method: &str, path: &str, body: &[u8]) -> T {
        let (status, body) = request(
            &directory.join("ca.pem"),
            method,
            &format!("https://{}{path}", self.address),
            &[("authorization", &format!("Bearer {OPERATOR}"))],
            body,
        );
        assert!(status < 300, "{status}: {}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).unwrap()
    }
}

fn request(ca: &Path, method: &str, url: &str, headers: &[(&str, &str)], body: &[u8]) -> (u16, Vec<u8>) {
    let agent =
        registry::agent(registry::certificates(&std::fs::read(ca).unwrap()).unwrap(), &Floor::default()).unwrap();
    let mut request = ureq::http::Request::builder().method(method).uri(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut response = agent.run(request.body(body).unwrap()).unwrap();
    (response.status().as_u16(), response.body_mut().read_to_vec().unwrap())
}

/// A device with its store and its line to the fleet.
struct Device {
    _directory: tempfile::TempDir,
    store: Store,
    line: FleetLine,
    floor: Floor,
    clock: fn() -> Timestamp,
}

impl Device {
    fn new(seed: u8) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let places = Places::new(Some(directory.path()), None);
        let (store, _) = Store::open(&places, 50).unwrap();
        let line = FleetLine::new(SecretKey::from_seed(&[seed; 32]), "pump-1".parse().unwrap(), Vec::new());
        Self { _directory: directory, store, line, floor: Floor::default(), clock }
    }

    fn start(
        &self,
        fleet: &Fleet_,
        directory: &Path,
        token: Option<String>,
        known: Option<Digest>,
    ) -> mpsc::Receiver<Offer> {
        let (offers, offered) = mpsc::channel(4);
        let config = Fleet {
            url: Some(format!("https://{}/", fleet.address)),
            ca: Some(directory.join("ca.pem")),
            enroll_token: token,
            ..Fleet::default()
        };
        self.line.start(&config, &self.store, known, offers, self.clock, &self.floor).unwrap();
        offered
    }

    fn waiting(&self) -> u64 {
        self.store.waiting_reports().unwrap()
    }
}

/// A status such as a busy device has.
fn status(workloads: usize) -> Status {
    let digest = Digest::of(b"x");
    let workload = |n: usize| {
        serde_json::json!({
            "name": format!("workload-{n}"), "image": format!("registry.example:5000/team/app-{n}@{digest}"),
            "phase": "running", "health": "healthy",
            "pid": 1000 + n, "upSecs": 86_400, "restarts": 0, "oomKills": 0,
            "memory": (20_000_000 + 4096 * n).to_string(), "memoryMax": "64Mi", "cpuMilli": 12, "cpuMaxMilli": 250,
            "address": "10.88.0.9", "why": null, "lastExit": null,
        })
    };
    serde_json::from_value(serde_json::json!({
        "device": "pump-1", "agentVersion": "0.1.0", "bootId": "5f0a9c1e-8d1b-4a38-9f3e-0a1b2c3d4e5f",
        "uptimeSecs": 86_400, "now": "2026-11-20T08:00:00Z", "clockSource": "ntp",
        "generation": {"sequence": 1_763_625_600_u64, "digest": digest, "state": "good", "since": "2026-11-20T08:00:00Z", "reason": null},
        "candidate": null, "workloads": (0..workloads).map(workload).collect::<Vec<_>>(),
        "fleet": {"url": null, "lastContact": null, "waitingReports": 0, "problem": null},
        "disk": {"total": "8Gi", "free": "5000000000"}, "memoryTotal": "512Mi", "memoryAvailable": "300Mi",
        "pressure": {"memory": 12, "cpu": 250, "io": 3}, "refused": null,
    }))
    .unwrap()
}

#[test]
fn a_report_names_eight_images_on_their_way_and_counts_the_rest_and_one_without_any_says_nothing() {
    use edged_model::quantity::Bytes;
    use edged_model::report::Report;
    let report = |pulls: Vec<serde_json::Value>| {
        let status = Status { pulls: serde_json::from_value(serde_json::json!(pulls)).unwrap(), ..status(1) };
        cbor::encode(&collect::report(&status, "x86_64", 1, 0)).unwrap()
    };
    let pull = |n: u32| {
        serde_json::json!({
            "image": format!("r.example/app:{n}"), "generation": 4, "since": "2026-11-20T08:00:00Z",
            "done": (3 << 20) + n, "total": "8Mi",
        })
    };
    let told: Report = cbor::decode(&report((0..20).map(pull).collect())).unwrap();
    assert_eq!((told.pulls.len(), told.pulls_left_out), (8, 12));
    assert_eq!(told.pulls[1].done, Some(Bytes::mebi(3)), "in whole kibibytes: shorter on the wire");
    let names = |bytes: &[u8]| cbor::decode::<serde_json::Value>(bytes).unwrap().to_string();
    assert!(
        names(&report(vec![pull(0)])).contains("\"pulls\"") && !names(&report(vec![pull(0)])).contains("pullsLeftOut")
    );
    assert!(!names(&report(Vec::new())).contains("pulls"));
}

fn manifest(sequence: u64) -> Vec<u8> {
    let document = serde_json::json!({"apiVersion": "edge/v1", "device": "pump-1", "sequence": sequence});
    envelope::sign(Kind::Manifest, cbor::encode(&document).unwrap(), &[SecretKey::from_seed(&[1; 32])]).unwrap()
}

#[test]
fn a_report_of_twenty_workloads_keeps_to_its_two_kibibytes() {
    let device = Device::new(7);
    device.line.put(&device.store, &status(20), Due::Change).unwrap();
    let (_, envelope) = device.store.oldest_report().unwrap().unwrap();
    assert!(envelope.len() <= 2048, "{} bytes", envelope.len());
}

#[test]
fn a_device_enrols_itself_and_its_reports_arrive_in_order_over_an_outage() {
    let directory = tempfile::tempdir().unwrap();
    let fleet = Fleet_::start(directory.path(), 0);
    let token: Token = fleet.operator(directory.path(), "POST", "/v1/tokens", b"");
    let device = Device::new(7);
    device.line.put(&device.store, &status(1), Due::Change).unwrap();
    let token_file = directory.path().join("token");
    std::fs::write(&token_file, format!("{}\n", token.token)).unwrap();
    let _offers = device.start(&fleet, directory.path(), Some(token_file.display().to_string()), None);
    until("the first report arrives", || (device.waiting() == 0).then_some(()));
    let contact = device.line.status(None, &device.store);
    assert!(contact.last_contact.is_some() && contact.problem.is_none(), "{contact:?}");

    let port = fleet.address.port();
    fleet.stop();
    for _ in 0..3 {
        device.line.put(&device.store, &status(1), Due::Change).unwrap();
    }
    let problem = until("the outage is noticed", || device.line.status(None, &device.store).problem);
    assert_eq!(problem.code, Code::FleetUnavailable);
    assert_eq!(device.waiting(), 3, "reports wait");

    let fleet = Fleet_::start(directory.path(), port);
    until("the reports arrive", || (device.waiting() == 0).then_some(()));
    let got: Vec<ReceivedReport> = fleet.operator(directory.path(), "GET", "/v1/devices/pump-1/reports", b"");
    let numbers: Vec<u64> = got.iter().rev().map(|received| received.report.number).collect();
    assert!(numbers.len() == 4 && numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    assert!(got.iter().all(|received| received.report.workloads.values().all(|w| w.phase == Phase::Running)));
}

#[test]
fn a_routine_report_costs_no_write_unless_the_fleet_did_not_take_it() {
    let directory = tempfile::tempdir().unwrap();
    let fleet = Fleet_::start(directory.path(), 0);
    let token: Token = fleet.operator(directory.path(), "POST", "/v1/tokens", b"");
    let device = Device::new(7);
    let put = |due| device.line.put(&device.store, &status(1), due).unwrap();
    let unsent = || device.line.status(None, &device.store).waiting_reports;
    put(Due::Routine);
    let numbers_promised = device.store.flushes();
    assert_eq!((device.waiting(), unsent()), (0, 1));
    // Nobody sends yet: it is late when the next one comes.
    put(Due::Routine);
    assert_eq!(device.waiting(), 2);
    assert!(device.store.flushes() > numbers_promised);

    let _offers = device.start(&fleet, directory.path(), Some(token.token), None);
    until("both arrive", || (unsent() == 0).then_some(()));
    let flushes = device.store.flushes();
    for _ in 0..3 {
        put(Due::Routine);
        until("it arrives", || (unsent() == 0).then_some(()));
    }
    assert_eq!((device.store.flushes(), device.waiting()), (flushes, 0));
    put(Due::Change);
    until("the change arrives", || (unsent() == 0).then_some(()));
    let got: Vec<ReceivedReport> = fleet.operator(directory.path(), "GET", "/v1/devices/pump-1/reports", b"");
    let numbers: Vec<u64> = got.iter().rev().map(|received| received.report.number).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
}

#[test]
fn a_replayed_report_leaves_the_outbox_and_a_stranger_keeps_his() {
    let directory = tempfile::tempdir().unwrap();
    let fleet = Fleet_::start(directory.path(), 0);
    let token: Token = fleet.operator(directory.path(), "POST", "/v1/tokens", b"{}");
    let first = Device::new(7);
    first.line.put(&first.store, &status(1), Due::Change).unwrap();
    let _first = first.start(&fleet, directory.path(), Some(token.token.clone()), None);
    until("the report arrives", || (first.waiting() == 0).then_some(()));

    // The same device after its store was lost: its numbers begin again.
    let again = Device::new(7);
    again.line.put(&again.store, &status(1), Due::Change).unwrap();
    let _again = again.start(&fleet, directory.path(), None, None);
    until("the replayed report is dropped", || (again.waiting() == 0).then_some(()));

    let stranger = Device::new(8);
    stranger.line.put(&stranger.store, &status(1), Due::Change).unwrap();
    let _stranger = stranger.start(&fleet, directory.path(), Some(token.token), None);
    let problem = until("he is told", || stranger.line.status(None, &stranger.store).problem);
    assert!(problem.text.contains("another key"), "{problem}");
    assert_eq!(stranger.waiting(), 1);
    let known: DeviceStatus = fleet.operator(directory.path(), "GET", "/v1/devices/pump-1", b"");
    assert_eq!(known.report.unwrap().report.number, 1);
}

#[test]
fn a_new_manifest_is_offered_until_it_is_judged_and_then_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let fleet = Fleet_::start(directory.path(), 0);
    let path = "/v1/devices/pump-1/manifest";
    let _: Accepted = fleet.operator(directory.path(), "PUT", path, &manifest(1));
    let device = Device::new(7);
    let mut offers = device.start(&fleet, directory.path(), None, Some(Digest::of(&manifest(1))));

    let next = |offers: &mut mpsc::Receiver<Offer>| until("an offer", || offers.try_recv().ok());
    let _: Accepted = fleet.operator(directory.path(), "PUT", path, &manifest(2));
    let busy = next(&mut offers);
    assert_eq!((busy.envelope, busy.by.as_str()), (manifest(2), "fleet"), "the known one was not offered");
    busy.reply.send(Err(Reason::new(Code::Busy, "another change"))).unwrap();
    let refused = next(&mut offers);
    assert_eq!(refused.envelope, manifest(2), "it was not judged: it comes again");
    refused.reply.send(Err(Reason::new(Code::Expired, "too old"))).unwrap();

    let _: Accepted = fleet.operator(directory.path(), "PUT", path, &manifest(3));
    let accepted = next(&mut offers);
    assert_eq!(accepted.envelope, manifest(3), "a refused one is not offered again");
    accepted.reply.send(Ok(Taken::Generation(Sequence(3)))).unwrap();
    assert!(device.line.status(None, &device.store).problem.is_none());
}

#[test]
fn a_manifest_that_is_not_yet_issued_is_offered_again_when_the_clock_was_put_right() {
    static PUT_FORWARD_SECS: AtomicI64 = AtomicI64::new(0);
    let directory = tempfile::tempdir().unwrap();
    let fleet = Fleet_::start(directory.path(), 0);
    let path = "/v1/devices/pump-1/manifest";
    let mut device = Device::new(11);
    device.clock = || Timestamp(clock().0 + PUT_FORWARD_SECS.load(Ordering::Relaxed));
    let _: Accepted = fleet.operator(directory.path(), "PUT", path, &manifest(1));
    let mut offers = device.start(&fleet, directory.path(), None, None);
    let next = |offers: &mut mpsc::Receiver<Offer>| until("an offer", || offers.try_recv().ok());
    let refused = next(&mut offers);
    PUT_FORWARD_SECS.store(86_400, Ordering::Relaxed);
    refused.reply.send(Err(Reason::new(Code::NotYetIssued, "it is 1970 here"))).unwrap();
    let again = next(&mut offers);
    assert_eq!(again.envelope, manifest(1));
    // What was taken is not, however the clock leaps.
    PUT_FORWARD_SECS.store(864_000, Ordering::Relaxed);
    again.reply.send(Ok(Taken::Generation(Sequence(1)))).unwrap();
    let _: Accepted = fleet.operator(directory.path(), "PUT", path, &manifest(2));
    assert_eq!(next(&mut offers).envelope, manifest(2));
}

#[test]
fn a_push_is_answered_with_the_verdict() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = Runtime::new().unwrap();
    let (offers, mut offered) = mpsc::channel::<Offer>(1);
    let config = Api { listen: Some("127.0.0.1:0".to_owned()), ..Api::default() };
    let device: DeviceId = "pump-1".parse().unwrap();
    let listen = |offers| runtime.block_on(push::listen(&config, &device, directory.path(), offers)).unwrap().unwrap();
    let address = listen(offers.clone());
    runtime.spawn(async move {
        while let Some(offer) = offered.recv().await {
            let verdict = match offer.envelope.first() {
                Some(b'g') => Ok(Sequence(7)),
                Some(b's') => Err(Reason::new(Code::SequenceSeen, "sequence 6 was seen").next("raise it")),
                Some(b'b') => Err(Reason::new(Code::Busy, "another change is being written")),
                // The agent dies under it.
                _ => continue,
            };
            let _ = offer.reply.send(verdict.map(Taken::Generation));
        }
    });

    // The certificate of our own is for the device's name, so that is how it is called.
    let ca = directory.path().join("push.crt");
    let send = |method: &str, path: &str, body: &[u8]| {
        let (status, body) = request(&ca, method, &format!("https://localhost:{}{path}", address.port()), &[], body);
        (status, body)
    };
    let (status, body) = send("PUT", "/v1/manifest", b"good");
    let accepted: Accepted = serde_json::from_slice(&body).unwrap();
    assert_eq!((status, accepted.sequence.0, accepted.digest), (202, 7, Digest::of(b"good")));
    let problem = |method, path, body: &[u8]| {
        let (status, body) = send(method, path, body);
        let problem: Problem = serde_json::from_slice(&body).unwrap();
        assert_eq!(problem.status, status);
        problem
    };
    let seen = problem("PUT", "/v1/manifest", b"seen");
    assert_eq!(
        (seen.status, seen.code.as_deref(), seen.next.as_deref()),
        (409, Some("sequenceSeen"), Some("raise it"))
    );
    assert_eq!(problem("PUT", "/v1/manifest", b"busy").status, 503);
    assert_eq!(problem("PUT", "/v1/manifest", b"dies").status, 503);
    assert_eq!(problem("PUT", "/v1/manifest", &vec![0; 3 << 20]).status, 413);
    assert_eq!(problem("POST", "/v1/manifest", b"good").status, 405);
    assert_eq!(problem("PUT", "/", b"good").status, 404);

    let before = std::fs::read(&ca).unwrap();
    listen(offers.clone());
    assert_eq!(std::fs::read(&ca).unwrap(), before, "the certificate is kept");
    std::fs::write(&ca, "damaged").unwrap();
    listen(offers);
    assert_ne!(std::fs::read(&ca).unwrap(), before, "a damaged one is made again");
}

#[test]
fn a_fleet_whose_certificate_ended_before_the_time_floor_hears_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let fleet = Fleet_::start(directory.path(), 0);
    let device = Device::new(9);
    // By the clock of this machine it is good for two thousand years more.
    device.floor.raise("4096-01-02T00:00:00Z".parse().unwrap());
    let _offers = device.start(&fleet, directory.path(), None, None);
    let why = until("a word on the certificate", || device.line.status(None, &device.store).problem);
    assert!(why.text.contains("certificate expired"), "{why}");
}
