//! Everything the child does between clone and exec: one straight line of named steps. On failure it sends
//! (stage, errno) through a close-on-exec socket and leaves with `_exit`. No log, no lock, no panic, no `exit`. It may
//! allocate, because the keeper that cloned it has one thread ([`crate::spawn::SingleThread`]).
//!
//! ```text
//! signals, cgroup, oom score, session ─┬─> new: namespaces, host name, root, mounts, pivot ─┬─> limits, terminal, stdio,
//!                                      └─> join: setns into a living one ──────────────────┘   cwd, user, capabilities,
//!                                                                                              seccomp, exec
//! ```

use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use edged_model::keeper::{CgroupEntry, LaunchSpec};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::resolve::{self, Want};
use crate::spawn::Failure;
use crate::{fdpass, mount, privilege, rootfs};

macro_rules! stages {
    ($($stage:ident $text:literal,)*) => {
        /// The steps, in their order. Their words appear in `edgectl`: "mounts: No such device".
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Stage { $($stage,)* }

        const STAGES: &[(Stage, &str)] = &[$((Stage::$stage, $text),)*];
    };
}

stages! {
    Signals "signals",
    Cgroup "entering the cgroup",
    OomScore "oom score",
    Session "session",
    Join "entering the container",
    CgroupNamespace "cgroup namespace",
    NetworkNamespace "network namespace",
    Hostname "hostname",
    MountNamespace "mount namespace",
    Root "root file system",
    Mounts "mounts",
    Devices "device nodes",
    Links "links",
    Pivot "pivot_root",
    Sysctls "sysctls",
    MaskedPaths "masked paths",
    ReadonlyPaths "read-only paths",
    Limits "resource limits",
    Terminal "terminal",
    Stdio "standard streams",
    WorkingDirectory "working directory",
    User "user",
    Capabilities "capabilities",
    Seccomp "seccomp",
    Exec "exec",
}

impl Stage {
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        STAGES.get(number as usize).map(|(stage, _)| *stage)
    }

    pub fn text(self) -> &'static str {
        STAGES[self as usize].1
    }
}

/// The child's own descriptors.
#[derive(Debug)]
pub(crate) struct Plumbing {
    /// Where a failure, and before it a terminal's master, is told.
    pub talk: OwnedFd,
    pub stdio: Streams,
}

#[derive(Debug)]
pub(crate) enum Streams {
    Ready([OwnedFd; 3]),
    /// A pty of the container's own devpts, so that ttyname(3) works inside.
    Terminal {
        rows: u16,
        columns: u16,
    },
}

pub(crate) type Step<T = ()> = Result<T, (Stage, Errno)>;

/// Tags a result with its stage.
pub(crate) fn at<T, E: Into<Errno>>(stage: Stage, result: Result<T, E>) -> Step<T> {
    result.map_err(|error| (stage, error.into()))
}

/// `nix` and `rustix` each have an `Errno`; the number is the same.
fn errno(error: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(error as i32)
}

fn io_errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Runs the steps; does not come back.
pub(crate) fn run(spec: &LaunchSpec, fds: &[OwnedFd], join: Option<BorrowedFd<'_>>, plumbing: Plumbing) -> Infallible {
    let Plumbing { talk, stdio } = plumbing;
    let failed = match steps(spec, fds, join, &talk, stdio) {
        Ok(never) => match never {},
        Err((stage, errno)) => Failure { stage, errno: errno.raw_os_error() },
    };
    // Nobody can be told that telling failed.
    let _ = fdpass::send(talk.as_fd(), &failed.to_bytes(), &[]);
    // SAFETY: `_exit` runs no destructor and no handler of the parent whose memory this is a copy of.
    unsafe { libc::_exit(127) }
}

fn steps(
    spec: &LaunchSpec,
    fds: &[OwnedFd],
    join: Option<BorrowedFd<'_>>,
    talk: &OwnedFd,
    stdio: Streams,
) -> Step<Infallible> {
    at(Stage::Signals, reset_signals())?;
    at(Stage::Cgroup, enter_v1_cgroups(spec, fds))?;
    // Now, while /proc is the host's: a container's may be missing, or something else.
    at(Stage::OomScore, oom_score(spec))?;
    at(Stage::Session, nix::unistd::setsid().map_err(errno))?;
    match join {
        Some(target) => join_container(target)?,
        None => make_container(spec, fds)?,
    }
    at(Stage::Limits, limits(spec))?;
    let (stdio, terminal) = match stdio {
        Streams::Ready(stdio) => (stdio, false),
        Streams::Terminal { rows, columns } => {
            (at(Stage::Terminal, terminal(spec, join.is_none(), talk, rows, columns))?, true)
        }
    };
    if let (None, Some(rootfs)) = (join, &spec.rootfs) {
        at(Stage::Root, rootfs::seal_root(rootfs))?;
    }
    at(Stage::Stdio, wire_stdio(&stdio, terminal))?;
    at(Stage::WorkingDirectory, working_directory(&spec.cwd))?;
    if let Some(mask) = spec.umask {
        rustix::process::umask(Mode::from_raw_mode(mask));
    }
    let program = at(Stage::Exec, Program::prepare(spec))?;
    if !spec.no_new_privs {
        // Without no_new_privs a filter needs CAP_SYS_ADMIN, which is gone a few lines below (seccomp(2)).
        at(Stage::Seccomp, seccomp(spec))?;
    }
    at(Stage::Capabilities, privilege::drop_bounding(spec.capabilities.bounding))?;
    at(Stage::User, privilege::set_ids(spec.uid, spec.gid, &spec.additional_gids))?;
    at(Stage::Capabilities, privilege::set_capabilities(&spec.capabilities))?;
    at(Stage::Exec, privilege::cloexec_from(3))?;
    if spec.no_new_privs {
        at(Stage::Seccomp, privilege::set_no_new_privs())?;
        at(Stage::Seccomp, seccomp(spec))?;
    }
    at(Stage::Exec, program.exec())
}

/// The keeper blocks signals for its signalfd and ignores SIGPIPE, and whoever started it may have had it ignore more
/// (nohup(1)); a program expects none of it.
fn reset_signals() -> Result<(), Errno> {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    for number in 1..=privilege::LAST_SIGNAL {
        // SAFETY: SIG_DFL is no function of ours. SIGKILL, SIGSTOP and libc's own two say EINVAL: nothing to reset.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).map_err(errno)
}

fn seccomp(spec: &LaunchSpec) -> Result<(), Errno> {
    if spec.seccomp.is_empty() { Ok(()) } else { privilege::install_seccomp(&spec.seccomp) }
}

fn oom_score(spec: &LaunchSpec) -> Result<(), Errno> {
    let Some(adjust) = spec.oom_score_adj else { return Ok(()) };
    std::fs::write("/proc/self/oom_score_adj", adjust.to_string()).map_err(|error| io_errno(&error))
}

fn enter_v1_cgroups(spec: &LaunchSpec, fds: &[OwnedFd]) -> Result<(), Errno> {
    if let CgroupEntry::V1 { procs_fds } = &spec.cgroup {
        for index in procs_fds {
            let file = fds.get(*index as usize).ok_or(Errno::BADF)?;
            rustix::io::write(file, b"0")?;
        }
    }
    Ok(())
}

/// Into a living container. The pid namespace was entered by being born there.
fn join_container(target: BorrowedFd<'_>) -> Step {
    // Until exec this process is edged inside a foreign container (CVE-2016-9962). Nobody there can trace it or open
    // its files: the keeper is not dumpable (`Keeper::new`), so its children are born so.
    let namespaces = CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWNS;
    at(Stage::Join, setns(target, namespaces).map_err(errno))
}

fn make_container(spec: &LaunchSpec, fds: &[OwnedFd]) -> Step {
    let wants = |flag: CloneFlags| spec.namespaces & u64::from(flag.bits() as u32) != 0;
    if wants(CloneFlags::CLONE_NEWCGROUP) {
        at(Stage::CgroupNamespace, unshare(CloneFlags::CLONE_NEWCGROUP).map_err(errno))?;
    }
    if let Some(index) = spec.netns_fd {
        let netns = at(Stage::NetworkNamespace, fds.get(index as usize).ok_or(Errno::BADF))?;
        at(Stage::NetworkNamespace, setns(netns, CloneFlags::CLONE_NEWNET).map_err(errno))?;
    }
    if let Some(hostname) = &spec.hostname {
        at(Stage::Hostname, rustix::system::sethostname(hostname.as_bytes()))?;
    }
    match &spec.rootfs {
        Some(rootfs) => rootfs::make(spec, rootfs),
        None => Ok(()),
    }
}

fn limits(spec: &LaunchSpec) -> Result<(), Errno> {
    privilege::restore_open_files()?;
    for (resource, soft, hard) in &spec.rlimits {
        privilege::set_limit(*resource, *soft, *hard)?;
    }
    Ok(())
}

/// Makes a pty in the container's devpts, gives its master to the keeper, and puts the other side onto `/dev/console`
/// of a new container (runtime-spec, config.md, "terminal").
fn terminal(spec: &LaunchSpec, new: bool, talk: &OwnedFd, rows: u16, columns: u16) -> Result<[OwnedFd; 3], Errno> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let inside = rustix::fs::ResolveFlags::IN_ROOT | rustix::fs::ResolveFlags::NO_MAGICLINKS;
    let master = rustix::fs::openat2(&root, "/dev/pts/ptmx", flags, Mode::empty(), inside)?;
    // An image could bring its own /dev/pts.
    if rustix::fs::fstatfs(&master)?.f_type as u64 != DEVPTS_SUPER_MAGIC {
        return Err(Errno::NOTTY);
    }
    rustix::pty::unlockpt(&master)?;
    let peer = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY | rustix::pty::OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, peer)?;
    let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&master, size)?;
    rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(spec.uid)), None)?;
    if new && spec.rootfs.is_some() {
        let tree = mount::clone_tree(slave.as_fd(), false)?;
        let console = resolve::ensure(root.as_fd(), Path::new("/dev/console"), Want::File)?;
        mount::attach(tree.as_fd(), console.as_fd())?;
    }
    fdpass::send(talk.as_fd(), MASTER_FOLLOWS, &[master.as_fd()]).map_err(|error| io_errno(&error))?;
    let copy = || slave.try_clone().map_err(|error| io_errno(&error));
    Ok([copy()?, copy()?, slave])
}

/// linux/magic.h.
const DEVPTS_SUPER_MAGIC: u64 = 0x1cd1;

/// The message beside which a terminal's master travels.
pub(crate) const MASTER_FOLLOWS: &[u8] = b"T";

fn wire_stdio(stdio: &[OwnedFd; 3], terminal: bool) -> Result<(), Errno> {
    rustix::stdio::dup2_stdin(&stdio[0])?;
    rustix::stdio::dup2_stdout(&stdio[1])?;
    rustix::stdio::dup2_stderr(&stdio[2])?;
    if terminal {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
    }
    Ok(())
}

/// Changes to `cwd` and makes sure that it lies inside the root (CVE-2024-21626).
fn working_directory(cwd: &str) -> Result<(), Errno> {
    let cwd = if cwd.is_empty() { "/" } else { cwd };
    rustix::process::chdir(cwd)?;
    let seen = rustix::process::getcwd(Vec::new())?;
    if seen.to_bytes().starts_with(b"/") { Ok(()) } else { Err(Errno::NOENT) }
}

/// What execve(2) needs, made before the seccomp filter is on.
struct Program {
    candidates: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    fn prepare(spec: &LaunchSpec) -> Result<Self, Errno> {
        let text = |s: &String| CString::new(s.as_str()).map_err(|_| Errno::INVAL);
        let argv: Vec<_> = spec.argv.iter().map(text).collect::<Result<_, _>>()?;
        let env: Vec<_> = spec.env.iter().map(text).collect::<Result<_, _>>()?;
        let program = spec.argv.first().filter(|program| !program.is_empty()).ok_or(Errno::NOENT)?;
        let candidates = if program.contains('/') {
            vec![text(program)?]
        } else {
            let path = spec.env.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
            path.split(':')
                .filter(|dir| !dir.is_empty())
                .map(|dir| text(&format!("{dir}/{program}")))
                .collect::<Result<_, _>>()?
        };
        Ok(Self { candidates, argv, env })
    }

    /// Tries each candidate as execvp(3) does: a file that is not there, or is no directory, lets the next one try.
    fn exec(&self) -> Result<Infallible, Errno> {
        let mut result = Errno::NOENT;
        for candidate in &self.candidates {
            let Err(error) = nix::unistd::execve(candidate, &self.argv, &self.env);
            match errno(error) {
                Errno::NOENT | Errno::NOTDIR => {}
                Errno::ACCESS => result = Errno::ACCESS,
                other => return Err(other),
            }
        }
        Err(result)
    }
}

/// Where programs are sought when the image says nothing (image-spec leaves it open; this is what engines take).
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_stages_is_in_their_order() {
        for (number, (stage, text)) in STAGES.iter().enumerate() {
            assert_eq!(*stage as usize, number, "{text}");
        }
    }
}
