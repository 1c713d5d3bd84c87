//! One streaming pass: bytes -> sha256 -> gzip or zstd -> sha256 -> archive entries. Memory is bounded whatever the
//! layer; nothing is visible before both digests agree. Three threads share the work: this one reads, hashes what comes and
//! decodes it, one hashes the archive, one writes the files (`relay`).

use std::io::{self, BufReader, Read};
use std::path::Path;

use edged_model::id::Digest;
use sha2::{Digest as _, Sha256};

use super::relay::{Chunks, Hasher, Pump, Relay, relay};
use super::table::Sums;
use super::unpack::{self, Bounds, LayersBelow, UnpackError};
use super::zstd::ZstdReader;

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
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => {
                Some(Self::None)
            }
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
    #[error("more than {max} bytes follow the end of the archive")]
    Padding { max: u64 },
}

impl LayerError {
    /// A damaged stream, or one that does not fit its archive; not a full disk or a bound.
    fn may_come_from_wrong_bytes(&self) -> bool {
        matches!(self, Self::Unpack(UnpackError::Archive(_)) | Self::Decompress(_) | Self::Padding { .. })
    }
}

const BUFFER_BYTES: usize = 64 << 10;

/// Archivers fill up to a record of 10 KiB; some leave more room.
const PADDING_MAX_BYTES: u64 = 16 << 20;

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

/// Unpacks the layer that `reader` gives into `dir`; the sums of what it wrote are for the layer's table.
pub fn unpack_stream(
    reader: impl Read,
    expected: &Expected,
    dir: &Path,
    below: &LayersBelow<'_>,
    bounds: Bounds<'_>,
) -> Result<Sums, LayerError> {
    let mut compressed = Hashing::new(reader);
    let Relay { pump, hasher, chunks } = relay();
    let unpacked = std::thread::scope(|scope| {
        let hasher = scope.spawn(move || Hasher::run(hasher));
        let writer = scope.spawn(move || {
            own_umask();
            unpack_archive(chunks, dir, below, bounds)
        });
        decode(&mut compressed, expected.compression, pump);
        let unpacked = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let diff_id = hasher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        unpacked.map(|sums| (diff_id, sums))
    });
    let (diff_id, sums) = match unpacked {
        Ok(unpacked) => unpacked,
        // Bytes that are not those of the image explain whatever is wrong with them.
        Err(error) if error.may_come_from_wrong_bytes() => {
            rest_is_expected(compressed, expected)?;
            return Err(error);
        }
        Err(error) => return Err(error),
    };
    // What the decoder did not need is part of the digest all the same.
    rest_is_expected(compressed, expected)?;
    if diff_id != expected.diff_id {
        return Err(LayerError::WrongDiffId { wanted: expected.diff_id, found: diff_id });
    }
    Ok(sums)
}

/// Files get their mode when they are made, on this thread. Where that cannot be, they get it afterwards.
fn own_umask() {
    if nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).is_ok() {
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    }
}

fn decode(compressed: impl Read, compression: Compression, pump: Pump) {
    let buffered = BufReader::with_capacity(BUFFER_BYTES, compressed);
    match compression {
        // It has buffers of its own.
        Compression::None => pump.run(buffered.into_inner()),
        Compression::Gzip => pump.run(flate2::bufread::MultiGzDecoder::new(buffered)),
        Compression::Zstd => pump.run(ZstdReader::new(buffered)),
    }
}

fn rest_is_expected(mut compressed: Hashing<impl Read>, expected: &Expected) -> Result<(), LayerError> {
    io::copy(&mut compressed, &mut io::sink()).map_err(LayerError::Read)?;
    let found = compressed.digest();
    if found == expected.digest { Ok(()) } else { Err(LayerError::WrongDigest { wanted: expected.digest, found }) }
}

fn unpack_archive(
    mut plain: Chunks,
    dir: &Path,
    below: &LayersBelow<'_>,
    bounds: Bounds<'_>,
) -> Result<Sums, LayerError> {
    let sums = unpack::unpack(&mut plain, dir, below, bounds)?;
    // The padding behind the archive's end, which may not go on for ever either.
    let padding = io::copy(&mut plain.take(PADDING_MAX_BYTES + 1), &mut io::sink()).map_err(LayerError::Decompress)?;
    if padding > PADDING_MAX_BYTES {
        return Err(LayerError::Padding { max: PADDING_MAX_BYTES });
    }
    Ok(sums)
}

#[cfg(test)]
mod tests;
