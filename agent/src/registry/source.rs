//! Where an image comes from. Both kinds give the same documents and the same streams, and neither is believed.

use std::io::Read;

use edged_model::id::Digest;

use super::layout::Layout;
use super::{Client, DOCUMENT_MAX_BYTES, Document, RegistryError};

/// Bytes of a blob. A `Read` can only say `io::Error`: what it was about is asked for afterwards.
pub trait BlobStream: Read {
    fn take_error(&mut self) -> Option<RegistryError>;
}

pub enum Source {
    Registry { client: Box<Client>, repository: String },
    Layout(Box<Layout>),
}

impl Source {
    /// A manifest or an index, by tag or digest.
    pub fn manifest(&self, wanted: &str) -> Result<Document, RegistryError> {
        self.manifest_within(wanted, DOCUMENT_MAX_BYTES)
    }

    /// The same, unless it is larger than this.
    pub fn manifest_within(&self, wanted: &str, bytes_max: u64) -> Result<Document, RegistryError> {
        match (self, Digest::parse(wanted)) {
            (Self::Registry { client, repository }, _) => client.manifest(repository, wanted, bytes_max),
            (Self::Layout(layout), Ok(digest)) => layout.document(digest, bytes_max),
            (Self::Layout(layout), Err(_)) => layout.manifest(wanted),
        }
    }

    pub fn small_blob(&self, digest: Digest) -> Result<Document, RegistryError> {
        self.small_blob_within(digest, DOCUMENT_MAX_BYTES)
    }

    /// The same, unless it is larger than this.
    pub fn small_blob_within(&self, digest: Digest, bytes_max: u64) -> Result<Document, RegistryError> {
        match self {
            Self::Registry { client, repository } => client.small_blob(repository, digest, bytes_max),
            Self::Layout(layout) => layout.document(digest, bytes_max),
        }
    }

    /// From the byte `from` on.
    pub fn blob(&self, digest: Digest, size: u64, from: u64) -> Result<Box<dyn BlobStream + '_>, RegistryError> {
        Ok(match self {
            Self::Registry { client, repository } => Box::new(client.blob(repository, digest, size, from)),
            Self::Layout(layout) => Box::new(layout.blob(digest, from)?),
        })
    }

    /// `bytes` of a blob from `from` on, where they can be had without the rest.
    pub fn part(&self, digest: Digest, from: u64, bytes: usize) -> Option<Vec<u8>> {
        match self {
            Self::Registry { client, repository } => client.part(repository, digest, from, bytes),
            Self::Layout(layout) => layout.part(digest, from, bytes),
        }
    }
}
