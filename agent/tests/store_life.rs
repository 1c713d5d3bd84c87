//! The state store over a device's life: generations and restarts by the thousand, as the agent writes them, with a clock
//! that is only counted. Says how large the store is then and what a generation and a restart cost in bytes handed to the
//! kernel; `cargo xtask bench store` lives a whole life of ten thousand generations and a million restarts.

use std::path::Path;

use edged::config::Places;
use edged::store::{Durability, SavedHistory, Store};
use edged_model::api::Event;
use edged_model::generation::{Generation, GenerationState, Pointers};
use edged_model::id::{Digest, Sequence, WorkloadName};
use edged_model::manifest::{Manifest, Workload};
use edged_model::quantity::{Bytes, MilliCpu, Timestamp};
use edged_model::reason::{Code, Reason};
use edged_model::spec::Spec;

/// Workloads of a device.
const WORKLOADS: u64 = 20;

/// Beyond the manifest in an envelope: its head and two signatures.
const SIGNATURES_BYTES: usize = 250;

/// An ordinary manifest, of as many workloads as make some two kilobytes.
fn manifest(n: u64) -> Manifest {
    let workload = |index: u64| {
        let digest = Digest::of(&(n * 100 + index).to_be_bytes());
        let mut workload = Workload::of_image(&format!("registry.example/team/program-{index}@{digest}"));
        workload.args = vec!["--listen".to_owned(), "0.0.0.0:8080".to_owned()];
        (workload.resources.memory, workload.resources.cpu) = (Some(Bytes::mebi(16)), Some(MilliCpu(100)));
        (WorkloadName::parse(&format!("workload-{index}")).unwrap(), Spec::from(workload))
    };
    Manifest { sequence: Sequence(n), workloads: (0..8).map(workload).collect(), ..Manifest::empty() }
}

fn count(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// All bytes that this process has handed to write calls (proc(5), `io`, `wchar`).
fn written_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap();
    text.lines().find_map(|line| line.strip_prefix("wchar: ")?.parse().ok()).unwrap()
}

fn size_bytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => size_bytes(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

fn tell(store: &Store, at: u64, workload: Option<WorkloadName>, generation: u64, text: String) {
    let why = Reason::new(Code::Started, text);
    let boot_id = "5f0a9c1e-8d1b-4a38-9f3e-0a1b2c3d4e5f".to_owned();
    let (at, generation, by) =
        (Timestamp(i64::try_from(at).unwrap()), Some(Sequence(generation)), "planner".to_owned());
    let event = Event { number: 0, at, boot_id, workload, generation, why, by };
    store.append_event(event, Durability::Together).unwrap();
}

fn envelope(n: u64) -> Vec<u8> {
    let mut bytes = edged_model::cbor::encode(&manifest(n)).unwrap();
    bytes.extend(n.to_be_bytes().into_iter().cycle().take(SIGNATURES_BYTES));
    bytes
}

/// From the offer to good: each step is a transition that is flushed, and a line of the story.
fn one_generation(store: &Store, n: u64) {
    let envelope = envelope(n);
    let before = (n > 1).then(|| Sequence(n - 1));
    let mut generation = Generation::received(manifest(n), Digest::of(&envelope), Timestamp(0));
    let own = Some(Sequence(n));
    for (state, active, last_good, candidate) in [
        (GenerationState::Received, before, before, own),
        (GenerationState::Verified, before, before, own),
        (GenerationState::Staged, before, before, own),
        (GenerationState::Activating, own, before, None),
        (GenerationState::Probation, own, before, None),
        (GenerationState::Good, own, own, None),
    ] {
        generation.state = state;
        let pointers =
            Pointers { active, last_good, candidate, highest_sequence: Sequence(n), ..store.pointers().unwrap() };
        let with = (state == GenerationState::Received).then_some((Sequence(n), &envelope[..]));
        tell(store, n * 60, None, n, format!("generation {n} is {state:?}"));
        store.transition(std::slice::from_ref(&generation), with, &pointers).unwrap();
    }
}

/// The end and the new start of one workload.
fn one_restart(store: &Store, n: u64) {
    let name = WorkloadName::parse(&format!("workload-{}", n % WORKLOADS)).unwrap();
    let mut saved = SavedHistory { spec: Some(Digest::of(b"spec")), ..SavedHistory::default() };
    saved.history.total = u32::try_from(n).unwrap_or(u32::MAX);
    for word in ["ended with exit code 1", "runs (pid 4711)"] {
        store.save_history(&name, &saved, Durability::Along).unwrap();
        tell(store, n, Some(name.clone()), 1, format!("{name} {word}"));
        store.settle().unwrap();
    }
}

#[test]
fn a_long_life_keeps_the_store_small() {
    let (generations, restarts) = (count("EDGED_STORE_GENERATIONS", 150), count("EDGED_STORE_RESTARTS", 1_500));
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(&Places::new(Some(dir.path()), None), 500).unwrap();
    let (begin, flushes) = (written_bytes(), store.flushes());
    (1..=generations).for_each(|n| one_generation(&store, n));
    let (after_generations, flushes) = (written_bytes(), store.flushes() - flushes);
    (1..=restarts).for_each(|n| one_restart(&store, n));
    let after_restarts = written_bytes();
    let (each_generation, each_restart) =
        ((after_generations - begin) / generations, (after_restarts - after_generations) / restarts);
    let (state, keep) = (size_bytes(&dir.path().join("state")), size_bytes(&dir.path().join("keep")));
    println!("store after {generations} generations and {restarts} restarts");
    println!("  database {state} bytes, second copy {keep} bytes");
    println!(
        "  written for a generation {each_generation} bytes ({:.1} times its manifest of {})",
        each_generation as f64 / envelope(1).len() as f64,
        envelope(1).len()
    );
    println!("  flushed {:.1} times for a generation", flushes as f64 / generations as f64);
    println!("  written for a restart {each_restart} bytes");
    drop(store);
    let begin = std::time::Instant::now();
    let (store, _) = Store::open(&Places::new(Some(dir.path()), None), 500).unwrap();
    println!("  opened again in {} ms", begin.elapsed().as_millis());
    assert_eq!(store.pointers().unwrap().active, Some(Sequence(generations)));
    assert!(store.generations().unwrap().len() <= 10, "old generations go");
    assert!(state < 64 << 20 && keep < 1 << 20, "the store grew to {state} and {keep} bytes");
}
