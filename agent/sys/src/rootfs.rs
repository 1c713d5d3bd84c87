//! The container's file system, made by the child in its own mount namespace: root, mounts, device nodes, links,
//! pivot_root(2), masked and read-only paths (OCI runtime-spec, config-linux.md). No path inside the new root is handed
//! to the kernel as a path: each is resolved by [`crate::resolve`] and used by descriptor.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use edged_model::keeper::{DeviceNode, LaunchSpec, MountStep, Rootfs};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};

use crate::child::{Stage, Step, at};
use crate::mount::{self, Attributes};
use crate::resolve::{self, Want};

/// Everything from the private mount namespace to the new root, in order.
pub(crate) fn make(spec: &LaunchSpec, rootfs: &Rootfs) -> Step {
    // Slave first: what the host unmounts while we work goes here too, and nothing of ours goes to the host.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    at(Stage::MountNamespace, rustix::mount::mount_change("/", slave))?;
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
    Ok(())
}

/// The last thing done to the root: the terminal's `/dev/console` still needed a file in it.
pub(crate) fn seal_root(rootfs: &Rootfs) -> Result<(), Errno> {
    let (Rootfs::Overlay { read_only, .. } | Rootfs::Directory { read_only, .. }) = rootfs;
    if !*read_only {
        return Ok(());
    }
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    mount::set_attributes(root.as_fd(), Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() })
}

/// Mounts the root file system in this mount namespace, private from now on, and opens it.
fn open_root(rootfs: &Rootfs) -> Result<OwnedFd, Errno> {
    let at = match rootfs {
        Rootfs::Overlay { lower, upper, work, mount_at, volatile, read_only } => {
            // A read-only root of several layers needs no upper; of a single one, overlayfs insists on it.
            let upper = if !*read_only || lower.len() < 2 { Some((upper.as_str(), work.as_str())) } else { None };
            mount_overlay(lower, upper, mount_at, *volatile)?;
            mount_at
        }
        Rootfs::Directory { path, .. } => {
            rustix::mount::mount_bind_recursive(path.as_str(), path.as_str())?;
            path
        }
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(at.as_str(), flags, Mode::empty())?;
    let private = Attributes { propagation: MS_PRIVATE, recursive: true, ..Attributes::default() };
    mount::set_attributes(root.as_fd(), private)?;
    Ok(root)
}

#[expect(clippy::unnecessary_cast, reason = "c_ulong is 32 bits on armv7")]
const MS_PRIVATE: u64 = libc::MS_PRIVATE as u64;

/// mount(2) copies one page of options, its end included.
const LONGEST_OPTIONS_BYTES: usize = 4095;

/// One mount(2) where the options fit into it; an image of many layers needs `lowerdir+`, layer by layer (Linux 6.5).
fn mount_overlay(lower: &[String], upper: Option<(&str, &str)>, at: &str, volatile: bool) -> Result<(), Errno> {
    // In the option list `:` parts layers and `,` parts options (Documentation/filesystems/overlayfs.rst).
    let escaped = |path: &str| path.replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,");
    let mut data = format!("lowerdir={}", lower.iter().map(|path| escaped(path)).collect::<Vec<_>>().join(":"));
    if let Some((upper, work)) = upper {
        data.push_str(&format!(",upperdir={},workdir={}", escaped(upper), escaped(work)));
    }
    if volatile && upper.is_some() {
        data.push_str(",volatile");
    }
    if data.len() <= LONGEST_OPTIONS_BYTES {
        let data = CString::new(data).map_err(|_| Errno::INVAL)?;
        return rustix::mount::mount("overlay", at, "overlay", MountFlags::empty(), Some(data.as_c_str()));
    }
    let mut options: Vec<(&str, Option<&str>)> = lower.iter().map(|path| ("lowerdir+", Some(path.as_str()))).collect();
    if let Some((upper, work)) = upper {
        options.extend([("upperdir", Some(upper)), ("workdir", Some(work))]);
        options.extend(volatile.then_some(("volatile", None)));
    }
    let tree = mount::new_filesystem_of("overlay", "overlay", &options, 0)?;
    let target = rustix::fs::open(at, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    mount::attach(tree.as_fd(), target.as_fd())
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
        // A mount that says nothing is private: what happens to the host's original later is not the container's.
        propagation: if step.propagation == 0 { MS_PRIVATE } else { step.propagation },
        recursive: step.recursive,
    };
    mount::set_attributes(tree.as_fd(), set)?;
    let target = resolve::ensure(root, Path::new(&step.target), want)?;
    mount::attach(tree.as_fd(), target.as_fd())
}

fn device_node(root: BorrowedFd<'_>, node: &DeviceNode) -> Result<(), Errno> {
    let (parent, name) = resolve::ensure_parent(root, Path::new(&node.path))?;
    let kind = if node.kind == 'b' { FileType::BlockDevice } else { FileType::CharacterDevice };
    let number = rustix::fs::makedev(node.major, node.minor);
    let is_it = |stat: &rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == kind && stat.st_rdev == number;
    let mode = Mode::from_raw_mode(node.mode);
    match rustix::fs::mknodat(&parent, name, kind, mode, number) {
        Ok(()) => {
            // The umask took bits away at mknod.
            rustix::fs::chmodat(&parent, name, mode, AtFlags::empty())?;
            let (uid, gid) = (Some(Uid::from_raw(node.uid)), Some(Gid::from_raw(node.gid)));
            rustix::fs::chownat(&parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
        }
        Err(Errno::EXIST) => {
            let found = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if is_it(&found) { Ok(()) } else { Err(Errno::EXIST) }
        }
        // mknod is not ours to do here (a user namespace): the host's own node, if it is the same device.
        Err(Errno::PERM) => {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let host = rustix::fs::open(node.path.as_str(), flags, Mode::empty())?;
            if !is_it(&rustix::fs::fstat(&host)?) {
                return Err(Errno::PERM);
            }
            let tree = mount::clone_tree(host.as_fd(), false)?;
            let target = resolve::ensure(root, Path::new(&node.path), Want::File)?;
            mount::attach(tree.as_fd(), target.as_fd())
        }
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
