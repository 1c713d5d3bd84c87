//! Waiting for a program in the foreground: signals to us are signals to it, its end is ours.

use std::os::fd::BorrowedFd;

use edged_sys::pidfd;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{Pid, WaitOptions, WaitStatus};

use crate::error::OciError;

/// All signals, blocked; the child gives itself none of it.
pub struct Signals {
    pub file: SignalFd,
}

impl Signals {
    pub fn block() -> Result<Self, OciError> {
        let all = SigSet::all();
        let failed = |errno| OciError::system("signals", errno);
        all.thread_block().map_err(failed)?;
        Ok(Self { file: SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC).map_err(failed)? })
    }

    /// Waits for `pid`, passing on what comes.
    pub fn wait_for(&self, pid: i32, program: BorrowedFd<'_>) -> Result<u8, OciError> {
        loop {
            if let Some(code) = ended(pid)? {
                return Ok(code);
            }
            self.pass_on(program)?;
        }
    }

    /// Takes one signal. Those of the terminal's size are the relay's.
    pub fn pass_on(&self, program: BorrowedFd<'_>) -> Result<Option<Signal>, OciError> {
        let info = self.file.read_signal().map_err(|errno| OciError::system("signals", errno))?;
        let number = info.and_then(|info| i32::try_from(info.ssi_signo).ok()).unwrap_or(0);
        let signal = Signal::try_from(number).ok();
        // SIGURG is what some runtimes wake their threads with; it is nobody's message.
        if !matches!(signal, Some(Signal::SIGCHLD | Signal::SIGWINCH | Signal::SIGURG)) && number > 0 {
            // It may have ended already.
            let _ = pidfd::send_signal(program, number);
        }
        Ok(signal)
    }
}

/// The exit code of `pid` if it has ended: its own, or 128 and the signal.
pub fn ended(pid: i32) -> Result<Option<u8>, OciError> {
    let waited = rustix::process::waitpid(Pid::from_raw(pid), WaitOptions::NOHANG);
    let status = waited.map_err(|errno| OciError::system("waiting for the program", errno))?;
    Ok(status.map(|(_, status)| code_of(status)))
}

fn code_of(status: WaitStatus) -> u8 {
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255)
}
