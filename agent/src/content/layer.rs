//! One streaming pass: bytes -> sha256 -> gzip or zstd -> sha256 -> archive entries. Memory is bounded whatever the
//! layer; nothing is visible before both digests agree.

use std::io::{self, Read};
use std::path::Path;

use edged_model::id::Digest;
use sha2::{Digest as _, Sha256};

use super::unpack::{self, Bounds, UnpackError};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// By the layer's media type (image-spec layer.md; Docker schema 2).
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        match media_type {
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => Some(Self::None),
            "application/vnd.oci.image.layer.v1.tar+gzip" | "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
                Some(Self::Gzip)
            }
            "application/vnd.oci.image.layer.v1.tar+zstd" => Some(Self::Zstd),
            _ => None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    #[error("the layer is {found}, not {wanted}")]
    WrongDigest { wanted: Digest, found: Digest },
    #[error("the layer unpacks to {found}, not {wanted} (its diff id)")]
    WrongDiffId { wanted: Digest, found: Digest },
    #[error("the layer cannot be read")]
    Read(#[source] io::Error),
    #[error("the layer cannot be decompressed")]
    Decompress(#[source] io::Error),
}

/// Counts and hashes what is read through it.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Hashing<R> {
    fn new(inner: R) -> Self {
        Self { inner, hash: Sha256::new() }
    }

    fn digest(self) -> Digest {
        Digest::from_bytes(self.hash.finalize().into())
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        Ok(count)
    }
}

/// What a layer must turn out to be.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    /// Of the bytes as they travel.
    pub digest: Digest,
    /// Of the archive.
    pub diff_id: Digest,
    pub compression: Compression,
}

/// Unpacks the layer that `reader` gives into `dir`. `below`: the layers under it, lowest first, for hard links to files
/// of theirs.
pub fn unpack_stream(
    reader: impl Read,
    expected: &Expected,
    dir: &Path,
    below: &[std::path::PathBuf],
    bounds: Bounds,
) -> Result<(), LayerError> {
    let mut compressed = Hashing::new(reader);
    let diff_id = match expected.compression {
        Compression::None => unpack_archive(&mut compressed, dir, below, bounds)?,
        Compression::Gzip => {
            let buffered = io::BufReader::with_capacity(64 << 10, &mut compressed);
            unpack_archive(flate2::bufread::MultiGzDecoder::new(buffered), dir, below, bounds)?
        }
        Compression::Zstd => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(&mut compressed)
                .map_err(|error| LayerError::Decompress(io::Error::other(error.to_string())))?;
            unpack_archive(decoder, dir, below, bounds)?
        }
    };
    // What the decoder did not need is part of the digest all the same.
    io::copy(&mut compressed, &mut io::sink()).map_err(LayerError::Read)?;
    let found = compressed.digest();
    if found != expected.digest {
        return Err(LayerError::WrongDigest { wanted: expected.digest, found });
    }
    if diff_id != expected.diff_id {
        return Err(LayerError::WrongDiffId { wanted: expected.diff_id, found: diff_id });
    }
    Ok(())
}

fn unpack_archive(
    reader: impl Read,
    dir: &Path,
    below: &[std::path::PathBuf],
    bounds: Bounds,
) -> Result<Digest, LayerError> {
    let mut plain = Hashing::new(reader.take(bounds.bytes_max.saturating_add(1)));
    unpack::unpack(&mut plain, dir, below, bounds)?;
    // The padding behind the archive's end.
    io::copy(&mut plain, &mut io::sink()).map_err(LayerError::Decompress)?;
    Ok(plain.digest())
}
