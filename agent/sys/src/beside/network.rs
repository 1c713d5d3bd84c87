//! A new network namespace, made beside the container's mounts. It is the dearest of all namespaces, about half a
//! millisecond, and little of the rest needs it: so the child enters it before the first thing that does (sysfs, hooks,
//! kernel parameters: [`has_no_use_for_it`]). network_namespaces(7), clone(2). If the thread fails, the child makes the
//! namespace itself, and tells why not.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use edged_model::keeper::{LaunchSpec, MountStep};
use nix::sched::{CloneFlags, setns};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use super::{Job, Thread, has_another_processor};
use crate::child::errno;
use crate::{device, enter};

/// Whether `spec` has its network namespace made so. Where a user namespace is to own it, or clocks are set (which takes
/// a process of one thread), it comes with the others.
pub(crate) fn is_wanted(spec: &LaunchSpec) -> bool {
    let bits = |flag: CloneFlags| u64::from(flag.bits() as u32);
    let none_of = bits(CloneFlags::CLONE_NEWUSER) | bits(enter::CLONE_NEWTIME);
    spec.namespaces & bits(CloneFlags::CLONE_NEWNET) != 0
        && spec.namespaces & none_of == 0
        && spec.join.is_none()
        && spec.joins.iter().all(|join| join.flag & none_of == 0)
        && spec.rootfs.is_some()
        && has_another_processor()
}

/// Whether a mount is the same in whatever network namespace it is made.
pub(crate) fn has_no_use_for_it(step: &MountStep) -> bool {
    const SAME: [&str; 6] = ["proc", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];
    step.bind || step.remount || step.tree_fd.is_some() || SAME.contains(&step.fstype.as_str())
}

/// A namespace that is being made.
pub(crate) struct Network {
    /// `None`: no thread was to be had.
    thread: Option<Thread<Making>>,
}

/// The namespace, or -1.
struct Making(AtomicI32);

impl Network {
    pub(crate) fn begin() -> Self {
        Self { thread: Thread::begin(Making(AtomicI32::new(-1))) }
    }

    /// Waits for it, and enters it.
    pub(crate) fn enter(self) -> Result<(), Errno> {
        match self.thread.and_then(made) {
            Some(made) => setns(&made, CloneFlags::CLONE_NEWNET).map_err(errno),
            None => nix::sched::unshare(CloneFlags::CLONE_NEWNET).map_err(errno).and_then(|()| device::loopback_up()),
        }
    }
}

/// The namespace, unless making it failed.
fn made(thread: Thread<Making>) -> Option<OwnedFd> {
    thread.wait();
    let fd = thread.job().0.swap(-1, Ordering::Acquire);
    // SAFETY: the thread has left this descriptor to us, and taking it out of `Making` makes it ours alone.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Job for Making {
    fn run(&self) {
        // SAFETY: without CLONE_FILES, no descriptor anybody owns goes away.
        let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) };
        let open = || rustix::fs::open(c"/proc/thread-self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let made = unshared.and_then(|()| device::loopback_up()).and_then(|()| open());
        self.0.store(made.map_or(-1, IntoRawFd::into_raw_fd), Ordering::Release);
    }
}
