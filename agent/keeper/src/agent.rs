//! The agent's life as the keeper sees it: start it, hear its heartbeat, start it again. The decisions are pure.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command};

use edged_model::keeper::HEARTBEAT_TIMEOUT_MS;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::{KeeperConfig, SOCKET_ENV};

/// A run this long forgets the failures before it.
const STABLE_MS: u64 = 60_000;
const FIRST_DELAY_MS: u64 = 100;
const LONGEST_DELAY_MS: u64 = 10_000;

/// Wait before the n-th restart in a row: at once, then 100 ms doubling up to 10 s, for ever.
pub fn restart_delay_ms(failures_in_a_row: u32) -> u64 {
    match failures_in_a_row {
        0 | 1 => 0,
        n => FIRST_DELAY_MS.saturating_mul(1 << (n - 2).min(20)).min(LONGEST_DELAY_MS),
    }
}

/// Failures in a row after a run of `ran_ms` ended.
pub fn count_failure(before: u32, ran_ms: u64) -> u32 {
    if ran_ms >= STABLE_MS { 1 } else { before.saturating_add(1) }
}

#[derive(Debug)]
pub struct Agent {
    pub life: Life,
    pub failures_in_a_row: u32,
    pub restarts: u64,
}

#[derive(Debug)]
pub enum Life {
    Running(Running),
    Waiting {
        until_boot_ms: u64,
    },
    /// On the way down it is not started again.
    Retired,
}

#[derive(Debug)]
pub struct Running {
    pub pid: i32,
    pub socket: OwnedFd,
    pub started_boot_ms: u64,
    pub heard_boot_ms: u64,
    /// Messages that the agent has not taken yet.
    pub outgoing: VecDeque<Outgoing>,
    pub killed: bool,
}

#[derive(Debug)]
pub struct Outgoing {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// An agent that leaves this many messages unread is as good as hung.
pub const MAX_OUTGOING: usize = 8192;

impl Running {
    pub fn is_silent(&self, now_boot_ms: u64) -> bool {
        now_boot_ms.saturating_sub(self.heard_boot_ms) > HEARTBEAT_TIMEOUT_MS
    }
}

/// Starts the agent as a process of its own, with one end of a socket pair.
pub fn start(config: &KeeperConfig, now_boot_ms: u64) -> io::Result<(Running, Child)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::sockopt::set_socket_send_buffer_size(&ours, 1 << 20)?;
    rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 1 << 20)?;
    edged_sys::inherit::leave(&theirs)?;
    let child = Command::new("/proc/self/exe")
        .arg("agent")
        .args(&config.agent_args)
        .env(SOCKET_ENV, theirs.as_raw_fd().to_string())
        .stdin(std::process::Stdio::null())
        .spawn()?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    let running = Running {
        pid,
        socket: ours,
        started_boot_ms: now_boot_ms,
        heard_boot_ms: now_boot_ms,
        outgoing: VecDeque::new(),
        killed: false,
    };
    Ok((running, child))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_restart_is_at_once_and_no_wait_is_for_ever() {
        assert_eq!(restart_delay_ms(1), 0);
        assert_eq!(restart_delay_ms(2), 100);
        assert_eq!(restart_delay_ms(3), 200);
        assert_eq!(restart_delay_ms(u32::MAX), LONGEST_DELAY_MS);
        assert_eq!(count_failure(9, STABLE_MS), 1);
    }

    proptest! {
        #[test]
        fn waits_only_grow_and_stay_bounded(n in 0..u32::MAX - 1) {
            prop_assert!(restart_delay_ms(n) <= restart_delay_ms(n + 1));
            prop_assert!(restart_delay_ms(n) <= LONGEST_DELAY_MS);
        }
    }
}
