//! A process by descriptor: never a number that somebody else has by now (pidfd_open(2)).

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::mount::last_errno;
use crate::privilege::LAST_SIGNAL;

/// Sends `signal`, real-time ones included (pidfd_send_signal(2), Linux 5.1).
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<(), Errno> {
    if !(1..=LAST_SIGNAL).contains(&signal) {
        return Err(Errno::INVAL);
    }
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: `pidfd` is borrowed for the call; no information is passed, so the kernel reads no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, no_info, 0) };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

/// A descriptor of a child of ours. Nobody else can reap it, so the number still is that process, or its zombie.
pub fn open_child(pid: i32) -> Result<OwnedFd, Errno> {
    pidfd_open(Pid::from_raw(pid).ok_or(Errno::SRCH)?, PidfdFlags::empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn a_real_time_signal_reaches_the_child() {
        let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let pidfd = open_child(i32::try_from(child.id()).unwrap()).unwrap();
        assert_eq!(send_signal(pidfd.as_fd(), 0), Err(Errno::INVAL));
        assert_eq!(send_signal(pidfd.as_fd(), 65), Err(Errno::INVAL));
        send_signal(pidfd.as_fd(), 37).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(37));
    }
}
