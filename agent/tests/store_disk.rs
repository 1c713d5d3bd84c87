//! The state store on a disk that fails it: a real ext4 on a loop device, shut down in mid-write without writing its
//! journal (FS_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH), mounted again, and asked what it still knows; and one that
//! is full and has room again.
//!
//! Needs root, loop devices and mkfs.ext4; without them it says so and passes.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use edged::config::Places;
use edged::store::{Durability, Opened, Store};
use edged_model::generation::{Generation, GenerationState, Pointers};
use edged_model::id::{Digest, Sequence};
use edged_model::manifest::Manifest;
use edged_model::quantity::Timestamp;

const WRITER: &str = "EDGED_TEST_STORE_DISK_WRITER";
const CHECKER: &str = "EDGED_TEST_STORE_DISK_CHECKER";
const ROUNDS: u64 = 12;

// `_IOR('X', 125, __u32)` of ext4 and xfs.
nix::ioctl_read!(fs_ioc_shutdown, b'X', 125, u32);
const NO_LOG_FLUSH: u32 = 2;

fn open(root: &str) -> (Store, Opened) {
    Store::open(&Places::new(Some(Path::new(root)), None), 1_000_000).unwrap()
}

/// The envelope of a generation: told apart by its bytes, larger than a page.
fn envelope(sequence: u64) -> Vec<u8> {
    sequence.to_be_bytes().repeat(700)
}

/// Not a test: what writes until its disk goes.
#[test]
fn child_writer() {
    let Ok(root) = std::env::var(WRITER) else { return };
    let (store, _) = open(&root);
    let first = store.pointers().unwrap().highest_sequence.0 + 1;
    for n in first.. {
        let sequence = Sequence(n);
        let generation = Generation {
            sequence,
            state: GenerationState::Good,
            ..Generation::received(Manifest::empty(), Digest::of(&envelope(n)), Timestamp(0))
        };
        let pointers = Pointers {
            active: Some(sequence),
            last_good: Some(sequence),
            highest_sequence: sequence,
            ..Pointers::default()
        };
        store.transition(&[generation], Some((sequence, &envelope(n))), &pointers).unwrap();
        store.push_report(&n.to_be_bytes(), Durability::Now).unwrap();
        println!("\nacknowledged {n}");
    }
}

/// Not a test: says what is there. A process of its own, so that nothing holds the file system afterwards.
#[test]
fn child_checker() {
    let Ok(root) = std::env::var(CHECKER) else { return };
    let (store, opened) = open(&root);
    let pointers = store.pointers().unwrap();
    let active = pointers.active.unwrap_or_default();
    assert_eq!((active, pointers.last_good.unwrap_or_default()), (pointers.highest_sequence, active));
    if active != Sequence(0) {
        assert_eq!(store.envelope(active).unwrap().unwrap(), envelope(active.0));
        assert_eq!(store.generation(active).unwrap().unwrap().state, GenerationState::Good);
    }
    let reports = store.waiting_reports().unwrap();
    println!("\nfound {active} {reports} {}", matches!(opened, Opened::Fresh | Opened::Whole));
}

fn run(program: &str, words: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(words).output().map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(format!("{program} {words:?}: {said}")) }
}

/// A disk that can lose its power.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    fn new(bytes: u64) -> Result<Self, String> {
        let disk = Self { dir: tempfile::tempdir().map_err(|error| error.to_string())? };
        let image = File::create(disk.image()).map_err(|error| error.to_string())?;
        image.set_len(bytes).map_err(|error| error.to_string())?;
        std::fs::create_dir(disk.mounted()).map_err(|error| error.to_string())?;
        run("mkfs.ext4", &["-q", disk.image().to_str().unwrap_or_default()])?;
        disk.mount()?;
        Ok(disk)
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn mounted(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }

    fn mount(&self) -> Result<(), String> {
        let (image, mounted) = (self.image(), self.mounted());
        run("mount", &["-o", "loop", image.to_str().unwrap_or_default(), mounted.to_str().unwrap_or_default()])
    }

    fn unmount(&self) -> Result<(), String> {
        run("umount", &[self.mounted().to_str().unwrap_or_default()])
    }

    fn cut(&self) {
        let root = File::open(self.mounted()).unwrap();
        let mut how = NO_LOG_FLUSH;
        // SAFETY: `root` is open for the whole call and `how` is the one __u32 that the request reads.
        unsafe { fs_ioc_shutdown(root.as_raw_fd(), &raw mut how) }.unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.unmount();
    }
}

fn child(name: &str, variable: &str, root: &Path) -> (Child, std::io::Lines<BufReader<ChildStdout>>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(variable, root)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}

#[test]
fn nothing_acknowledged_is_lost_when_the_power_goes() {
    let disk = match Disk::new(96 << 20) {
        Ok(disk) => disk,
        Err(why) => {
            eprintln!("left out: no file system to cut: {why}");
            return;
        }
    };
    let root = disk.mounted().join("data");
    let (mut acknowledged, mut reports) = (0, 0);
    for round in 0..ROUNDS {
        // Every fourth time the database is a new one: its first writes are the ones most easily lost.
        if round % 4 == 3 {
            std::fs::remove_dir_all(&root).unwrap();
            (acknowledged, reports) = (0, 0);
        }
        let (mut writer, lines) = child("child_writer", WRITER, &root);
        let wanted = acknowledged + 1 + round * 11 % 29;
        let mut is_cut = false;
        for line in lines.map_while(Result::ok) {
            if let Some(n) = line.strip_prefix("acknowledged ") {
                acknowledged = n.parse().unwrap();
                reports += 1;
            }
            if acknowledged >= wanted && !is_cut {
                disk.cut();
                // It may hang on its dead disk: what it said is in the pipe.
                writer.kill().unwrap();
                is_cut = true;
            }
        }
        writer.wait().unwrap();
        assert!(is_cut, "round {round}: the writer ended by itself after {acknowledged}");
        disk.unmount().unwrap();
        disk.mount().unwrap();
        let (mut checker, lines) = child("child_checker", CHECKER, &root);
        let lines: Vec<String> = lines.map_while(Result::ok).collect();
        assert!(checker.wait().unwrap().success(), "round {round}: {lines:?}");
        let found = lines.iter().find_map(|line| line.strip_prefix("found ")).unwrap();
        let words: Vec<&str> = found.split(' ').collect();
        let (active, waiting): (u64, u64) = (words[0].parse().unwrap(), words[1].parse().unwrap());
        let told = format!("round {round}: {acknowledged} and {reports} reports acknowledged, found {found}");
        assert!((acknowledged..=acknowledged + 1).contains(&active), "{told}");
        assert!((reports..=reports + 1).contains(&waiting), "{told}");
        assert_eq!(words[2], "true", "{told}: opened without a rebuild");
        (acknowledged, reports) = (active, waiting);
    }
}

const FILLER: &str = "EDGED_TEST_STORE_DISK_FILLER";

/// Not a test: fills its disk, makes room, and writes on. A process of its own, as the checker is.
#[test]
fn child_on_a_full_disk() {
    let Ok(root) = std::env::var(FILLER) else { return };
    let root = Path::new(&root);
    let (store, _) = open(root.join("data").to_str().unwrap());
    let number = store.next_report_number().unwrap();
    let filler = root.join("filler");
    // As much as there is.
    let _ = std::fs::write(&filler, vec![7; 64 << 20]);
    let mut accepted = 0;
    while store.push_report(&[2; 3000], Durability::Now).is_ok() {
        accepted += 1;
        assert!(accepted < 10_000, "the disk never filled");
    }
    assert_eq!(store.oldest_report().unwrap().unwrap().1, [2; 3000], "what is there can be read");
    assert!(store.raise_time_floor(Timestamp(5)).is_err());
    std::fs::remove_file(&filler).unwrap();
    assert_eq!(store.raise_time_floor(Timestamp(5)).unwrap(), Timestamp(5));
    store.push_report(b"after", Durability::Now).unwrap();
    assert!(store.next_report_number().unwrap() > number);
    assert!(store.waiting_reports().unwrap() > accepted);
    println!("\nfound room again");
}

#[test]
fn a_full_disk_is_told_and_passes() {
    let disk = match Disk::new(16 << 20) {
        Ok(disk) => disk,
        Err(why) => {
            eprintln!("left out: no file system to fill: {why}");
            return;
        }
    };
    let (mut child, lines) = child("child_on_a_full_disk", FILLER, &disk.mounted());
    let lines: Vec<String> = lines.map_while(Result::ok).collect();
    assert!(child.wait().unwrap().success() && lines.iter().any(|line| line == "found room again"), "{lines:#?}");
}
