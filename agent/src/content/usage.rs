//! What the disk holds, and taking away what nobody needs. A layer is renamed aside first: half a layer is never seen
//! under its name, and what a cut leaves aside is taken away at the next start.

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use edged_model::id::Digest;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, openat, statat};

use super::{Content, ContentError, at};

/// One thing on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Chain id of a layer, digest of a document.
    pub digest: Digest,
    /// As the file system charges them; of a layer with its table.
    pub bytes: u64,
    /// When it got its name, in seconds since 1970 by the clock of that time.
    pub since_unix_secs: i64,
}

impl Content {
    /// The unpacked layers. Costs a look at every file.
    pub fn layers(&self) -> Result<Vec<Item>, ContentError> {
        let table = |layer: &Path| self.tables.join(layer.file_name().unwrap_or_default());
        items(&self.layers, |layer| tree_bytes(layer) + file_bytes(&table(layer)))
    }

    /// Manifests and configurations.
    pub fn documents(&self) -> Result<Vec<Item>, ContentError> {
        items(&self.documents, file_bytes)
    }

    /// Layers that are on their way, by their digests.
    pub fn partials(&self) -> Result<Vec<Item>, ContentError> {
        if !self.partials.is_dir() {
            return Ok(Vec::new());
        }
        items(&self.partials, file_bytes)
    }

    pub fn remove_partial(&self, layer: Digest) -> Result<(), ContentError> {
        forget(&self.partials.join(layer.hex()))
    }

    /// Takes a layer away. Nobody may be pulling meanwhile: a pull takes what is there for granted.
    pub fn remove_layer(&self, chain: Digest) -> Result<(), ContentError> {
        self.move_aside(&self.layer(chain), &self.table(chain), &format!("gone-{}", chain.hex()))
    }

    pub fn remove_document(&self, digest: Digest) -> Result<(), ContentError> {
        forget(&self.documents.join(digest.hex()))
    }

    /// Forgets what a name was pulled to.
    pub fn remove_record(&self, name: &str) -> Result<(), ContentError> {
        forget(&self.records.join(Digest::of(name.as_bytes()).hex()))
    }
}

fn forget(path: &Path) -> Result<(), ContentError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(at(path)),
    }
}

pub(super) fn items(dir: &Path, size: impl Fn(&Path) -> u64) -> Result<Vec<Item>, ContentError> {
    use std::os::unix::fs::MetadataExt;
    let mut list = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(at(dir))? {
        let path = entry.map_err(at(dir))?.path();
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let Ok(digest) = Digest::parse(&format!("{}{name}", Digest::PREFIX)) else { continue };
        // Not the modification time: that is the archive's.
        let Ok(since) = std::fs::symlink_metadata(&path).map(|meta| meta.ctime()) else { continue };
        list.push(Item { digest, bytes: size(&path), since_unix_secs: since });
    }
    list.sort_by_key(|item| item.digest);
    Ok(list)
}

/// The blocks that one file takes; none if it is not there.
pub(super) fn file_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

/// The blocks that a tree takes, each file once however many names it has. What cannot be read counts nothing.
pub fn tree_bytes(path: &Path) -> u64 {
    let mut bytes = 0;
    walk(path, &mut |_, charged, _| bytes += charged);
    bytes
}

/// Looks at every file below a directory, and at the directory itself: names from there on, the bytes that the file system
/// charges for it (nothing for a further name of a file), and whether it is a directory. What is mounted there is not
/// looked at. However deep it is, few descriptors are open: nobody but workloads decides how deep a volume is.
pub fn walk(top: &Path, look: &mut dyn FnMut(&[OsString], u64, bool)) {
    let Ok(fd) = rustix::fs::open(top, DIRECTORY, Mode::empty()) else { return };
    let Ok(stat) = fstat(&fd) else { return };
    let mut walk = Walk { device: stat.st_dev, seen: BTreeSet::new(), names: Vec::new(), open: Vec::new(), look };
    (walk.look)(&[], charged(&stat), true);
    walk.enter(fd, &stat);
    walk.run();
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Levels whose directories stay open. Below them the way up is `..`, and if somebody has moved a directory meanwhile, what
/// is left of the levels below is not looked at.
const OPEN_MAX: usize = 64;

struct Walk<'l> {
    device: u64,
    /// Files with several names.
    seen: BTreeSet<u64>,
    names: Vec<OsString>,
    open: Vec<Level>,
    look: &'l mut dyn FnMut(&[OsString], u64, bool),
}

struct Level {
    /// Closed while a directory deep below is looked at.
    fd: Option<OwnedFd>,
    inode: u64,
    /// Directories that are still to be entered.
    left: Vec<CString>,
}

impl Walk<'_> {
    fn run(&mut self) {
        while let Some(level) = self.open.last_mut() {
            let Some(name) = level.left.pop() else {
                self.leave();
                continue;
            };
            let Some(child) = level.fd.as_ref().and_then(|fd| openat(fd, &name, DIRECTORY, Mode::empty()).ok()) else {
                continue;
            };
            let Ok(stat) = fstat(&child) else { continue };
            if stat.st_dev == self.device {
                self.names.push(OsString::from_vec(name.into_bytes()));
                self.enter(child, &stat);
            }
        }
    }

    fn enter(&mut self, fd: OwnedFd, stat: &Stat) {
        let mut left = Vec::new();
        for entry in Dir::read_from(&fd).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let Ok(stat) = statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            if stat.st_dev != self.device {
                continue;
            }
            let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            let is_another_name = !is_directory && stat.st_nlink > 1 && !self.seen.insert(stat.st_ino);
            self.names.push(OsString::from_vec(name.to_bytes().to_vec()));
            (self.look)(&self.names, if is_another_name { 0 } else { charged(&stat) }, is_directory);
            self.names.pop();
            if is_directory {
                left.push(name.to_owned());
            }
        }
        if self.open.len() >= OPEN_MAX
            && let Some(above) = self.open.last_mut()
        {
            above.fd = None;
        }
        self.open.push(Level { fd: Some(fd), inode: stat.st_ino, left });
    }

    fn leave(&mut self) {
        let below = self.open.pop().and_then(|level| level.fd);
        self.names.pop();
        let Some(level) = self.open.last_mut() else { return };
        if level.fd.is_none() {
            let up = below.and_then(|fd| openat(&fd, c"..", DIRECTORY, Mode::empty()).ok());
            level.fd =
                up.filter(|up| fstat(up).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (self.device, level.inode)));
            if level.fd.is_none() {
                level.left.clear();
            }
        }
    }
}

fn charged(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0) * 512
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::table::Sums;

    #[test]
    fn a_file_with_two_names_counts_once_and_a_removed_layer_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let places = crate::config::Places::new(Some(dir.path()), None);
        let content = Content::open(&places).unwrap();
        let chain = Digest::of(b"layer");
        let staged = content.stage(chain).unwrap().unwrap();
        let deep = staged.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("file"), vec![1; 100_000]).unwrap();
        std::fs::hard_link(deep.join("file"), staged.path().join("again")).unwrap();
        staged.publish(&Sums::default()).unwrap();
        let layers = content.layers().unwrap();
        assert_eq!(layers.len(), 1, "{layers:?}");
        assert_eq!(layers[0].digest, chain);
        assert!((100_000..150_000).contains(&layers[0].bytes), "{layers:?}");

        content.remove_layer(chain).unwrap();
        content.remove_layer(chain).unwrap();
        assert!(!content.has_layer(chain) && content.layers().unwrap().is_empty());
        assert_eq!(std::fs::read_dir(content.staging()).unwrap().count(), 0);
    }

    #[test]
    fn a_tree_deeper_than_files_may_be_open_and_than_paths_may_be_long_is_counted_whole() {
        use rustix::fs::mkdirat;
        const DEPTH: u64 = 3_000;
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("deep");
        std::fs::create_dir(&top).unwrap();
        let mut at = rustix::fs::open(&top, DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..DEPTH {
            // In whatever order they are read, one of them is left on the way back.
            for name in ["one", "next", "other"] {
                mkdirat(&at, name, Mode::RWXU).unwrap();
            }
            for name in ["one/file", "other/file"] {
                let flags = OFlags::WRONLY | OFlags::CREATE;
                rustix::io::write(openat(&at, name, flags, Mode::RUSR).unwrap(), b"one block").unwrap();
            }
            at = openat(&at, "next", DIRECTORY, Mode::empty()).unwrap();
        }
        let (mut files, mut directories, mut bytes) = (0, 0, 0);
        walk(&top, &mut |names, charged, is_directory| {
            assert!(names.len() as u64 <= DEPTH + 1);
            (files, directories) = (files + u64::from(!is_directory), directories + u64::from(is_directory));
            bytes += charged;
        });
        assert_eq!((files, directories), (2 * DEPTH, 3 * DEPTH + 1));
        assert_eq!(tree_bytes(&top), bytes);
        super::super::remove::path(&top).unwrap();
    }
}
