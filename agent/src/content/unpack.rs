//! Archive entries into a directory. The archive is hostile: every name is resolved inside the directory (openat2), no
//! entry is written through anything it could have put there to lead out, sizes and numbers are bounded, and whatever
//! is refused is refused by name.
//!
//! Whiteouts (image-spec layer.md) become those of overlayfs: a character device 0:0, and `trusted.overlay.opaque`. They
//! hide what is in the layers below, never what this layer brings itself, in whatever order the two come.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::AtomicU64;

use edged_sys::resolve;
use rustix::fs::{FileType, Mode, OFlags, mknodat};
use rustix::io::Errno;

use super::archive::{ArchiveError, ArchiveReader, Item, Kind, NAME_MAX_BYTES, Segment, printable};
use super::table::{Sum, Sums};
use crate::config::DeviceNodes;
use account::Account;
use kept::{Directories, SET_ENTRY_BYTES};
use nodes::{Below, MadeWay};

mod account;
mod kept;
pub(super) mod nodes;
mod over;

/// How much one layer may be.
#[derive(Debug, Clone, Copy)]
pub struct Bounds<'a> {
    pub bytes_max: u64,
    pub entries_max: u64,
    /// What may still be written to the disk, shared by all layers that are unpacked at the same time.
    pub disk_left: &'a AtomicU64,
    pub device_nodes: DeviceNodes,
    /// Large files get a tree of hashes beside them (`verity`).
    pub is_protected: bool,
}

/// The directories of the layers below, lowest first: asked for only when an entry needs them, since they may still be
/// on their way.
pub type LayersBelow<'a> = dyn Fn() -> Vec<PathBuf> + Sync + 'a;

#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
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
    #[error("entry `{name}` is one more than the {max} that a layer may have")]
    TooMany { name: String, max: u64 },
    #[error("with entry `{name}` the layer has more than {max} bytes")]
    TooLarge { name: String, max: u64 },
    #[error("entry `{name}` of {size} bytes would take the disk's reserve")]
    DiskFull { name: String, size: u64 },
    #[error("with entry `{name}` the directories, whiteouts and devices left out take more than {max} bytes")]
    TooManyDirectories { name: String, max: usize },
}

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Book-keeping of an old layered file system, in images made on it: nothing of the image.
const RESERVED: &[u8] = b".wh..wh.";

/// What is kept until the end: directories for their times, whiteouts, devices left out. Twenty thousand directories take half
/// a MiB, and a pull has 24 MiB.
const KEPT_MAX_BYTES: usize = 6 << 20;

/// Unpacks the archive that `reader` gives. The reader is not read past the archive's end.
pub fn unpack(
    reader: impl BufRead,
    dir: &Path,
    below: &LayersBelow<'_>,
    bounds: Bounds<'_>,
) -> Result<Sums, UnpackError> {
    let root = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| UnpackError::Write { name: "/".to_owned(), source: errno.into() })?;
    let mut unpacker = Unpacker {
        archive: ArchiveReader::new(reader),
        root,
        below,
        directories: Directories::default(),
        whiteouts: Rc::default(),
        opaques: Rc::default(),
        account: Account::new(bounds),
        device_nodes: bounds.device_nodes,
        left_out: BTreeSet::new(),
        set_bytes: 0,
        parent: None,
        hides_root: false,
        sums: Sums::default(),
    };
    while let Some(item) = unpacker.archive.next_item()? {
        unpacker.account.entry(&item)?;
        unpacker.entry(&item)?;
    }
    unpacker.finish()
}

struct Unpacker<'b, R> {
    archive: ArchiveReader<R>,
    root: OwnedFd,
    below: &'b LayersBelow<'b>,
    account: Account<'b>,
    /// Their times are set last: every entry in them changes them.
    directories: Directories,
    /// Made at the end, where they hide something: others would show, and so would the directories made for them.
    whiteouts: Rc<BTreeSet<PathBuf>>,
    opaques: Rc<BTreeSet<PathBuf>>,
    device_nodes: DeviceNodes,
    /// Device nodes that were not made, for the links to them.
    left_out: BTreeSet<PathBuf>,
    /// What these three sets take.
    set_bytes: usize,
    /// The directory of the entry before: most entries are in the same one.
    parent: Option<(PathBuf, Rc<OwnedFd>)>,
    /// An opaque whiteout in the root, which overlayfs knows no mark for.
    hides_root: bool,
    sums: Sums,
}

/// What stopped one entry: the archive, a bound, or the file system.
enum Stop {
    Archive(ArchiveError),
    Refused(UnpackError),
    Io(io::Error),
}

impl Stop {
    fn at(self, name: impl FnOnce() -> String) -> UnpackError {
        match self {
            Self::Archive(error) => error.into(),
            Self::Refused(error) => error,
            Self::Io(source) => UnpackError::Write { name: name(), source },
        }
    }
}

impl From<UnpackError> for Stop {
    fn from(error: UnpackError) -> Self {
        Self::Refused(error)
    }
}

impl From<ArchiveError> for Stop {
    fn from(error: ArchiveError) -> Self {
        Self::Archive(error)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

impl<R: BufRead> Unpacker<'_, R> {
    fn entry(&mut self, item: &Item) -> Result<(), UnpackError> {
        if item.name.len() as u64 > NAME_MAX_BYTES {
            return Err(UnpackError::Write { name: item.shown_name(), source: Errno::NAMETOOLONG.into() });
        }
        let path = inside(&item.name).ok_or_else(|| UnpackError::LeadsOut { name: item.shown_name() })?;
        match item.kind {
            Kind::CharDevice | Kind::BlockDevice => match self.device_nodes {
                DeviceNodes::Refuse => {
                    let kind = if item.kind == Kind::BlockDevice { "block device" } else { "character device" };
                    return Err(UnpackError::Refused { name: item.shown_name(), kind });
                }
                DeviceNodes::Ignore => return self.leave_out(path, item),
                DeviceNodes::Allow => {
                    if let Some(kind) = nodes::bad_device(item) {
                        return Err(UnpackError::Refused { name: item.shown_name(), kind });
                    }
                }
            },
            Kind::Unknown => {
                return Err(UnpackError::Refused { name: item.shown_name(), kind: "entry of an unknown kind" });
            }
            Kind::HardLink => return self.hard_link(item, &path),
            Kind::File | Kind::Symlink | Kind::Directory | Kind::Fifo => {}
        }
        self.place(item, &path).map_err(|stop| stop.at(|| item.shown_name()))
    }

    /// For one of the sets.
    fn keep(&mut self, path: &Path, item: &Item) -> Result<(), UnpackError> {
        self.set_bytes += path.as_os_str().len() + SET_ENTRY_BYTES;
        self.check_kept(item)
    }

    fn check_kept(&self, item: &Item) -> Result<(), UnpackError> {
        if self.set_bytes + self.directories.bytes() > KEPT_MAX_BYTES {
            return Err(UnpackError::TooManyDirectories { name: item.shown_name(), max: KEPT_MAX_BYTES });
        }
        Ok(())
    }

    fn keep_directory(&mut self, path: &Path, item: &Item) -> Result<(), UnpackError> {
        self.directories.push(path, (item.mtime_secs, item.mtime_nanos));
        self.check_kept(item)
    }

    fn leave_out(&mut self, path: PathBuf, item: &Item) -> Result<(), UnpackError> {
        self.keep(&path, item)?;
        self.left_out.insert(path);
        Ok(())
    }

    fn place(&mut self, item: &Item, path: &Path) -> Result<(), Stop> {
        let Some(file_name) = path.file_name() else {
            self.keep_directory(Path::new(""), item)?;
            return Ok(nodes::directory_metadata(&nodes::reopen(&self.root)?, item)?);
        };
        if let Some(hidden) = file_name.as_bytes().strip_prefix(WHITEOUT).filter(|_| !is_reserved(file_name)) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(Errno::INVAL.into());
            }
            self.keep(path, item)?;
            Rc::make_mut(&mut self.whiteouts).insert(path.with_file_name(OsStr::from_bytes(hidden)));
            return Ok(());
        }
        if file_name.as_bytes() == OPAQUE {
            // Files beside it in this layer stay: the mark hides what is below only.
            match path.parent() {
                Some(directory) if directory != Path::new("") => {
                    self.keep(path, item)?;
                    Rc::make_mut(&mut self.opaques).insert(directory.to_owned());
                }
                _ => self.hides_root = true,
            }
            return Ok(());
        }
        if is_reserved(file_name) {
            return Ok(());
        }
        let parent = self.parent(path)?;
        if item.kind == Kind::File {
            return self.file(item, &parent, file_name);
        }
        self.make_way(&parent, file_name, item.kind == Kind::Directory)?;
        match item.kind {
            Kind::Directory => {
                nodes::directory(&parent, file_name, item)?;
                self.keep_directory(path, item)?;
            }
            Kind::Symlink => nodes::symlink(&parent, file_name, item)?,
            Kind::Fifo => {
                mknodat(&parent, file_name, FileType::Fifo, Mode::from_raw_mode(item.mode), 0)?;
                nodes::node_metadata(&parent, file_name, item)?;
            }
            Kind::CharDevice | Kind::BlockDevice => nodes::device(&parent, file_name, item)?,
            // Files and links have gone another way, and what is unknown was refused.
            Kind::File | Kind::HardLink | Kind::Unknown => {}
        }
        Ok(())
    }

    /// What was removed may have been on the way to the remembered directory.
    fn make_way(&mut self, parent: &OwnedFd, name: &OsStr, is_directory: bool) -> io::Result<()> {
        let made_way = nodes::make_way(parent.as_fd(), name, is_directory)?;
        if made_way == MadeWay::Removed {
            self.parent = None;
            self.sums.forget();
        }
        Ok(())
    }

    fn file(&mut self, item: &Item, parent: &OwnedFd, name: &OsStr) -> Result<(), Stop> {
        let mut file = match nodes::new_file(parent, name, item.mode) {
            // Nearly always nothing is in the way: it is looked for only when the kernel says so.
            Err(Errno::EXIST) => {
                self.make_way(parent, name, false)?;
                nodes::new_file(parent, name, item.mode)?
            }
            file => file?,
        };
        let sum = match &item.segments {
            None => {
                let mut sum = Sum::default();
                loop {
                    let bytes = self.archive.peek_body(usize::MAX)?;
                    if bytes.is_empty() {
                        break Some(sum.value());
                    }
                    sum.add(bytes);
                    file.write_all(bytes)?;
                    let count = bytes.len();
                    self.archive.consume(count);
                }
            }
            Some(segments) => {
                file.set_len(item.size)?;
                self.segments(&file, segments)?;
                None
            }
        };
        let stat = rustix::fs::fstat(&file)?;
        if let Some(sum) = sum {
            self.sums.note(stat.st_ino, sum, !item.xattrs.is_empty());
        }
        Ok(nodes::file_metadata(&file, &stat, item)?)
    }

    fn segments(&mut self, file: &File, segments: &[Segment]) -> Result<(), Stop> {
        for segment in segments {
            let (mut at, mut left) = (segment.offset, segment.length);
            while left > 0 {
                let bytes = self.archive.peek_body(usize::try_from(left).unwrap_or(usize::MAX))?;
                if bytes.is_empty() {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
                file.write_all_at(bytes, at)?;
                let count = bytes.len();
                self.archive.consume(count);
                (at, left) = (at + count as u64, left - count as u64);
            }
        }
        Ok(())
    }

    /// A second name for a file of this layer, or a copy of a file of a layer below (a layer is a directory of its own).
    fn hard_link(&mut self, item: &Item, path: &Path) -> Result<(), UnpackError> {
        let leads_out = || UnpackError::LeadsOut { name: item.shown_name() };
        let target = inside(&item.link).ok_or_else(leads_out)?;
        let file_name = path.file_name().ok_or_else(leads_out)?;
        let found = match resolve::open_path_no_follow(self.root.as_fd(), &target) {
            Ok(found) => Some(found),
            Err(Errno::NOENT | Errno::NOTDIR) => None,
            Err(errno) => return Err(UnpackError::Write { name: item.shown_name(), source: errno.into() }),
        };
        let copied = match &found {
            Some(_) => None,
            None => match Below((self.below)()).file(&target) {
                Some(file) => Some(file),
                None if self.left_out.contains(&target) => return self.leave_out(path.to_owned(), item),
                None => {
                    return Err(UnpackError::DanglingLink { name: item.shown_name(), target: printable(&item.link) });
                }
            },
        };
        let made = self.parent(path).and_then(|parent| match (&found, &copied) {
            (Some(found), _) => {
                self.make_way(&parent, file_name, false)?;
                Ok(nodes::link(found, &parent, file_name)?)
            }
            (None, Some(file)) => self.copy(item, file, &parent, file_name),
            (None, None) => Ok(()),
        });
        made.map_err(|stop| stop.at(|| item.shown_name()))
    }

    /// A file of a layer below, as it is there: what it takes here is more than the archive has for it.
    fn copy(&mut self, item: &Item, file: &File, parent: &OwnedFd, name: &OsStr) -> Result<(), Stop> {
        let shown = || item.shown_name();
        let size = file.metadata()?.len();
        self.account.content(&shown, size, nodes::data_bytes(file)?)?;
        self.account.attributes(&shown, nodes::attribute_bytes(file)?)?;
        self.make_way(parent, name, false)?;
        Ok(nodes::copy(file, parent, name)?)
    }

    fn finish(mut self) -> Result<Sums, UnpackError> {
        self.hide()?;
        if self.hides_root {
            self.hide_root()?;
        }
        let wrote =
            |name: &Path, errno: Errno| UnpackError::Write { name: name.display().to_string(), source: errno.into() };
        // Of a directory that comes twice the later word counts.
        for (path, mtime) in self.directories.iter() {
            // A later entry may have taken the directory's place: then there is nothing to set.
            if let Ok(directory) = resolve::open_path_no_follow(self.root.as_fd(), &Path::new("/").join(&path))
                && let Ok(directory) = nodes::reopen(&directory)
            {
                nodes::set_times(&directory, mtime).map_err(|errno| wrote(&path, errno))?;
            }
        }
        Ok(self.sums.sorted())
    }
}

fn is_reserved(name: &OsStr) -> bool {
    name.as_bytes().starts_with(RESERVED)
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

#[cfg(test)]
mod expansion;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
