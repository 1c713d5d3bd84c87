//! The files inside a tar archive, read where they lie: an image on a stick as `docker save`, `podman save`, `skopeo` and
//! `cosign` write it. Nothing is unpacked: the archive's names are keys of a table and never paths of this machine.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path};
use std::sync::Arc;

use edged_model::reason::Code;

use super::RegistryError;
use crate::content::archive::{ArchiveReader, Kind};

/// Files in one archive: an image has two and one for each layer; what carries more is no archive of images.
const FILES_MAX: usize = 10_000;
/// Names of all of them together.
const NAMES_MAX_BYTES: usize = 1 << 20;
const BUFFER_BYTES: usize = 64 << 10;

#[derive(Debug)]
pub struct Bundle {
    file: Arc<File>,
    places: BTreeMap<String, Place>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    at: u64,
    size: u64,
}

impl Bundle {
    pub fn open(path: &Path) -> Result<Self, RegistryError> {
        let wrong = |code: Code, why: String| {
            let text = format!("{}: {why}", path.display());
            let mut error = RegistryError::new(code, text, true);
            error.reason =
                error.reason.next("give an OCI layout, or what `docker save`, `podman save` or `skopeo` wrote");
            error
        };
        let unusable = |why: String| wrong(Code::ImageUnusable, why);
        let mut file = File::open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => wrong(Code::ImageNotFound, "it is not there".to_owned()),
            _ => unusable(error.to_string()),
        })?;
        let mut magic = [0; 4];
        let count = file.read(&mut magic).map_err(|error| unusable(error.to_string()))?;
        if let Some(tool) = compressed_by(&magic[..count]) {
            return Err(unusable(format!("it is compressed: unpack it with `{tool} -d` first")));
        }
        let places = list(&file).map_err(unusable)?;
        Ok(Self { file: Arc::new(file), places })
    }

    pub fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    pub fn size(&self, name: &str) -> Option<u64> {
        self.places.get(name).map(|place| place.size)
    }

    pub fn file(&self, name: &str) -> Option<Part> {
        let place = self.places.get(name)?;
        Some(Part { file: Arc::clone(&self.file), at: place.at, left: place.size })
    }
}

fn compressed_by(magic: &[u8]) -> Option<&'static str> {
    match magic {
        [0x1f, 0x8b, ..] => Some("gzip"),
        [0x28, 0xb5, 0x2f, 0xfd] => Some("zstd"),
        [b'B', b'Z', b'h', _] => Some("bzip2"),
        [0xfd, b'7', b'z', b'X'] => Some("xz"),
        _ => None,
    }
}

/// Every file of the archive and where it lies; links are followed once (`docker save` names a layer twice that way).
fn list(file: &File) -> Result<BTreeMap<String, Place>, String> {
    let again = file.try_clone().and_then(|mut file| io::Seek::rewind(&mut file).map(|()| file));
    let mut archive = ArchiveReader::new(BufReader::with_capacity(4096, again.map_err(|error| error.to_string())?));
    let (mut places, mut links) = (BTreeMap::new(), Vec::new());
    let mut name_bytes = 0;
    while let Some(item) = archive.next_item().map_err(|error| crate::store::inline_chain(&error))? {
        let Some(name) = clean("", &item.name) else { continue };
        name_bytes += name.len();
        if places.len() + links.len() >= FILES_MAX || name_bytes > NAMES_MAX_BYTES {
            return Err(format!("more than {FILES_MAX} files, or too long names: it is no archive of images"));
        }
        match item.kind {
            Kind::File if item.segments.is_none() => {
                let at = archive.position().map_err(|error| error.to_string())?;
                places.insert(name, Place { at, size: item.size });
            }
            Kind::Symlink => {
                let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent).to_owned();
                links.extend(clean(&parent, &item.link).map(|target| (name, target)));
            }
            Kind::HardLink => links.extend(clean("", &item.link).map(|target| (name, target))),
            _ => {}
        }
        archive.seek_over_body().map_err(|error| error.to_string())?;
    }
    for (name, target) in links {
        if let Some(place) = places.get(&target).copied() {
            places.entry(name).or_insert(place);
        }
    }
    Ok(places)
}

/// A name as a plain path; `None` for one that leads out or is no text.
fn clean(parent: &str, name: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(name).ok()?;
    let mut parts: Vec<&str> = parent.split('/').filter(|part| !part.is_empty()).collect();
    for component in Path::new(name).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir => {}
            Component::ParentDir => drop(parts.pop()?),
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// One file of the archive as a stream.
pub struct Part {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Part {
    /// Only what comes after so many bytes.
    pub fn from(self, bytes: u64) -> Self {
        let over = self.left.min(bytes);
        Self { at: self.at + over, left: self.left - over, ..self }
    }
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let take = buffer.len().min(BUFFER_BYTES).min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut buffer[..take], self.at)?;
        if count == 0 && take > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive ends in the middle of it"));
        }
        (self.at, self.left) = (self.at + count as u64, self.left - count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn files_are_found_where_they_lie_links_included_and_names_that_lead_out_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("sub")).unwrap();
        std::fs::write(root.join("one"), "first").unwrap();
        std::fs::write(root.join("sub/two"), vec![7; 100_000]).unwrap();
        std::os::unix::fs::symlink("../one", root.join("sub/again")).unwrap();
        std::os::unix::fs::symlink("../../../etc/passwd", root.join("sub/out")).unwrap();
        let archive = dir.path().join("a.tar");
        let status = Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&root).arg(".").status().unwrap();
        assert!(status.success());
        let bundle = Bundle::open(&archive).unwrap();
        let read = |name: &str| {
            let mut bytes = Vec::new();
            bundle.file(name).map(|mut part| part.read_to_end(&mut bytes).map(|_| bytes).unwrap())
        };
        assert_eq!(read("one").unwrap(), b"first");
        assert_eq!(read("sub/again").unwrap(), b"first");
        assert_eq!(read("sub/two").unwrap(), vec![7; 100_000]);
        assert_eq!((bundle.has("sub/out"), bundle.has("etc/passwd")), (false, false));
        // Cut off: what lies behind the cut cannot be read, and says so.
        let bytes = std::fs::read(&archive).unwrap();
        std::fs::write(&archive, &bytes[..40_000]).unwrap();
        if let Ok(cut) = Bundle::open(&archive) {
            assert!(cut.file("sub/two").is_none_or(|mut part| part.read_to_end(&mut Vec::new()).is_err()));
        }
        std::fs::write(&archive, [0x1f, 0x8b, 8, 0]).unwrap();
        assert!(Bundle::open(&archive).unwrap_err().reason.text.contains("gzip -d"));
    }
}
