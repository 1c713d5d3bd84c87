//! An OCI image layout (image-spec image-layout.md) in a directory or in a tar archive, or what `docker save` writes; named
//! `oci:/path` or `oci:/path:reference`: an image on a stick, or one just built. Verified like one from a registry.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use edged_model::id::Digest;
use edged_model::reason::{Code, Reason};
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};

use super::bundle::Bundle;
use super::docker_archive::DockerImages;
use super::{BlobStream, DOCUMENT_MAX_BYTES, Document, RegistryError};
use crate::content::layer::Compression;

const PREFIX: &str = "oci:";
const INDEX: &str = "index.json";

/// The annotation of `index.json` that names an image.
const REFERENCE: &str = "org.opencontainers.image.ref.name";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutReference {
    pub path: PathBuf,
    pub reference: Option<String>,
    pub digest: Option<Digest>,
}

impl LayoutReference {
    pub fn is_one(text: &str) -> bool {
        text.starts_with(PREFIX)
    }

    /// `oci:/path[:reference][@sha256:…]`
    pub fn parse(text: &str) -> Result<Self, Reason> {
        let bad = |why: &str| {
            Reason::new(Code::InvalidManifest, format!("image `{text}`: {why}"))
                .next("write it as `oci:/absolute/path[:reference][@sha256:…]`")
        };
        let rest = text.strip_prefix(PREFIX).ok_or_else(|| bad("it is no layout"))?;
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest).map_err(|error| bad(&error.to_string()))?)),
            None => (rest, None),
        };
        let (path, reference) = match rest.split_once(':') {
            Some((path, reference)) if !reference.is_empty() => (path, Some(reference.to_owned())),
            Some(_) => return Err(bad("the reference is empty")),
            None => (rest, None),
        };
        if !path.starts_with('/') {
            return Err(bad("the path is not absolute"));
        }
        Ok(Self { path: path.into(), reference, digest })
    }

    /// What [`Layout::manifest`] is asked for; empty: the only image there is.
    pub fn wanted(&self) -> String {
        match (&self.digest, &self.reference) {
            (Some(digest), _) => digest.to_string(),
            (None, reference) => reference.clone().unwrap_or_default(),
        }
    }
}

pub struct Layout {
    path: PathBuf,
    files: Files,
    index: ImageIndex,
}

/// Where a layout's files lie.
enum Files {
    Directory,
    Archive(Bundle),
    /// Without an index: one was made of what it says about itself.
    DockerArchive {
        bundle: Bundle,
        image: Box<DockerImages>,
    },
}

impl Layout {
    /// A directory, or an archive of one; an archive of `docker save` too.
    pub fn open(path: &Path) -> Result<Self, RegistryError> {
        if path.is_dir() {
            let bytes = read(&path.join(INDEX), DOCUMENT_MAX_BYTES)?;
            return Ok(Self { path: path.to_owned(), files: Files::Directory, index: parse_index(path, &bytes)? });
        }
        let bundle = Bundle::open(path)?;
        if let Some(part) = bundle.file(INDEX) {
            let index = parse_index(path, &read_bounded(part, &path.join(INDEX), DOCUMENT_MAX_BYTES)?)?;
            return Ok(Self { path: path.to_owned(), files: Files::Archive(bundle), index });
        }
        let image = Box::new(DockerImages::read(path, &bundle)?);
        let index = image.index.clone();
        Ok(Self { path: path.to_owned(), files: Files::DockerArchive { bundle, image }, index })
    }

    /// Whether its manifests were made here: then nobody can have signed them.
    pub fn is_docker_archive(&self) -> bool {
        matches!(self.files, Files::DockerArchive { .. })
    }

    /// By digest or by name; empty: the only one there is.
    pub fn manifest(&self, wanted: &str) -> Result<Document, RegistryError> {
        if let Ok(digest) = Digest::parse(wanted) {
            return self.document(digest, DOCUMENT_MAX_BYTES);
        }
        let mut found = match wanted {
            "" => self.images()?,
            wanted => {
                let named = self.index.manifests().iter().filter(|descriptor| name(descriptor) == Some(wanted));
                named.map(|descriptor| self.described(descriptor)).collect::<Result<_, _>>()?
            }
        };
        let how_many = found.len();
        match found.pop() {
            Some(document) if how_many == 1 => Ok(document),
            found => {
                let is = if found.is_none() { "no" } else { "more than one" };
                let text = format!("{}: there is {is} image `{wanted}`", self.path.display());
                Err(RegistryError::new(Code::ImageNotFound, text, true))
            }
        }
    }

    /// Every image in it: signatures and other artifacts left out, each image once.
    pub fn images(&self) -> Result<Vec<Document>, RegistryError> {
        let mut images: Vec<Document> = Vec::new();
        for descriptor in self.index.manifests().iter().filter(|descriptor| !is_signature(name(descriptor))) {
            let document = self.described(descriptor)?;
            if has_image(&document) && !images.iter().any(|known| known.digest == document.digest) {
                images.push(document);
            }
        }
        Ok(images)
    }

    fn described(&self, descriptor: &Descriptor) -> Result<Document, RegistryError> {
        let digest = Digest::parse(descriptor.digest().as_ref()).map_err(|error| {
            RegistryError::new(Code::ImageUnusable, format!("{}: {error}", self.path.display()), true)
        })?;
        Ok(Document { media_type: descriptor.media_type().to_string(), ..self.document(digest, DOCUMENT_MAX_BYTES)? })
    }

    /// A document by its digest, checked.
    pub fn document(&self, digest: Digest, bytes_max: u64) -> Result<Document, RegistryError> {
        let name = blob_name(digest);
        let bytes = match &self.files {
            Files::Directory => read(&self.path.join(&name), bytes_max)?,
            Files::Archive(bundle) => {
                let part = bundle.file(&name).ok_or_else(|| self.has_no(&name))?;
                read_bounded(part, &self.path.join(&name), bytes_max)?
            }
            Files::DockerArchive { image, .. } => {
                image.documents.get(&digest).cloned().ok_or_else(|| self.has_no(&name))?
            }
        };
        let found = Digest::of(&bytes);
        if found != digest {
            let text = format!("{}/{name} has digest {found}", self.path.display());
            return Err(RegistryError::new(Code::DigestMismatch, text, true));
        }
        Ok(Document { bytes, digest, media_type: String::new() })
    }

    /// From the byte `from` on. Its digest is the reader's to check.
    pub fn blob(&self, digest: Digest, from: u64) -> Result<LayoutBlob, RegistryError> {
        let name = blob_name(digest);
        let stream: Option<Box<dyn Read + Send>> = match &self.files {
            Files::Directory => {
                let path = self.path.join(&name);
                Some(Box::new(File::open(&path).map_err(|error| unreadable(&path, &error))?))
            }
            Files::Archive(bundle) => bundle.file(&name).map(|part| Box::new(part) as _),
            Files::DockerArchive { bundle, image } => {
                image.layers.get(&digest).and_then(|name| bundle.file(name)).map(|part| Box::new(part) as _)
            }
        };
        let mut stream = stream.ok_or_else(|| self.has_no(&name))?;
        let passed = io::copy(&mut stream.by_ref().take(from), &mut io::sink());
        passed.map_err(|error| unreadable(&self.path.join(&name), &error))?;
        Ok(LayoutBlob(stream))
    }

    /// `bytes` of a blob from `from` on.
    pub fn part(&self, digest: Digest, from: u64, bytes: usize) -> Option<Vec<u8>> {
        let mut part = vec![0; bytes];
        match &self.files {
            Files::Directory => {
                File::open(self.path.join(blob_name(digest))).ok()?.read_exact_at(&mut part, from).ok()?;
            }
            Files::Archive(bundle) => bundle.file(&blob_name(digest))?.from(from).read_exact(&mut part).ok()?,
            // Its layers are not compressed.
            Files::DockerArchive { .. } => return None,
        }
        Some(part)
    }

    fn has_no(&self, name: &str) -> RegistryError {
        RegistryError::new(Code::ImageNotFound, format!("{} has no {name}", self.path.display()), true)
    }

    /// All that it says of itself.
    pub fn index(&self) -> &ImageIndex {
        &self.index
    }
}

fn parse_index(path: &Path, bytes: &[u8]) -> Result<ImageIndex, RegistryError> {
    serde_json::from_slice(bytes).map_err(|error| {
        let text = format!("{}: its index.json cannot be read: {error}", path.display());
        RegistryError::new(Code::ImageUnusable, text, true)
    })
}

fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn name(descriptor: &Descriptor) -> Option<&str> {
    descriptor.annotations().as_ref().and_then(|all| all.get(REFERENCE)).map(String::as_str)
}

/// The tags that signers give: `sha256-<hex>` and `sha256-<hex>.sig`.
fn is_signature(name: Option<&str>) -> bool {
    name.is_some_and(|name| name.starts_with("sha256-"))
}

/// An index, or a manifest with layers of files. What signers write has an image's configuration, but no such layer.
fn has_image(document: &Document) -> bool {
    if serde_json::from_slice::<ImageIndex>(&document.bytes).is_ok() {
        return true;
    }
    serde_json::from_slice::<ImageManifest>(&document.bytes).is_ok_and(|manifest| {
        let is_of_files = |layer: &Descriptor| Compression::of_media_type(layer.media_type().as_ref()).is_some();
        manifest.artifact_type().is_none() && manifest.layers().iter().any(is_of_files)
    })
}

fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, RegistryError> {
    let file = File::open(path).map_err(|error| unreadable(path, &error))?;
    read_bounded(file, path, bytes_max)
}

fn read_bounded(reader: impl Read, path: &Path, bytes_max: u64) -> Result<Vec<u8>, RegistryError> {
    let mut bytes = Vec::new();
    reader.take(bytes_max + 1).read_to_end(&mut bytes).map_err(|error| unreadable(path, &error))?;
    if bytes.len() as u64 > bytes_max {
        let text = format!("{} is larger than {bytes_max} bytes", path.display());
        return Err(RegistryError::new(Code::ImageUnusable, text, true));
    }
    Ok(bytes)
}

fn unreadable(path: &Path, error: &io::Error) -> RegistryError {
    let code = if error.kind() == io::ErrorKind::NotFound { Code::ImageNotFound } else { Code::ImageUnusable };
    RegistryError::new(code, format!("{}: {error}", path.display()), true)
}

pub struct LayoutBlob(Box<dyn Read + Send>);

impl Read for LayoutBlob {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl BlobStream for LayoutBlob {
    fn take_error(&mut self) -> Option<RegistryError> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_layouts() {
        let digest = Digest::of(b"x");
        let parsed = LayoutReference::parse(&format!("oci:/mnt/stick:app@{digest}")).unwrap();
        assert_eq!(
            parsed,
            LayoutReference { path: "/mnt/stick".into(), reference: Some("app".to_owned()), digest: Some(digest) }
        );
        assert_eq!(LayoutReference::parse("oci:/mnt").unwrap().wanted(), "");
        for bad in ["oci:mnt", "oci:/mnt:", "oci:/mnt@sha256:0", "oci:"] {
            assert!(LayoutReference::parse(bad).is_err(), "{bad}");
        }
    }
}
