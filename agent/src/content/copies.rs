//! Layers with other owners: for a kernel that mounts no overlay over idmapped layers (before Linux 5.19), or a file system
//! that cannot be idmapped at all. A copy belongs to one range of ids; every owner in it is moved up by the range's first
//! id, and so is the one in a file's capabilities (capabilities(7), "Namespaced file capabilities"). It is staged, synced,
//! named and held against a table as the layer it was made from.
//!
//! ```text
//! layers/copies/<first id>/<chain id>/        the copy
//! layers/copies/<first id>/<chain id>.table   what it was when it was made
//! ```

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use edged_model::id::Digest;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, linkat, mknodat, openat, readlinkat};

use super::archive::{Item as Entry, Kind};
use super::reading::Reader;
use super::table::{self, Found, Sum, Sums, Walk};
use super::unpack::nodes;
use super::usage::{self, Item};
use super::{Content, ContentError, at, remove};
use crate::crash_point;

#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error(transparent)]
    Content(#[from] ContentError),
    #[error("entry `{name}` of the layer {chain}")]
    Entry {
        name: String,
        chain: String,
        #[source]
        source: io::Error,
    },
    #[error("entry `{name}` of {size} bytes would take the disk's reserve")]
    DiskFull { name: String, size: u64 },
}

/// The ids that the owners of a copy have: `first` is what 0 becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owners {
    pub first: u32,
    pub count: u32,
}

/// In no range ([`crate::config::UserIds`]), so whoever is in one sees it as nobody's, as it would in an idmapped mount.
const NOBODYS: u32 = u32::MAX - 1;

impl Owners {
    fn of(self, id: u32) -> u32 {
        if id < self.count { self.first + id } else { NOBODYS }
    }

    fn of_capability(self, value: &[u8]) -> Vec<u8> {
        capability_with_root(value, |root| self.of(root))
    }
}

/// `vfs_ns_cap_data` (linux/capability.h): as revision 3, for the root that `of` makes of the one it was for. What is no
/// capability is left as it is, and the kernel will say so.
pub(super) fn capability_with_root(value: &[u8], of: impl Fn(u32) -> u32) -> Vec<u8> {
    const REVISION: u32 = 0xff00_0000;
    let word = |index: usize| {
        let bytes = value.get(index * 4..index * 4 + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_le_bytes(bytes.unwrap_or_default())
    };
    let (sets, root) = match (word(0) & REVISION, value.len()) {
        (0x0100_0000, 12) => ([word(1), word(2), 0, 0], 0),
        (0x0200_0000, 20) => ([word(1), word(2), word(3), word(4)], 0),
        (0x0300_0000, 24) => ([word(1), word(2), word(3), word(4)], word(5)),
        _ => return value.to_vec(),
    };
    let magic = 0x0300_0000 | (word(0) & !REVISION);
    let words = [[magic].as_slice(), &sets, &[of(root)]].concat();
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// A copy on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerCopy {
    pub first: u32,
    pub item: Item,
}

impl Content {
    fn copies_home(&self) -> PathBuf {
        self.layers.join("copies")
    }

    fn copies_of(&self, first: u32) -> PathBuf {
        self.copies_home().join(first.to_string())
    }

    /// Where the copy is, there or not.
    pub fn copy(&self, chain: Digest, first: u32) -> PathBuf {
        self.copies_of(first).join(chain.hex())
    }

    fn copy_table(&self, chain: Digest, first: u32) -> PathBuf {
        self.copies_of(first).join(format!("{}.table", chain.hex()))
    }

    pub fn has_copy(&self, chain: Digest, first: u32) -> bool {
        self.copy(chain, first).is_dir()
    }

    /// Whether there is any for this range.
    pub fn has_copies(&self, first: u32) -> bool {
        self.copies_of(first).is_dir()
    }

    /// Copies a layer that is there, unless that was done before. `left`: what may still be written to the disk.
    pub fn copy_layer(&self, chain: Digest, owners: Owners, left: &AtomicU64) -> Result<(), CopyError> {
        let home = self.copies_of(owners.first);
        if !home.is_dir() {
            fs::create_dir_all(&home).map_err(at(&home))?;
            // A setuid program in there is for nobody outside.
            fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).map_err(at(&home))?;
            let parent = self.copies_home();
            File::open(&parent).and_then(|dir| dir.sync_all()).map_err(at(&parent))?;
        }
        let name = format!("{}-{}", owners.first, chain.hex());
        let (target, table) = (self.copy(chain, owners.first), self.copy_table(chain, owners.first));
        let Some(staged) = self.stage_as(name, target, table)? else { return Ok(()) };
        let layer = self.layer(chain);
        let sums = Copier::new(&layer, staged.path(), owners, left).map_err(at(&layer))?.run(chain, &layer)?;
        Ok(staged.publish(&sums)?)
    }

    /// Holds a copy against its table.
    pub fn check_copy(&self, chain: Digest, first: u32, reader: &mut dyn Reader) -> Result<Found, ContentError> {
        let copy = self.copy(chain, first);
        table::check(&copy, &self.copy_table(chain, first), reader).map_err(at(&copy))
    }

    /// The ranges that have copies.
    pub fn copy_ranges(&self) -> Vec<u32> {
        let names = fs::read_dir(self.copies_home()).into_iter().flatten().flatten();
        let mut ranges: Vec<u32> = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        ranges.sort_unstable();
        ranges
    }

    /// All of them. Costs a look at every file.
    pub fn copies(&self) -> Result<Vec<LayerCopy>, ContentError> {
        let mut list = Vec::new();
        for first in self.copy_ranges() {
            let bytes = |copy: &Path| usage::tree_bytes(copy) + usage::file_bytes(&copy.with_extension("table"));
            let items = usage::items(&self.copies_of(first), bytes)?;
            list.extend(items.into_iter().map(|item| LayerCopy { first, item }));
        }
        Ok(list)
    }

    /// Takes a copy away, and its range's directory with the last one. Nobody may run on it.
    pub fn remove_copy(&self, chain: Digest, first: u32) -> Result<(), ContentError> {
        let aside = format!("gone-{first}-{}", chain.hex());
        self.move_aside(&self.copy(chain, first), &self.copy_table(chain, first), &aside)?;
        // Not empty: others are left.
        let _ = fs::remove_dir(self.copies_of(first));
        Ok(())
    }

    /// Tables whose copies were not named any more.
    pub(super) fn sweep_copies(&self) {
        for first in self.copy_ranges() {
            let home = self.copies_of(first);
            for path in fs::read_dir(&home).into_iter().flatten().flatten().map(|entry| entry.path()) {
                if path.extension().is_some() && !path.with_extension("").is_dir() {
                    let _ = fs::remove_file(&path);
                }
            }
            let _ = fs::remove_dir(&home);
        }
    }

    pub(super) fn move_aside(&self, from: &Path, table: &Path, aside: &str) -> Result<(), ContentError> {
        let aside = self.staging().join(aside);
        match fs::rename(from, &aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            renamed => renamed.map_err(at(from))?,
        }
        crash_point::pass("layer-moved-aside");
        // Without its layer it means nothing, and the next one writes it anew.
        let _ = fs::remove_file(table);
        remove::path(&aside).map_err(at(&aside))
    }
}

/// From one tree that nobody changes to one that nobody else sees.
struct Copier<'l> {
    walk: Walk,
    from: OwnedFd,
    to: OwnedFd,
    owners: Owners,
    left: &'l AtomicU64,
    /// By inode: where the first name of a file with several has gone.
    named: HashMap<u64, PathBuf>,
    /// Their times are set last: every entry in them changes them.
    directories: Vec<(PathBuf, (i64, u32))>,
    sums: Sums,
    buffer: Vec<u8>,
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl<'l> Copier<'l> {
    fn new(from: &Path, to: &Path, owners: Owners, left: &'l AtomicU64) -> io::Result<Self> {
        Ok(Self {
            walk: Walk::new(from)?,
            from: rustix::fs::open(from, DIRECTORY, Mode::empty())?,
            to: rustix::fs::open(to, DIRECTORY, Mode::empty())?,
            owners,
            left,
            named: HashMap::new(),
            directories: Vec::new(),
            sums: Sums::default(),
            buffer: vec![0; 128 << 10],
        })
    }

    fn run(mut self, chain: Digest, layer: &Path) -> Result<Sums, CopyError> {
        while let Some(found) = self.walk.next(None).map_err(at(layer))? {
            let failed = |source| CopyError::Entry { name: found.escaped(), chain: chain.short(), source };
            let size = u64::try_from(found.stat.st_blocks).unwrap_or(0).saturating_mul(512).max(4096);
            let take = |left: u64| left.checked_sub(size);
            if self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
                return Err(CopyError::DiskFull { name: found.escaped(), size });
            }
            self.entry(&found).map_err(failed)?;
        }
        for (path, mtime) in self.directories.iter().rev() {
            let set = openat(&self.to, path, DIRECTORY, Mode::empty()).and_then(|dir| nodes::set_times(dir, *mtime));
            set.map_err(|errno| at(path)(errno.into()))?;
        }
        Ok(self.sums.sorted())
    }

    fn entry(&mut self, found: &table::Entry) -> io::Result<()> {
        let (path, stat) = (&found.path, &found.stat);
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mut item = self.described(found)?;
        let Some(name) = path.file_name() else {
            nodes::directory_metadata(&self.to, &item)?;
            self.directories.push((path.clone(), (item.mtime_secs, item.mtime_nanos)));
            return Ok(());
        };
        let parent = path.parent().filter(|parent| *parent != Path::new(""));
        let parent = openat(&self.to, parent.unwrap_or(Path::new(".")), DIRECTORY, Mode::empty())?;
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.named.get(&stat.st_ino) {
                return Ok(linkat(&self.to, first, &parent, name, AtFlags::empty())?);
            }
            self.named.insert(stat.st_ino, path.clone());
        }
        match kind {
            FileType::Directory => {
                nodes::directory(&parent, name, &item)?;
                self.directories.push((path.clone(), (item.mtime_secs, item.mtime_nanos)));
            }
            FileType::RegularFile => self.file(path, &parent, name, &item)?,
            FileType::Symlink => {
                item.link = readlinkat(&self.from, path, Vec::new())?.into_bytes();
                nodes::symlink(&parent, name, &item)?;
            }
            // A whiteout is one: a character device 0:0.
            _ => {
                mknodat(&parent, name, kind, Mode::from_raw_mode(item.mode), stat.st_rdev)?;
                nodes::node_metadata(&parent, name, &item)?;
            }
        }
        Ok(())
    }

    /// As the archive would have described it for this range.
    fn described(&self, found: &table::Entry) -> io::Result<Entry> {
        let stat = &found.stat;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let xattrs = match kind {
            FileType::RegularFile | FileType::Directory => self.attributes(&found.path)?,
            _ => Vec::new(),
        };
        Ok(Entry {
            kind: if kind == FileType::Directory { Kind::Directory } else { Kind::File },
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mode: stat.st_mode & 0o7777,
            uid: self.owners.of(stat.st_uid),
            gid: self.owners.of(stat.st_gid),
            mtime_secs: stat.st_mtime,
            // A nanosecond fits.
            mtime_nanos: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
            xattrs,
            ..Entry::default()
        })
    }

    fn attributes(&self, path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let from = openat(&self.from, path, flags, Mode::empty())?;
        let is_wanted = |name: &[u8]| nodes::is_of_the_image(name) || name.starts_with(b"trusted.overlay.");
        let mut list = Vec::new();
        let mut value = vec![0; 64 << 10];
        for name in nodes::attributes(&from, is_wanted)? {
            let length = rustix::fs::fgetxattr(&from, name.as_c_str(), &mut value[..])?;
            let name = name.into_string().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
            let is_capability = name == "security.capability";
            let value = &value[..length];
            list.push((name, if is_capability { self.owners.of_capability(value) } else { value.to_vec() }));
        }
        Ok(list)
    }

    fn file(&mut self, path: &Path, parent: &OwnedFd, name: &OsStr, item: &Entry) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let from = File::from(openat(&self.from, path, flags, Mode::empty())?);
        let to = nodes::new_file(parent, name, item.mode)?;
        // Where the file system shares blocks, nothing is written twice.
        if rustix::fs::ioctl_ficlone(&to, &from).is_err() {
            self.content(&from, &to, item)?;
        }
        Ok(nodes::file_metadata(&to, &rustix::fs::fstat(&to)?, item)?)
    }

    /// Holes stay holes.
    fn content(&mut self, from: &File, to: &File, item: &Entry) -> io::Result<()> {
        to.set_len(item.size)?;
        let (mut sum, mut summed) = (Sum::default(), 0);
        for part in nodes::DataParts::of(from) {
            let mut part = part?;
            while !part.is_empty() {
                let take = self.buffer.len().min(usize::try_from(part.end - part.start).unwrap_or(usize::MAX));
                let bytes = &mut self.buffer[..take];
                from.read_exact_at(bytes, part.start)?;
                to.write_all_at(bytes, part.start)?;
                sum.add(bytes);
                (part.start, summed) = (part.start + take as u64, summed + take as u64);
            }
        }
        // A sum over the parts is none over the whole.
        if summed == item.size {
            self.sums.note(rustix::fs::fstat(to)?.st_ino, sum.value(), !item.xattrs.is_empty());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
