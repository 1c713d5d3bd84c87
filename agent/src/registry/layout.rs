//! An OCI image layout in a directory (image-spec image-layout.md), named `oci:/path` or `oci:/path:reference`: an image
//! on a stick, or one just built. Verified like one from a registry.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use edged_model::id::Digest;
use edged_model::reason::{Code, Reason};
use oci_spec::image::{Descriptor, ImageIndex};

use super::source::ARTIFACTS_MAX;
use super::{BlobStream, DOCUMENT_MAX_BYTES, Document, RegistryError};

const PREFIX: &str = "oci:";

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
    index: ImageIndex,
}

impl Layout {
    pub fn open(path: &Path) -> Result<Self, RegistryError> {
        let bytes = read(&path.join("index.json"))?;
        let index = serde_json::from_slice(&bytes).map_err(|error| {
            let text = format!("{}: its index.json cannot be read: {error}", path.display());
            RegistryError::new(Code::ImageUnusable, text, true)
        })?;
        Ok(Self { path: path.to_owned(), index })
    }

    pub fn manifest(&self, wanted: &str) -> Result<Document, RegistryError> {
        if let Ok(digest) = Digest::parse(wanted) {
            return self.document(digest);
        }
        let name = |descriptor: &Descriptor| descriptor.annotations().as_ref().and_then(|a| a.get(REFERENCE).cloned());
        let mut found = self.index.manifests().iter().filter(|descriptor| match wanted {
            "" => !is_signature(name(descriptor).as_deref()),
            wanted => name(descriptor).as_deref() == Some(wanted),
        });
        match (found.next(), found.next()) {
            (Some(descriptor), None) => self.described(descriptor),
            (None, _) => {
                let text = format!("{}: there is no image `{wanted}`", self.path.display());
                Err(RegistryError::new(Code::ImageNotFound, text, true))
            }
            (Some(_), Some(_)) => {
                let text = format!("{}: there is more than one image `{wanted}`", self.path.display());
                Err(RegistryError::new(Code::ImageNotFound, text, true))
            }
        }
    }

    fn described(&self, descriptor: &Descriptor) -> Result<Document, RegistryError> {
        let digest = Digest::parse(descriptor.digest().as_ref()).map_err(|error| {
            RegistryError::new(Code::ImageUnusable, format!("{}: {error}", self.path.display()), true)
        })?;
        Ok(Document { media_type: descriptor.media_type().to_string(), ..self.document(digest)? })
    }

    /// A document by its digest, checked.
    pub fn document(&self, digest: Digest) -> Result<Document, RegistryError> {
        let path = self.blob_path(digest);
        let bytes = read(&path)?;
        let found = Digest::of(&bytes);
        if found != digest {
            let text = format!("{} has digest {found}", path.display());
            return Err(RegistryError::new(Code::DigestMismatch, text, true));
        }
        Ok(Document { bytes, digest, media_type: String::new() })
    }

    /// Its digest is the reader's to check.
    pub fn blob(&self, digest: Digest) -> Result<LayoutBlob, RegistryError> {
        let path = self.blob_path(digest);
        File::open(&path).map(LayoutBlob).map_err(|error| unreadable(&path, &error))
    }

    /// Everything else in the layout may be a signature.
    pub fn artifacts(&self) -> Result<Vec<Document>, RegistryError> {
        self.index.manifests().iter().take(ARTIFACTS_MAX).map(|descriptor| self.described(descriptor)).collect()
    }

    fn blob_path(&self, digest: Digest) -> PathBuf {
        self.path.join("blobs/sha256").join(digest.hex())
    }
}

/// The tags that signers give: `sha256-<hex>` and `sha256-<hex>.sig`.
fn is_signature(name: Option<&str>) -> bool {
    name.is_some_and(|name| name.starts_with("sha256-"))
}

fn read(path: &Path) -> Result<Vec<u8>, RegistryError> {
    let mut bytes = Vec::new();
    let opened = File::open(path).and_then(|file| file.take(DOCUMENT_MAX_BYTES + 1).read_to_end(&mut bytes));
    opened.map_err(|error| unreadable(path, &error))?;
    if bytes.len() as u64 > DOCUMENT_MAX_BYTES {
        let text = format!("{} is larger than {DOCUMENT_MAX_BYTES} bytes", path.display());
        return Err(RegistryError::new(Code::ImageUnusable, text, true));
    }
    Ok(bytes)
}

fn unreadable(path: &Path, error: &io::Error) -> RegistryError {
    let code = if error.kind() == io::ErrorKind::NotFound { Code::ImageNotFound } else { Code::ImageUnusable };
    RegistryError::new(code, format!("{}: {error}", path.display()), true)
}

pub struct LayoutBlob(File);

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
