//! Tool: what is on disk of images. Documents (manifests, configurations) are files by digest; layers are unpacked once
//! per chain id and shared. A thing is visible under its name only when it is whole, verified and synced: it is staged
//! beside and renamed in.

use std::fs::{self, File};
use std::io::{self, Read};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use edged_model::id::Digest;

use crate::config::Places;

/// Packing a directory or a program into an OCI layout.
pub mod build;
/// A layer from its stream to its directory.
pub mod layer;
/// Archive entries into a directory, whatever they try.
pub mod unpack;

#[derive(Debug, thiserror::Error)]
#[error("{path}")]
pub struct ContentError {
    pub path: PathBuf,
    #[source]
    pub source: io::Error,
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> ContentError + '_ {
    move |source| ContentError { path: path.to_owned(), source }
}

#[derive(Debug, Clone)]
pub struct Content {
    documents: PathBuf,
    layers: PathBuf,
    /// One lock for each layer that is being unpacked: two images may bring the same one at the same time.
    unpacking: Arc<Mutex<HashMap<Digest, Arc<Mutex<()>>>>>,
}

impl Content {
    /// Takes away what an earlier run left half done.
    pub fn open(places: &Places) -> Result<Self, ContentError> {
        let content = Self { documents: places.content(), layers: places.layers(), unpacking: Arc::default() };
        let staging = content.staging();
        for dir in [&content.documents, &content.layers, &staging] {
            fs::create_dir_all(dir).map_err(at(dir))?;
        }
        for entry in fs::read_dir(&staging).map_err(at(&staging))? {
            let path = entry.map_err(at(&staging))?.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(at(&path))?;
        }
        Ok(content)
    }

    fn staging(&self) -> PathBuf {
        self.layers.join("ingest")
    }

    /// A document by its digest, checked again: a flipped byte on the disk is not believed.
    pub fn document(&self, digest: Digest) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.documents.join(digest.hex())).ok()?.read_to_end(&mut bytes).ok()?;
        (Digest::of(&bytes) == digest).then_some(bytes)
    }

    pub fn put_document(&self, bytes: &[u8]) -> Result<Digest, ContentError> {
        let digest = Digest::of(bytes);
        let path = self.documents.join(digest.hex());
        crate::store::keep::durable(&path, bytes, 0o600).map_err(|error| match error {
            crate::store::StoreError::File { path, source } => ContentError { path, source },
            other => ContentError { path: path.clone(), source: io::Error::other(other.to_string()) },
        })?;
        Ok(digest)
    }

    /// Where a layer is, whether it is there or not.
    pub fn layer(&self, chain: Digest) -> PathBuf {
        self.layers.join(chain.hex())
    }

    pub fn has_layer(&self, chain: Digest) -> bool {
        self.layer(chain).is_dir()
    }

    /// Whoever holds this lock may stage the layer.
    pub fn layer_lock(&self, chain: Digest) -> Arc<Mutex<()>> {
        let mut locks = self.unpacking.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody holds any more are done.
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        Arc::clone(locks.entry(chain).or_default())
    }

    /// A fresh directory to unpack a layer in.
    pub fn stage(&self, chain: Digest) -> Result<PathBuf, ContentError> {
        let path = self.staging().join(chain.hex());
        if path.exists() {
            fs::remove_dir_all(&path).map_err(at(&path))?;
        }
        fs::create_dir(&path).map_err(at(&path))?;
        Ok(path)
    }

    /// Makes a staged layer visible: its data first, then its name.
    pub fn publish(&self, staged: &Path, chain: Digest) -> Result<PathBuf, ContentError> {
        let dir = File::open(staged).map_err(at(staged))?;
        rustix::fs::syncfs(&dir).map_err(|errno| at(staged)(errno.into()))?;
        let path = self.layer(chain);
        fs::rename(staged, &path).map_err(at(&path))?;
        File::open(&self.layers).and_then(|dir| dir.sync_all()).map_err(at(&self.layers))?;
        Ok(path)
    }
}

/// The name of a stack of layers (image-spec config.md, "Layer ChainID").
pub fn chain_id(below: Option<Digest>, diff: Digest) -> Digest {
    below.map_or(diff, |below| Digest::of(format!("{below} {diff}").as_bytes()))
}
