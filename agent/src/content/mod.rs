//! Tool: what is on disk of images. Documents (manifests, configurations) are files by digest; layers are unpacked once
//! per chain id and shared. A thing is visible under its name only when it is whole, verified and synced: it is staged
//! beside and renamed in.
//!
//! A layer's compressed bytes are not kept: they go from the socket through the hashes into the directory. That writes
//! the flash once instead of twice and needs no room for both. Only on a slow link they are kept while they are on their
//! way (`partial`), so that another process goes on where this one stopped.
//!
//! ```text
//! content/blobs/<sha256>       manifests and configurations
//! content/images/<sha256 of the name>   what a pulled name has become
//! content/tables/<chain id>    what a layer was when it was unpacked
//! content/partial/<sha256>     bytes of a layer on its way, where they are dear
//! layers/<chain id>/           unpacked; layers/ingest/ while on the way
//! layers/copies/<first id>/    the same with other owners, where mounts cannot be idmapped (`copies`)
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};

use edged_model::id::Digest;

use crate::config::{FsVerity, Places};
use crate::crash_point;
use reading::Reader;
use table::{Found, Sums};

/// A tar archive as a stream of entries.
pub mod archive;
/// Packing a directory or a program into an OCI layout.
pub mod build;
/// Layers with other owners.
pub mod copies;
/// A layer from its stream to its directory.
pub mod layer;
/// The names in a directory, in order.
mod names;
/// Layers that are on their way.
pub mod partial;
/// Contents for their sums.
pub mod reading;
/// Bytes from thread to thread.
mod relay;
/// Taking a tree away, however deep.
pub mod remove;
/// Other owners for a tree, in place.
pub mod shift;
/// What a layer was when it was unpacked.
pub mod table;
/// Archive entries into a directory, whatever they try.
pub mod unpack;
/// What the disk holds, and what may go.
pub mod usage;
/// Files that the kernel checks whenever they are read.
pub mod verity;
/// Zstandard frames as one stream.
pub mod zstd;

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
    records: PathBuf,
    tables: PathBuf,
    partials: PathBuf,
    layers: PathBuf,
    fs_verity: FsVerity,
    in_work: Arc<InWork>,
}

/// Layers that some thread is unpacking or copying, by their names in `ingest`. Two images of one generation share their
/// lower layers: each is fetched once. And what all threads have found out of the disk.
#[derive(Debug, Default)]
struct InWork {
    names: Mutex<BTreeSet<String>>,
    done: Condvar,
    can_protect: OnceLock<bool>,
}

impl Content {
    /// Takes away what an earlier run left half done.
    pub fn open(places: &Places) -> Result<Self, ContentError> {
        let content = Self {
            documents: places.content().join("blobs"),
            records: places.content().join("images"),
            tables: places.content().join("tables"),
            partials: places.content().join("partial"),
            layers: places.layers(),
            fs_verity: FsVerity::default(),
            in_work: Arc::default(),
        };
        let staging = content.staging();
        for dir in [&content.documents, &content.records, &content.tables, &content.layers, &staging] {
            fs::create_dir_all(dir).map_err(at(dir))?;
        }
        for dir in [&content.documents, &content.records] {
            crate::store::keep::sweep_unfinished(dir);
        }
        content.sweep_copies();
        for entry in fs::read_dir(&staging).map_err(at(&staging))? {
            let path = entry.map_err(at(&staging))?.path();
            // What cannot be taken away must not keep the agent from starting: staging that layer again will say so.
            let _ = remove::path(&path);
        }
        for dir in [&content.documents, &content.records, &content.tables] {
            for entry in fs::read_dir(dir).map_err(at(dir))? {
                let path = entry.map_err(at(dir))?.path();
                let is_half_written = path.extension().is_some();
                let is_of_no_layer = dir == &content.tables
                    && path.file_name().is_some_and(|chain| !content.layers.join(chain).is_dir());
                if is_half_written || is_of_no_layer {
                    let _ = fs::remove_file(&path);
                }
            }
        }
        Ok(content)
    }

    /// Whether the kernel is asked to protect what is unpacked from now on.
    #[must_use]
    pub fn with_fs_verity(mut self, fs_verity: FsVerity) -> Self {
        self.fs_verity = fs_verity;
        self
    }

    /// Whether files of layers are protected as they are unpacked. Asked of the kernel once.
    pub fn protects(&self) -> bool {
        let look = || {
            let is_possible = verity::is_possible(&self.staging());
            if !is_possible {
                tracing::info!("layers are not under fs-verity: the kernel, or the file system they are on, has none");
            }
            is_possible
        };
        self.fs_verity != FsVerity::Off && *self.in_work.can_protect.get_or_init(look)
    }

    /// Where all but the layers lies.
    pub fn directory(&self) -> &Path {
        self.documents.parent().unwrap_or(&self.documents)
    }

    /// What is on its way in, or out.
    pub fn staging(&self) -> PathBuf {
        self.layers.join("ingest")
    }

    /// A document by its digest, checked again: a flipped byte on the disk is not believed.
    pub fn document(&self, digest: Digest) -> Option<Vec<u8>> {
        let bytes = fs::read(self.documents.join(digest.hex())).ok()?;
        (Digest::of(&bytes) == digest).then_some(bytes)
    }

    pub fn put_document(&self, bytes: &[u8]) -> Result<Digest, ContentError> {
        let digest = Digest::of(bytes);
        if self.document(digest).is_none() {
            durable(&self.documents.join(digest.hex()), bytes)?;
        }
        Ok(digest)
    }

    /// What is remembered under an image's name, as it was given.
    pub fn record(&self, name: &str) -> Option<Vec<u8>> {
        fs::read(self.records.join(Digest::of(name.as_bytes()).hex())).ok()
    }

    pub fn put_record(&self, name: &str, bytes: &[u8]) -> Result<(), ContentError> {
        durable(&self.records.join(Digest::of(name.as_bytes()).hex()), bytes)
    }

    /// Where a layer is, whether it is there or not.
    pub fn layer(&self, chain: Digest) -> PathBuf {
        self.layers.join(chain.hex())
    }

    /// Where its table is.
    fn table(&self, chain: Digest) -> PathBuf {
        self.tables.join(chain.hex())
    }

    /// Holds a layer against its table; `None` for one that was unpacked before there were tables.
    pub fn check_layer(&self, chain: Digest, reader: &mut dyn Reader) -> Result<Option<Found>, ContentError> {
        let (layer, path) = (self.layer(chain), self.table(chain));
        if !path.exists() {
            return Ok(None);
        }
        table::check(&layer, &path, reader).map(Some).map_err(at(&layer))
    }

    /// How much of a layer the kernel checks whenever it is read (fs-verity).
    pub fn protected_bytes(&self, chain: Digest) -> u64 {
        // Without a table, or with one that is damaged, nobody knows of any.
        table::protected_bytes(&self.table(chain)).unwrap_or(0)
    }

    pub fn has_layer(&self, chain: Digest) -> bool {
        self.layer(chain).is_dir()
    }

    /// A fresh directory to unpack a layer in, or `None` if the layer is there, possibly because another thread has just
    /// unpacked it: this waits for it. Lower layers are staged first, so that nobody waits for himself.
    pub fn stage(&self, chain: Digest) -> Result<Option<Staged<'_>>, ContentError> {
        self.stage_as(chain.hex(), self.layer(chain), self.table(chain))
    }

    fn stage_as(&self, name: String, target: PathBuf, table: PathBuf) -> Result<Option<Staged<'_>>, ContentError> {
        let mut names = self.in_work.names.lock().unwrap_or_else(PoisonError::into_inner);
        while names.contains(&name) {
            names = self.in_work.done.wait(names).unwrap_or_else(PoisonError::into_inner);
        }
        if target.is_dir() {
            return Ok(None);
        }
        if self.fs_verity == FsVerity::Required && !self.protects() {
            return Err(at(&self.layers)(io::Error::from(io::ErrorKind::Unsupported)));
        }
        names.insert(name.clone());
        drop(names);
        let path = self.staging().join(&name);
        // From here on, whatever happens, `Staged` cleans up.
        let staged = Staged { content: self, name, path, target, table };
        remove::path(&staged.path).map_err(at(&staged.path))?;
        fs::create_dir(&staged.path).map_err(at(&staged.path))?;
        fs::set_permissions(&staged.path, fs::Permissions::from_mode(0o755)).map_err(at(&staged.path))?;
        Ok(Some(staged))
    }
}

/// A layer that is being unpacked or copied. Dropped, it leaves nothing behind.
pub struct Staged<'c> {
    content: &'c Content,
    name: String,
    path: PathBuf,
    target: PathBuf,
    table: PathBuf,
}

impl Staged<'_> {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the layer visible: its data and its table first, then its name.
    pub fn publish(self, sums: &Sums) -> Result<(), ContentError> {
        let fs_verity = if self.content.protects() { self.content.fs_verity } else { FsVerity::Off };
        table::write(&self.path, sums, &self.table, fs_verity).map_err(at(&self.table))?;
        let dir = File::open(&self.path).map_err(at(&self.path))?;
        crash_point::pass("layer-unpacked");
        // One layer is thousands of files: one syncfs(2) is cheaper than an fsync for each.
        rustix::fs::syncfs(&dir).map_err(|errno| at(&self.path)(errno.into()))?;
        crash_point::pass("layer-synced");
        fs::rename(&self.path, &self.target).map_err(at(&self.target))?;
        crash_point::pass("layer-named");
        let layers = self.target.parent().unwrap_or(&self.content.layers);
        File::open(layers).and_then(|dir| dir.sync_all()).map_err(at(layers))
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        // Not there any more if it was published; else, what stays is taken away at the next start.
        let _ = remove::path(&self.path);
        if !self.target.is_dir() {
            let _ = fs::remove_file(&self.table);
        }
        self.content.in_work.names.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
        self.content.in_work.done.notify_all();
    }
}

/// A file that is there as a whole or not at all.
pub fn durable(path: &Path, bytes: &[u8]) -> Result<(), ContentError> {
    crate::store::keep::durable(path, bytes, 0o600).map_err(|error| match error {
        crate::store::StoreError::File { path, source } => ContentError { path, source },
        other => ContentError { path: path.to_owned(), source: io::Error::other(other.to_string()) },
    })
}

/// The name of a stack of layers (image-spec config.md, "Layer ChainID").
pub fn chain_id(below: Option<Digest>, diff: Digest) -> Digest {
    below.map_or(diff, |below| Digest::of(format!("{below} {diff}").as_bytes()))
}
