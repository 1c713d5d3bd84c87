//! Mounts by descriptor: made detached, given their attributes, then moved onto a target that is a descriptor too. No
//! path inside a container is ever handed to mount(2).

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

/// Attributes of one mount, as `MOUNT_ATTR_*` bits (mount_setattr(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    pub set: u64,
    pub clear: u64,
    /// `MS_PRIVATE`, `MS_SLAVE` …; 0 leaves it.
    pub propagation: u64,
    pub recursive: bool,
}

const MAPPED: [(libc::c_ulong, u64); 6] = [
    (libc::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
    (libc::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
    (libc::MS_NODEV, libc::MOUNT_ATTR_NODEV),
    (libc::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
    (libc::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
    (libc::MS_NOSYMFOLLOW, libc::MOUNT_ATTR_NOSYMFOLLOW),
];

/// The `MOUNT_ATTR_*` form of `MS_*` flags; bits that are of the file system and not of the mount are left out.
pub fn attributes_of(ms_flags: u64) -> u64 {
    let mut attributes =
        MAPPED.iter().filter(|(ms, _)| ms_flags & to_u64(*ms) != 0).fold(0, |all, (_, attribute)| all | attribute);
    if ms_flags & to_u64(libc::MS_NOATIME) != 0 {
        attributes |= libc::MOUNT_ATTR_NOATIME;
    } else if ms_flags & to_u64(libc::MS_STRICTATIME) != 0 {
        attributes |= libc::MOUNT_ATTR_STRICTATIME;
    }
    attributes
}

#[expect(clippy::useless_conversion, reason = "c_ulong is 32 bits on armv7")]
fn to_u64(flag: libc::c_ulong) -> u64 {
    u64::from(flag)
}

/// A detached copy of the tree that `source` stands for.
pub fn clone_tree(source: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(source, "", flags)
}

/// As [`clone_tree`], of what is at `path` on the host, looked up once. `no_follow`: a link at its end is not followed.
pub(crate) fn clone_tree_at(path: &str, recursive: bool, no_follow: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    flags.set(OpenTreeFlags::AT_SYMLINK_NOFOLLOW, no_follow);
    open_tree(rustix::fs::CWD, path, flags)
}

/// A new, detached mount of a file system. `data` is the option list of mount(8): `size=64k,mode=755`. Nothing is allocated
/// for texts of less than 256 bytes.
pub fn new_filesystem(fstype: &str, source: &str, data: &str, attributes: u64) -> Result<OwnedFd, Errno> {
    new_labelled_filesystem(fstype, source, data, None, attributes)
}

/// As [`new_filesystem`], with the SELinux context of all that is in it: apart from the options, as it may have commas of
/// its own (mount(8), "context=").
pub fn new_labelled_filesystem(
    fstype: &str,
    source: &str,
    data: &str,
    label: Option<&str>,
    attributes: u64,
) -> Result<OwnedFd, Errno> {
    let options = data.split(',').filter(|option| !option.is_empty()).map(|option| match option.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (option, None),
    });
    new_filesystem_of(fstype, source, options.chain(label.map(|label| ("context", Some(label)))), attributes)
}

/// As [`new_filesystem`], with the options apart: a key with its value, or a flag. A value may have 255 bytes.
pub fn new_filesystem_of<'o>(
    fstype: &str,
    source: &str,
    options: impl IntoIterator<Item = (&'o str, Option<&'o str>)>,
    attributes: u64,
) -> Result<OwnedFd, Errno> {
    let context = fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)?;
    if !source.is_empty() {
        fsconfig_set_string(context.as_fd(), "source", source)?;
    }
    for (key, value) in options {
        match value {
            Some(value) => fsconfig_set_string(context.as_fd(), key, value)?,
            None => fsconfig_set_flag(context.as_fd(), key)?,
        }
    }
    fsconfig_create(context.as_fd())?;
    let attributes = u32::try_from(attributes).map_err(|_| Errno::INVAL)?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::from_bits_retain(attributes))
}

/// Puts a detached mount onto `target`.
pub fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}

/// Changes the attributes of the mount that `tree` stands for (mount_setattr(2), Linux 5.12).
pub fn set_attributes(tree: BorrowedFd<'_>, attributes: Attributes) -> Result<(), Errno> {
    if attributes.set == 0 && attributes.clear == 0 && attributes.propagation == 0 {
        return Ok(());
    }
    let attr = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear | atime_mask(attributes.set),
        propagation: attributes.propagation,
        userns_fd: 0,
    };
    setattr(tree, &attr, attributes.recursive)
}

/// The ways of keeping access times exclude each other: setting one means clearing them all first.
fn atime_mask(set: u64) -> u64 {
    if set & libc::MOUNT_ATTR__ATIME == 0 { 0 } else { libc::MOUNT_ATTR__ATIME }
}

/// Makes a detached mount idmapped: ids of the file system are seen as `userns` maps them (mount_setattr(2)).
pub fn set_idmap(tree: BorrowedFd<'_>, userns: BorrowedFd<'_>, recursive: bool) -> Result<(), Errno> {
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::from(userns.as_raw_fd().unsigned_abs()),
    };
    setattr(tree, &attr, recursive)
}

fn setattr(tree: BorrowedFd<'_>, attr: &libc::mount_attr, recursive: bool) -> Result<(), Errno> {
    const EMPTY: &CStr = c"";
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the kernel reads `attr` (its true size is passed) and the empty C string during the call only; `tree` is
    // borrowed for the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            std::ptr::from_ref(attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

pub(crate) fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
