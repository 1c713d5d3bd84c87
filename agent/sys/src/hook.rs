//! Runs a program of the OCI runtime-spec's `hooks`: the container's state on its standard input, a time limit.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};

use edged_model::keeper::Hook;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error("hook {path} cannot be run")]
    NotRun {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("hook {path} did not end in {timeout_ms} ms")]
    TooLong { path: String, timeout_ms: u64 },
    #[error("hook {path} failed: {status}")]
    Failed { path: String, status: ExitStatus },
}

impl HookError {
    /// For the way out of a child, which has room for a number.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            Self::NotRun { source, .. } => Errno::from_io_error(source).unwrap_or(Errno::IO),
            Self::TooLong { .. } => Errno::TIMEDOUT,
            Self::Failed { .. } => Errno::CANCELED,
        }
    }
}

/// Runs `hook` to its end. A hook that takes too long is killed.
pub fn run(hook: &Hook, state: &[u8]) -> Result<(), HookError> {
    let not_run = |source| HookError::NotRun { path: hook.path.clone(), source };
    let (name, rest) = hook.args.split_first().map_or((hook.path.as_str(), &[][..]), |(name, rest)| (name, rest));
    let environment = hook.env.iter().filter_map(|entry| entry.split_once('='));
    let mut child = Command::new(&hook.path)
        .arg0(name)
        .args(rest)
        .env_clear()
        .envs(environment)
        .stdin(Stdio::piped())
        .spawn()
        .map_err(not_run)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read it.
        let _ = stdin.write_all(state);
    }
    if hook.timeout_ms > 0 && !ends_in(child.id(), hook.timeout_ms).map_err(not_run)? {
        let _ = child.kill();
        let _ = child.wait();
        return Err(HookError::TooLong { path: hook.path.clone(), timeout_ms: hook.timeout_ms });
    }
    let status = child.wait().map_err(not_run)?;
    if status.success() { Ok(()) } else { Err(HookError::Failed { path: hook.path.clone(), status }) }
}

fn ends_in(pid: u32, timeout_ms: u64) -> io::Result<bool> {
    let pid = i32::try_from(pid).map_err(io::Error::other)?;
    let pidfd = crate::pidfd::open_child(pid)?;
    let timeout = Timespec {
        tv_sec: i64::try_from(timeout_ms / 1000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(timeout_ms % 1000 * 1_000_000).unwrap_or(0) as _,
    };
    loop {
        let mut watched = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        match poll(&mut watched, Some(&timeout)) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(ready) => return Ok(ready > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, timeout_ms: u64) -> Hook {
        let args = ["sh", "-c", script].map(str::to_owned).to_vec();
        Hook { path: "/bin/sh".into(), args, env: vec!["A=b".into()], timeout_ms }
    }

    #[test]
    fn the_state_and_the_environment_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        run(&shell(&format!("cat > {0}; echo $A >> {0}", out.display()), 10_000), b"{state}").unwrap();
        assert_eq!(std::fs::read_to_string(out).unwrap(), "{state}b\n");
    }

    #[test]
    fn what_fails_and_what_takes_too_long_is_told() {
        assert!(matches!(run(&shell("exit 3", 0), b"").unwrap_err(), HookError::Failed { .. }));
        assert!(matches!(run(&shell("exec sleep 100", 20), b"").unwrap_err(), HookError::TooLong { .. }));
        let nothing = Hook { path: "/nowhere".into(), ..Hook::default() };
        assert!(matches!(run(&nothing, b"").unwrap_err(), HookError::NotRun { .. }));
    }
}
