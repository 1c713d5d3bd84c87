//! Removes a directory tree that somebody else has filled, however deep it is: no recursion, three descriptors. A tree
//! deeper than a process may have files open, or than PATH_MAX, is made flat while it is taken away. What was made
//! immutable or append-only (chattr(1)) goes too.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, Dir, FileType, IFlags, Mode, OFlags, RenameFlags, ResolveFlags, fstat, ioctl_getflags, ioctl_setflags,
    openat2, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

/// Removes the directory at `path`; that it is not there is fine.
pub fn path(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    match rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::NOENT) => Ok(()),
        opened => tree(opened?.as_fd(), name),
    }
}

/// Removes what `name` is in `parent`, if it is there; a link is not followed, and what is mounted somewhere below stays, with
/// all that it is mounted on.
pub fn tree(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        stat => stat?,
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Ok(unlink_file(parent, name).map(drop)?);
    }
    let top = open(parent, name)?;
    let mut moved = 0_u64;
    // Each round takes some names away; directories among them are emptied into the top first.
    loop {
        let children = some_names(&top)?;
        if children.is_empty() {
            return Ok(or_gone(unlinkat(parent, name, AtFlags::REMOVEDIR))?);
        }
        for child in children {
            let child = OsStr::from_bytes(&child);
            if !unlink_file(top.as_fd(), child)? {
                match open(top.as_fd(), child) {
                    Err(Errno::NOENT) => continue,
                    directory => empty(&directory?, &top, &mut moved)?,
                }
                or_gone(unlinkat(&top, child, AtFlags::REMOVEDIR))?;
            }
        }
    }
}

/// Somebody else may take things away as well.
fn or_gone(removed: Result<(), Errno>) -> Result<(), Errno> {
    match removed {
        Err(Errno::NOENT) => Ok(()),
        removed => removed,
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
                or_gone(move_up(directory, child, top, moved))?;
            }
        }
    }
}

fn open(parent: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat2(parent, name, flags, Mode::empty(), here())?;
    release(&directory);
    Ok(directory)
}

/// Whatever is mounted there is another's.
fn here() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS
}

/// What nobody may remove, by a flag of its own, may be removed; gives the flags that it had. A file system without such flags
/// has nothing to release; one that keeps them says so when it is removed.
fn release(file: &OwnedFd) -> Option<IFlags> {
    let kept = IFlags::IMMUTABLE | IFlags::APPEND;
    let flags = ioctl_getflags(file).ok().filter(|flags| flags.intersects(kept))?;
    ioctl_setflags(file, flags - kept).ok().map(|()| flags)
}

/// A file with such a flag. It keeps the flag where it has another name.
fn unlink_released(parent: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat2(parent, name, flags, Mode::empty(), here())?;
    let had = release(&file);
    let removed = unlinkat(parent, name, AtFlags::empty());
    if let Some(had) = had
        && fstat(&file).is_ok_and(|stat| stat.st_nlink > 0)
    {
        ioctl_setflags(&file, had)?;
    }
    removed
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
    match or_gone(unlinkat(parent, name, AtFlags::empty())) {
        Err(Errno::ISDIR) => Ok(false),
        // An immutable one, or a directory; only regular files and directories have such flags.
        Err(Errno::PERM) => match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(true),
            stat => match FileType::from_raw_mode(stat?.st_mode) {
                FileType::Directory => Ok(false),
                FileType::RegularFile => or_gone(unlink_released(parent, name)).map(|()| true),
                _ => Err(Errno::PERM),
            },
        },
        removed => removed.map(|()| true),
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
    use rustix::fs::openat;

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

    #[test]
    fn a_file_with_another_name_elsewhere_keeps_its_flag_there() {
        let dir = tempfile::tempdir().unwrap();
        let (top, elsewhere) = (dir.path().join("top"), dir.path().join("elsewhere"));
        std::fs::create_dir(&top).unwrap();
        std::fs::write(&elsewhere, "").unwrap();
        std::fs::hard_link(&elsewhere, top.join("file")).unwrap();
        let file = std::fs::File::open(&elsewhere).unwrap();
        ioctl_setflags(&file, ioctl_getflags(&file).unwrap() | IFlags::IMMUTABLE).unwrap();
        path(&top).unwrap();
        let flags = ioctl_getflags(&file).unwrap();
        ioctl_setflags(&file, flags - IFlags::IMMUTABLE).unwrap();
        assert!(!top.exists() && flags.contains(IFlags::IMMUTABLE));
    }

    #[test]
    fn what_is_mounted_in_it_stays_with_all_that_is_there() {
        use nix::mount::{MsFlags, mount};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for at in ["top", "top/disk", "top/deeper/disk"] {
            let (top, at) = (dir.path().join("top"), dir.path().join(at));
            std::fs::create_dir_all(&at).unwrap();
            mount(Some("tmpfs"), &at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            std::fs::write(at.join("file"), "").unwrap();
            assert!(path(&top).is_err());
            assert!(at.join("file").exists(), "{}", at.display());
            nix::mount::umount(&at).unwrap();
            path(&top).unwrap();
            assert!(!top.exists());
        }
    }
}
