//! Why the machine was started: from the traces that the boot before left. Only looked at on a device.

use std::io::Read;
use std::path::{Path, PathBuf};

use edged_model::report::BootCause;

use crate::store::boots::LastBoot;
use crate::store::keep::durable;
use crate::store::{Store, inline_chain};

/// The keeper's farewell, written at the end of an orderly shutdown (`edged_keeper`, `shutdown`).
const FAREWELL: &str = edged_keeper::FAREWELL;
/// Bits of the timer that reset the machine (Documentation/watchdog/watchdog-api.rst).
const WATCHDOGS: &str = "/sys/class/watchdog";
/// The kernel's last words, kept over a reset where the board can (Documentation/admin-guide/pstore-blk.rst).
const PSTORE: &str = "/sys/fs/pstore";
const WDIOF_CARDRESET: u32 = 0x0020;
/// Beside `keep/`: what the kernel said before its last panic.
const PANIC: &str = "last-panic";
const WORDS_BYTES: u64 = 256 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Traces {
    said_farewell: bool,
    watchdog_fired: bool,
    has_panic_record: bool,
}

/// Finds it out once for each boot, and keeps it for the agents that follow in the same boot.
pub fn cause(store: &Store, keep: &Path, boot_id: &str) -> Option<BootCause> {
    let cause = find_cause(store, keep, boot_id);
    // They are in this boot's record now; the next one must not find them again.
    if cause.is_some() {
        take_last_words(Path::new(PSTORE), &keep.with_file_name(PANIC));
    }
    cause
}

/// The sentence with which the kernel panicked, and the file with all it said before; if this boot followed a panic.
pub fn last_words(data: &Path) -> Option<(String, PathBuf)> {
    let file = data.join(PANIC);
    let text = String::from_utf8_lossy(&std::fs::read(&file).ok()?).into_owned();
    let line = text.lines().rev().find_map(|line| Some(line[line.find("Kernel panic")?..].trim().to_owned()));
    Some((line.unwrap_or_else(|| "the kernel panicked".to_owned()), file))
}

/// Moves what a kernel has left to the disk, where it is kept until the next panic. The parts are numbered from the end.
fn take_last_words(pstore: &Path, file: &Path) {
    let records = std::fs::read_dir(pstore).into_iter().flatten().flatten().map(|record| record.path());
    let mut records: Vec<PathBuf> = records.filter(|path| is_panic_record(path)).collect();
    if records.is_empty() {
        return;
    }
    records.sort();
    let mut words = Vec::new();
    for record in records.iter().rev() {
        if let Ok(file) = std::fs::File::open(record) {
            // A record is what the board has reserved, of some 100 KiB.
            let _ = file.take(WORDS_BYTES - words.len() as u64).read_to_end(&mut words);
        }
    }
    if let Err(error) = durable(file, &words, 0o600) {
        return tracing::warn!("the kernel's last words: {}", inline_chain(&error));
    }
    for record in records {
        if let Err(error) = std::fs::remove_file(&record) {
            tracing::warn!("{}: {error}", record.display());
        }
    }
}

fn find_cause(store: &Store, keep: &Path, boot_id: &str) -> Option<BootCause> {
    let last = match store.last_boot() {
        Ok(last) => last,
        Err(error) => {
            tracing::warn!("the boot before: {}", inline_chain(&error));
            return None;
        }
    };
    if let Some(same) = last.as_ref().filter(|last| last.boot_id == boot_id) {
        return Some(same.cause);
    }
    let farewell = keep.join(FAREWELL);
    let traces = Traces {
        said_farewell: farewell.exists(),
        watchdog_fired: watchdog_fired(),
        has_panic_record: has_panic_record(),
    };
    let cause = decide(last.is_some(), traces);
    if let Err(error) = store.note_boot(&LastBoot { boot_id: boot_id.to_owned(), cause }) {
        tracing::warn!("this boot: {}", inline_chain(&error));
    }
    // Only when this boot is on record: a cut in between finds the farewell again.
    if let Err(error) = std::fs::remove_file(&farewell).and_then(|()| std::fs::File::open(keep)?.sync_all())
        && traces.said_farewell
    {
        tracing::warn!("{}: {error}", farewell.display());
    }
    Some(cause)
}

/// After a farewell the disk was left in order, whatever reset the machine then: a watchdog may have had to.
fn decide(has_booted: bool, traces: Traces) -> BootCause {
    match traces {
        _ if !has_booted => BootCause::First,
        Traces { said_farewell: true, .. } => BootCause::Requested,
        Traces { has_panic_record: true, .. } => BootCause::Panic,
        Traces { watchdog_fired: true, .. } => BootCause::Watchdog,
        _ => BootCause::PowerLoss,
    }
}

fn watchdog_fired() -> bool {
    let devices = std::fs::read_dir(WATCHDOGS).into_iter().flatten().flatten();
    let status = |path: &Path| {
        let text = std::fs::read_to_string(path.join("bootstatus")).ok()?;
        text.trim().parse::<u32>().ok()
    };
    devices.filter_map(|device| status(&device.path())).any(|bits| bits & WDIOF_CARDRESET != 0)
}

fn has_panic_record() -> bool {
    let records = std::fs::read_dir(PSTORE).into_iter().flatten().flatten();
    records.map(|record| record.path()).any(|path| is_panic_record(&path))
}

fn is_panic_record(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("dmesg-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Traces = Traces { said_farewell: false, watchdog_fired: false, has_panic_record: false };

    #[test]
    fn the_last_words_are_taken_once_and_the_sentence_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let pstore = dir.path().join("pstore");
        std::fs::create_dir(&pstore).unwrap();
        take_last_words(&pstore, &dir.path().join(PANIC));
        assert_eq!(last_words(dir.path()), None);
        std::fs::write(
            pstore.join("dmesg-ramoops-0"),
            "Panic#1 Part1\n<0>[ 9.1] Kernel panic - not syncing: NMI\n<0>[ 9.2] Offset\n",
        )
        .unwrap();
        std::fs::write(pstore.join("dmesg-ramoops-1"), "Panic#1 Part2\n<6>[ 1.0] earlier\n").unwrap();
        std::fs::write(pstore.join("console-ramoops-0"), "not ours").unwrap();
        take_last_words(&pstore, &dir.path().join(PANIC));
        let (line, file) = last_words(dir.path()).unwrap();
        assert_eq!(line, "Kernel panic - not syncing: NMI");
        assert!(std::fs::read_to_string(file).unwrap().starts_with("Panic#1 Part2"), "in the order of time");
        assert_eq!(std::fs::read_dir(&pstore).unwrap().count(), 1, "the next boot finds none of them");
    }

    #[test]
    fn a_farewell_is_believed_before_all_other_traces_and_no_trace_is_a_loss_of_power() {
        assert_eq!(decide(false, Traces { watchdog_fired: true, ..NOTHING }), BootCause::First);
        assert_eq!(decide(true, NOTHING), BootCause::PowerLoss);
        assert_eq!(decide(true, Traces { watchdog_fired: true, ..NOTHING }), BootCause::Watchdog);
        // A panic ends in the watchdog's reset where nothing else resets the machine.
        let both = Traces { watchdog_fired: true, has_panic_record: true, ..NOTHING };
        assert_eq!(decide(true, both), BootCause::Panic);
        assert_eq!(decide(true, Traces { said_farewell: true, ..both }), BootCause::Requested);
    }
}
