//! Where an image comes from. Both kinds give the same documents and the same streams, and neither is believed.

use std::io::Read;

use edged_model::id::Digest;
use edged_model::reason::Code;
use oci_spec::image::ImageIndex;

use super::layout::Layout;
use super::{Client, Document, RegistryError};

/// Signatures and other artifacts of one image that are looked at: a registry could list any number.
pub const ARTIFACTS_MAX: usize = 32;

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
        match self {
            Self::Registry { client, repository } => client.manifest(repository, wanted),
            Self::Layout(layout) => layout.manifest(wanted),
        }
    }

    pub fn small_blob(&self, digest: Digest) -> Result<Document, RegistryError> {
        match self {
            Self::Registry { client, repository } => client.small_blob(repository, digest),
            Self::Layout(layout) => layout.document(digest),
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

    /// Manifests that may hold a signature of `digest`, at most [`ARTIFACTS_MAX`].
    pub fn artifacts(&self, digest: Digest) -> Result<Vec<Document>, RegistryError> {
        match self {
            Self::Registry { client, repository } => registry_artifacts(client, repository, digest),
            Self::Layout(layout) => layout.artifacts(),
        }
    }
}

fn registry_artifacts(client: &Client, repository: &str, digest: Digest) -> Result<Vec<Document>, RegistryError> {
    let mut artifacts = Vec::new();
    match client.manifest(repository, &format!("sha256-{}.sig", digest.hex())) {
        Ok(document) => artifacts.push(document),
        Err(error) if error.reason.code == Code::ImageNotFound => {}
        Err(error) => return Err(error),
    }
    let Some(referrers) = client.referrers(repository, digest)? else { return Ok(artifacts) };
    let index: ImageIndex = serde_json::from_slice(&referrers.bytes).map_err(|error| {
        let text = format!("{}/{repository}: the referrers of {digest} cannot be read: {error}", client.name);
        RegistryError::new(Code::ImageUnusable, text, true)
    })?;
    // The artifact type in the list is not to be relied on: signers get it wrong.
    for descriptor in index.manifests().iter().take(ARTIFACTS_MAX - artifacts.len()) {
        match client.manifest(repository, descriptor.digest().as_ref()) {
            Ok(document) => artifacts.push(document),
            // A list that has outlived what it lists.
            Err(error) if error.reason.code == Code::ImageNotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(artifacts)
}
