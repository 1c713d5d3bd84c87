//! Paths inside a root that belongs to somebody else. Every look-up goes through openat2(2) with `RESOLVE_IN_ROOT`, so
//! neither `..`, nor a symbolic link, nor a magic link of /proc leads out; what was found is then only used by
//! descriptor, never looked up a second time.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;

/// What shall be at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    Directory,
    File,
}

fn inside() -> ResolveFlags {
    ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS
}

/// An `O_PATH` descriptor of what `path` is inside `root`, links followed inside the root.
pub fn open_path(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), inside())
}

/// An `O_PATH` descriptor of the path itself: a link at its end is not followed.
pub fn open_path_no_follow(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    openat2(root, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), inside())
}

/// The plain file that `path` is inside `root`, for reading. Anything else is not even opened: to open a device, as an
/// image may have it, is to do something to it. `EINVAL`: it is something else. For trees that nobody changes meanwhile.
pub fn open_file(root: BorrowedFd<'_>, path: &Path, more: OFlags) -> Result<OwnedFd, Errno> {
    let found = openat2(root, path, OFlags::PATH | OFlags::CLOEXEC | more, Mode::empty(), inside())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    openat2(root, path, OFlags::RDONLY | OFlags::CLOEXEC | more, Mode::empty(), inside())
}

/// The file `path` of the procfs at `/proc` in `root`. Nothing else is opened: not what an image has there, not what a
/// mount on top of that file redirects to (CVE-2025-52881).
pub fn open_proc(root: BorrowedFd<'_>, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = openat2(root, "/proc", directory, Mode::empty(), inside())?;
    // PROC_ROOT_INO (linux/proc_fs.h): its very root, and no directory of it that was bound there.
    let is_root = rustix::fs::fstat(&proc)?.st_ino == 1;
    if !is_root || rustix::fs::fstatfs(&proc)?.f_type != rustix::fs::PROC_SUPER_MAGIC {
        return Err(Errno::XDEV);
    }
    let here = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    openat2(&proc, path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), here)
}

/// As [`open_path`], making what is missing: directories on the way, and at the end what is wanted.
pub fn ensure(root: BorrowedFd<'_>, path: &Path, want: Want) -> Result<OwnedFd, Errno> {
    match open_path(root, path) {
        Err(Errno::NOENT) => {}
        found => return found,
    }
    let (parent, name) = ensure_parent(root, path)?;
    match want {
        Want::Directory => make_missing_directory(parent.as_fd(), name)?,
        Want::File => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            ignore_exists(openat2(&parent, name, flags, Mode::from_raw_mode(0o644), inside()).map(drop))?;
        }
    }
    open_path(root, path)
}

/// A new directory in `parent`, and an `O_PATH` descriptor of it; `None` if something has that name. What it is then
/// takes a look-up inside the root: it may be a link.
pub fn make_directory(parent: BorrowedFd<'_>, name: &OsStr) -> Result<Option<OwnedFd>, Errno> {
    match mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => return Ok(None),
        made => made?,
    }
    // Should somebody have put something else in its place by now: no link, and nothing mounted there.
    let itself = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(parent, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), itself).map(Some)
}

/// A file at the path itself, made if missing: a link at its end is an error.
pub fn ensure_itself(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let (parent, name) = ensure_parent(root, path)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    ignore_exists(openat2(&parent, name, flags, Mode::from_raw_mode(0o600), inside()).map(drop))?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = openat2(&parent, name, flags, Mode::empty(), ResolveFlags::BENEATH)?;
    match FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) {
        FileType::RegularFile | FileType::CharacterDevice => Ok(found),
        _ => Err(Errno::LOOP),
    }
}

/// A directory at the path itself, made if missing: a link at its end is an error.
pub fn ensure_directory_itself(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // With a slash behind it, or a dot, a link would be followed all the same.
    let path = &path.components().collect::<PathBuf>();
    match openat2(root, path, flags, Mode::empty(), inside()) {
        Err(Errno::NOENT) => {}
        found => return found,
    }
    let (parent, name) = ensure_parent(root, path)?;
    make_missing_directory(parent.as_fd(), name)?;
    openat2(&parent, name, flags, Mode::empty(), ResolveFlags::BENEATH)
}

/// The directory that holds the last name of `path`, made if missing, and that name.
pub fn ensure_parent<'p>(root: BorrowedFd<'_>, path: &'p Path) -> Result<(OwnedFd, &'p OsStr), Errno> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    match open_path(root, path.parent().ok_or(Errno::INVAL)?) {
        Err(Errno::NOENT) => {}
        found => return Ok((found?, name)),
    }
    let mut walked = PathBuf::from("/");
    let mut directory = open_path(root, &walked)?;
    for component in path.parent().ok_or(Errno::INVAL)?.components() {
        let Component::Normal(part) = component else { continue };
        walked.push(part);
        directory = match open_path(root, &walked) {
            Err(Errno::NOENT) => {
                make_missing_directory(directory.as_fd(), part)?;
                open_path(root, &walked)?
            }
            found => found?,
        };
    }
    Ok((directory, name))
}

fn make_missing_directory(parent: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    ignore_exists(mkdirat(parent, name, Mode::from_raw_mode(0o755)))
}

/// Somebody else made it in the meantime, or a link that leads nowhere is there: the open that follows tells.
fn ignore_exists(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        (dir, fd)
    }

    #[test]
    fn makes_what_is_missing() {
        let (dir, fd) = root();
        ensure(fd.as_fd(), Path::new("/a/b/c"), Want::Directory).unwrap();
        ensure(fd.as_fd(), Path::new("/a/b/f"), Want::File).unwrap();
        assert!(dir.path().join("a/b/c").is_dir() && dir.path().join("a/b/f").is_file());
    }

    #[test]
    fn no_link_and_no_dots_lead_out() {
        let (dir, fd) = root();
        let outside = tempfile::tempdir().unwrap();
        symlink(outside.path(), dir.path().join("out")).unwrap();
        symlink("../../../../..", dir.path().join("up")).unwrap();
        ensure(fd.as_fd(), Path::new("/../../up/made"), Want::Directory).unwrap();
        assert!(dir.path().join("made").is_dir(), "`..` ends at the root");
        // The absolute link is read inside the root, where nothing of that name exists: it dangles.
        assert!(ensure(fd.as_fd(), Path::new("/out/x"), Want::File).is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_is_made_only_where_nothing_is() {
        let (dir, fd) = root();
        let outside = tempfile::tempdir().unwrap();
        symlink(outside.path(), dir.path().join("link")).unwrap();
        assert!(make_directory(fd.as_fd(), OsStr::new("link")).unwrap().is_none());
        let made = make_directory(fd.as_fd(), OsStr::new("new")).unwrap().unwrap();
        std::fs::create_dir(dir.path().join("new/below")).unwrap();
        assert!(open_path(made.as_fd(), Path::new("/below")).is_ok());
        assert!(make_directory(fd.as_fd(), OsStr::new("new")).unwrap().is_none());
    }

    #[test]
    fn a_directory_itself_is_no_link_to_one() {
        let (dir, fd) = root();
        symlink(".", dir.path().join("link")).unwrap();
        symlink("nowhere", dir.path().join("dangling")).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        for name in ["/link", "/link/", "/link/.", "/dangling", "/dangling/", "/file"] {
            assert_eq!(ensure_directory_itself(fd.as_fd(), Path::new(name)).unwrap_err(), Errno::NOTDIR, "{name}");
        }
        for _ in ["made", "there"] {
            ensure_directory_itself(fd.as_fd(), Path::new("/link/a/new")).unwrap();
            assert!(dir.path().join("a/new").is_dir());
        }
    }

    #[test]
    fn magic_links_are_refused() {
        let (_dir, _) = root();
        let slash = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        assert_eq!(open_path(slash.as_fd(), Path::new("/proc/self/root/etc")).unwrap_err(), Errno::LOOP);
    }
}
