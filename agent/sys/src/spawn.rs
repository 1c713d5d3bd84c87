//! Starting a child: clone3(2) with a pidfd, born inside its cgroup, its failures told through a pipe.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use edged_model::keeper::{CgroupEntry, IdMapping, LaunchSpec, Stdio};
use nix::sched::CloneFlags;

use crate::beside::network;
use crate::child::{self, Plumbing, Stage, Streams};
use crate::enter;

/// Proof that this process has one thread. Only then may the child between clone and exec allocate and use the whole
/// standard library: no other thread can have held a lock at the moment of the clone.
#[derive(Debug)]
pub struct SingleThread(());

impl SingleThread {
    /// Looks at `/proc/self/task`. Whoever keeps the proof promises to start no thread afterwards.
    pub fn prove() -> io::Result<Self> {
        // A directory has a link for itself, one in its parent, and one for each directory in it: the threads.
        match rustix::fs::stat("/proc/self/task")?.st_nlink {
            3 => Ok(Self(())),
            _ => Err(io::Error::other("this process has more than one thread")),
        }
    }
}

/// A child that was cloned and is on its way to exec.
#[derive(Debug)]
pub struct Launching {
    pub pid: i32,
    pub pidfd: OwnedFd,
    /// What the child says on its way: [`hear`].
    pub talk: OwnedFd,
    /// The read ends of stdout and stderr. A pty's master comes later, by [`hear`].
    pub outputs: Vec<OwnedFd>,
}

/// One word of a child on its way to exec.
#[derive(Debug)]
pub enum Heard {
    /// The master of its terminal.
    Master(OwnedFd),
    /// Its namespaces are there: it waits for [`go_on`].
    Holding,
    /// All but exec is done: it waits at its gate.
    Ready,
    /// Exec was reached, or the child is dead without a word: its end tells which.
    Silence,
    Failed(Failure),
}

/// Reads one word from [`Launching::talk`]; never waits once epoll has reported it or the child is dead.
pub fn hear(talk: BorrowedFd<'_>) -> io::Result<Heard> {
    let mut buffer = [0; Failure::MAX_BYTES];
    let (count, mut fds) = crate::fdpass::recv(talk, &mut buffer)?;
    match (&buffer[..count], fds.pop()) {
        ([], _) => Ok(Heard::Silence),
        (child::MASTER_FOLLOWS, Some(master)) => Ok(Heard::Master(master)),
        (child::HOLDING, None) => Ok(Heard::Holding),
        (child::READY, None) => Ok(Heard::Ready),
        (bytes, _) => Failure::parse(bytes)
            .map(Heard::Failed)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no word of a child")),
    }
}

/// Lets a child that holds go on. `state` is what its hooks read; it must not be empty.
pub fn go_on(talk: BorrowedFd<'_>, state: &[u8]) -> io::Result<()> {
    if state.is_empty() || state.len() > child::MAX_STATE_BYTES {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    crate::fdpass::send(talk, state, &[])
}

/// Gives a child the filter that it waits for ([`LaunchSpec::seccomp_follows`]).
pub fn give_filter(talk: BorrowedFd<'_>, filter: &[u8]) -> io::Result<()> {
    go_on(talk, filter)
}

/// Which step failed, how, and on what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub stage: Stage,
    pub errno: i32,
    /// A path, a name; often empty.
    pub what: String,
}

impl Failure {
    const MAX_BYTES: usize = 512;

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = (self.stage as u32).to_ne_bytes().to_vec();
        bytes.extend(self.errno.to_ne_bytes());
        bytes.extend(self.what.bytes().take(Self::MAX_BYTES - bytes.len()));
        bytes
    }

    /// What the child wrote; `None` for anything shorter than its two numbers.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (stage, rest) = bytes.split_first_chunk()?;
        let (errno, what) = rest.split_first_chunk()?;
        let stage = Stage::from_number(u32::from_ne_bytes(*stage))?;
        Some(Self { stage, errno: i32::from_ne_bytes(*errno), what: String::from_utf8_lossy(what).into_owned() })
    }

    /// The step, and what it was about.
    pub fn place(&self) -> String {
        let stage = self.stage.text();
        if self.what.is_empty() { stage.to_owned() } else { format!("{stage} ({})", self.what) }
    }
}

/// Why no child was born.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error("descriptor {index} of {given} is named in the launch")]
    NoSuchDescriptor { index: u32, given: usize },
    #[error("pipes")]
    Pipes(#[source] io::Error),
    #[error("the pid namespace of the container to join")]
    JoinPid(#[source] io::Error),
    #[error("clone3")]
    Clone(#[source] io::Error),
    #[error("id maps of the user namespace")]
    IdMaps(#[source] io::Error),
}

impl SpawnError {
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoSuchDescriptor { .. } => libc::EBADF,
            Self::Pipes(source) | Self::JoinPid(source) | Self::Clone(source) | Self::IdMaps(source) => {
                source.raw_os_error().unwrap_or(0)
            }
        }
    }
}

/// What `spec` names by index, out of the descriptors that came with the request.
pub fn descriptor<'f>(fds: &'f [OwnedFd], index: u32) -> Result<BorrowedFd<'f>, SpawnError> {
    fds.get(index as usize).map(AsFd::as_fd).ok_or(SpawnError::NoSuchDescriptor { index, given: fds.len() })
}

/// Starts what `spec` describes. `join` is the pidfd of the living container to enter.
pub fn launch(
    proof: &SingleThread,
    spec: &LaunchSpec,
    fds: &[OwnedFd],
    join: Option<BorrowedFd<'_>>,
) -> Result<Launching, SpawnError> {
    let cgroup = match &spec.cgroup {
        CgroupEntry::V2 { dir_fd } => Some(descriptor(fds, *dir_fd)?),
        CgroupEntry::V1 { .. } | CgroupEntry::Inherit => None,
    };
    let (talk, childs_talk) = talk()?;
    let (plumbing, outputs) = plumbing(spec, fds, childs_talk)?;
    let of = |flag: CloneFlags| spec.joins.iter().find(|join| join.flag == to_flags(flag));
    // The cgroup namespace's root is the cgroup one is in when it is made: the child unshares it once it is inside. A
    // time namespace is for children only (time_namespaces(7)): the child makes it, and enters it when its clocks are
    // set.
    let late = to_flags(CloneFlags::CLONE_NEWCGROUP) | to_flags(enter::CLONE_NEWTIME);
    let mut flags = spec.namespaces & !late;
    if plumbing.network_beside {
        flags &= !to_flags(CloneFlags::CLONE_NEWNET);
    }
    let restore = match (join, of(CloneFlags::CLONE_NEWPID)) {
        (Some(target), _) => {
            flags = 0;
            Some(enter_pid_namespace(target).map_err(SpawnError::JoinPid)?)
        }
        (None, Some(join)) => Some(enter_pid_namespace(descriptor(fds, join.fd)?).map_err(SpawnError::JoinPid)?),
        (None, None) => None,
    };
    let child = || match child::run(spec, fds, join, plumbing) {};
    let cloned = match of(CloneFlags::CLONE_NEWUSER) {
        None => clone3(proof, flags, cgroup, child),
        // The rest it makes itself, once it is inside: so nobody has to be waited for.
        Some(_) if enter::is_childs_own_way(spec) => {
            clone3(proof, flags & to_flags(CloneFlags::CLONE_NEWPID), cgroup, child)
        }
        Some(join) => launch_inside(proof, flags, cgroup, descriptor(fds, join.fd)?, child),
    };
    if let Some(own) = restore {
        // Without this, all later children would be born in the container. For one's own namespace it needs nothing
        // but CAP_SYS_ADMIN, which the keeper has: it does not fail.
        nix::sched::setns(&own, CloneFlags::CLONE_NEWPID).map_err(|errno| SpawnError::JoinPid(errno.into()))?;
    }
    let (pid, pidfd) = cloned.map_err(SpawnError::Clone)?;
    if spec.namespaces & to_flags(CloneFlags::CLONE_NEWUSER) != 0 {
        write_id_maps(pid, &spec.uid_map, &spec.gid_map).map_err(SpawnError::IdMaps)?;
        if !spec.hold {
            go_on(talk.as_fd(), b"{}").map_err(SpawnError::IdMaps)?;
        }
    }
    Ok(Launching { pid, pidfd, talk, outputs })
}

/// user_namespaces(7): each map is written once, by somebody with power over both namespaces.
pub(crate) fn write_id_maps(pid: i32, uid_map: &[IdMapping], gid_map: &[IdMapping]) -> io::Result<()> {
    let text = |map: &[IdMapping]| {
        map.iter().map(|one| format!("{} {} {}\n", one.inside, one.outside, one.count)).collect::<String>()
    };
    std::fs::write(format!("/proc/{pid}/uid_map"), text(uid_map))?;
    std::fs::write(format!("/proc/{pid}/gid_map"), text(gid_map))
}

/// A child that is born in a user namespace that exists, and in new namespaces owned by it. Who enters a user namespace
/// does not come back, so a helper goes, and makes the child in our stead (`CLONE_PARENT`).
fn launch_inside(
    proof: &SingleThread,
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
    user_namespace: BorrowedFd<'_>,
    child: impl FnOnce(),
) -> io::Result<(i32, OwnedFd)> {
    let (ours, theirs) = talk().map_err(io::Error::other)?;
    let (helper, _) = clone3(proof, 0, cgroup, || {
        let made = nix::sched::setns(user_namespace, CloneFlags::CLONE_NEWUSER)
            .map_err(io::Error::from)
            .and_then(|()| enter::become_root_of_it().map_err(io::Error::from))
            .and_then(|()| clone3(proof, flags | CLONE_PARENT, None, child));
        let (number, fds) = match &made {
            Ok((pid, pidfd)) => (*pid, vec![pidfd.as_fd()]),
            Err(error) => (-error.raw_os_error().unwrap_or(libc::EIO), Vec::new()),
        };
        let _ = crate::fdpass::send(theirs.as_fd(), &number.to_ne_bytes(), &fds);
        // SAFETY: `_exit` runs nothing of the parent whose memory this is a copy of.
        unsafe { libc::_exit(0) }
    })?;
    let mut number = [0; 4];
    let (count, mut fds) = crate::fdpass::recv(ours.as_fd(), &mut number)?;
    let helper = rustix::process::Pid::from_raw(helper);
    let _ = rustix::process::waitpid(helper, rustix::process::WaitOptions::empty());
    match (i32::from_ne_bytes(number), fds.pop()) {
        (pid, Some(pidfd)) if count == 4 && pid > 0 => Ok((pid, pidfd)),
        (errno, _) if errno < 0 => Err(io::Error::from_raw_os_error(-errno)),
        _ => Err(io::Error::other("the helper in the user namespace died")),
    }
}

/// A user namespace with these maps, by descriptor: for an idmapped mount. It is owned by a child that ends at once.
pub fn user_namespace(proof: &SingleThread, uid_map: &[IdMapping], gid_map: &[IdMapping]) -> io::Result<OwnedFd> {
    let (ours, theirs) = talk().map_err(io::Error::other)?;
    let (pid, _) = clone3(proof, to_flags(CloneFlags::CLONE_NEWUSER), None, || {
        let _ = crate::fdpass::recv(theirs.as_fd(), &mut [0]);
        // SAFETY: `_exit` runs nothing of the parent whose memory this is a copy of.
        unsafe { libc::_exit(0) }
    })?;
    let namespace =
        write_id_maps(pid, uid_map, gid_map).and_then(|()| std::fs::File::open(format!("/proc/{pid}/ns/user")));
    let _ = crate::fdpass::send(ours.as_fd(), b"g", &[]);
    let _ = rustix::process::waitpid(rustix::process::Pid::from_raw(pid), rustix::process::WaitOptions::empty());
    namespace.map(OwnedFd::from)
}

fn to_flags(flags: CloneFlags) -> u64 {
    u64::from(flags.bits() as u32)
}

/// Children from now on are born in the pid namespace of `target`; returns the way back.
fn enter_pid_namespace(target: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let own = OwnedFd::from(std::fs::File::open("/proc/self/ns/pid")?);
    nix::sched::setns(target, CloneFlags::CLONE_NEWPID)?;
    Ok(own)
}

fn pipe() -> Result<(OwnedFd, OwnedFd), SpawnError> {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|errno| SpawnError::Pipes(errno.into()))
}

/// Where a child tells how far it came: whole messages, with a descriptor beside them if need be.
fn talk() -> Result<(OwnedFd, OwnedFd), SpawnError> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|errno| SpawnError::Pipes(errno.into()))
}

/// The child's ends and ours.
fn plumbing(spec: &LaunchSpec, fds: &[OwnedFd], talk: OwnedFd) -> Result<(Plumbing, Vec<OwnedFd>), SpawnError> {
    let copy = |index: u32| descriptor(fds, index)?.try_clone_to_owned().map_err(SpawnError::Pipes);
    let null = || std::fs::File::open("/dev/null").map(OwnedFd::from).map_err(SpawnError::Pipes);
    let network_beside = network::is_wanted(spec);
    match &spec.stdio {
        Stdio::Pipes => {
            let (out_read, out_write) = pipe()?;
            let (err_read, err_write) = pipe()?;
            let stdio = Streams::Ready([null()?, out_write, err_write]);
            Ok((Plumbing { talk, stdio, network_beside }, vec![out_read, err_read]))
        }
        Stdio::Given { stdin_fd, stdout_fd, stderr_fd } => {
            let stdio = Streams::Ready([copy(*stdin_fd)?, copy(*stdout_fd)?, copy(*stderr_fd)?]);
            Ok((Plumbing { talk, stdio, network_beside }, Vec::new()))
        }
        Stdio::Terminal { rows, columns } => {
            let stdio = Streams::Terminal { rows: *rows, columns: *columns };
            Ok((Plumbing { talk, stdio, network_beside }, Vec::new()))
        }
    }
}

/// clone3(2), Linux 5.7. The crate's own constant is an `int` and overflows.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The new process is a sister, not a child.
const CLONE_PARENT: u64 = libc::CLONE_PARENT as u64;

/// `struct clone_args` of clone3(2), Linux 5.7: the same on every architecture; the crate has it only for some.
#[repr(C, align(8))]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// clone3(2) without a new stack: the child goes on where the parent is, like fork(2).
fn clone3(
    _proof: &SingleThread,
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
    child: impl FnOnce(),
) -> io::Result<(i32, OwnedFd)> {
    // SAFETY: `_proof` says that no other thread held a lock at the moment of the clone, so the child may do anything.
    // It never returns from here: `child` cannot return, or ends in `_exit` below.
    match unsafe { raw_clone3(flags, cgroup) }? {
        Some(born) => Ok(born),
        None => {
            child();
            // SAFETY: the child's steps end in exec or `_exit`; should they ever come back, this copy of the parent
            // must end here without running anything of the parent's.
            unsafe { libc::_exit(127) }
        }
    }
}

/// `None` in the child.
///
/// # Safety
/// The child is a copy of the parent with one thread: unless the parent had one thread only, it may call nothing but
/// async-signal-safe functions (signal-safety(7)), and it must end in exec or `_exit`.
pub(crate) unsafe fn raw_clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Option<(i32, OwnedFd)>> {
    let mut pidfd: libc::c_int = -1;
    let mut flags = flags | libc::CLONE_PIDFD as u64;
    let mut cgroup_fd = 0;
    if let Some(fd) = cgroup {
        flags |= CLONE_INTO_CGROUP;
        cgroup_fd = u64::from(fd.as_raw_fd().unsigned_abs());
    }
    let args = CloneArgs {
        flags,
        pidfd: (&raw mut pidfd).expose_provenance() as u64,
        child_tid: 0,
        parent_tid: 0,
        // A sister's is that of our own birth: naming one is an error (clone(2)).
        exit_signal: if flags & CLONE_PARENT == 0 { libc::SIGCHLD as u64 } else { 0 },
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup_fd,
    };
    // SAFETY: without CLONE_VM the child has its own copy of the memory; what it does with it is the caller's promise.
    // `args` and `pidfd` live across the call.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match result {
        0 => Ok(None),
        -1 => Err(io::Error::last_os_error()),
        pid => {
            // SAFETY: CLONE_PIDFD was given and clone3 succeeded, so the kernel wrote a new descriptor that is ours.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Some((i32::try_from(pid).map_err(io::Error::other)?, pidfd)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_survives_the_pipe() {
        let failure = Failure { stage: Stage::Exec, errno: libc::ENOENT, what: "/bin/nothing".into() };
        assert_eq!(Failure::parse(&failure.to_bytes()), Some(failure));
        let long = Failure { stage: Stage::Mounts, errno: 1, what: "x".repeat(1000) };
        assert_eq!(long.to_bytes().len(), Failure::MAX_BYTES);
        assert_eq!(Failure::parse(&[0; 7]), None);
        assert_eq!(Failure::parse(&[0xff; 8]), None);
    }
}
