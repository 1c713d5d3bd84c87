//! The last step: exec(3), directly or below a tiny init that stays.

use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};

use edged_model::keeper::LaunchSpec;
use rustix::fs::FileType;
use rustix::io::Errno;

use crate::child::{DEFAULT_PATH, errno};
use crate::privilege::LAST_SIGNAL;

/// What execve(2) needs, made before the seccomp filter is on.
pub(crate) struct Program {
    candidates: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    pub(crate) fn prepare(spec: &LaunchSpec) -> Result<Self, Errno> {
        let text = |s: &String| CString::new(s.as_str()).map_err(|_| Errno::INVAL);
        let argv: Vec<_> = spec.argv.iter().map(text).collect::<Result<_, _>>()?;
        let env: Vec<_> = spec.env.iter().map(text).collect::<Result<_, _>>()?;
        let program = spec.argv.first().filter(|program| !program.is_empty()).ok_or(Errno::NOENT)?;
        let candidates = if program.contains('/') {
            vec![text(program)?]
        } else {
            let path = spec.env.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
            path.split(':')
                .filter(|dir| !dir.is_empty())
                .map(|dir| text(&format!("{dir}/{program}")))
                .collect::<Result<_, _>>()?
        };
        let made = Self { candidates, argv, env };
        made.find()?;
        Ok(made)
    }

    /// Said now rather than at exec, so that `create` fails where there is nothing to start. What only exec can tell (a
    /// right of the user that it is not yet, a file of another machine) is left to it.
    fn find(&self) -> Result<(), Errno> {
        let mut result = Err(Errno::NOENT);
        for path in &self.candidates {
            match rustix::fs::stat(path) {
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(_) => return Ok(()),
                Ok(found) if can_be_executed(found.st_mode) => return Ok(()),
                Ok(_) => result = Err(Errno::ACCESS),
            }
        }
        result
    }

    /// Tries each candidate as execvp(3) does: a file that is not there, or is no directory, lets the next one try.
    pub(crate) fn exec(&self) -> Result<Infallible, Errno> {
        let mut result = Errno::NOENT;
        for candidate in &self.candidates {
            let Err(error) = nix::unistd::execve(candidate, &self.argv, &self.env);
            match errno(error) {
                Errno::NOENT | Errno::NOTDIR => {}
                Errno::ACCESS => result = Errno::ACCESS,
                other => return Err(other),
            }
        }
        Err(result)
    }
}

/// By somebody.
fn can_be_executed(mode: u32) -> bool {
    FileType::from_raw_mode(mode) == FileType::RegularFile && mode & 0o111 != 0
}

/// Forks: the child comes back and goes on to exec; the parent stays, passes signals on, reaps what ends, and leaves as
/// the program did. It keeps no descriptor but the standard streams, and nothing in the container can trace it: it is
/// not dumpable.
pub(crate) fn stay_as_init(talk: &OwnedFd, starter: Option<&OwnedFd>) -> Result<(), Errno> {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), Some(&mut before)).map_err(errno)?;
    // SAFETY: this process has one thread (`SingleThread`), so the child may go on as it likes.
    match unsafe { nix::unistd::fork() }.map_err(errno)? {
        nix::unistd::ForkResult::Child => {
            // Its own session, so that its terminal stays its own: but only a new process may ask for one.
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None).map_err(errno)
        }
        nix::unistd::ForkResult::Parent { child } => {
            let _ = (talk.as_raw_fd(), starter.map(AsRawFd::as_raw_fd));
            crate::privilege::close_from(3);
            tend(child.as_raw())
        }
    }
}

/// The life of the init.
fn tend(program: i32) -> ! {
    let all = nix::sys::signal::SigSet::all();
    loop {
        // SAFETY: no information is asked for, so the kernel writes nothing; the set lives across the call.
        let signal = unsafe { libc::sigwaitinfo(all.as_ref(), std::ptr::null_mut()) };
        if signal == libc::SIGCHLD {
            reap(program);
        } else if (1..=LAST_SIGNAL).contains(&signal) {
            // SAFETY: plain integers. That the program has just ended is no harm: it is not reaped yet.
            unsafe { libc::kill(program, signal) };
        }
    }
}

fn reap(program: i32) {
    use rustix::process::{WaitOptions, wait};
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if pid.as_raw_nonzero().get() == program {
            let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
            // SAFETY: `_exit` runs no destructor of the parent whose memory this is a copy of.
            unsafe { libc::_exit(code.unwrap_or(255)) }
        }
    }
}
