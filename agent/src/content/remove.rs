//! Removes a directory tree that somebody else has filled, however deep it is: no recursion, three descriptors. A tree
//! deeper than a process may have files open, or than PATH_MAX, is made flat while it is taken away. What was made
//! immutable or append-only (chattr(1)) goes too.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, Dir, FileType, IFlags, Mode, OFlags, RenameFlags, ioctl_getflags, ioctl_setflags, openat, renameat_with,
    statat, unlinkat,
};
use rustix::io::Errno;

/// Removes the directory at `path`; that it is not there is fine.
pub fn path(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let parent = match rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        opened => opened?,
    };
    match tree(parent.as_fd(), name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Removes what `name` is in `parent`; a link is not followed.
pub fn tree(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Ok(unlink_file(parent, name).map(drop)?);
    }
    let top = open(parent, name)?;
    let mut moved = 0_u64;
    // Each round takes some names away; directories among them are emptied into the top first.
    loop {
        let children = some_names(&top)?;
        if children.is_empty() {
            return Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?);
        }
        for child in children {
            let child = OsStr::from_bytes(&child);
            if !unlink_file(top.as_fd(), child)? {
                empty(&open(top.as_fd(), child)?, &top, &mut moved)?;
                unlinkat(&top, child, AtFlags::REMOVEDIR)?;
            }
        }
    }
}

/// Its files are taken away, its directories moved up.
fn empty(directory: &OwnedFd, top: &OwnedFd, moved: &mut u64) -> io::Result<()> {
    loop {
        let children = some_names(directory)?;
        if children.is_empty() {
            return Ok(());
        }
        for child in children {
            let child = OsStr::from_bytes(&child);
            if !unlink_file(directory.as_fd(), child)? {
                move_up(directory, child, top, moved)?;
            }
        }
    }
}

fn open(parent: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat(parent, name, flags, Mode::empty())?;
    release(&directory);
    Ok(directory)
}

/// What nobody may remove, by a flag of its own, may be removed. A file system without such flags has nothing to release;
/// one that keeps them says so when it is removed.
fn release(file: &OwnedFd) {
    let kept = IFlags::IMMUTABLE | IFlags::APPEND;
    if let Ok(flags) = ioctl_getflags(file)
        && flags.intersects(kept)
    {
        let _ = ioctl_setflags(file, flags - kept);
    }
}

/// So many that they take no more than this, with what each costs besides: a directory may have half a million.
const NAMES_MAX_BYTES: usize = 1 << 20;
const NAME_EXTRA_BYTES: usize = 48;

/// Read beforehand, since the directory changes while they are used. None: it is empty.
fn some_names(directory: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    let (mut names, mut bytes) = (Vec::new(), 0);
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            bytes += name.len() + NAME_EXTRA_BYTES;
            names.push(name.to_vec());
        }
        if bytes > NAMES_MAX_BYTES {
            break;
        }
    }
    Ok(names)
}

/// False: it is a directory.
fn unlink_file(parent: BorrowedFd<'_>, name: &OsStr) -> Result<bool, Errno> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::ISDIR) => Ok(false),
        // An immutable one, or a directory; only regular files and directories have such flags.
        Err(Errno::PERM) => match FileType::from_raw_mode(statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode) {
            FileType::Directory => Ok(false),
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                release(&openat(parent, name, flags, Mode::empty())?);
                unlinkat(parent, name, AtFlags::empty()).map(|()| true)
            }
            _ => Err(Errno::PERM),
        },
        Err(errno) => Err(errno),
    }
}

fn move_up(from: &OwnedFd, name: &OsStr, top: &OwnedFd, moved: &mut u64) -> Result<(), Errno> {
    loop {
        let fresh = format!(".removed-{moved}");
        *moved += 1;
        match renameat_with(from, name, top, fresh.as_str(), RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            // An immutable one stays where it is, until it is opened.
            Err(Errno::PERM) => {
                drop(open(from.as_fd(), name)?);
                return renameat_with(from, name, top, fresh.as_str(), RenameFlags::NOREPLACE);
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_deeper_than_any_path_goes() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        std::fs::create_dir(&top).unwrap();
        let mut at = openat(rustix::fs::CWD, &top, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "directory", Mode::from_raw_mode(0o755)).unwrap();
            rustix::fs::mkdirat(&at, ".removed-7", Mode::from_raw_mode(0o755)).unwrap();
            rustix::fs::symlinkat("..", &at, "link").unwrap();
            at = open(at.as_fd(), OsStr::new("directory")).unwrap();
        }
        drop(at);
        path(&top).unwrap();
        assert!(!top.exists());
        path(&top).unwrap();
    }

    #[test]
    fn what_was_made_immutable_or_append_only_goes() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        std::fs::create_dir_all(top.join("closed/deeper/deepest")).unwrap();
        for file in ["file", "closed/file", "closed/deeper/file"] {
            std::fs::write(top.join(file), "").unwrap();
        }
        let keep = |name: &str, flag| {
            let file = std::fs::File::open(top.join(name)).unwrap();
            ioctl_setflags(&file, ioctl_getflags(&file).unwrap() | flag).unwrap();
        };
        for name in ["file", "closed/file", "closed/deeper/file", "closed/deeper/deepest"] {
            keep(name, IFlags::IMMUTABLE);
        }
        for name in ["closed/deeper", "closed", ""] {
            keep(name, IFlags::APPEND);
        }
        assert!(std::fs::remove_file(top.join("file")).is_err(), "the flags hold");
        path(&top).unwrap();
        assert!(!top.exists());
    }
}
