//! What a device must not take: each is refused with the object named, nothing is half applied, and what was running
//! goes on untouched.

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use edged_qemu::process;

use crate::faults::{Answer, FaultServer};
use crate::rig::{Device, Factory, head, until};

const WALLS: &str = "{ memory: 8Mi, cpu: 100m }";

fn steady(sequence: u32, image: &str) -> String {
    format!(
        "{}workloads:\n  steady:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    resources: {WALLS}\n",
        head(sequence)
    )
}

/// A device on which `steady` runs in generation 5, good.
fn device_with_steady(factory: &Factory) -> (Device, String, i32) {
    let image = factory.publish_busybox();
    let device = factory.device("");
    device.take(&factory.sign("steady", &steady(5, &image)));
    device.wait_for_generation(5, "good");
    let pid = device.pid("steady");
    (device, image, pid)
}

/// CBOR: a head of a major type with its argument in 8 bytes.
fn claims(major: u8, count: u64) -> Vec<u8> {
    let mut bytes = vec![major << 5 | 27];
    bytes.extend(count.to_be_bytes());
    bytes
}

#[test]
fn bytes_that_are_no_signed_manifest_are_refused_by_name_and_nothing_moves() {
    let factory = Factory::start();
    let (device, image, pid) = device_with_steady(&factory);
    let signed = fs::read(factory.sign("next", &steady(6, &image))).unwrap();
    let nested = [vec![0x81; 10_000], vec![0x00]].concat();
    let mut flipped = signed.clone();
    let last = flipped.len() - 1;
    flipped[last] ^= 1;
    // {"a": 1, "a": 2} where an envelope should be.
    let twice = vec![0xa2, 0x61, b'a', 1, 0x61, b'a', 2];
    let yaml = steady(6, &image).into_bytes();
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("not CBOR", b"\xff\xff\xff\xff".to_vec(), &["notCbor"]),
        ("an empty file", Vec::new(), &["notCbor", "notSigned"]),
        ("the YAML itself, not signed", yaml, &["it is text"]),
        ("truncated", signed[..signed.len() / 2].to_vec(), &["notCbor"]),
        ("nested 10,000 deep", nested, &["tooDeep"]),
        ("claims 2^60 bytes", claims(2, 1 << 60), &["notCbor", "tooLarge"]),
        ("claims 2^60 elements", claims(4, 1 << 60), &["notCbor", "tooLarge"]),
        ("a duplicate key", twice, &["duplicateKey"]),
        ("one flipped bit", flipped, &["badSignature"]),
        ("larger than a manifest may be", vec![0x40; 2 << 20], &["tooLarge"]),
        ("bytes behind the end", [signed.clone(), vec![0]].concat(), &["notCbor", "malformed"]),
    ];
    for (what, bytes, words) in cases {
        let file = factory.path("bad.cose");
        fs::write(&file, &bytes).unwrap();
        // The operator's tool says no before it sends anything; the device says no to whoever sends without it.
        let here = device.refuse(&file);
        let (status, there) = device.put(&bytes);
        println!("{what}: {} | {status} {there}", here.trim());
        assert!((400..500).contains(&status), "{what}: {status} {there}");
        assert!(words.iter().any(|word| there.contains(word)), "{what}: {there}");
        assert_eq!(device.pid("steady"), pid, "{what} touched what runs");
    }
    let status = device.status();
    assert_eq!(status["generation"]["sequence"], 5, "{status:#}");
    assert!(status["candidate"].is_null(), "{status:#}");
    // And the good one is still taken.
    let next = factory.sign("next", &steady(6, &image));
    device.take(&next);
    device.wait_for_generation(6, "good");
    assert_eq!(device.pid("steady"), pid, "the same workload in the next generation is not restarted");
}

/// What the agent has: open files, threads, and its anonymous memory in KiB.
fn agent_has(device: &Device) -> (usize, usize, u64) {
    let proc = PathBuf::from(format!("/proc/{}", device.agent_pid()));
    let count = |dir: &str| fs::read_dir(proc.join(dir)).unwrap().count();
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let memory = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.split_whitespace().next()?.parse().ok());
    (count("fd"), count("task"), memory.unwrap())
}

#[test]
fn however_many_strangers_come_to_the_port_a_few_are_let_in_and_the_agent_does_not_grow() {
    let factory = Factory::start();
    let (device, image, pid) = device_with_steady(&factory);
    let ca = factory.authority.cert();
    // Bodies that no manifest has, one after the other.
    let rubbish = factory.path("rubbish");
    fs::write(&rubbish, vec![0x40; 3 << 20]).unwrap();
    let send = |times: usize| {
        for _ in 0..times {
            let mut curl = Command::new("curl");
            curl.args(["--silent", "--max-time", "60", "-o", "/dev/null", "-w", "%{http_code}", "--upload-file"]);
            curl.arg(&rubbish)
                .arg("--cacert")
                .arg(&ca)
                .arg(format!("https://127.0.0.1:{}/v1/manifest", device.push_port()));
            let said = curl.output().unwrap();
            assert_eq!(String::from_utf8_lossy(&said.stdout), "413");
        }
    };
    send(4);
    let (files, threads, memory) = agent_has(&device);
    send(40);
    // And many that come and say nothing, or the beginning of a handshake.
    let hello = [0x16, 3, 1, 2, 0, 1];
    let strangers: Vec<TcpStream> = (0..100)
        .map(|n| {
            let mut stream = TcpStream::connect(("127.0.0.1", device.push_port())).unwrap();
            stream.write_all(&hello[..n % 7]).unwrap();
            stream
        })
        .collect();
    // The agent is awake meanwhile, for whoever has another door.
    for _ in 0..20 {
        assert_eq!(device.status()["generation"]["sequence"], 5);
    }
    let (files_now, threads_now, memory_now) = agent_has(&device);
    println!("files {files} {files_now}, threads {threads} {threads_now}, KiB {memory} {memory_now}");
    assert!(files_now <= files + 8, "{files} {files_now}: 100 are there");
    assert!(threads_now <= threads + 4, "{threads} {threads_now}");
    assert!(memory_now <= memory + (6 << 10), "{memory} {memory_now} KiB");
    drop(strangers);
    device.take(&factory.sign("next", &steady(6, &image)));
    device.wait_for_generation(6, "good");
    assert_eq!(device.pid("steady"), pid);
}

#[test]
fn manifests_that_are_signed_and_wrong_are_refused_by_name_and_nothing_moves() {
    let factory = Factory::start();
    let (device, image, pid) = device_with_steady(&factory);
    let other = |from: &str, to: &str| steady(6, &image).replace(from, to);
    let cases: Vec<(&str, String, &[&str])> = vec![
        ("a sequence already seen", steady(4, &image), &["sequence 4", "5"]),
        ("an expiry in the past", other("2036-01-01", "2026-01-02"), &["expired", "2026-01-02"]),
        ("another device's name", other("device: host-1", "device: pump-9"), &["pump-9", "host-1"]),
        ("no memory limit", other("memory: 8Mi, ", ""), &["memory"]),
        ("no CPU limit", other(", cpu: 100m", ""), &["cpu"]),
        ("more memory than there is", other("8Mi", "4096Gi"), &["4 TiB", "4096Gi", "4Ti"]),
        ("more CPU than there is", other("100m", "\"4000\""), &["4000"]),
    ];
    for (what, yaml, words) in cases {
        let why = refusal_of(&factory, &device, &yaml);
        assert!(words.iter().any(|word| why.contains(word)), "{what}: {why}");
        println!("{what}: {}", why.trim());
        assert_eq!(device.pid("steady"), pid, "{what} touched what runs");
    }
    let stranger = factory.keys.sign_with("stranger", &steady(6, &image), &factory.keys.private("image")).unwrap();
    let why = device.refuse(&stranger);
    assert!(why.contains("sign"), "{why}");
    assert_eq!(device.status()["generation"]["sequence"], 5);
    assert!(device.status()["refused"]["why"]["text"].as_str().is_some(), "the status says what was refused");
}

/// Where it is refused: at the operator's desk when that is possible, else by the device.
fn refusal_of(factory: &Factory, device: &Device, yaml: &str) -> String {
    match factory.keys.sign("wrong", yaml) {
        Ok(signed) => device.refuse(&signed),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn an_unknown_field_is_named_with_the_nearest_known_one() {
    let factory = Factory::start();
    let yaml = steady(1, "registry.example/x:1").replace("resources:", "resoruces:");
    let file = factory.path("typo.yaml");
    fs::write(&file, yaml).unwrap();
    let output = factory.keys.edgectl().args(["manifest", "validate"]).arg(&file).output().unwrap();
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{why}");
    assert!(why.contains("resoruces") && why.contains("resources"), "{why}");
}

#[test]
fn images_that_are_not_signed_by_us_or_changed_do_not_replace_what_runs() {
    let factory = Factory::start();
    let (device, good, pid) = device_with_steady(&factory);
    // Another image under another name, signed by nobody.
    let layout = factory.path("other.layout");
    let root = factory.path("other");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/sleep")).unwrap();
    process::run(factory.keys.edgectl().args(["image", "build", "-o"]).arg(&layout).arg(&root)).unwrap();
    let digest = factory.registry.push(&layout, "other", "latest").unwrap();
    let other = format!("{}/other@{digest}", factory.registry.seen_from_host());

    device.take(&factory.sign("unsigned", &steady(6, &other)));
    let why = refused_image(&device);
    assert!(why.contains("is not signed") && why.contains("other"), "{why}");
    assert_eq!(device.pid("steady"), pid);

    // Signed with a key that the trust root does not know.
    let stranger = factory.path("stranger.key");
    process::run(factory.keys.edgectl().args(["key", "generate", "--out"]).arg(&stranger)).unwrap();
    factory.registry.sign("other", &digest, &stranger, edged_qemu::registry::SignatureForm::Bundle).unwrap();
    device.take(&factory.sign("wrong-key", &steady(7, &other)));
    let why = until("the refusal of the wrong key", || {
        let why = refused_image(&device);
        why.contains("key").then_some(why)
    });
    assert!(why.contains("other"), "{why}");
    assert_eq!(device.pid("steady"), pid);

    // Properly signed, but a layer was changed in the registry.
    factory
        .registry
        .sign("other", &digest, &factory.keys.private("image"), edged_qemu::registry::SignatureForm::Bundle)
        .unwrap();
    let changed = change_largest_blob(&factory, &layout);
    device.take(&factory.sign("changed", &steady(8, &other)));
    let why = until("the refusal of the changed blob", || {
        let why = refused_image(&device);
        why.contains(&changed[..19]).then_some(why)
    });
    println!("changed blob: {why}");
    assert_eq!(device.pid("steady"), pid, "what was running goes on");
    assert_eq!(device.status()["generation"]["sequence"], 5);
    // The way back to what is known to be good.
    device.take(&factory.sign("good", &steady(9, &good)));
    device.wait_for_generation(9, "good");
    assert_eq!(device.pid("steady"), pid);
}

/// What the status says about the image that cannot be had.
fn refused_image(device: &Device) -> String {
    until("a reason in the status", || {
        let status = device.status();
        let of = |value: &serde_json::Value| value["reason"]["text"].as_str().map(str::to_owned);
        of(&status["candidate"]).or_else(|| Some(status["refused"]["why"]["text"].as_str()?.to_owned()))
    })
}

/// Flips a byte in the middle of the largest layer, in the registry's own storage; gives back the layer's digest.
fn change_largest_blob(factory: &Factory, layout: &std::path::Path) -> String {
    let blobs: Vec<PathBuf> = fs::read_dir(layout.join("blobs/sha256")).unwrap().map(|e| e.unwrap().path()).collect();
    let largest = blobs.iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let hash = largest.file_name().unwrap().to_str().unwrap();
    let data = factory.path("registry/data/docker/registry/v2/blobs/sha256").join(&hash[..2]).join(hash).join("data");
    let mut bytes = fs::read(&data).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&data, bytes).unwrap();
    format!("sha256:{hash}")
}

#[test]
fn a_registry_that_fails_in_any_way_is_named_and_what_runs_goes_on() {
    let factory = Factory::start();
    let (device, _, pid) = device_with_steady(&factory);
    device.switch_off();
    // 0: hangs up without a word; 1: a body shorter than it said; 2: a body with another digest; else a status.
    let mode = Arc::new(AtomicU16::new(401));
    let shared = Arc::clone(&mode);
    let server = FaultServer::start(move |_| match shared.load(Ordering::Relaxed) {
        0 => Answer { silent: true, ..Answer::default() },
        1 => Answer { cut: Some(3), ..Answer::new(200, "{\"schemaVersion\":2}") },
        2 => Answer::new(200, "{\"schemaVersion\":2}"),
        301 => Answer::new(301, "").header("Location", "http://127.0.0.1:1/elsewhere"),
        429 => Answer::new(429, "").header("Retry-After", "1"),
        status => Answer::new(status, ""),
    });
    let more = format!("[registry.\"{}\"]\ninsecure-http = true\n", server.host);
    let device = factory.device(&more);
    let before = device.pid("steady");
    assert_ne!(before, pid, "it was switched off in between");
    let zeros = format!("sha256:{}", "0".repeat(64));
    let image = format!("{}/thing@{zeros}", server.host);
    let cases: [(u16, &[&str]); 8] = [
        (401, &["401", "password", "unauthorized", "refuses"]),
        (404, &["404", "has no", "not there", "no such"]),
        (429, &["429"]),
        (500, &["500"]),
        (301, &["127.0.0.1:1"]),
        (1, &["disconnected"]),
        (2, &["digest", "sha256:"]),
        (0, &["disconnected", "closed"]),
    ];
    for (sequence, (answer, words)) in (6..).zip(cases) {
        mode.store(answer, Ordering::Relaxed);
        device.take(&factory.sign("bad-registry", &steady(sequence, &image)));
        let why = until(&format!("the reason for answer {answer}"), || {
            let last = device.events().into_iter().rev().take(2).find(|text| text.contains(&server.host));
            last.filter(|text| words.iter().any(|word| text.contains(word)))
        });
        println!("answer {answer}: {why}");
        assert_eq!(device.pid("steady"), before, "answer {answer} touched what runs");
        assert_eq!(device.status()["generation"]["sequence"], 5);
    }
}

#[test]
fn what_is_missing_is_said_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    // Not root: `nobody` may not make namespaces and mounts.
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", env!("CARGO_BIN_EXE_edged"), "--root"])
        .arg(&root)
        .output()
        .unwrap();
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{why}");
    assert!(why.contains("root") || why.contains("Permission denied"), "{why}");

    fs::write(dir.path().join("agent.toml"), "[device]\nidd = \"x\"\n").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_edged"))
        .args(["--root", root.to_str().unwrap(), "--config", dir.path().join("agent.toml").to_str().unwrap()])
        .output()
        .unwrap();
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && why.contains("agent.toml") && why.contains("idd"), "{why}");
}
