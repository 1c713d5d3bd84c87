//! Giving up power: capabilities(7), credentials(7), no_new_privs and seccomp(2). Called by the child alone, on itself.

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::OnceLock;

use edged_model::keeper::{CapabilitySets, Scheduler};
use rustix::io::Errno;

use crate::mount::last_errno;

/// The highest capability this code knows (CAP_CHECKPOINT_RESTORE); the kernel may know fewer.
const LAST_CAPABILITY: u32 = 40;

/// SIGRTMAX.
pub(crate) const LAST_SIGNAL: i32 = 64;

/// The limit on open files that this process was started with; its children get it back.
static OPEN_FILES: OnceLock<libc::rlimit64> = OnceLock::new();

/// Takes as many descriptors as may be had, up to `wanted`: each child costs the keeper three. Returns how many.
pub fn raise_open_files(wanted: u64) -> Result<u64, Errno> {
    let mut before = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one `rlimit64`, which lives across the call.
    check(unsafe { libc::getrlimit64(libc::RLIMIT_NOFILE, &raw mut before) })?;
    let before = *OPEN_FILES.get_or_init(|| before);
    let more = |hard: u64| set_limit(libc::RLIMIT_NOFILE, wanted.min(hard), hard);
    if before.rlim_max < wanted && more(wanted).is_ok() {
        return Ok(wanted);
    }
    more(before.rlim_max)?;
    Ok(wanted.min(before.rlim_max))
}

/// How LaunchSpec and the kernel number it; the C library's own type differs from one to the next.
#[expect(clippy::unnecessary_cast, reason = "it is an `int` with musl")]
pub(crate) const RLIMIT_NOFILE: u32 = libc::RLIMIT_NOFILE as u32;

/// What [`raise_open_files`] changed, changed back. In a child.
pub(crate) fn restore_open_files() -> Result<(), Errno> {
    match OPEN_FILES.get() {
        Some(before) => set_limit(libc::RLIMIT_NOFILE, before.rlim_cur, before.rlim_max),
        None => Ok(()),
    }
}

/// setrlimit(2), by number.
pub(crate) fn set_limit(resource: u32, soft: u64, hard: u64) -> Result<(), Errno> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the kernel reads `limit` during the call only; an unknown resource number is EINVAL.
    check(unsafe { libc::setrlimit64(resource as _, &raw const limit) })
}

fn check(result: libc::c_int) -> Result<(), Errno> {
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

fn prctl(option: libc::c_int, a: libc::c_ulong, b: libc::c_ulong) -> Result<libc::c_int, Errno> {
    let zero: libc::c_ulong = 0;
    // SAFETY: the options used in this file take integers only, no pointer is passed.
    let result = unsafe { libc::prctl(option, a, b, zero, zero) };
    if result >= 0 { Ok(result) } else { Err(last_errno()) }
}

/// Takes away from the bounding set all that is not in `keep`.
pub fn drop_bounding(keep: u64) -> Result<(), Errno> {
    for capability in 0..=LAST_CAPABILITY {
        if keep & (1 << capability) == 0 {
            match prctl(libc::PR_CAPBSET_DROP, capability.into(), 0) {
                // The kernel does not know it: then nobody can have it.
                Ok(_) | Err(Errno::INVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
    Ok(())
}

/// Changes group list, gid and uid for good. Capabilities outlive the change (PR_SET_KEEPCAPS) until
/// [`set_capabilities`] says which stay.
pub fn set_ids(uid: u32, gid: u32, additional_gids: &[u32]) -> Result<(), Errno> {
    prctl(libc::PR_SET_KEEPCAPS, 1, 0)?;
    // SAFETY: pointer and length are those of one live slice; the kernel only reads it.
    check(unsafe { libc::setgroups(additional_gids.len() as _, additional_gids.as_ptr()) })?;
    // SAFETY: plain integers.
    check(unsafe { libc::setresgid(gid, gid, gid) })?;
    // SAFETY: plain integers.
    check(unsafe { libc::setresuid(uid, uid, uid) })
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3` (linux/capability.h): two words per set.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// Sets effective, permitted, inheritable and ambient exactly.
pub fn set_capabilities(sets: &CapabilitySets) -> Result<(), Errno> {
    let header = CapHeader { version: CAPABILITY_VERSION, pid: 0 };
    let word = |set: u64, index: u32| ((set >> (32 * index)) & 0xffff_ffff) as u32;
    let data = [0, 1].map(|index| CapData {
        effective: word(sets.effective, index),
        permitted: word(sets.permitted, index),
        inheritable: word(sets.inheritable, index),
    });
    // SAFETY: header and data have the layout of version 3 (one header, two data words) and live across the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    if result != 0 {
        return Err(last_errno());
    }
    let _ = prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0)?;
    for capability in 0..=LAST_CAPABILITY {
        if sets.ambient & (1 << capability) != 0 {
            prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong, capability.into())?;
        }
    }
    Ok(())
}

pub fn set_no_new_privs() -> Result<(), Errno> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).map(drop)
}

/// Nobody without CAP_SYS_PTRACE may look into or trace the caller, nor its children until they have exec'd (proc(5)).
pub fn set_not_dumpable() -> Result<(), Errno> {
    prctl(libc::PR_SET_DUMPABLE, 0, 0).map(drop)
}

/// Orphans of our children become ours (PR_SET_CHILD_SUBREAPER).
pub fn become_subreaper() -> Result<(), Errno> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0).map(drop)
}

/// Installs a filter with SECCOMP_FILTER_FLAG_*: `program` is an array of `struct sock_filter` (8 bytes each, native endian).
pub fn install_seccomp(program: &[u8], flags: u32) -> Result<(), Errno> {
    set_filter(program, flags).map(drop)
}

/// As [`install_seccomp`]; the descriptor hears of the calls that the filter does not decide about (seccomp_unotify(2)).
pub fn install_seccomp_with_listener(program: &[u8], flags: u32) -> Result<OwnedFd, Errno> {
    const TSYNC: u32 = 1;
    const NEW_LISTENER: u32 = 8;
    // There is no other thread, and the kernel does not take the two together.
    let fd = set_filter(program, flags & !TSYNC | NEW_LISTENER)?;
    // SAFETY: with NEW_LISTENER the answer is a descriptor that was just made, close-on-exec, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The number is what seccomp(2) answers.
fn set_filter(program: &[u8], flags: u32) -> Result<libc::c_int, Errno> {
    const INSTRUCTION_BYTES: usize = size_of::<libc::sock_filter>();
    if program.is_empty() || !program.len().is_multiple_of(INSTRUCTION_BYTES) {
        return Err(Errno::INVAL);
    }
    let filter: Vec<libc::sock_filter> = program
        .chunks_exact(INSTRUCTION_BYTES)
        .map(|b| libc::sock_filter {
            code: u16::from_ne_bytes([b[0], b[1]]),
            jt: b[2],
            jf: b[3],
            k: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        })
        .collect();
    let len = u16::try_from(filter.len()).map_err(|_| Errno::TOOBIG)?;
    let prog = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    // SAFETY: `prog` points at `filter`, which lives to the end of this function and has `len` entries; the kernel
    // copies it and checks every instruction.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const prog) };
    // A descriptor, or 0.
    if result >= 0 { Ok(result as libc::c_int) } else { Err(last_errno()) }
}

/// sched_setaffinity(2): the kernel leaves out what the cgroup does not have.
pub fn set_cpus(cpus: &[u32]) -> Result<(), Errno> {
    let mut set = rustix::thread::CpuSet::new();
    for cpu in cpus {
        let cpu = usize::try_from(*cpu).ok().filter(|cpu| *cpu < rustix::thread::CpuSet::MAX_CPU);
        set.set(cpu.ok_or(Errno::INVAL)?);
    }
    rustix::thread::sched_setaffinity(None, &set)
}

/// A session keyring that nobody else has (keyctl(2)). A kernel without keys has nothing to share.
pub(crate) fn new_session_keyring() -> Result<(), Errno> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: no name is given, so the kernel reads no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0_usize) };
    match if result >= 0 { Ok(()) } else { Err(last_errno()) } {
        Err(Errno::NOSYS) => Ok(()),
        other => other,
    }
}

/// ioprio_set(2) for the caller.
pub(crate) fn set_io_priority(priority: u32) -> Result<(), Errno> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: plain integers.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, priority) };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

/// personality(2).
pub(crate) fn set_personality(persona: u32) -> Result<(), Errno> {
    // SAFETY: a plain integer.
    let result = unsafe { libc::syscall(libc::SYS_personality, libc::c_ulong::from(persona)) };
    if result >= 0 { Ok(()) } else { Err(last_errno()) }
}

/// `struct sched_attr` as of Linux 3.14 (SCHED_ATTR_SIZE_VER0).
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// sched_setattr(2) for the caller.
pub(crate) fn set_scheduler(wanted: &Scheduler) -> Result<(), Errno> {
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: wanted.policy,
        flags: wanted.flags,
        nice: wanted.nice,
        priority: wanted.priority,
        runtime: wanted.runtime_ns,
        deadline: wanted.deadline_ns,
        period: wanted.period_ns,
    };
    // SAFETY: the kernel reads `attr`, whose size is its first field, during the call only.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

/// Closes every descriptor from `first` on. For a process that never returns into code which owns one.
pub(crate) fn close_from(first: u32) {
    // SAFETY: the caller never returns, so no owner of a closed descriptor uses or closes it again.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
}

/// Marks every descriptor from `first` on close-on-exec (close_range(2)).
pub fn cloexec_from(first: u32) -> Result<(), Errno> {
    // SAFETY: only flags of descriptors change; none is closed while Rust owns it.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_uint) };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}
