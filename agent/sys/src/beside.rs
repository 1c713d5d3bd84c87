//! A new network namespace, made beside the container's mounts. It is the dearest of all namespaces, about half a
//! millisecond, and little of the rest needs it: so a thread of the child makes it on another processor, and the child
//! enters it before the first thing that does (sysfs, hooks, kernel parameters: [`has_no_use_for_it`]). network_namespaces(7), clone(2).
//!
//! The thread is no thread of Rust's or of the C library's: it makes system calls, allocates nothing, and shares the child's
//! thread-local memory without touching it. If it fails, the child makes the namespace itself, and tells why not.

use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use edged_model::keeper::{LaunchSpec, MountStep};
use nix::sched::{CloneFlags, setns};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{UnshareFlags, futex};

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

/// Of two on one processor, each only waits for the other.
fn has_another_processor() -> bool {
    rustix::thread::sched_getaffinity(None).is_ok_and(|set| set.count() > 1)
}

/// Whether a mount is the same in whatever network namespace it is made.
pub(crate) fn has_no_use_for_it(step: &MountStep) -> bool {
    const SAME: [&str; 6] = ["proc", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];
    step.bind || step.remount || step.tree_fd.is_some() || SAME.contains(&step.fstype.as_str())
}

/// Far more than a few system calls need.
const STACK_BYTES: usize = 32 << 10;

/// What thread and child have in common.
struct Shared {
    /// 0 when the thread has ended: the kernel writes it, and wakes who waits (CLONE_CHILD_CLEARTID).
    runs: AtomicU32,
    /// The namespace, or -1.
    made: AtomicI32,
}

/// A namespace that is being made.
pub(crate) struct Network {
    /// `None`: no thread was to be had.
    thread: Option<Thread>,
}

struct Thread {
    shared: Box<Shared>,
    /// There as long as the thread runs.
    _stack: Vec<MaybeUninit<u8>>,
}

impl Network {
    pub(crate) fn begin() -> Self {
        Self { thread: Thread::begin() }
    }

    /// Waits for it, and enters it.
    pub(crate) fn enter(self) -> Result<(), Errno> {
        match self.thread.and_then(Thread::end) {
            Some(made) => setns(&made, CloneFlags::CLONE_NEWNET).map_err(errno),
            None => nix::sched::unshare(CloneFlags::CLONE_NEWNET).map_err(errno).and_then(|()| device::loopback_up()),
        }
    }
}

impl Thread {
    fn begin() -> Option<Self> {
        let mut stack: Vec<MaybeUninit<u8>> = Vec::with_capacity(STACK_BYTES);
        let shared = Box::new(Shared { runs: AtomicU32::new(1), made: AtomicI32::new(-1) });
        // Aligned to 16 bytes, as the calling conventions of all our architectures want it.
        let lowest = stack.as_mut_ptr();
        let top = lowest.with_addr(lowest.addr().saturating_add(STACK_BYTES) & !15);
        let flags = libc::CLONE_VM
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_CHILD_CLEARTID;
        let argument = std::ptr::from_ref::<Shared>(&shared).cast_mut().cast::<libc::c_void>();
        let no_parent_tid = std::ptr::null_mut::<libc::pid_t>();
        let no_tls = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: stack and `shared` live in the value returned, whose drop waits for the thread's end. `make` touches
        // nothing else that is the child's: no allocator, no thread-local memory (which it has in common with the child,
        // as no CLONE_SETTLS is given), no lock. It never returns.
        let tid =
            unsafe { libc::clone(make, top.cast(), flags, argument, no_parent_tid, no_tls, shared.runs.as_ptr()) };
        (tid > 0).then_some(Self { shared, _stack: stack })
    }

    /// The namespace, unless making it failed.
    fn end(self) -> Option<OwnedFd> {
        self.wait();
        let fd = self.shared.made.swap(-1, Ordering::Acquire);
        // SAFETY: the thread has left this descriptor to us, and taking it out of `made` makes it ours alone.
        (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn wait(&self) {
        // The kernel's wake is not of the private kind.
        while self.shared.runs.load(Ordering::Acquire) != 0 {
            let _ = futex::wait(&self.shared.runs, futex::Flags::empty(), 1, None);
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.wait();
    }
}

/// The thread.
extern "C" fn make(shared: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `begin` passes a `Shared` that outlives this thread and is only read through shared references.
    let shared = unsafe { &*shared.cast::<Shared>() };
    // SAFETY: without CLONE_FILES, no descriptor anybody owns goes away.
    let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) };
    let made = unshared
        .and_then(|()| device::loopback_up())
        .and_then(|()| rustix::fs::open(c"/proc/thread-self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()));
    shared.made.store(made.map_or(-1, IntoRawFd::into_raw_fd), Ordering::Release);
    // SAFETY: ends this thread alone. A return would, too, but how is the C library's own business.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    0
}
