//! Why the machine was started: from the traces that the boot before left. Only looked at on a device.

use std::path::Path;

use edged_model::report::BootCause;

use crate::store::boots::LastBoot;
use crate::store::{Store, inline_chain};

/// The keeper's farewell, written at the end of an orderly shutdown (`edged_keeper`, `shutdown`).
const FAREWELL: &str = edged_keeper::FAREWELL;
/// Bits of the timer that reset the machine (Documentation/watchdog/watchdog-api.rst).
const WATCHDOGS: &str = "/sys/class/watchdog";
/// The kernel's last words, kept over a reset where the board can (Documentation/admin-guide/pstore-blk.rst).
const PSTORE: &str = "/sys/fs/pstore";
const WDIOF_CARDRESET: u32 = 0x0020;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Traces {
    said_farewell: bool,
    watchdog_fired: bool,
    has_panic_record: bool,
}

/// Finds it out once for each boot, and keeps it for the agents that follow in the same boot.
pub fn cause(store: &Store, keep: &Path, boot_id: &str) -> Option<BootCause> {
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
    if let Err(error) = std::fs::remove_file(&farewell).and_then(|()| std::fs::File::open(keep)?.sync_all()) {
        if traces.said_farewell {
            tracing::warn!("{}: {error}", farewell.display());
        }
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
    records.map(|record| record.file_name()).any(|name| name.to_string_lossy().starts_with("dmesg-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Traces = Traces { said_farewell: false, watchdog_fired: false, has_panic_record: false };

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
