//! The power goes away.
//!
//! What this does today: SIGKILL for QEMU. The guest's page cache is lost, but no write it had issued: those sit in
//! the host's cache whatever `cache=` says. A missing fsync is therefore found only sometimes. The honest cut, crash
//! states built from a log of every write and flush (QEMU's `blklogwrites`), is not here yet.

use std::time::Duration;

use anyhow::Result;

use crate::artifacts::Firmware;
use crate::machine::{Machine, Setup};

/// Pulls the plug and switches the same device on again, with the same disk.
pub fn cut(mut machine: Machine, firmware: &Firmware, setup: &Setup) -> Result<Machine> {
    machine.kill()?;
    let dir = machine.dir().to_owned();
    drop(machine);
    Machine::boot(firmware, &dir, setup)
}

/// Pulls the plug after `delay`: a moment nobody has chosen. The waiting is the point here, not a guess.
pub fn cut_after(machine: &mut Machine, delay: Duration) -> Result<()> {
    #[expect(clippy::disallowed_methods, reason = "the random moment of the cut is the test's input")]
    std::thread::sleep(delay);
    machine.kill()
}
