//! Namespaces that the child enters or finishes (namespaces(7), user_namespaces(7), time_namespaces(7)).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use edged_model::keeper::{LaunchSpec, Rootfs};
use nix::sched::{CloneFlags, setns};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::child::{Fault, Stage, Step, at, errno};
use crate::{mount, spawn};

/// The crate does not know it yet (linux/sched.h).
pub(crate) const CLONE_NEWTIME: CloneFlags = CloneFlags::from_bits_retain(0x80);

/// Into a living container. The pid namespace was entered by being born there.
///
/// Until exec this process is edged inside a foreign container (CVE-2016-9962). Nobody there can trace it or open its
/// files: whoever cloned it is not dumpable, so it was born so.
pub(crate) fn container(target: BorrowedFd<'_>) -> Result<(), Errno> {
    let always = CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWNS;
    // One's own user namespace cannot be entered again (EINVAL), and a kernel may know no time namespaces (EINVAL).
    let user = CloneFlags::CLONE_NEWUSER;
    for more in [user | CLONE_NEWTIME, CLONE_NEWTIME, user] {
        match setns(target, always | more) {
            Ok(()) if more.contains(user) => return become_root_of_it(),
            Ok(()) => return Ok(()),
            Err(nix::errno::Errno::EINVAL) => {}
            Err(other) => return Err(errno(other)),
        }
    }
    setns(target, always).map_err(errno)
}

/// Whether the child goes into its user namespace by itself. It can where all that takes the rights of the host was made
/// beforehand (`Rootfs::Tree`); the pid namespace it is born in then belongs to the host, which nobody inside can tell.
pub(crate) fn is_childs_own_way(spec: &LaunchSpec) -> bool {
    let user =
        spec.joins.iter().any(|join| CloneFlags::from_bits_retain(join.flag as i32) == CloneFlags::CLONE_NEWUSER);
    user && matches!(spec.rootfs, Some(Rootfs::Tree { .. }))
}

/// That way: network and user namespace, then new ones that belong to it. Gives back the procfs of the pid namespace,
/// which only the owner of that can mount.
pub(crate) fn own_ids(spec: &LaunchSpec, fds: &[OwnedFd]) -> Step<Option<OwnedFd>> {
    let procfs = spec.mounts.iter().find(|step| step.fstype == "proc" && !step.bind);
    let procfs = procfs
        .map(|step| mount::new_filesystem(&step.fstype, &step.source, &step.data, mount::attributes_of(step.flags)));
    let procfs = at(Stage::Mounts, procfs.transpose())?;
    let enter = |stage: Stage, index: u32, flag: CloneFlags| {
        let fd = at(stage, spawn::descriptor(fds, index).map_err(|_| Errno::BADF))?;
        at(stage, setns(fd, flag).map_err(errno))
    };
    if let Some(index) = spec.netns_fd {
        enter(Stage::NetworkNamespace, index, CloneFlags::CLONE_NEWNET)?;
    }
    let is_user = |flag: u64| CloneFlags::from_bits_retain(flag as i32) == CloneFlags::CLONE_NEWUSER;
    for join in spec.joins.iter().filter(|join| is_user(join.flag)) {
        enter(Stage::UserNamespace, join.fd, CloneFlags::CLONE_NEWUSER)?;
    }
    at(Stage::UserNamespace, become_root_of_it())?;
    // The others are made in their time by `child`.
    let now = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
    let wanted = CloneFlags::from_bits_retain(spec.namespaces as i32) & now;
    at(Stage::OtherNamespace, nix::sched::unshare(wanted).map_err(errno))?;
    Ok(procfs)
}

/// Namespaces by descriptor. Those that the rights of the host do not reach belong to the user namespace, and are
/// entered from inside it. The pid namespace was entered by being born there, the user namespace by the helper.
pub(crate) fn joins(spec: &LaunchSpec, fds: &[OwnedFd]) -> Step {
    for join in &spec.joins {
        let flag = CloneFlags::from_bits_retain(i32::try_from(join.flag).unwrap_or(0));
        if flag.intersects(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWUSER) {
            continue;
        }
        let fd = at(Stage::OtherNamespace, spawn::descriptor(fds, join.fd).map_err(|_| Errno::BADF))?;
        setns(fd, flag).map_err(|error| Fault {
            stage: Stage::OtherNamespace,
            errno: errno(error),
            what: name_of(flag).to_owned(),
        })?;
    }
    Ok(())
}

fn name_of(flag: CloneFlags) -> &'static str {
    match flag {
        CloneFlags::CLONE_NEWNS => "mount",
        CloneFlags::CLONE_NEWNET => "network",
        CloneFlags::CLONE_NEWIPC => "ipc",
        CloneFlags::CLONE_NEWUTS => "uts",
        CloneFlags::CLONE_NEWCGROUP => "cgroup",
        CLONE_NEWTIME => "time",
        _ => "unknown",
    }
}

/// Root of a user namespace that has just been entered or mapped. Where nothing maps to 0 the capabilities must do.
pub(crate) fn become_root_of_it() -> Result<(), Errno> {
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    let zero = (Uid::from_raw(0), Gid::from_raw(0));
    let result = setgroups(&[]).and_then(|()| setresgid(zero.1, zero.1, zero.1));
    match result.and_then(|()| setresuid(zero.0, zero.0, zero.0)) {
        Ok(()) | Err(nix::errno::Errno::EINVAL) => {}
        Err(other) => return Err(errno(other)),
    }
    // A change of ids made the process dumpable as /proc/sys/fs/suid_dumpable says (prctl(2)).
    crate::privilege::set_not_dumpable()
}

/// The time namespace that was made for children is entered, now that its clocks are set.
pub(crate) fn time_for_children() -> Result<(), Errno> {
    let file = rustix::fs::open("/proc/self/ns/time_for_children", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    setns(file.as_fd(), CLONE_NEWTIME).map_err(errno)
}
