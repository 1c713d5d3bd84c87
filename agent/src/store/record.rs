//! How one record is written: CBOR behind the first bytes of a sha256 over its place and its content, cut into pieces.
//!
//! The sum is there because sled does not notice every flipped byte. The pieces are there because sled 0.34 puts what is
//! larger than a quarter of a segment into a file of its own under `blobs/`, which nobody syncs: a leaf of its tree has
//! at most some twenty entries, so pieces of 4 KiB keep every leaf far below that size.

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::StoreError;

/// Enough to notice damage; nobody is kept out by it (what must be authentic is signed).
const SUM_BYTES: usize = 8;

/// One entry of a sled tree is never larger.
pub const PIECE_BYTES: usize = 4096;

/// Between a key and the number of a piece. No key has it.
const PIECE_MARK: u8 = 0;

/// The value behind its sum.
pub fn seal<T: Serialize>(tree: &str, key: &str, value: &T) -> Result<Vec<u8>, StoreError> {
    let bytes =
        serde_cbor::to_vec(value).map_err(|source| StoreError::Encode { key: format!("{tree}/{key}"), source })?;
    let mut sealed = sum(tree, key, &bytes).to_vec();
    sealed.extend(bytes);
    Ok(sealed)
}

/// The value, or `None` if it is not what was sealed for this place.
pub fn unseal<T: DeserializeOwned>(tree: &str, key: &str, sealed: &[u8]) -> Option<T> {
    let (found, bytes) = sealed.split_at_checked(SUM_BYTES)?;
    if sum(tree, key, bytes) != *found {
        return None;
    }
    edged_model::cbor::read(bytes).ok()
}

fn sum(tree: &str, key: &str, bytes: &[u8]) -> [u8; SUM_BYTES] {
    let mut hash = Sha256::new();
    for part in [tree.as_bytes(), b"/", key.as_bytes(), b"\0", bytes] {
        hash.update(part);
    }
    let mut sum = [0; SUM_BYTES];
    sum.copy_from_slice(&hash.finalize()[..SUM_BYTES]);
    sum
}

/// The entries that a sealed value becomes.
pub fn pieces<'a>(key: &'a str, sealed: &'a [u8]) -> impl Iterator<Item = (Vec<u8>, &'a [u8])> {
    sealed.chunks(PIECE_BYTES).enumerate().map(|(index, piece)| (piece_key(key, index), piece))
}

/// The first piece lies under the key itself, the others sort right behind it.
pub fn piece_key(key: &str, index: usize) -> Vec<u8> {
    let mut bytes = key.as_bytes().to_vec();
    if index > 0 {
        bytes.push(PIECE_MARK);
        // A document is at most a few mebibytes: a few hundred pieces.
        bytes.extend(u32::try_from(index).unwrap_or(u32::MAX).to_be_bytes());
    }
    bytes
}

/// Whether an entry is a later piece of the record `key`.
pub fn is_piece_of(entry: &[u8], key: &[u8]) -> bool {
    entry.len() == key.len() + 5 && entry.starts_with(key) && entry[key.len()] == PIECE_MARK
}

/// Sorts as the number does.
pub fn number_key(number: u64) -> String {
    format!("{number:020}")
}

/// Bytes as a CBOR byte string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

impl Serialize for Blob {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for Blob {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl serde::de::Visitor<'_> for Bytes {
            type Value = Blob;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a byte string")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Blob, E> {
                Ok(Blob(bytes.to_vec()))
            }
        }
        d.deserialize_bytes(Bytes)
    }
}
