//! Between the device and its fleet stands everything that stands between devices and servers: a portal that answers for
//! everybody, a server that fails for days, a certificate that has run out, a line that swallows, a name that does not
//! resolve. What runs goes on, reports wait or are dropped with a count, and nobody is asked in a storm.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use edged_qemu::fleet::Fleet;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::Value;

use crate::rig::{DEVICE, Device, Factory, head, until};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Open,
    /// 200 and a page, whatever is asked.
    Portal,
    Error500,
    /// As open, but the certificate ran out years ago.
    Expired,
    /// Takes everything and says nothing.
    Swallows,
    /// Hangs up at once.
    Refuses,
}

struct Front {
    port: u16,
    way: Arc<Mutex<Way>>,
    /// When somebody came.
    asked: Arc<Mutex<Vec<Instant>>>,
}

impl Front {
    /// The server lives as long as the test's process.
    fn start(fleet_port: u16, good: Arc<ServerConfig>, expired: Arc<ServerConfig>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let front = Self {
            port: listener.local_addr().unwrap().port(),
            way: Arc::new(Mutex::new(Way::Open)),
            asked: Arc::default(),
        };
        let (way, asked) = (front.way.clone(), front.asked.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                asked.lock().unwrap().push(Instant::now());
                let now = *way.lock().unwrap();
                let (good, expired, way) = (good.clone(), expired.clone(), way.clone());
                std::thread::spawn(move || match now {
                    Way::Open => pass(stream, fleet_port, &way),
                    Way::Portal => answer(stream, good, "200 OK", "text/html; charset=utf-8", "<html>Log in</html>"),
                    Way::Error500 => answer(stream, good, "500 Oops", "text/plain", "broken"),
                    Way::Expired => answer(stream, expired, "204 No Content", "text/plain", ""),
                    Way::Swallows => drop(std::io::copy(&mut &stream, &mut std::io::sink())),
                    Way::Refuses => drop(stream.shutdown(Shutdown::Both)),
                });
            }
        });
        front
    }

    fn becomes(&self, way: Way) {
        *self.way.lock().unwrap() = way;
        self.asked.lock().unwrap().clear();
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

/// Both ways, until the way is no longer open: a poll that waits shall not survive what the test has decided.
fn pass(stream: TcpStream, port: u16, way: &Mutex<Way>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { return };
    let copy = |from: &TcpStream, to: &TcpStream| {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        })
    };
    let both = [copy(&stream, &server), copy(&server, &stream)];
    until("the end of a connection", || {
        let is_over = both.iter().all(std::thread::JoinHandle::is_finished);
        (is_over || *way.lock().unwrap() != Way::Open).then_some(())
    });
    let _ = (stream.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
}

fn answer(stream: TcpStream, config: Arc<ServerConfig>, status: &str, kind: &str, body: &str) {
    let mut stream = StreamOwned::new(ServerConnection::new(config).unwrap(), stream);
    let mut length = 0;
    {
        let mut lines = BufReader::new(&mut stream);
        let mut line = String::new();
        while lines.read_line(&mut line).is_ok_and(|count| count > 2) {
            if let Some(value) = line.to_lowercase().strip_prefix("content-length: ") {
                length = value.trim().parse().unwrap_or(0);
            }
            line.clear();
        }
        // What was sent is taken, as real servers do.
        let _ = std::io::copy(&mut (&mut lines).take(length), &mut std::io::sink());
    }
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.conn.send_close_notify();
    let _ = stream.flush();
}

/// A second authority, whose certificates the test can date as it likes; its own PEM is added to `roots`.
fn certificates(dir: &Path, roots: &Path) -> (Arc<ServerConfig>, Arc<ServerConfig>) {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let pem = ca.self_signed(&ca_key).unwrap().pem();
    let both = std::fs::read_to_string(roots).unwrap() + &pem;
    std::fs::write(dir.join("roots.pem"), both).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    let issue = |name: &str, until_year: i32| {
        let key = KeyPair::generate().unwrap();
        let mut own = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        own.not_before = rcgen::date_time_ymd(2015, 1, 1);
        own.not_after = rcgen::date_time_ymd(until_year, 1, 1);
        let own = own.signed_by(&key, &issuer).unwrap();
        let (cert, private) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
        std::fs::write(&cert, own.pem()).unwrap();
        std::fs::write(&private, key.serialize_pem()).unwrap();
        edge_fleet::tls::server_config(&cert, &private).unwrap()
    };
    (issue("good", 2080), issue("expired", 2020))
}

fn problem(device: &Device) -> String {
    device.status()["fleet"]["problem"]["text"].as_str().unwrap_or_default().to_owned()
}

fn manifest(image: &str) -> String {
    format!(
        "{}workloads:\n  steady:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    \
         resources: {{ memory: 8Mi, cpu: 100m }}\n  \
         other:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    resources: {{ memory: 8Mi, cpu: 100m }}\n",
        head(1)
    )
}

fn push(factory: &Factory, fleet: &Fleet, signed: &Path) {
    let mut push = factory.keys.edgectl();
    push.args(["push", "--to", &fleet.url_seen_from_host(), "--device", DEVICE, "--ca"]);
    push.arg(factory.authority.cert()).env("EDGED_TOKEN", fleet.operator_token().unwrap()).arg(signed);
    edged_qemu::process::run(&mut push).unwrap();
}

#[test]
fn a_network_that_lies_or_fails_stops_nothing_and_costs_reports_only_by_the_count() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let fleet = factory.fleet();
    let dir = factory.path("front");
    std::fs::create_dir(&dir).unwrap();
    let (good, expired) = certificates(&dir, &factory.authority.cert());
    let front = Front::start(fleet.port, good, expired);
    let config = format!(
        "[fleet]\nurl = \"https://127.0.0.1:{}\"\nca = \"{}\"\nenroll-token = \"{}\"\npoll-wait = \"2s\"\n\
         poll-interval = \"1s\"\nreport-interval = \"2s\"\noutbox-max = 4\n",
        front.port,
        dir.join("roots.pem").display(),
        fleet.enroll_token().unwrap()
    );
    let device = factory.device(&config);
    until("the device at the fleet", || fleet.tool(&["device", DEVICE]).ok());
    push(&factory, &fleet, &factory.sign("first", &manifest(&image)));
    device.wait_for_generation(1, "good");
    let steady = device.pid("steady");

    for (way, word) in [
        (Way::Portal, "a web page answers and not the fleet"),
        (Way::Expired, "certificate"),
        (Way::Refuses, "127.0.0.1"),
        (Way::Swallows, "127.0.0.1"),
        (Way::Error500, "the fleet answers 500"),
    ] {
        front.becomes(way);
        let begin = Instant::now();
        until(&format!("{way:?} in the status"), || problem(&device).contains(word).then_some(()));
        // An operator has the device all the same, and what he does is quick.
        let (asked, before) = (Instant::now(), device.pid("other"));
        device.ask(&["restart", "other"]);
        device.workload_that("other", "with another pid", |w| w["phase"] == "running" && w["pid"] != before);
        assert!(asked.elapsed() < Duration::from_secs(10), "{way:?}: {:?}", asked.elapsed());
        if way == Way::Error500 {
            // It takes none any more: what is dropped from now on had no room.
            let dropped = || device.status()["survived"]["reportsDropped"].as_u64();
            let before = dropped();
            until("reports that are dropped", || (dropped() > before).then_some(()));
            assert_eq!(device.status()["fleet"]["waitingReports"], 4, "the outbox keeps to its bound");
        }
        // Two threads, each with pauses of half a second and more that double.
        let (came, within) = (front.asked(), begin.elapsed());
        let most =
            2 * (3 + usize::try_from(within.as_secs()).unwrap().next_power_of_two().trailing_zeros() as usize + 1);
        assert!(came <= most, "{way:?}: {came} requests within {within:?}");
        assert_eq!(device.pid("steady"), steady, "{way:?}");
        assert!(device.status()["refused"].is_null(), "{way:?}: {:#}", device.status()["refused"]);
        front.becomes(Way::Open);
        until(&format!("the fleet again after {way:?}"), || problem(&device).is_empty().then_some(()));
    }

    until("an empty outbox", || (device.status()["fleet"]["waitingReports"] == 0).then_some(()));
    until("a fleet that knows of all that was dropped", || {
        (device.status()["fleet"]["droppedUntold"] == 0).then_some(())
    });
    let survived = device.status()["survived"].clone();
    let seen: Value = serde_json::from_str(&fleet.tool(&["device", DEVICE]).unwrap()).unwrap();
    assert!(survived["reportsDropped"].as_u64() > Some(0), "{survived:#}");
    assert!(survived["fleetFailures"].as_u64() >= Some(5), "{survived:#}");
    assert_eq!(seen["report"]["dropped"], survived["reportsDropped"], "{seen:#}");
    assert_eq!(device.pid("steady"), steady);
}

#[test]
fn a_name_that_does_not_resolve_is_said_and_stops_nothing() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    // RFC 6761: it never does.
    let device = factory.device("[fleet]\nurl = \"https://fleet.invalid\"\nreport-interval = \"2s\"\n");
    device.take(&factory.sign("first", &manifest(&image)));
    device.wait_for_generation(1, "good");
    until("the reason", || problem(&device).contains("fleet.invalid").then_some(()));
    let before = device.pid("other");
    device.ask(&["restart", "other"]);
    device.workload_that("other", "with another pid", |w| w["phase"] == "running" && w["pid"] != before);
}
