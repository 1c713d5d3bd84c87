//! A user namespace to keep, and a network namespace that belongs to it (user_namespaces(7), ioctl_ns(2)): who is root in
//! the one has power over the other.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use edged_model::keeper::IdMapping;
use rustix::process::{WaitId, WaitIdOptions};

use crate::{pidfd, spawn};

/// By descriptor: they live as long as that, or as long as somebody is in them or they are bound somewhere.
#[derive(Debug)]
pub struct Owned {
    pub user: OwnedFd,
    pub network: Option<OwnedFd>,
}

/// Makes a user namespace with these maps and, if wanted, a network namespace owned by it. For a program of many threads
/// too: the child that they are made with does nothing but wait for its end.
pub fn namespaces(uid_map: &[IdMapping], gid_map: &[IdMapping], network: bool) -> io::Result<Owned> {
    let more = if network { libc::CLONE_NEWNET } else { 0 };
    let flags = u64::from((libc::CLONE_NEWUSER | more).unsigned_abs());
    let parent = std::process::id();
    // SAFETY: `wait_for_the_end` calls nothing that is not async-signal-safe, and never returns.
    let Some((pid, child)) = unsafe { spawn::raw_clone3(flags, None) }? else { wait_for_the_end(parent) };
    let open = |name: &str| File::open(format!("/proc/{pid}/ns/{name}")).map(OwnedFd::from);
    let owned = spawn::write_id_maps(pid, uid_map, gid_map)
        .and_then(|()| Ok(Owned { user: open("user")?, network: network.then(|| open("net")).transpose()? }));
    // It is ours and nobody waits for it: both succeed.
    let _ = pidfd::send_signal(child.as_fd(), libc::SIGKILL);
    let _ = rustix::process::waitid(WaitId::PidFd(child.as_fd()), WaitIdOptions::EXITED);
    owned
}

/// The child. It holds copies of all descriptors of its parent, so it must not outlive it.
fn wait_for_the_end(parent: u32) -> ! {
    // SAFETY: plain integers; prctl(2) is a bare system call.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    loop {
        // SAFETY: takes nothing.
        if unsafe { libc::getppid() }.unsigned_abs() != parent {
            // SAFETY: runs nothing of the parent whose memory this is a copy of.
            unsafe { libc::_exit(1) }
        }
        // SAFETY: takes nothing.
        unsafe { libc::pause() };
    }
}

/// `NS_GET_USERNS` (linux/nsfs.h).
const NS_GET_USERNS: u32 = 0xb701;

/// Whether `namespace` belongs to the user namespace `user`.
pub fn belongs_to(namespace: BorrowedFd<'_>, user: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: NS_GET_USERNS takes no argument; `namespace` is borrowed for the call.
    let fd = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS as _) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the ioctl succeeded, so `fd` is a new descriptor that is ours alone.
    let owner = unsafe { OwnedFd::from_raw_fd(fd) };
    let (owner, user) = (rustix::fs::fstat(owner)?, rustix::fs::fstat(user)?);
    Ok((owner.st_dev, owner.st_ino) == (user.st_dev, user.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_namespace_belongs_to_the_user_namespace_it_was_made_with() {
        let map = [IdMapping { inside: 0, outside: 1_879_048_192, count: 65_536 }];
        let first = namespaces(&map, &map, true).unwrap();
        let second = namespaces(&map, &map, true).unwrap();
        let network = first.network.unwrap();
        assert!(belongs_to(network.as_fd(), first.user.as_fd()).unwrap());
        assert!(!belongs_to(network.as_fd(), second.user.as_fd()).unwrap());
        assert!(namespaces(&map, &map, false).unwrap().network.is_none());
    }
}
