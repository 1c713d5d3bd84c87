//! A real store, damaged in each of its files at every block of 4 KiB, cut, emptied, overwritten or with one bit turned.
//! Whoever opens it then is a process of its own with little memory, started again when it dies, as the keeper does with
//! the agent. It must come to an end, and what must never be lost must be there.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use edged::config::Places;
use edged::store::{Durability, Opened, SavedHistory, Store, opened_reason};
use edged_model::api::Event;
use edged_model::generation::{Generation, GenerationState, Pointers};
use edged_model::id::{Digest, Sequence, WorkloadName};
use edged_model::manifest::Manifest;
use edged_model::observed::Hold;
use edged_model::quantity::Timestamp;
use edged_model::reason::{Code, Reason};

const OPENER: &str = "EDGED_TEST_STORE_DAMAGE_OPENER";
const BLOCK: u64 = 4096;

/// The keeper starts an agent again and again; by then the store is there.
const STARTS_MAX: u32 = 5;

/// Twice the bound of one opening.
const PATIENCE: Duration = Duration::from_secs(40);

fn open(root: &Path) -> (Store, Opened) {
    Store::open(&Places::new(Some(root), None), 100).unwrap()
}

fn pointers() -> Pointers {
    Pointers {
        active: Some(Sequence(9)),
        last_good: Some(Sequence(9)),
        highest_sequence: Sequence(12),
        highest_trust_version: 4,
        ..Pointers::default()
    }
}

/// Some of everything, written as in life: again and again, so that the log has old segments too.
fn fill(root: &Path) {
    let (store, _) = open(root);
    store.set_trust_root(4, b"root").unwrap();
    for n in 1..=9 {
        let generation = Generation {
            state: GenerationState::Good,
            ..Generation::received(
                Manifest { sequence: Sequence(n), ..Manifest::empty() },
                Digest::of(&n.to_be_bytes()),
                Timestamp(1),
            )
        };
        let envelope = vec![u8::try_from(n).unwrap(); 9_000];
        let own = Pointers { active: Some(Sequence(n)), last_good: Some(Sequence(n)), ..pointers() };
        store.transition(&[generation], Some((Sequence(n), &envelope)), &own).unwrap();
        for workload in 0..20 {
            let name = WorkloadName::parse(&format!("w{workload}")).unwrap();
            store.save_history(&name, &SavedHistory::default(), Durability::Soon).unwrap();
            let why = Reason::new(Code::Started, format!("{name} runs (pid {n})"));
            let (generation, by) = (Some(Sequence(n)), "planner".to_owned());
            let event = Event {
                number: 0,
                at: Timestamp(5),
                boot_id: "b".to_owned(),
                workload: Some(name),
                generation,
                why,
                by,
            };
            store.append_event(event, Durability::Soon).unwrap();
        }
        store.push_report(&[3; 1500], Durability::Now).unwrap();
    }
    store.raise_time_floor(Timestamp(1_000)).unwrap();
    store.hold(&WorkloadName::parse("w1").unwrap(), Some(Hold::Stopped)).unwrap();
    store.remember_failed(Digest::of(b"bad")).unwrap();
    assert_eq!(store.next_report_number().unwrap(), 1);
    store.sync().unwrap();
}

/// Not a test: the agent, as far as the store sees it.
#[test]
fn child_opener() {
    let Some(root) = std::env::var_os(OPENER) else { return };
    // As on a device, where the agent has a wall: more than a good store needs, less than a bad one may take.
    let wall = rustix::process::Rlimit { current: Some(2 << 30), maximum: Some(2 << 30) };
    rustix::process::setrlimit(rustix::process::Resource::As, wall).unwrap();
    let (store, opened) = open(Path::new(&root));
    assert_eq!(store.pointers().unwrap(), pointers());
    assert_eq!(store.envelope(Sequence(9)).unwrap().unwrap(), [9; 9_000]);
    assert_eq!(store.generation(Sequence(9)).unwrap().unwrap().state, GenerationState::Good);
    assert_eq!(store.trust_root().unwrap().unwrap(), b"root");
    assert_eq!(store.time_floor().unwrap(), Timestamp(1_000));
    assert_eq!(store.held().unwrap(), [(WorkloadName::parse("w1").unwrap(), Hold::Stopped)]);
    assert!(store.has_failed(Digest::of(b"bad")).unwrap());
    assert!(store.next_report_number().unwrap() > 1);
    // What is left can be read, and something new be written.
    store.events(usize::MAX, |_| true).unwrap();
    store.push_report(b"after", Durability::Now).unwrap();
    println!("\nopened {}", opened_reason(&opened).map_or("whole".to_owned(), |why| why.text));
}

/// What the opener said at last, and how many had to be started.
fn start_openers(root: &Path) -> Result<(String, u32), String> {
    let begin = Instant::now();
    let mut last = String::new();
    for start in 1..=STARTS_MAX {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_opener", "--nocapture"])
            .env(OPENER, root)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        if begin.elapsed() > PATIENCE {
            return Err(format!("took {:?}", begin.elapsed()));
        }
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if let Some(opened) =
            said.lines().find_map(|line| line.strip_prefix("opened ")).filter(|_| output.status.success())
        {
            return Ok((opened.to_owned(), start));
        }
        last = format!("{}: {said}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Err(last)
}

#[derive(Debug, Clone)]
struct Damage {
    file: PathBuf,
    how: &'static str,
    at: u64,
}

impl Damage {
    fn everywhere(state: &Path) -> Vec<Self> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(state).unwrap().flatten().filter(|entry| entry.path().is_file()) {
            let length = entry.metadata().unwrap().len();
            let file = PathBuf::from(entry.file_name());
            for at in (0..length.max(1)).step_by(usize::try_from(BLOCK).unwrap()) {
                all.extend(["cut", "zero", "noise", "bit"].map(|how| Self { file: file.clone(), how, at }));
            }
            all.push(Self { file, how: "gone", at: 0 });
        }
        all
    }

    fn apply(&self, state: &Path, random: &mut fastrand::Rng) {
        let path = state.join(&self.file);
        if self.how == "gone" {
            return std::fs::remove_file(path).unwrap();
        }
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        let size = file.metadata().unwrap().len().saturating_sub(self.at).min(BLOCK);
        let mut block = vec![0; usize::try_from(size).unwrap()];
        match self.how {
            "cut" => return file.set_len(self.at).unwrap(),
            "noise" => random.fill(&mut block),
            "bit" => {
                file.read_exact_at(&mut block, self.at).unwrap();
                let place = random.usize(..block.len());
                block[place] ^= 1 << random.u8(..8);
            }
            _ => {}
        }
        file.write_all_at(&block, self.at).unwrap();
    }
}

#[test]
fn damage_at_any_block_of_any_file_is_noticed_and_nothing_that_matters_is_lost() {
    let source = tempfile::tempdir().unwrap();
    fill(source.path());
    // The control: what is not damaged is not rebuilt.
    assert_eq!(start_openers(source.path()).unwrap(), ("whole".to_owned(), 1));
    let all = Damage::everywhere(&source.path().join("state"));
    let seed: u64 = std::env::var("EDGED_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(5);
    let (next, rebuilt, again) = (AtomicUsize::new(0), AtomicU32::new(0), AtomicU32::new(0));
    let one = |number: usize, damage: &Damage| {
        let dir = tempfile::tempdir().unwrap();
        let copied = Command::new("cp").arg("-a").arg(source.path().join(".")).arg(dir.path()).status();
        assert!(copied.unwrap().success());
        damage.apply(&dir.path().join("state"), &mut fastrand::Rng::with_seed(seed + number as u64));
        let told = format!("{damage:?} (EDGED_SEED={seed})");
        let (opened, starts) = start_openers(dir.path()).unwrap_or_else(|why| panic!("{told}: {why}"));
        rebuilt.fetch_add(u32::from(opened.contains("rebuilt")), Ordering::Relaxed);
        if starts > 1 {
            eprintln!("{told}: {starts} starts: {opened}");
            again.fetch_add(1, Ordering::Relaxed);
        }
        if opened.contains("rebuilt") && damage.how != "gone" {
            let aside = std::fs::read_dir(dir.path()).unwrap().flatten();
            let aside = aside.filter(|entry| entry.file_name().to_string_lossy().contains("damaged")).count();
            assert_eq!(aside, 1, "{told}: the damaged files are there to be looked at");
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((number, damage)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|n| Some((n, all.get(n)?)))
                {
                    one(number, damage);
                }
            });
        }
    });
    let (rebuilt, again) = (rebuilt.into_inner(), again.into_inner());
    eprintln!("{} damages: {rebuilt} rebuilt, {again} only by a later start", all.len());
    assert!(rebuilt as usize > all.len() / 8, "most of it is live data: {rebuilt} of {}", all.len());
}

/// An agent that dies whenever it opens its store, for whatever reason, is not let do so for ever.
#[test]
fn a_store_that_nobody_survives_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    let point = dir.path().join("crash-point");
    for _ in 0..3 {
        std::fs::write(&point, "store-opening 1").unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_opener"])
            .env(OPENER, dir.path())
            .env(edged::crash_point::FILE_ENV, &point)
            .stdout(Stdio::null())
            .status();
        assert!(!status.unwrap().success() && !point.exists(), "it died there");
    }
    let (opened, starts) = start_openers(dir.path()).unwrap();
    assert!(opened.contains("3 agents in a row died") && starts == 1, "{opened}");
    let (opened, _) = start_openers(dir.path()).unwrap();
    assert_eq!(opened, "whole");
}
