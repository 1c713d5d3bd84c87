//! Archive entries into a directory. The archive is hostile: every name is resolved inside the directory (openat2), no
//! entry is written through anything it could have put there to lead out, sizes and numbers are bounded, and whatever
//! is refused is refused by name.
//!
//! Whiteouts (image-spec layer.md) become those of overlayfs: a character device 0:0, and `trusted.overlay.opaque`.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use edged_sys::resolve;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, fchmod, fchown,
    fsetxattr, futimens, linkat, lsetxattr, mkdirat, mknodat, openat, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

/// How much one layer may be.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub bytes_max: u64,
    pub entries_max: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("the archive cannot be read after entry {after}")]
    Archive {
        after: u64,
        #[source]
        source: io::Error,
    },
    #[error("entry `{name}` leads out of the layer")]
    LeadsOut { name: String },
    #[error("entry `{name}` is a {kind}, which a layer may not have")]
    Refused { name: String, kind: &'static str },
    #[error("entry `{name}` links to `{target}`, which is not there")]
    DanglingLink { name: String, target: String },
    #[error("entry `{name}`")]
    Write {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("more than {max} entries")]
    TooMany { max: u64 },
    #[error("more than {max} bytes")]
    TooLarge { max: u64 },
}

/// A name longer than Linux has (PATH_MAX) is refused before it costs anything.
const NAME_MAX_BYTES: usize = 4096;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Unpacks the archive that `reader` gives.
pub fn unpack(reader: impl Read, dir: &Path, below: &[PathBuf], bounds: Bounds) -> Result<(), UnpackError> {
    let root = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| UnpackError::Write { name: "/".to_owned(), source: errno.into() })?;
    let mut unpacker = Unpacker { root, below, directories: Vec::new(), buffer: vec![0; 128 << 10] };
    let mut archive = Archive::new(reader);
    let mut count = 0;
    let mut bytes = 0_u64;
    let damaged = |after| move |source| UnpackError::Archive { after, source };
    for entry in archive.entries().map_err(damaged(0))? {
        let entry = entry.map_err(damaged(count))?;
        count += 1;
        bytes = bytes.saturating_add(entry.size());
        if count > bounds.entries_max {
            return Err(UnpackError::TooMany { max: bounds.entries_max });
        }
        if bytes > bounds.bytes_max {
            return Err(UnpackError::TooLarge { max: bounds.bytes_max });
        }
        unpacker.entry(entry)?;
    }
    unpacker.finish()
}

struct Unpacker<'b> {
    root: OwnedFd,
    below: &'b [PathBuf],
    /// Their times are set last: every entry in them changes them.
    directories: Vec<(PathBuf, Timespec)>,
    buffer: Vec<u8>,
}

/// What a header says about ownership and the rest.
struct Metadata {
    uid: u32,
    gid: u32,
    mode: Mode,
    modified: Timespec,
    /// Name and value of the extended attributes that are kept.
    xattrs: Vec<(String, Vec<u8>)>,
}

impl Unpacker<'_> {
    fn entry(&mut self, mut entry: Entry<'_, impl Read>) -> Result<(), UnpackError> {
        let raw = entry.path_bytes().into_owned();
        let name = printable(&raw);
        if raw.len() > NAME_MAX_BYTES {
            let source = io::Error::from(Errno::NAMETOOLONG);
            return Err(UnpackError::Write { name: name.chars().take(64).collect(), source });
        }
        let path = inside(&raw).ok_or_else(|| UnpackError::LeadsOut { name: name.clone() })?;
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        let wrote = |source: io::Error| UnpackError::Write { name: name.clone(), source };
        let metadata = metadata(&mut entry).map_err(wrote)?;
        if path.as_os_str().is_empty() {
            return self.root_metadata(&metadata).map_err(|errno| wrote(errno.into()));
        }
        let (parent, file_name) =
            resolve::ensure_parent(self.root.as_fd(), &path).map_err(|errno| wrote(errno.into()))?;
        if file_name.as_bytes() == OPAQUE {
            return opaque(&parent).map_err(|errno| wrote(errno.into()));
        }
        if let Some(removed) = file_name.as_bytes().strip_prefix(WHITEOUT) {
            return whiteout(&parent, OsStr::from_bytes(removed)).map_err(|errno| wrote(errno.into()));
        }
        let is_directory = kind == EntryType::Directory;
        make_way(parent.as_fd(), file_name, is_directory).map_err(wrote)?;
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.file(&mut entry, &parent, file_name, &metadata).map_err(wrote)
            }
            EntryType::Directory => {
                directory(&parent, file_name, &metadata).map_err(|errno| wrote(errno.into()))?;
                self.directories.push((path, metadata.modified));
                Ok(())
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                symlink(&parent, file_name, &target, &metadata).map_err(|errno| wrote(errno.into()))
            }
            EntryType::Link => {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                self.hard_link(&parent, file_name, &target, &name)
            }
            EntryType::Fifo => {
                let made = mknodat(&parent, file_name, FileType::Fifo, metadata.mode, 0);
                made.and_then(|()| node_metadata(&parent, file_name, &metadata)).map_err(|errno| wrote(errno.into()))
            }
            EntryType::Char => Err(UnpackError::Refused { name, kind: "character device" }),
            EntryType::Block => Err(UnpackError::Refused { name, kind: "block device" }),
            _ => Err(UnpackError::Refused { name, kind: "entry of an unknown kind" }),
        }
    }

    fn root_metadata(&self, metadata: &Metadata) -> Result<(), Errno> {
        let root = openat(&self.root, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        fchown(&root, Some(Uid::from_raw(metadata.uid)), Some(Gid::from_raw(metadata.gid)))?;
        fchmod(&root, metadata.mode)
    }

    fn file(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        parent: &OwnedFd,
        name: &OsStr,
        metadata: &Metadata,
    ) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(openat(parent, name, flags, Mode::from_raw_mode(0o600))?);
        loop {
            match entry.read(&mut self.buffer)? {
                0 => break,
                count => file.write_all(&self.buffer[..count])?,
            }
        }
        fchown(&file, Some(Uid::from_raw(metadata.uid)), Some(Gid::from_raw(metadata.gid)))?;
        // After the owner: a change of owner takes the setuid bit away.
        fchmod(&file, metadata.mode)?;
        for (name, value) in &metadata.xattrs {
            fsetxattr(&file, name.as_str(), value, XattrFlags::empty())?;
        }
        futimens(&file, &times(metadata.modified)).map_err(Into::into)
    }

    /// A second name for a file of this layer, or a copy of a file of a layer below (a layer is a directory of its own).
    fn hard_link(&self, parent: &OwnedFd, name: &OsStr, target: &[u8], shown: &str) -> Result<(), UnpackError> {
        let target_shown = printable(target);
        let path = inside(target).ok_or_else(|| UnpackError::LeadsOut { name: shown.to_owned() })?;
        let wrote = |source: io::Error| UnpackError::Write { name: shown.to_owned(), source };
        match resolve::open_path_no_follow(self.root.as_fd(), &path) {
            Ok(found) => linkat(&found, "", parent, name, AtFlags::EMPTY_PATH).map_err(|errno| wrote(errno.into())),
            Err(Errno::NOENT) => {
                let source = self.below.iter().rev().find_map(|layer| open_file_in(layer, &path));
                let Some(mut source) = source else {
                    return Err(UnpackError::DanglingLink { name: shown.to_owned(), target: target_shown });
                };
                copy_up(&mut source, parent, name).map_err(wrote)
            }
            Err(errno) => Err(wrote(errno.into())),
        }
    }

    fn finish(self) -> Result<(), UnpackError> {
        for (path, modified) in self.directories.iter().rev() {
            // A later entry may have taken the directory's place.
            if let Ok((parent, name)) = resolve::ensure_parent(self.root.as_fd(), path) {
                let _ = utimensat(&parent, name, &times(*modified), AtFlags::SYMLINK_NOFOLLOW);
            }
        }
        Ok(())
    }
}

fn open_file_in(layer: &Path, path: &Path) -> Option<File> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(layer, flags, Mode::empty()).ok()?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let inside = rustix::fs::ResolveFlags::IN_ROOT | rustix::fs::ResolveFlags::NO_MAGICLINKS;
    let file = File::from(rustix::fs::openat2(&root, path, flags, Mode::empty(), inside).ok()?);
    file.metadata().is_ok_and(|meta| meta.is_file()).then_some(file)
}

fn copy_up(source: &mut File, parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let meta = source.metadata()?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut copy = File::from(openat(parent, name, flags, Mode::from_raw_mode(0o600))?);
    io::copy(source, &mut copy)?;
    fchown(&copy, Some(Uid::from_raw(meta.uid())), Some(Gid::from_raw(meta.gid())))?;
    fchmod(&copy, Mode::from_raw_mode(meta.mode() & 0o7777))?;
    let modified = Timespec { tv_sec: meta.mtime(), tv_nsec: meta.mtime_nsec() as _ };
    futimens(&copy, &times(modified)).map_err(Into::into)
}

/// The name as a clean relative path; `None` if it has `..` or a zero byte.
fn inside(raw: &[u8]) -> Option<PathBuf> {
    if raw.contains(&0) {
        return None;
    }
    let mut path = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(raw)).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(path)
}

/// A name for people, whatever bytes it has.
fn printable(raw: &[u8]) -> String {
    String::from_utf8_lossy(raw).chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn metadata(entry: &mut Entry<'_, impl Read>) -> io::Result<Metadata> {
    let mut xattrs = Vec::new();
    for extension in entry.pax_extensions()?.into_iter().flatten() {
        let extension = extension?;
        // GNU's newest way to store holes; read as an ordinary file it would be something else than was meant.
        if extension.key() == Ok("GNU.sparse.major") {
            return Err(io::Error::other("a sparse file in GNU's pax form, which is not supported"));
        }
        if let Some(name) = extension.key().ok().and_then(|key| key.strip_prefix("SCHILY.xattr.")) {
            // `trusted.overlay.*` would let a layer command overlayfs; labels of the builder's machine mean nothing here.
            if name.starts_with("user.") || name == "security.capability" {
                xattrs.push((name.to_owned(), extension.value_bytes().to_vec()));
            }
        }
    }
    let header = entry.header();
    let number = |value: u64| u32::try_from(value).map_err(|_| io::Error::other("an id above 2^32"));
    Ok(Metadata {
        uid: number(header.uid()?)?,
        gid: number(header.gid()?)?,
        mode: Mode::from_raw_mode(header.mode()? & 0o7777),
        modified: Timespec { tv_sec: i64::try_from(header.mtime()?).unwrap_or(0), tv_nsec: 0 },
        xattrs,
    })
}

fn times(modified: Timespec) -> Timestamps {
    Timestamps { last_access: modified, last_modification: modified }
}

/// Takes away what is there already, unless a directory meets a directory.
fn make_way(parent: BorrowedFd<'_>, name: &OsStr, is_directory: bool) -> io::Result<()> {
    let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        stat => stat?,
    };
    match (FileType::from_raw_mode(stat.st_mode) == FileType::Directory, is_directory) {
        (true, true) => Ok(()),
        (true, false) => remove_tree(parent, name),
        (false, _) => unlinkat(parent, name, AtFlags::empty()).map_err(Into::into),
    }
}

fn remove_tree(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat(parent, name, flags, Mode::empty())?;
    for entry in rustix::fs::Dir::read_from(&dir)? {
        let entry = entry?;
        let child = OsStr::from_bytes(entry.file_name().to_bytes());
        if child == "." || child == ".." {
            continue;
        }
        make_way(dir.as_fd(), child, false)?;
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR).map_err(Into::into)
}

fn directory(parent: &OwnedFd, name: &OsStr, metadata: &Metadata) -> Result<(), Errno> {
    match mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat(parent, name, flags, Mode::empty())?;
    fchown(&dir, Some(Uid::from_raw(metadata.uid)), Some(Gid::from_raw(metadata.gid)))?;
    fchmod(&dir, metadata.mode)?;
    metadata.xattrs.iter().try_for_each(|(name, value)| fsetxattr(&dir, name.as_str(), value, XattrFlags::empty()))
}

fn symlink(parent: &OwnedFd, name: &OsStr, target: &[u8], metadata: &Metadata) -> Result<(), Errno> {
    symlinkat(OsStr::from_bytes(target), parent, name)?;
    let (uid, gid) = (Some(Uid::from_raw(metadata.uid)), Some(Gid::from_raw(metadata.gid)));
    chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    utimensat(parent, name, &times(metadata.modified), AtFlags::SYMLINK_NOFOLLOW)
}

fn node_metadata(parent: &OwnedFd, name: &OsStr, metadata: &Metadata) -> Result<(), Errno> {
    let (uid, gid) = (Some(Uid::from_raw(metadata.uid)), Some(Gid::from_raw(metadata.gid)));
    chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    chmodat(parent, name, metadata.mode, AtFlags::empty())
}

fn whiteout(parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    if name.is_empty() || name == "." || name == ".." {
        return Err(Errno::INVAL);
    }
    make_way(parent.as_fd(), name, false).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    mknodat(parent, name, FileType::CharacterDevice, Mode::empty(), 0)
}

fn opaque(parent: &OwnedFd) -> Result<(), Errno> {
    use std::os::fd::AsRawFd;
    // `parent` is O_PATH, which fsetxattr refuses; the magic link of our own descriptor is what setxattr(2) offers.
    lsetxattr(
        format!("/proc/self/fd/{}/.", parent.as_raw_fd()),
        "trusted.overlay.opaque",
        b"y",
        XattrFlags::empty(),
    )
}

#[cfg(test)]
mod tests;
