//! What the disk holds, and taking away what nobody needs. A layer is renamed aside first: half a layer is never seen
//! under its name, and what a cut leaves aside is taken away at the next start.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use edged_model::id::Digest;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, statat};

use super::{Content, ContentError, at};

/// One thing on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Chain id of a layer, digest of a document.
    pub digest: Digest,
    pub bytes: u64,
    /// When it got its name, in seconds since 1970 by the clock of that time.
    pub since_unix_secs: i64,
}

impl Content {
    /// The unpacked layers. Costs a look at every file.
    pub fn layers(&self) -> Result<Vec<Item>, ContentError> {
        items(&self.layers, tree_bytes)
    }

    /// Manifests and configurations.
    pub fn documents(&self) -> Result<Vec<Item>, ContentError> {
        items(&self.documents, |path| std::fs::symlink_metadata(path).map_or(0, |meta| meta.len()))
    }

    /// Layers that are on their way, by their digests.
    pub fn partials(&self) -> Result<Vec<Item>, ContentError> {
        if !self.partials.is_dir() {
            return Ok(Vec::new());
        }
        items(&self.partials, |path| std::fs::symlink_metadata(path).map_or(0, |meta| meta.len()))
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

/// The blocks that a tree takes, each file once however many names it has. What cannot be read counts nothing.
pub fn tree_bytes(path: &Path) -> u64 {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(top) = rustix::fs::open(path, flags, Mode::empty()) else { return 0 };
    let mut seen = BTreeSet::new();
    let mut waiting: Vec<PathBuf> = vec![PathBuf::from(".")];
    let mut blocks = 0_u64;
    while let Some(relative) = waiting.pop() {
        let Ok(directory) = openat(&top, &relative, flags, Mode::empty()) else { continue };
        blocks += directory_blocks(&directory, &relative, &mut seen, &mut waiting);
    }
    blocks * 512
}

fn directory_blocks(directory: &OwnedFd, relative: &Path, seen: &mut BTreeSet<u64>, waiting: &mut Vec<PathBuf>) -> u64 {
    let mut blocks = rustix::fs::fstat(directory).map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0));
    for entry in Dir::read_from(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let Ok(stat) = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            use std::os::unix::ffi::OsStrExt;
            waiting.push(relative.join(OsStr::from_bytes(name.to_bytes())));
        } else if stat.st_nlink < 2 || seen.insert(stat.st_ino) {
            blocks += u64::try_from(stat.st_blocks).unwrap_or(0);
        }
    }
    blocks
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
}
