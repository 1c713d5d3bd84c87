//! Everything the child does between clone and exec: one straight line of named steps. On failure it writes
//! (stage, errno) into a close-on-exec pipe and leaves with `_exit`. No log, no lock, no panic, no `exit`. It may
//! allocate, because the keeper that cloned it has one thread ([`crate::spawn::SingleThread`]).

use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use edged_model::keeper::{CgroupEntry, DeviceNode, LaunchSpec, MountStep, Rootfs};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::mount::{self, Attributes};
use crate::privilege;
use crate::resolve::{self, Want};
use crate::spawn::Failure;

/// The steps, in their order. Their words appear in `edgectl`: "mounts: No such device".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Stage {
    Signals,
    Cgroup,
    Session,
    Join,
    CgroupNamespace,
    NetworkNamespace,
    Hostname,
    MountNamespace,
    Root,
    Mounts,
    Devices,
    Links,
    Pivot,
    Sysctls,
    MaskedPaths,
    ReadonlyPaths,
    Limits,
    Stdio,
    WorkingDirectory,
    User,
    Capabilities,
    Seccomp,
    Exec,
}

const STAGES: [(Stage, &str); 23] = [
    (Stage::Signals, "signals"),
    (Stage::Cgroup, "entering the cgroup"),
    (Stage::Session, "session"),
    (Stage::Join, "entering the container"),
    (Stage::CgroupNamespace, "cgroup namespace"),
    (Stage::NetworkNamespace, "network namespace"),
    (Stage::Hostname, "hostname"),
    (Stage::MountNamespace, "mount namespace"),
    (Stage::Root, "root file system"),
    (Stage::Mounts, "mounts"),
    (Stage::Devices, "device nodes"),
    (Stage::Links, "links"),
    (Stage::Pivot, "pivot_root"),
    (Stage::Sysctls, "sysctls"),
    (Stage::MaskedPaths, "masked paths"),
    (Stage::ReadonlyPaths, "read-only paths"),
    (Stage::Limits, "resource limits"),
    (Stage::Stdio, "standard streams"),
    (Stage::WorkingDirectory, "working directory"),
    (Stage::User, "user"),
    (Stage::Capabilities, "capabilities"),
    (Stage::Seccomp, "seccomp"),
    (Stage::Exec, "exec"),
];

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
    pub failure: OwnedFd,
    pub stdio: [OwnedFd; 3],
    /// stdin is a terminal that becomes the session's own.
    pub terminal: bool,
}

type Step<T = ()> = Result<T, (Stage, Errno)>;

/// Tags a result with its stage.
fn at<T, E: Into<Errno>>(stage: Stage, result: Result<T, E>) -> Step<T> {
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
    let Plumbing { failure, stdio, terminal } = plumbing;
    let failed = match steps(spec, fds, join, &stdio, terminal) {
        Ok(never) => match never {},
        Err((stage, errno)) => Failure { stage, errno: errno.raw_os_error() },
    };
    // Nobody can be told that telling failed.
    let _ = rustix::io::write(&failure, &failed.to_bytes());
    // SAFETY: `_exit` runs no destructor and no handler of the parent whose memory this is a copy of.
    unsafe { libc::_exit(127) }
}

fn steps(
    spec: &LaunchSpec,
    fds: &[OwnedFd],
    join: Option<BorrowedFd<'_>>,
    stdio: &[OwnedFd; 3],
    terminal: bool,
) -> Step<Infallible> {
    at(Stage::Signals, reset_signals())?;
    at(Stage::Cgroup, enter_v1_cgroups(spec, fds))?;
    at(Stage::Session, nix::unistd::setsid().map_err(errno))?;
    if let Some(target) = join {
        join_container(target)?;
    } else {
        make_container(spec, fds)?;
    }
    at(Stage::Limits, limits(spec))?;
    at(Stage::Stdio, wire_stdio(stdio, terminal))?;
    at(Stage::WorkingDirectory, working_directory(&spec.cwd))?;
    if let Some(mask) = spec.umask {
        rustix::process::umask(Mode::from_raw_mode(mask));
    }
    at(Stage::Capabilities, privilege::drop_bounding(spec.capabilities.bounding))?;
    at(Stage::User, privilege::set_ids(spec.uid, spec.gid, &spec.additional_gids))?;
    at(Stage::Capabilities, privilege::set_capabilities(&spec.capabilities))?;
    if spec.no_new_privs {
        at(Stage::Seccomp, privilege::set_no_new_privs())?;
    }
    let program = at(Stage::Exec, Program::prepare(spec))?;
    at(Stage::Exec, privilege::cloexec_from(3))?;
    if !spec.seccomp.is_empty() {
        at(Stage::Seccomp, privilege::install_seccomp(&spec.seccomp))?;
    }
    at(Stage::Exec, program.exec())
}

/// The keeper blocks signals for its signalfd and ignores SIGPIPE; a program expects neither.
fn reset_signals() -> Result<(), Errno> {
    use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask};
    // SAFETY: SIG_DFL is no function of ours.
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map_err(errno)?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).map_err(errno)
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
    // Until exec this process is edged's binary inside a foreign container (CVE-2016-9962).
    at(Stage::Join, privilege::set_not_dumpable())?;
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
    let Some(rootfs) = &spec.rootfs else { return Ok(()) };
    at(Stage::MountNamespace, rustix::mount::mount_change("/", private_recursive()))?;
    let root = at(Stage::Root, open_root(rootfs))?;
    for step in &spec.mounts {
        match mount_step(root.as_fd(), step) {
            Err(_) if step.optional => {}
            result => at(Stage::Mounts, result)?,
        }
    }
    for node in &spec.device_nodes {
        at(Stage::Devices, device_node(root.as_fd(), node))?;
    }
    for (link, target) in &spec.symlinks {
        at(Stage::Links, symlink(root.as_fd(), link, target))?;
    }
    at(Stage::Pivot, pivot(root.as_fd()))?;
    let root = at(Stage::Pivot, rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))?;
    for (name, value) in &spec.sysctls {
        at(Stage::Sysctls, sysctl(root.as_fd(), name, value))?;
    }
    for path in &spec.masked_paths {
        at(Stage::MaskedPaths, mask(root.as_fd(), path))?;
    }
    for path in &spec.readonly_paths {
        at(Stage::ReadonlyPaths, make_read_only(root.as_fd(), path))?;
    }
    let read_only = match rootfs {
        Rootfs::Overlay { read_only, .. } | Rootfs::Directory { read_only, .. } => *read_only,
    };
    if read_only {
        let attributes = Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() };
        at(Stage::Root, mount::set_attributes(root.as_fd(), attributes))?;
    }
    Ok(())
}

fn private_recursive() -> rustix::mount::MountPropagationFlags {
    rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC
}

/// Mounts the root file system in this mount namespace and opens it.
fn open_root(rootfs: &Rootfs) -> Result<OwnedFd, Errno> {
    use rustix::mount::MountFlags;
    let at = match rootfs {
        Rootfs::Overlay { lower, upper, work, mount_at, volatile, read_only } => {
            let mut data = format!("lowerdir={}", lower.join(":"));
            // A read-only root with several layers needs no upper; with one, overlayfs insists on it.
            if !*read_only || lower.len() < 2 {
                data.push_str(&format!(",upperdir={upper},workdir={work}"));
            }
            if *volatile {
                data.push_str(",volatile");
            }
            let data = CString::new(data).map_err(|_| Errno::INVAL)?;
            rustix::mount::mount("overlay", mount_at.as_str(), "overlay", MountFlags::empty(), Some(data.as_c_str()))?;
            mount_at
        }
        Rootfs::Directory { path, .. } => {
            rustix::mount::mount_bind_recursive(path.as_str(), path.as_str())?;
            path
        }
    };
    rustix::fs::open(at.as_str(), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn mount_step(root: BorrowedFd<'_>, step: &MountStep) -> Result<(), Errno> {
    let attributes = mount::attributes_of(step.flags);
    let (tree, want) = if step.bind {
        let source = rustix::fs::open(step.source.as_str(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let is_directory = FileType::from_raw_mode(rustix::fs::fstat(&source)?.st_mode) == FileType::Directory;
        let tree = mount::clone_tree(source.as_fd(), step.recursive)?;
        (tree, if is_directory { Want::Directory } else { Want::File })
    } else {
        (mount::new_filesystem(&step.fstype, &step.source, &step.data, attributes)?, Want::Directory)
    };
    let set = Attributes {
        set: if step.bind { attributes } else { 0 },
        clear: 0,
        propagation: step.propagation,
        recursive: step.recursive,
    };
    mount::set_attributes(tree.as_fd(), set)?;
    let target = resolve::ensure(root, Path::new(&step.target), want)?;
    mount::attach(tree.as_fd(), target.as_fd())
}

fn device_node(root: BorrowedFd<'_>, node: &DeviceNode) -> Result<(), Errno> {
    let (parent, name) = resolve::ensure_parent(root, Path::new(&node.path))?;
    let kind = if node.kind == 'b' { FileType::BlockDevice } else { FileType::CharacterDevice };
    let mode = Mode::from_raw_mode(node.mode);
    match rustix::fs::mknodat(&parent, name, kind, mode, rustix::fs::makedev(node.major, node.minor)) {
        Ok(()) => {
            // The umask took bits away at mknod.
            rustix::fs::chmodat(&parent, name, mode, AtFlags::empty())?;
            let (uid, gid) = (Some(Uid::from_raw(node.uid)), Some(Gid::from_raw(node.gid)));
            rustix::fs::chownat(&parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
        }
        Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn symlink(root: BorrowedFd<'_>, link: &str, target: &str) -> Result<(), Errno> {
    let (parent, name) = resolve::ensure_parent(root, Path::new(link))?;
    match rustix::fs::symlinkat(target, &parent, name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// The old root is stacked under the new one and taken off: no directory for it is needed (pivot_root(2), NOTES).
fn pivot(root: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::process::fchdir(root)?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", rustix::mount::UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}

/// `net.core.somaxconn` in /proc/sys, which must really be procfs: an image could bring its own.
fn sysctl(root: BorrowedFd<'_>, name: &str, value: &str) -> Result<(), Errno> {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let inside = rustix::fs::ResolveFlags::IN_ROOT | rustix::fs::ResolveFlags::NO_MAGICLINKS;
    let file = rustix::fs::openat2(root, path, flags, Mode::empty(), inside)?;
    if rustix::fs::fstatfs(&file)?.f_type != rustix::fs::PROC_SUPER_MAGIC {
        return Err(Errno::XDEV);
    }
    rustix::io::write(&file, value.as_bytes()).map(drop)
}

/// Hides a path: a directory behind an empty read-only tmpfs, a file behind /dev/null. What is not there needs no mask.
fn mask(root: BorrowedFd<'_>, path: &str) -> Result<(), Errno> {
    let target = match resolve::open_path_no_follow(root, Path::new(path)) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        found => found?,
    };
    let tree = if FileType::from_raw_mode(rustix::fs::fstat(&target)?.st_mode) == FileType::Directory {
        mount::new_filesystem("tmpfs", "tmpfs", "size=0,nr_inodes=1,mode=755", libc::MOUNT_ATTR_RDONLY)?
    } else {
        let null = resolve::open_path_no_follow(root, Path::new("/dev/null"))?;
        // CVE-2025-31133: a /dev/null that is something else would be mounted writable over the masked path.
        let stat = rustix::fs::fstat(&null)?;
        let is_null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && stat.st_rdev == rustix::fs::makedev(1, 3);
        if !is_null {
            return Err(Errno::NXIO);
        }
        mount::clone_tree(null.as_fd(), false)?
    };
    mount::attach(tree.as_fd(), target.as_fd())
}

fn make_read_only(root: BorrowedFd<'_>, path: &str) -> Result<(), Errno> {
    let target = match resolve::open_path_no_follow(root, Path::new(path)) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        found => found?,
    };
    let tree = mount::clone_tree(target.as_fd(), true)?;
    let set = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    mount::set_attributes(tree.as_fd(), Attributes { set, recursive: true, ..Attributes::default() })?;
    mount::attach(tree.as_fd(), target.as_fd())
}

fn limits(spec: &LaunchSpec) -> Result<(), Errno> {
    for (resource, soft, hard) in &spec.rlimits {
        let limit = libc::rlimit64 { rlim_cur: *soft, rlim_max: *hard };
        // SAFETY: the kernel reads `limit` during the call only; an unknown resource number is EINVAL.
        let result = unsafe { libc::setrlimit64(*resource as _, &raw const limit) };
        if result != 0 {
            return Err(mount::last_errno());
        }
    }
    if let Some(adjust) = spec.oom_score_adj {
        std::fs::write("/proc/self/oom_score_adj", adjust.to_string()).map_err(|error| io_errno(&error))?;
    }
    Ok(())
}

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
