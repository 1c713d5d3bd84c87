//! `tmpcopyup`: fills a new file system with what the root has at its place. Names are only used below descriptors, and
//! no link is followed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, mkdirat, openat2, readlinkat, statat, symlinkat,
};
use rustix::io::Errno;

/// Deeper than any directory one would copy into memory at every start.
const DEEPEST: usize = 64;

/// Copies the content of `from` into `to`; both may be `O_PATH`.
pub(crate) fn fill(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), Errno> {
    copy_directory(open_directory(from, ".")?, open_directory(to, ".")?, 0)
}

fn open_directory(at: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    openat2(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), beneath())
}

fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

fn copy_directory(from: OwnedFd, to: OwnedFd, depth: usize) -> Result<(), Errno> {
    if depth > DEEPEST {
        return Err(Errno::LOOP);
    }
    let stat = rustix::fs::fstat(&from)?;
    take_over(to.as_fd(), &stat)?;
    for entry in Dir::read_from(&from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_bytes() == b"." || name.to_bytes() == b".." {
            continue;
        }
        let stat = statat(&from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(&to, name, Mode::from_raw_mode(0o700))?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let source = openat2(&from, name, flags, Mode::empty(), beneath())?;
                let target = openat2(&to, name, flags, Mode::empty(), beneath())?;
                copy_directory(source, target, depth + 1)?;
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source = openat2(&from, name, flags, Mode::empty(), beneath())?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let target = openat2(&to, name, flags, Mode::from_raw_mode(0o600), beneath())?;
                take_over(target.as_fd(), &stat)?;
                let copied = std::io::copy(&mut std::fs::File::from(source), &mut std::fs::File::from(target));
                copied.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            }
            FileType::Symlink => {
                let target = readlinkat(&from, name, Vec::new())?;
                symlinkat(target.as_c_str(), &to, name)?;
            }
            // Sockets, FIFOs and devices of an image are nothing to be copied.
            _ => {}
        }
    }
    Ok(())
}

fn take_over(target: BorrowedFd<'_>, stat: &rustix::fs::Stat) -> Result<(), Errno> {
    rustix::fs::fchown(target, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    rustix::fs::fchmod(target, Mode::from_raw_mode(stat.st_mode & 0o7777))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_tree_is_copied_with_its_modes_and_links() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir_all(from.path().join("a/b")).unwrap();
        std::fs::write(from.path().join("a/b/file"), "text").unwrap();
        std::fs::set_permissions(from.path().join("a/b/file"), PermissionsExt::from_mode(0o640)).unwrap();
        symlink("/etc/passwd", from.path().join("a/link")).unwrap();
        let open = |path: &std::path::Path| rustix::fs::open(path, OFlags::PATH, Mode::empty()).unwrap();
        fill(open(from.path()).as_fd(), open(to.path()).as_fd()).unwrap();
        let copied = to.path().join("a/b/file");
        assert_eq!(std::fs::read_to_string(&copied).unwrap(), "text");
        assert_eq!(std::fs::metadata(&copied).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(std::fs::read_link(to.path().join("a/link")).unwrap().to_str(), Some("/etc/passwd"));
    }
}
