//! How much a layer will take on the disk: nobody says so in an image. A rough guess will do where there is plenty of room;
//! where it gets tight, the end of a gzip stream is asked for, which says how much was packed (RFC 1952, ISIZE).

use edged_model::id::Digest;

use super::layers::Layer;
use super::room::Disk;
use crate::content::layer::Compression;
use crate::registry::Source;

/// What gzip and zstd make of programs is about a third.
const UNPACKED_PER_COMPRESSED: u64 = 3;

/// An image that takes less than this part of the room is not worth a question.
const WORTH_ASKING: u64 = 8;

/// ISIZE has 32 bits: of larger streams it may be anything.
const ISIZE_COMPRESSED_MAX: u64 = 1 << 30;

/// For each layer what it takes.
pub fn needs<'l>(source: &Source, layers: impl Iterator<Item = &'l Layer>, disk: Disk) -> Vec<(Digest, u64)> {
    let layers: Vec<&Layer> = layers.collect();
    let all = layers.iter().map(|layer| guess(layer)).fold(0, u64::saturating_add);
    let is_tight = all > disk.free.saturating_sub(disk.reserve) / WORTH_ASKING;
    let need = |layer: &Layer| {
        let asked = if is_tight { ask(source, layer) } else { None };
        (layer.chain, asked.unwrap_or_else(|| guess(layer)))
    };
    layers.into_iter().map(need).collect()
}

fn guess(layer: &Layer) -> u64 {
    match layer.compression {
        Compression::None => layer.size,
        Compression::Gzip | Compression::Zstd => layer.size.saturating_mul(UNPACKED_PER_COMPRESSED),
    }
}

/// Whatever goes wrong here, the pull itself will say.
fn ask(source: &Source, layer: &Layer) -> Option<u64> {
    match layer.compression {
        Compression::Gzip if layer.size <= ISIZE_COMPRESSED_MAX => {
            let ending = source.ending(layer.digest, layer.size)?;
            packed(u32::from_le_bytes(ending), layer.size)
        }
        Compression::None | Compression::Gzip | Compression::Zstd => None,
    }
}

/// What ISIZE says, if it can be that: a stream of several members speaks of its last only.
fn packed(isize: u32, compressed: u64) -> Option<u64> {
    let packed = u64::from(isize);
    // What cannot be compressed grows by five bytes in 16 KiB, and a header.
    (packed + packed / 64 + 64 >= compressed).then_some(packed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_gzip_stream_is_believed_if_it_can_be() {
        assert_eq!(packed(300, 100), Some(300));
        assert_eq!(packed(1 << 20, (1 << 20) + 340), Some(1 << 20), "noise");
        assert_eq!(packed(0, 1 << 20), None, "the last member of many is empty");
        assert_eq!(packed(1000, 1 << 20), None);
    }
}
