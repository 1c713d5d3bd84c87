//! The way down, as a list of phases: stop the agent, ask the children, force them, then the machine.

use std::path::Path;

use edged_model::keeper::ShutdownHow;
use nix::mount::{MntFlags, MsFlags};

use crate::log;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// SIGTERM was sent; SIGKILL follows.
    Asked { kill_at_boot_ms: u64 },
    /// SIGKILL was sent; the machine goes down at this time even if something will not die (a process in disk sleep).
    Forced { leave_at_boot_ms: u64 },
}

/// Grace for the kernel to take away what was killed.
pub const FORCED_MS: u64 = 2_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shutdown {
    pub how: ShutdownHow,
    pub phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Wait,
    Kill,
    Leave,
}

impl Shutdown {
    /// What the clock and the children still alive ask for.
    pub fn next(&self, now_boot_ms: u64, any_living: bool) -> Next {
        match self.phase {
            _ if !any_living => Next::Leave,
            Phase::Asked { kill_at_boot_ms } if now_boot_ms >= kill_at_boot_ms => Next::Kill,
            Phase::Forced { leave_at_boot_ms } if now_boot_ms >= leave_at_boot_ms => Next::Leave,
            Phase::Asked { .. } | Phase::Forced { .. } => Next::Wait,
        }
    }

    pub fn wake_at_boot_ms(&self) -> u64 {
        match self.phase {
            Phase::Asked { kill_at_boot_ms } => kill_at_boot_ms,
            Phase::Forced { leave_at_boot_ms } => leave_at_boot_ms,
        }
    }
}

/// Writes everything out and turns the machine off or around. Comes back only if the kernel refuses.
pub fn machine(data: &Path, how: ShutdownHow) {
    rustix::fs::sync();
    if let Err(errno) = nix::mount::umount2(data, MntFlags::empty()) {
        log::line(&format!("{} stays mounted ({errno}): made read-only", data.display()));
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        if let Err(errno) = nix::mount::mount(None::<&str>, data, None::<&str>, flags, None::<&str>) {
            log::line(&format!("{} cannot be made read-only: {errno}", data.display()));
        }
    }
    rustix::fs::sync();
    let mode = match how {
        ShutdownHow::Reboot => nix::sys::reboot::RebootMode::RB_AUTOBOOT,
        ShutdownHow::PowerOff | ShutdownHow::Exit => nix::sys::reboot::RebootMode::RB_POWER_OFF,
    };
    log::line(&format!("going down: {how:?}"));
    let Err(errno) = nix::sys::reboot::reboot(mode);
    log::line(&format!("the kernel refuses to go down: {errno}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_asked_then_forced_then_left() {
        let asked = Shutdown { how: ShutdownHow::PowerOff, phase: Phase::Asked { kill_at_boot_ms: 10 } };
        assert_eq!(asked.next(9, true), Next::Wait);
        assert_eq!(asked.next(10, true), Next::Kill);
        assert_eq!(asked.next(0, false), Next::Leave);
        let forced = Shutdown { phase: Phase::Forced { leave_at_boot_ms: 20 }, ..asked };
        assert_eq!(forced.next(19, true), Next::Wait);
        assert_eq!(forced.next(20, true), Next::Leave);
    }
}
