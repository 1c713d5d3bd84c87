//! The power goes away.
//!
//! Two ways. [`cut`] kills QEMU: the guest's page cache is lost, but no write it had issued, because those sit in the
//! host's cache. The honest one is [`log`] and [`crash`]: every write and flush of the disk is logged, and afterwards
//! disks are made as a power cut may have left them: all that was flushed, and of the rest a random part, in a random
//! order, some requests torn. Not covered: a disk that lies about its flushes, and wear.

/// Disks as a power cut may leave them.
pub mod crash;
/// What the disk was told, in order.
pub mod log;
/// A device whose program lies on its disk.
pub mod system;

use anyhow::Result;

use crate::artifacts::Firmware;
use crate::machine::{Machine, Setup};

/// Pulls the plug and switches the same device on again, with the same disk.
pub fn cut(machine: Machine, firmware: &Firmware, setup: &Setup) -> Result<Machine> {
    cut_and(machine, firmware, setup, || Ok(()))
}

/// The same, with something done while the device is off.
pub fn cut_and(
    mut machine: Machine,
    firmware: &Firmware,
    setup: &Setup,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<Machine> {
    machine.kill()?;
    let dir = machine.dir().to_owned();
    drop(machine);
    meanwhile()?;
    Machine::boot(firmware, &dir, setup)
}
