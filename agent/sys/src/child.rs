//! Everything the child does between clone and exec: one straight line of named steps. On failure it sends
//! (stage, errno) through a close-on-exec socket and leaves with `_exit`. No log, no lock, no panic, no `exit`. It may
//! allocate, because the keeper that cloned it has one thread ([`crate::spawn::SingleThread`]).
//!
//! ```text
//! signals, cgroup, oom score, session ─┬─> new: namespaces, host name, root, mounts, pivot ─┬─> limits, terminal, stdio,
//!                                      └─> join: setns into a living one ──────────────────┘   cwd, gate, user,
//!                                                                                capabilities, hooks, seccomp, exec
//! ```

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use edged_model::keeper::{CgroupEntry, IdMapping, LaunchSpec, SecurityLabel};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::beside::Network;
use crate::program::Program;
use crate::resolve;
use crate::spawn::Failure;
use crate::{device, enter, fdpass, hook, mount, privilege, program, rootfs};

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
    UserNamespace "user namespace",
    TimeNamespace "time namespace",
    CgroupNamespace "cgroup namespace",
    NetworkNamespace "network namespace",
    OtherNamespace "entering a namespace",
    Hold "the word to go on",
    Hostname "hostname",
    MountNamespace "mount namespace",
    Root "root file system",
    Mounts "mounts",
    Devices "device nodes",
    Links "links",
    CreateContainerHooks "createContainer hooks",
    Pivot "pivot_root",
    Sysctls "sysctls",
    MaskedPaths "masked paths",
    ReadonlyPaths "read-only paths",
    Limits "resource limits",
    Terminal "terminal",
    Stdio "standard streams",
    WorkingDirectory "working directory",
    Scheduling "scheduler, CPUs, I/O priority, personality",
    Gate "waiting for start",
    User "user",
    Capabilities "capabilities",
    Label "security label",
    StartContainerHooks "startContainer hooks",
    Seccomp "seccomp",
    Init "init",
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
    /// The child was born in the network namespace of its parent, and makes its own (`beside`).
    pub network_beside: bool,
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

/// Where and how a step failed, and on what.
#[derive(Debug)]
pub(crate) struct Fault {
    pub stage: Stage,
    pub errno: Errno,
    /// A path, a name; often empty.
    pub what: String,
}

pub(crate) type Step<T = ()> = Result<T, Fault>;

/// Tags a result with its stage.
pub(crate) fn at<T, E: Into<Errno>>(stage: Stage, result: Result<T, E>) -> Step<T> {
    result.map_err(|error| Fault { stage, errno: error.into(), what: String::new() })
}

/// As [`at`], and with what it was about.
pub(crate) fn about<T, E: Into<Errno>>(stage: Stage, what: &str, result: Result<T, E>) -> Step<T> {
    result.map_err(|error| Fault { stage, errno: error.into(), what: what.to_owned() })
}

/// `nix` and `rustix` each have an `Errno`; the number is the same.
pub(crate) fn errno(error: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(error as i32)
}

pub(crate) fn io_errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Runs the steps; does not come back.
pub(crate) fn run(spec: &LaunchSpec, fds: &[OwnedFd], join: Option<BorrowedFd<'_>>, plumbing: Plumbing) -> Infallible {
    let Plumbing { talk, stdio, network_beside } = plumbing;
    let mut starter = None;
    let fault = match steps(spec, fds, join, &talk, stdio, network_beside, &mut starter) {
        Ok(never) => match never {},
        Err(fault) => fault,
    };
    let failure = Failure { stage: fault.stage, errno: fault.errno.raw_os_error(), what: fault.what };
    // Whoever opened the gate waits for the end of it; before that, the one who cloned us listens. Nobody can be told
    // that telling failed.
    let listener = starter.as_ref().unwrap_or(&talk);
    let _ = fdpass::send(listener.as_fd(), &failure.to_bytes(), &[]);
    // SAFETY: `_exit` runs no destructor and no handler of the parent whose memory this is a copy of.
    unsafe { libc::_exit(127) }
}

fn steps(
    spec: &LaunchSpec,
    fds: &[OwnedFd],
    join: Option<BorrowedFd<'_>>,
    talk: &OwnedFd,
    stdio: Streams,
    network_beside: bool,
    starter: &mut Option<OwnedFd>,
) -> Step<Infallible> {
    at(Stage::Signals, reset_signals())?;
    at(Stage::Cgroup, enter_v1_cgroups(spec, fds))?;
    // From here on the memory is the container's.
    let network = network_beside.then(Network::begin);
    // Now, while /proc is the host's: a container's may be missing, or something else.
    at(Stage::OomScore, oom_score(spec))?;
    at(Stage::Session, nix::unistd::setsid().map_err(errno))?;
    if let Streams::Ready(streams) = &stdio {
        at(Stage::Stdio, give_streams(spec, streams))?;
    }
    let state = match join {
        Some(target) => {
            at(Stage::Join, enter::container(target))?;
            Vec::new()
        }
        None => make_container(spec, fds, talk, network)?,
    };
    let filter = at(Stage::Seccomp, if spec.seccomp_follows { hear(talk) } else { Ok(Vec::new()) })?;
    let notifier = at(Stage::Hold, Notifier::hear(spec, fds, talk))?;
    if join.is_none() && !spec.keep_keyring {
        new_keyring(spec)?;
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
    drop(stdio);
    about(Stage::WorkingDirectory, &spec.cwd, working_directory(&spec.cwd))?;
    at(Stage::Scheduling, scheduling(spec))?;
    if let Some(mask) = spec.umask {
        rustix::process::umask(Mode::from_raw_mode(mask));
    }
    let program = about(Stage::Exec, spec.argv.first().map_or("", String::as_str), Program::prepare(spec))?;
    if let Some(index) = spec.gate_fd {
        *starter = Some(at(Stage::Gate, wait_at_gate(fds, index, talk))?);
    }
    become_the_program(spec, talk, starter.as_ref(), &Words { state, filter, notifier }, &program)
}

/// What the parent has said.
struct Words<'a> {
    /// The container's state as hooks read it; empty where nobody held the child.
    state: Vec<u8>,
    /// The filter; empty where the launch has it, or none.
    filter: Vec<u8>,
    notifier: Option<Notifier<'a>>,
}

/// Who decides about system calls that the filter does not decide about, and what that one is to know of this container.
struct Notifier<'a> {
    socket: &'a OwnedFd,
    words: Vec<u8>,
}

impl<'a> Notifier<'a> {
    fn hear(spec: &LaunchSpec, fds: &'a [OwnedFd], talk: &OwnedFd) -> Result<Option<Self>, Errno> {
        let Some(index) = spec.seccomp_listener_fd else { return Ok(None) };
        let socket = fds.get(index as usize).ok_or(Errno::BADF)?;
        Ok(Some(Self { socket, words: hear(talk)? }))
    }
}

/// From here on power is only given away.
fn become_the_program(
    spec: &LaunchSpec,
    talk: &OwnedFd,
    starter: Option<&OwnedFd>,
    words: &Words<'_>,
    program: &Program,
) -> Step<Infallible> {
    if !spec.no_new_privs {
        // Without no_new_privs a filter needs CAP_SYS_ADMIN, which is gone a few lines below (seccomp(2)).
        at(Stage::Seccomp, seccomp(spec, words))?;
    }
    at(Stage::Capabilities, privilege::drop_bounding(spec.capabilities.bounding))?;
    at(Stage::User, privilege::set_ids(spec.uid, spec.gid, &spec.additional_gids))?;
    at(Stage::Capabilities, privilege::set_capabilities(&spec.capabilities))?;
    for one in &spec.start_container_hooks {
        about(Stage::StartContainerHooks, &one.path, hook::run(one, &words.state).map_err(|error| error.errno()))?;
    }
    at(Stage::Exec, privilege::cloexec_from(3 + spec.kept_fds))?;
    if spec.init {
        at(Stage::Init, program::stay_as_init(talk, starter))?;
    }
    if let Some(label) = &spec.label {
        let (SecurityLabel::AppArmor(name) | SecurityLabel::SeLinux(name)) = label;
        about(Stage::Label, name, set_label(label))?;
    }
    if spec.no_new_privs {
        at(Stage::Seccomp, privilege::set_no_new_privs())?;
        at(Stage::Seccomp, seccomp(spec, words))?;
    }
    about(Stage::Exec, spec.argv.first().map_or("", String::as_str), program.exec())
}

/// Pipes are the host root's, who is a stranger where ids are mapped: a program that opens `/dev/stdout` anew must own it.
fn give_streams(spec: &LaunchSpec, streams: &[OwnedFd; 3]) -> Result<(), Errno> {
    let outside = |map: &[IdMapping], id: u32| {
        let within = |one: &&IdMapping| id.checked_sub(one.inside).is_some_and(|above| above < one.count);
        map.iter().find(within).map(|one| one.outside + (id - one.inside))
    };
    let (uid, gid) = (outside(&spec.uid_map, spec.uid), outside(&spec.gid_map, spec.gid));
    // Who is born in a new user namespace has no right to, and whoever gave the streams sees to it.
    let is_new = spec.namespaces & u64::from(CloneFlags::CLONE_NEWUSER.bits() as u32) != 0;
    let (Some(uid), Some(gid), false) = (uid, gid, is_new) else { return Ok(()) };
    for stream in streams {
        if FileType::from_raw_mode(rustix::fs::fstat(stream)?.st_mode) == FileType::Fifo {
            rustix::fs::fchown(stream, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
    }
    Ok(())
}

/// Says that all is ready, and waits until somebody connects: the connection then tells what came of exec.
fn wait_at_gate(fds: &[OwnedFd], index: u32, talk: &OwnedFd) -> Result<OwnedFd, Errno> {
    let gate = fds.get(index as usize).ok_or(Errno::BADF)?;
    fdpass::send(talk.as_fd(), READY, &[]).map_err(|error| io_errno(&error))?;
    loop {
        match rustix::net::accept_with(gate, rustix::net::SocketFlags::CLOEXEC) {
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            starter => return starter,
        }
    }
}

fn scheduling(spec: &LaunchSpec) -> Result<(), Errno> {
    if let Some(scheduler) = &spec.scheduler {
        privilege::set_scheduler(scheduler)?;
    }
    if !spec.cpus.is_empty() {
        privilege::set_cpus(&spec.cpus)?;
    }
    if let Some(priority) = spec.io_priority {
        privilege::set_io_priority(priority)?;
    }
    spec.personality.map_or(Ok(()), privilege::set_personality)
}

/// apparmor(7), selinux(8): the label is taken on at the next exec. The path is of the procfs that the container has
/// now; it must be one.
fn set_label(label: &SecurityLabel) -> Result<(), Errno> {
    let (paths, text): (&[&str], _) = match label {
        SecurityLabel::AppArmor(profile) => (&["self/attr/apparmor/exec", "self/attr/exec"], format!("exec {profile}")),
        SecurityLabel::SeLinux(context) => (&["self/attr/exec"], context.clone()),
    };
    set_attribute(paths, &text)
}

/// With the program's own label, or the program could not use it (keyrings(7)). The next exec forgets that again.
fn new_keyring(spec: &LaunchSpec) -> Step {
    if let Some(SecurityLabel::SeLinux(context)) = &spec.label {
        about(Stage::Label, context, set_attribute(&["self/attr/keycreate"], context))?;
    }
    at(Stage::Session, privilege::new_session_keyring())
}

/// The first of `paths` that this kernel has.
fn set_attribute(paths: &[&str], text: &str) -> Result<(), Errno> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mut result = Err(Errno::NOENT);
    for path in paths {
        result = resolve::open_proc(root.as_fd(), path, OFlags::WRONLY);
        if result.is_ok() {
            break;
        }
    }
    rustix::io::write(&result?, text.as_bytes()).map(drop)
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

fn seccomp(spec: &LaunchSpec, words: &Words<'_>) -> Result<(), Errno> {
    let filter = if spec.seccomp_follows { &words.filter } else { &spec.seccomp };
    if filter.is_empty() {
        return Ok(());
    }
    let Some(Notifier { socket, words }) = &words.notifier else {
        return privilege::install_seccomp(filter, spec.seccomp_flags);
    };
    let listener = privilege::install_seccomp_with_listener(filter, spec.seccomp_flags)?;
    // The one call that the filter must not ask about: nobody could answer yet.
    fdpass::send(socket.as_fd(), words, &[listener.as_fd()]).map_err(|error| io_errno(&error))
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

/// Namespaces and file system. Gives back what the parent said when it let us go on: the container's state.
fn make_container(spec: &LaunchSpec, fds: &[OwnedFd], talk: &OwnedFd, mut network: Option<Network>) -> Step<Vec<u8>> {
    let wants = |flag: CloneFlags| spec.namespaces & u64::from(flag.bits() as u32) != 0;
    let inside = enter::is_childs_own_way(spec);
    let procfs = if inside { enter::own_ids(spec, fds)? } else { None };
    enter::joins(spec, fds)?;
    if wants(CloneFlags::CLONE_NEWCGROUP) {
        at(Stage::CgroupNamespace, unshare(CloneFlags::CLONE_NEWCGROUP).map_err(errno))?;
    }
    if let (Some(index), false) = (spec.netns_fd, inside) {
        let netns = at(Stage::NetworkNamespace, fds.get(index as usize).ok_or(Errno::BADF))?;
        at(Stage::NetworkNamespace, nix::sched::setns(netns, CloneFlags::CLONE_NEWNET).map_err(errno))?;
    }
    if wants(enter::CLONE_NEWTIME) {
        at(Stage::TimeNamespace, unshare(enter::CLONE_NEWTIME).map_err(errno))?;
    }
    let new_user = wants(CloneFlags::CLONE_NEWUSER);
    // Of one that came with the clone; whoever lets us go on may want to use it.
    if wants(CloneFlags::CLONE_NEWNET) && network.is_none() && !inside {
        at(Stage::NetworkNamespace, device::loopback_up())?;
    }
    let mut state = Vec::new();
    if spec.hold || new_user {
        // Whoever lets us go on looks at the namespaces.
        enter_network(&mut network)?;
        state = at(Stage::Hold, hold(talk))?;
    }
    if new_user {
        at(Stage::UserNamespace, enter::become_root_of_it())?;
    }
    if wants(enter::CLONE_NEWTIME) {
        at(Stage::TimeNamespace, enter::time_for_children())?;
    }
    if let Some(hostname) = &spec.hostname {
        at(Stage::Hostname, rustix::system::sethostname(hostname.as_bytes()))?;
    }
    if let Some(domainname) = &spec.domainname {
        at(Stage::Hostname, rustix::system::setdomainname(domainname.as_bytes()))?;
    }
    if let Some(rootfs) = &spec.rootfs {
        rootfs::make(spec, rootfs, fds, procfs.as_ref(), &mut network, &state)?;
    }
    enter_network(&mut network)?;
    Ok(state)
}

/// Once; then there is nothing more to enter.
pub(crate) fn enter_network(network: &mut Option<Network>) -> Step {
    network.take().map_or(Ok(()), |network| at(Stage::NetworkNamespace, network.enter()))
}

/// Says that the namespaces are there; the answer is the container's state.
fn hold(talk: &OwnedFd) -> Result<Vec<u8>, Errno> {
    fdpass::send(talk.as_fd(), HOLDING, &[]).map_err(|error| io_errno(&error))?;
    hear(talk)
}

fn hear(talk: &OwnedFd) -> Result<Vec<u8>, Errno> {
    // Asked first how long it is: each page of a buffer for the longest would be a page made for nothing.
    let long = fdpass::length_of_next(talk.as_fd()).map_err(|error| io_errno(&error))?;
    let mut word = vec![0; long.min(MAX_STATE_BYTES)];
    let (count, _) = fdpass::recv(talk.as_fd(), &mut word).map_err(|error| io_errno(&error))?;
    // Whoever cloned us has died.
    if count == 0 {
        return Err(Errno::PIPE);
    }
    word.truncate(count);
    Ok(word)
}

/// The container's state as its hooks read it; a document with more annotations than this is refused beforehand.
pub const MAX_STATE_BYTES: usize = 96 * 1024;

fn limits(spec: &LaunchSpec) -> Result<(), Errno> {
    // Down and up again takes power over the whole machine (setrlimit(2)), which a user namespace does not give.
    if !spec.rlimits.iter().any(|(resource, ..)| *resource == privilege::RLIMIT_NOFILE) {
        privilege::restore_open_files()?;
    }
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
        // A link there would have the terminal mounted over whatever it names (CVE-2025-52565).
        let console = resolve::ensure_itself(root.as_fd(), Path::new("/dev/console"))?;
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
/// The namespaces are there; the child waits.
pub(crate) const HOLDING: &[u8] = b"H";
/// All but exec is done; the child waits at its gate.
pub(crate) const READY: &[u8] = b"R";

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
