//! Work of a start that is done beside the rest of it, on another processor: by a thread of the child.
//!
//! The thread is no thread of Rust's or of the C library's: it makes system calls, allocates nothing, and shares the child's
//! thread-local memory without touching it. What it does not get done the child does itself.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::futex;

pub(crate) use filesystems::FileSystems;
pub(crate) use network::Network;

/// File systems that are to be mounted.
mod filesystems;
/// A network namespace.
pub(crate) mod network;

/// What a thread may do.
trait Job: Sync {
    /// Allocates nothing, takes no lock, does not panic, and calls nothing that touches thread-local memory: the C library
    /// keeps `errno` there, so system calls are made by `rustix`, which does without it. (A descriptor that is dropped is
    /// closed by the C library, which writes it only should that fail.)
    fn run(&self);
}

/// Far more than a few system calls need.
const STACK_BYTES: usize = 32 << 10;

/// What thread and child have in common.
struct Shared<J> {
    /// 0 when the thread has ended: the kernel writes it, and wakes who waits (CLONE_CHILD_CLEARTID).
    runs: AtomicU32,
    job: J,
}

struct Thread<J> {
    shared: Box<Shared<J>>,
    /// There as long as the thread runs.
    _stack: Vec<MaybeUninit<u8>>,
}

/// Of two on one processor, each only waits for the other.
fn has_another_processor() -> bool {
    rustix::thread::sched_getaffinity(None).is_ok_and(|set| set.count() > 1)
}

impl<J: Job> Thread<J> {
    /// `None`: no thread was to be had.
    fn begin(job: J) -> Option<Self> {
        let mut stack: Vec<MaybeUninit<u8>> = Vec::with_capacity(STACK_BYTES);
        let shared = Box::new(Shared { runs: AtomicU32::new(1), job });
        // Aligned to 16 bytes, as the calling conventions of all our architectures want it.
        let lowest = stack.as_mut_ptr();
        let top = lowest.with_addr(lowest.addr().saturating_add(STACK_BYTES) & !15);
        let flags = libc::CLONE_VM
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_CHILD_CLEARTID;
        let argument = std::ptr::from_ref::<Shared<J>>(&shared).cast_mut().cast::<libc::c_void>();
        let no_parent_tid = std::ptr::null_mut::<libc::pid_t>();
        let no_tls = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: stack and `shared` live in the value returned, whose drop waits for the thread's end. The job touches
        // nothing else that is the child's: no allocator, no thread-local memory (which it has in common with the child,
        // as no CLONE_SETTLS is given), no lock. `work` never returns.
        let tid =
            unsafe { libc::clone(work::<J>, top.cast(), flags, argument, no_parent_tid, no_tls, shared.runs.as_ptr()) };
        // Made only now: to drop it is to wait for the thread.
        (tid > 0).then(|| Self { shared, _stack: stack })
    }

    fn job(&self) -> &J {
        &self.shared.job
    }
}

impl<J> Thread<J> {
    fn wait(&self) {
        // The kernel's wake is not of the private kind.
        while self.shared.runs.load(Ordering::Acquire) != 0 {
            let _ = futex::wait(&self.shared.runs, futex::Flags::empty(), 1, None);
        }
    }
}

impl<J> Drop for Thread<J> {
    fn drop(&mut self) {
        self.wait();
    }
}

/// The thread.
extern "C" fn work<J: Job>(shared: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `begin` passes a `Shared` that outlives this thread and is only read through shared references.
    let shared = unsafe { &*shared.cast::<Shared<J>>() };
    shared.job.run();
    // SAFETY: ends this thread alone. A return would, too, but how is the C library's own business.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    0
}
