//! The agent's process: how it is started, and how long until it is started again.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::{KeeperConfig, SOCKET_ENV, resume};

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

/// Room for the largest message and its fellows in the socket.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;

/// glibc's allocator keeps an arena for each of many threads, and raises by itself the sizes from which it gives memory
/// back (mallopt(3)). The agent's threads are few and wait for disks; its memory counts.
const ALLOCATOR: [(&str, &str); 3] =
    [("MALLOC_ARENA_MAX", "1"), ("MALLOC_MMAP_THRESHOLD_", "65536"), ("MALLOC_TRIM_THRESHOLD_", "65536")];

/// Starts the agent as a process of its own, from the keeper's own sealed binary, with one end of a socket pair. Its
/// end is seen like any child's.
pub fn start(config: &KeeperConfig) -> io::Result<(i32, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::sockopt::set_socket_send_buffer_size(&ours, SOCKET_BUFFER_BYTES)?;
    rustix::net::sockopt::set_socket_send_buffer_size(&theirs, SOCKET_BUFFER_BYTES)?;
    edged_sys::inherit::leave(&theirs)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(std::env::args_os().next().unwrap_or_else(|| "edged".into()));
    command.arg("agent").args(&config.agent_args);
    for name in resume::OWN_ENV {
        command.env_remove(name);
    }
    command.envs(ALLOCATOR);
    command.env(SOCKET_ENV, theirs.as_raw_fd().to_string()).stdin(Stdio::null());
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    Ok((pid, ours))
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
