//! The nodes of a layer, each made relative to the descriptor of its directory and never looked up by path again.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use edged_sys::resolve;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, SeekFrom, Stat, Timespec, Timestamps, Uid, XattrFlags, chmodat,
    chownat, fchmod, fchown, fgetxattr, flistxattr, fremovexattr, fsetxattr, futimens, linkat, makedev, mkdirat,
    mknodat, openat, openat2, seek, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use crate::content::archive::{Item, Kind};
use crate::content::remove;

const COPY_BYTES: usize = 128 << 10;
const OPAQUE_MARK: &str = "trusted.overlay.opaque";

fn owner(item: &Item) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(item.uid)), Some(Gid::from_raw(item.gid)))
}

fn times((secs, nanos): (i64, u32)) -> Timestamps {
    // The cast is to a type whose width depends on the machine; a nanosecond fits them all.
    let time = Timespec { tv_sec: secs, tv_nsec: nanos as _ };
    Timestamps { last_access: time, last_modification: time }
}

pub fn set_times(fd: impl AsFd, mtime: (i64, u32)) -> Result<(), Errno> {
    futimens(fd, &times(mtime))
}

/// A descriptor that is good for more than a look-up, of a directory that one has an `O_PATH` one of.
pub fn reopen(directory: &OwnedFd) -> Result<OwnedFd, Errno> {
    openat(directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// With the mode that it shall have, as far as the process' umask lets it.
pub fn new_file(parent: &OwnedFd, name: &OsStr, mode: u32) -> Result<File, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::from_raw_mode(mode & 0o777)).map(File::from)
}

/// What is not yet as it shall be, by what the kernel says it is.
pub fn file_metadata(file: &File, stat: &Stat, item: &Item) -> Result<(), Errno> {
    if (stat.st_uid, stat.st_gid) != (item.uid, item.gid) {
        let (uid, gid) = owner(item);
        fchown(file, uid, gid)?;
    }
    // After the owner: a change of owner takes the setuid bit and the capabilities away.
    if stat.st_mode & 0o7777 != item.mode {
        fchmod(file, Mode::from_raw_mode(item.mode))?;
    }
    set_xattrs(file, item)?;
    set_times(file, (item.mtime_secs, item.mtime_nanos))
}

/// A directory that no entry speaks of, and that is in no layer below. (In a setgid directory, a new one is so too.)
pub fn plain_metadata(directory: &OwnedFd) -> Result<(), Errno> {
    fchown(directory, Some(Uid::ROOT), Some(Gid::ROOT))?;
    fchmod(directory, Mode::from_raw_mode(0o755))
}

fn set_xattrs(fd: impl AsFd, item: &Item) -> Result<(), Errno> {
    for (name, value) in &item.xattrs {
        match fsetxattr(&fd, name.as_str(), value, XattrFlags::empty()) {
            // A file system without user attributes; nothing runs differently for it.
            Err(Errno::OPNOTSUPP) if name.starts_with("user.") => {}
            result => result?,
        }
    }
    Ok(())
}

/// All but the times, which every entry in the directory changes.
pub fn directory_metadata(directory: &OwnedFd, item: &Item) -> Result<(), Errno> {
    let (uid, gid) = owner(item);
    fchown(directory, uid, gid)?;
    fchmod(directory, Mode::from_raw_mode(item.mode))?;
    set_xattrs(directory, item)
}

pub fn directory(parent: &OwnedFd, name: &OsStr, item: &Item) -> Result<(), Errno> {
    let is_new = match mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(errno) => return Err(errno),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat(parent, name, flags, Mode::empty())?;
    if !is_new {
        // What an earlier entry said of it counts no more.
        for name in attributes(&directory, is_of_the_image)? {
            fremovexattr(&directory, name.as_c_str())?;
        }
    }
    directory_metadata(&directory, item)
}

pub fn symlink(parent: &OwnedFd, name: &OsStr, item: &Item) -> Result<(), Errno> {
    symlinkat(OsStr::from_bytes(&item.link), parent, name)?;
    let (uid, gid) = owner(item);
    chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    utimensat(parent, name, &times((item.mtime_secs, item.mtime_nanos)), AtFlags::SYMLINK_NOFOLLOW)
}

pub fn node_metadata(parent: &OwnedFd, name: &OsStr, item: &Item) -> Result<(), Errno> {
    let (uid, gid) = owner(item);
    chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    chmodat(parent, name, Mode::from_raw_mode(item.mode), AtFlags::empty())?;
    utimensat(parent, name, &times((item.mtime_secs, item.mtime_nanos)), AtFlags::SYMLINK_NOFOLLOW)
}

/// Linux has 12 bits for a major number and 20 for a minor one (mknod(2)); what is more would be cut off.
const MAJOR_MAX: u32 = 0xfff;
const MINOR_MAX: u32 = 0xf_ffff;

/// What keeps a device node from being made, whatever the policy.
pub fn bad_device(item: &Item) -> Option<&'static str> {
    let (major, minor) = item.device;
    match item.kind {
        Kind::CharDevice if (major, minor) == (0, 0) => Some("character device 0:0, a whiteout of overlayfs"),
        _ if major > MAJOR_MAX || minor > MINOR_MAX => Some("device whose number Linux does not have"),
        _ => None,
    }
}

pub fn device(parent: &OwnedFd, name: &OsStr, item: &Item) -> Result<(), Errno> {
    let kind = if item.kind == Kind::BlockDevice { FileType::BlockDevice } else { FileType::CharacterDevice };
    mknodat(parent, name, kind, Mode::empty(), makedev(item.device.0, item.device.1))?;
    node_metadata(parent, name, item)
}

/// What was in an entry's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MadeWay {
    Free,
    /// A directory meets a directory: it stays.
    Kept,
    Removed,
}

/// Takes away what is there already.
pub fn make_way(parent: BorrowedFd<'_>, name: &OsStr, is_directory: bool) -> io::Result<MadeWay> {
    let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(MadeWay::Free),
        stat => stat?,
    };
    let found = FileType::from_raw_mode(stat.st_mode);
    if found == FileType::Directory {
        if is_directory {
            return Ok(MadeWay::Kept);
        }
        remove::tree(parent, name)?;
        return Ok(MadeWay::Removed);
    }
    unlinkat(parent, name, AtFlags::empty())?;
    Ok(MadeWay::Removed)
}

fn is_whiteout(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Hides `name` of the layers below. What this layer has under that name stays, a directory without what is below it.
pub fn whiteout(parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    match mknodat(parent, name, FileType::CharacterDevice, Mode::empty(), 0) {
        Err(Errno::EXIST) => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match openat(parent, name, flags, Mode::empty()) {
                Ok(directory) => mark_opaque(&directory),
                Err(Errno::NOTDIR | Errno::LOOP) => Ok(()),
                Err(errno) => Err(errno),
            }
        }
        made => made,
    }
}

/// Whether this layer has a directory there, and nothing but directories on the way.
pub fn is_directory(root: &OwnedFd, path: &Path) -> bool {
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    openat2(root, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), inside).is_ok()
}

/// Whether what is below shows through `directory`: on the way there this layer has directories without a mark, or nothing.
pub fn shows_below(root: &OwnedFd, directory: &Path) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(mut walked) = reopen(root) else { return true };
    for part in directory {
        match openat(&walked, part, flags, Mode::empty()) {
            Ok(next) if fgetxattr(&next, OPAQUE_MARK, &mut [0_u8; 8][..]).is_ok() => return false,
            Ok(next) => walked = next,
            Err(errno) => return errno == Errno::NOENT,
        }
    }
    true
}

pub fn mark_opaque(directory: &OwnedFd) -> Result<(), Errno> {
    // fsetxattr(2) takes no O_PATH descriptor.
    fsetxattr(reopen(directory)?, OPAQUE_MARK, b"y", XattrFlags::empty())
}

/// A second name for a file (`O_PATH`).
pub fn link(found: &OwnedFd, parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    linkat(found, "", parent, name, AtFlags::EMPTY_PATH)
}

/// Another file that is the same: content, owner, mode, attributes, time. Holes stay holes.
pub fn copy(file: &File, parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let (meta, copy) = (file.metadata()?, new_file(parent, name, 0o600)?);
    copy.set_len(meta.len())?;
    let mut buffer = vec![0; COPY_BYTES];
    for part in DataParts::of(file) {
        let mut part = part?;
        while !part.is_empty() {
            let take = buffer.len().min(usize::try_from(part.end - part.start).unwrap_or(usize::MAX));
            file.read_exact_at(&mut buffer[..take], part.start)?;
            copy.write_all_at(&buffer[..take], part.start)?;
            part.start += take as u64;
        }
    }
    copy_metadata(file, &copy)?;
    // A nanosecond fits.
    Ok(set_times(&copy, (meta.mtime(), u32::try_from(meta.mtime_nsec()).unwrap_or(0)))?)
}

/// What of a file is no hole.
pub fn data_bytes(file: &File) -> io::Result<u64> {
    DataParts::of(file).map(|part| part.map(|part| part.end - part.start)).sum()
}

/// The parts of a file between its holes. A file system that knows no holes has one part (lseek(2)).
pub struct DataParts<'f> {
    file: &'f File,
    end: u64,
}

impl<'f> DataParts<'f> {
    pub fn of(file: &'f File) -> Self {
        Self { file, end: 0 }
    }
}

impl Iterator for DataParts<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        let start = match seek(self.file, SeekFrom::Data(self.end)) {
            Err(Errno::NXIO) => return None,
            Err(errno) => return Some(Err(errno.into())),
            Ok(start) => start,
        };
        match seek(self.file, SeekFrom::Hole(start)) {
            Ok(end) => {
                self.end = end;
                Some(Ok(start..end))
            }
            Err(errno) => Some(Err(errno.into())),
        }
    }
}

/// What the attributes of the image take, names and values.
pub fn attribute_bytes(from: impl AsFd) -> Result<u64, Errno> {
    let mut bytes = 0;
    for name in attributes(&from, is_of_the_image)? {
        // Nothing to write to: it only says how long it is.
        bytes += (name.as_bytes().len() + fgetxattr(&from, name.as_c_str(), &mut [0_u8; 0][..])?) as u64;
    }
    Ok(bytes)
}

/// Owner, mode and attributes.
pub fn copy_metadata(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    let stat = rustix::fs::fstat(&from)?;
    fchown(&to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    fchmod(&to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    // XATTR_SIZE_MAX of xattr(7).
    let mut value = vec![0; 64 << 10];
    for name in attributes(&from, is_of_the_image)? {
        let length = fgetxattr(&from, name.as_c_str(), &mut value[..])?;
        fsetxattr(&to, name.as_c_str(), &value[..length], XattrFlags::empty())?;
    }
    Ok(())
}

/// What overlayfs or the system notes is not.
pub fn is_of_the_image(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name == b"security.capability"
}

/// The names of the attributes that are wanted.
pub fn attributes(fd: impl AsFd, is_wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<CString>, Errno> {
    // XATTR_LIST_MAX.
    let mut names = vec![0; 64 << 10];
    let length = match flistxattr(&fd, &mut names[..]) {
        Err(Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty() && is_wanted(name));
    Ok(names.filter_map(|name| CString::new(name).ok()).collect())
}

/// The layers below, lowest first.
pub struct Below(pub Vec<PathBuf>);

impl Below {
    /// In the topmost layer that has anything of that name.
    fn find(&self, open: impl Fn(BorrowedFd<'_>) -> Result<OwnedFd, Errno>) -> Option<File> {
        for layer in self.0.iter().rev() {
            let root =
                rustix::fs::open(layer, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
            match open(root.as_fd()) {
                Err(Errno::NOENT) => {}
                found => return found.ok().map(File::from),
            }
        }
        None
    }

    /// Whether there is something that can be seen. What cannot be looked at may be there.
    pub fn has(&self, path: &Path) -> bool {
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for layer in self.0.iter().rev() {
            let opened = rustix::fs::open(layer, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .and_then(|root| openat2(&root, path, flags, Mode::empty(), inside));
            match opened {
                Ok(found) => return !rustix::fs::fstat(&found).is_ok_and(|stat| is_whiteout(&stat)),
                Err(Errno::NOENT) => {}
                Err(errno) => return !matches!(errno, Errno::NOTDIR | Errno::LOOP),
            }
        }
        false
    }

    /// Where the link leads that is to be seen there.
    pub fn link(&self, path: &Path) -> Option<PathBuf> {
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for layer in self.0.iter().rev() {
            let root =
                rustix::fs::open(layer, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
            match openat2(&root, path, flags, Mode::empty(), inside) {
                Err(Errno::NOENT) => {}
                found => {
                    // What is no link cannot be read as one.
                    let target = rustix::fs::readlinkat(found.ok()?, "", Vec::new()).ok()?;
                    return Some(PathBuf::from(OsStr::from_bytes(target.as_bytes())));
                }
            }
        }
        None
    }

    pub fn file(&self, path: &Path) -> Option<File> {
        self.find(|root| resolve::open_file(root, path, OFlags::NOFOLLOW))
    }

    pub fn directory(&self, path: &Path) -> Option<File> {
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.find(|root| openat2(root, path, flags, Mode::empty(), inside))
    }
}
