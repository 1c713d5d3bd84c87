//! What time it is: an SNTP server on loopback that says what we let it say. Here edged is a host's guest, and must reckon
//! with what it hears without touching the host's clock.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread::JoinHandle;

use edged::reconcile::clock::unix_ms;
use edged_model::cbor;
use edged_model::envelope::{self, Kind};
use edged_model::id::Sequence;
use edged_model::keys::SecretKey;
use edged_model::manifest::Manifest;
use edged_model::quantity::Timestamp;
use edged_qemu::process;
use serde_json::Value;

use crate::rig::{DEVICE, Device, Factory, sleeper, until};

const DAY_SECS: i64 = 86_400;
const YEAR_SECS: i64 = 365 * DAY_SECS;

/// RFC 4330: 48 bytes, times as seconds since 1900 and their fraction.
struct TimeServer {
    address: String,
    ahead_secs: Arc<AtomicI64>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl TimeServer {
    fn start(ahead_secs: i64) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
        let address = socket.local_addr().unwrap().to_string();
        let (ahead_secs, ends) = (Arc::new(AtomicI64::new(ahead_secs)), Arc::new(AtomicBool::new(false)));
        let (ahead, end) = (Arc::clone(&ahead_secs), Arc::clone(&ends));
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                let mut request = [0; 48];
                let Ok((48, from)) = socket.recv_from(&mut request) else { continue };
                let now_ms = unix_ms() + ahead.load(Ordering::Relaxed) * 1000;
                let seconds = u32::try_from((now_ms / 1000 + 2_208_988_800) & 0xffff_ffff).unwrap();
                let fraction = u32::try_from((now_ms % 1000) * (1 << 32) / 1000).unwrap();
                let time = [seconds.to_be_bytes(), fraction.to_be_bytes()].concat();
                let mut answer = [[0x24, 1, 6, 0xec].as_slice(), &[0; 8], b"LOCL", &time].concat();
                answer.extend_from_slice(&request[40..]);
                answer.extend([time.clone(), time].concat());
                socket.send_to(&answer, from).unwrap();
            }
        });
        Self { address, ahead_secs, ends, thread: Some(thread) }
    }
}

impl Drop for TimeServer {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How far the device's time is ahead of this machine's.
fn ahead_secs(status: &Value) -> i64 {
    let now: Timestamp = status["now"].as_str().unwrap().parse().unwrap();
    now.0 - unix_ms() / 1000
}

fn source(device: &Device) -> String {
    device.status()["clockSource"].as_str().unwrap().to_owned()
}

#[test]
fn sntp_moves_time_forward_the_hosts_clock_stays_and_the_floor_outlives_the_agent_and_never_falls() {
    let factory = Factory::start();
    let clock_before = unix_ms();
    let server = TimeServer::start(2 * YEAR_SECS);
    let config = format!("[time]\nservers = [\"127.0.0.1:1\", \"{}\"]\ninterval = \"1s\"\n", server.address);
    let device = factory.device(&config);
    until("the time of the server", || (ahead_secs(&device.status()) > 2 * YEAR_SECS - 60).then_some(()));
    assert_eq!(source(&device), "ntp");
    let told = || device.events().into_iter().filter(|text| text.contains("behind")).collect::<Vec<_>>();
    until("the story", || (told().len() == 1).then_some(()));
    assert!(told()[0].contains(&server.address) && told()[0].contains("edged reckons with that"), "{:?}", told());

    // Dates are judged by it: what is good by the host's clock has expired.
    let old = format!(
        "apiVersion: edge/v1\ndevice: {DEVICE}\nsequence: 1\nissued: {}\nexpires: {}\nworkloads: {{}}\n",
        Timestamp(unix_ms() / 1000 - 60),
        Timestamp(unix_ms() / 1000 + YEAR_SECS)
    );
    let why = device.refuse(&factory.sign("old", &old));
    assert!(why.contains("expired"), "{why}");

    // Two years are more than an hour: the floor follows. The next agent knows it without being told by anybody.
    drop(server);
    until("the floor on the disk", || device.kept_floor().filter(|floor| floor.0 > unix_ms() / 1000 + YEAR_SECS));
    device.switch_off();
    let device = factory.device("");
    let status = device.status();
    assert_eq!(status["clockSource"], "floor");
    assert!(ahead_secs(&status) > 2 * YEAR_SECS - 120, "{status:#}");

    // An earlier time, from whoever, changes nothing.
    device.switch_off();
    let late = TimeServer::start(-YEAR_SECS);
    let device = factory.device(&format!("[time]\nservers = [\"{}\"]\ninterval = \"1s\"\n", late.address));
    until("a word on it", || device.events().iter().any(|text| text.contains("never moved back")).then_some(()));
    assert!(ahead_secs(&device.status()) > 2 * YEAR_SECS - 120);
    late.ahead_secs.store(0, Ordering::Relaxed);
    assert_eq!(source(&device), "floor", "it is known to be wrong");
    assert!((unix_ms() - clock_before) < 10 * 60 * 1000, "this machine's clock is its own");
}

fn now_secs() -> i64 {
    unix_ms() / 1000
}

/// A manifest of no workloads with any date, which `edgectl manifest sign` would not sign: whoever has the key need not ask it.
fn issued_at(factory: &Factory, sequence: u64, issued: Timestamp, key: &Path) -> PathBuf {
    let manifest = Manifest {
        device: Some(DEVICE.parse().unwrap()),
        sequence: Sequence(sequence),
        issued,
        expires: Timestamp(issued.0.max(now_secs()) + 30 * YEAR_SECS),
        ..Manifest::empty()
    };
    let key = SecretKey::from_pem(&std::fs::read_to_string(key).unwrap()).unwrap();
    let file = factory.path("issued.cose");
    std::fs::write(&file, envelope::sign(Kind::Manifest, cbor::encode(&manifest).unwrap(), &[key]).unwrap()).unwrap();
    file
}

#[test]
fn a_stolen_manifest_key_moves_the_floor_to_the_end_of_the_root_at_most_and_a_rotation_leads_out() {
    let factory = Factory::start();
    let device = factory.device("");
    let stolen = factory.keys.private("manifest");
    let end: Timestamp = device.status()["trust"]["rootExpires"].as_str().unwrap().parse().unwrap();
    for issued in ["2200-01-01T00:00:00Z".parse().unwrap(), end] {
        let why = device.refuse(&issued_at(&factory, 1, issued, &stolen));
        assert!(why.contains(&format!("issued at {issued}")) && why.contains("trust root version 1 ends"), "{why}");
        assert!(why.contains("sign it with the date of today"), "{why}");
    }
    assert!(ahead_secs(&device.status()) < 60, "it believed nothing of it");

    // What is left to him, where nobody confirms the clock.
    let last = Timestamp(end.0 - 1);
    device.take(&issued_at(&factory, 1, last, &stolen));
    until("the floor on the disk", || device.kept_floor().filter(|floor| *floor == last));
    let honest = format!(
        "apiVersion: edge/v1\ndevice: {DEVICE}\nsequence: 2\nissued: {}\nexpires: {}\nworkloads: {{}}\n",
        Timestamp(now_secs()),
        Timestamp(now_secs() + YEAR_SECS)
    );
    let why = device.refuse(&factory.sign("honest", &honest));
    assert!(why.contains("expired"), "{why}");

    // The way out: a root that ends later and has another manifest key, and manifests that end later.
    let (ops, root) = (factory.path("ops2.key"), factory.path("trust2.cose"));
    process::run(factory.keys.edgectl().args(["key", "generate", "--out"]).arg(&ops)).unwrap();
    let mut rotate = factory.keys.edgectl();
    rotate.args(["trust", "rotate", "--expires", "20years", "--from"]).arg(factory.keys.trust_root());
    rotate.arg("--key").arg(factory.keys.private("root")).arg("--manifest-key").arg(ops.with_extension("pub"));
    process::run(rotate.arg("-o").arg(&root)).unwrap();
    device.take(&root);
    let why = device.refuse(&issued_at(&factory, 2, Timestamp(now_secs()), &stolen));
    assert!(why.contains("no manifest key of trust root version 2"), "{why}");
    device.take(&issued_at(&factory, 2, Timestamp(now_secs()), &ops));
    device.wait_for_generation(2, "good");
    // Certificates are judged by the floor like all else: those of this registry end some days before the first root.
    let later = sleeper(3, &factory.publish_busybox()).replace("expires: 2036", "expires: 2056");
    device.take(&factory.sign_with("later", &later, &ops));
    until("a word on the certificate", || {
        device.events().iter().any(|text| text.contains("certificate expired")).then_some(())
    });
}

#[test]
fn who_knows_the_time_takes_no_manifest_of_the_day_after_tomorrow_and_who_lay_on_a_shelf_does() {
    let factory = Factory::start();
    let key = factory.keys.private("manifest");
    let server = TimeServer::start(0);
    let device = factory.device(&format!("[time]\nservers = [\"{}\"]\ninterval = \"1s\"\n", server.address));
    until("the time of the server", || (source(&device) == "ntp").then_some(()));
    let issued = Timestamp(now_secs() + 2 * DAY_SECS);
    let why = device.refuse(&issued_at(&factory, 1, issued, &key));
    assert!(why.contains(&format!("manifest 1 is issued at {issued}; it is ")), "{why}");
    assert!(ahead_secs(&device.status()) < 60, "it believed nothing of it");
    device.take(&issued_at(&factory, 1, Timestamp(now_secs() + DAY_SECS / 2), &key));
    device.switch_off();

    // Nobody says what time it is: two years may have gone by.
    drop(server);
    let device = factory.device("");
    let issued = Timestamp(now_secs() + 2 * YEAR_SECS);
    device.take(&issued_at(&factory, 2, issued, &key));
    until("the floor on the disk", || device.kept_floor().filter(|floor| *floor == issued));
}
