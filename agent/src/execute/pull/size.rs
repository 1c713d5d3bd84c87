//! How much a layer will take on the disk: nobody says so in an image. A rough guess will do where there is plenty of room;
//! where it gets tight, the stream itself is asked for a few bytes that may say it: the end of a gzip stream (RFC 1952,
//! ISIZE), the first frame's header or the seek table of a zstd one. Where they say nothing it stays a guess, and the
//! refusal says so.

use edged_model::id::Digest;

use super::layers::Layer;
use super::room::{Disk, Need};
use crate::content::layer::Compression;
use crate::content::zstd;
use crate::registry::Source;

/// What gzip and zstd make of programs is about a third.
const UNPACKED_PER_COMPRESSED: u64 = 3;

/// An image that takes less than this part of the room is not worth a question.
const WORTH_ASKING: u64 = 8;

/// ISIZE has 32 bits: of larger streams it may be anything.
const ISIZE_COMPRESSED_MAX: u64 = 1 << 30;

/// For each layer what it takes.
pub fn needs<'l>(source: &Source, layers: impl Iterator<Item = &'l Layer>, disk: Disk) -> Vec<(Digest, Need)> {
    let layers: Vec<&Layer> = layers.collect();
    let all = layers.iter().map(|layer| guess(layer).bytes).fold(0, u64::saturating_add);
    let is_tight = all > disk.free.saturating_sub(disk.reserve) / WORTH_ASKING;
    let need = |layer: &Layer| {
        let asked = if is_tight { ask(source, layer) } else { None };
        (layer.chain, asked.map_or_else(|| guess(layer), Need::known))
    };
    layers.into_iter().map(need).collect()
}

fn guess(layer: &Layer) -> Need {
    match layer.compression {
        Compression::None => Need::known(layer.size),
        Compression::Gzip | Compression::Zstd => Need::guessed(layer.size.saturating_mul(UNPACKED_PER_COMPRESSED)),
    }
}

/// Whatever goes wrong here, the pull itself will say.
fn ask(source: &Source, layer: &Layer) -> Option<u64> {
    let part = |from: u64, bytes: usize| source.part(layer.digest, from, bytes);
    match layer.compression {
        Compression::Gzip if layer.size <= ISIZE_COMPRESSED_MAX => {
            let ending = part(layer.size.checked_sub(4)?, 4)?;
            packed(u64::from(u32::from_le_bytes(ending.try_into().ok()?)), layer.size)
        }
        Compression::Zstd => of_zstd(layer.size, &part),
        Compression::None | Compression::Gzip => None,
    }
}

/// Of a stream with a seek table the sum of its frames; else what the first frame says, if it can be the only one.
fn of_zstd(size: u64, part: &dyn Fn(u64, usize) -> Option<Vec<u8>>) -> Option<u64> {
    let footer_from = size.checked_sub(zstd::SEEK_FOOTER_BYTES as u64)?;
    let ending = part(footer_from, zstd::SEEK_FOOTER_BYTES)?;
    if let Some(table_bytes) = zstd::seek_table_bytes(&ending) {
        let table = part(size.checked_sub(table_bytes as u64)?, table_bytes)?;
        return zstd::seek_table_content(&table, size);
    }
    let begin = part(0, zstd::HEADER_MAX_BYTES.min(usize::try_from(size).ok()?))?;
    packed(zstd::Header::parse(&begin)?.content_size?, size)
}

/// What the stream says of its content, if it can be that: of several members or frames one speaks only of itself.
fn packed(content: u64, compressed: u64) -> Option<u64> {
    // What cannot be compressed grows by five bytes in 16 KiB with gzip, by less with zstd, and by a header.
    (content.saturating_add(content / 64).saturating_add(64) >= compressed).then_some(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::zstd::tests::{seekable, zstd};

    #[test]
    fn the_end_of_a_gzip_stream_is_believed_if_it_can_be() {
        assert_eq!(packed(300, 100), Some(300));
        assert_eq!(packed(1 << 20, (1 << 20) + 340), Some(1 << 20), "noise");
        assert_eq!(packed(0, 1 << 20), None, "the last member of many is empty");
        assert_eq!(packed(1000, 1 << 20), None);
        assert_eq!(packed(u64::MAX, 1 << 20), Some(u64::MAX), "it will not fit");
    }

    #[test]
    fn a_zstd_stream_says_what_it_holds_where_its_writer_knew() {
        let of = |stream: &[u8]| {
            of_zstd(stream.len() as u64, &|from, bytes| {
                let from = usize::try_from(from).unwrap();
                stream.get(from..from + bytes).map(<[u8]>::to_vec)
            })
        };
        let text: Vec<u8> = (0..300_000_u32).flat_map(|n| n.to_string().into_bytes()).collect();
        let length = format!("--stream-size={}", text.len());
        let one = zstd(&["-q", "-c", &length], &text);
        assert_eq!(of(&one), Some(text.len() as u64));
        assert_eq!(of(&zstd(&["-q", "-c"], &text)), None, "from a pipe: nobody knew");
        for small in [0, 100, 255, 256, 65_791, 65_792] {
            let stream = zstd(&["-q", "-c", &format!("--stream-size={small}")], &text[..small]);
            assert_eq!(of(&stream), Some(small as u64));
        }
        let frames = [&text[..1000], &text[1000..200_000], &text[200_000..]];
        let packed = frames.map(|frame| zstd(&["-q", "-c", &format!("--stream-size={}", frame.len())], frame));
        assert_eq!(of(&packed.concat()), None, "the first of several speaks of itself");
        for with_checksums in [false, true] {
            let mut stream = seekable(&packed, &frames.map(<[u8]>::len), with_checksums);
            assert_eq!(of(&stream), Some(text.len() as u64));
            stream.insert(0, 0);
            assert_eq!(of(&stream), None, "the table speaks of another stream");
        }
        for end in 0..one.len().min(20) {
            assert!(of(&one[..end]).is_none_or(|content| content == text.len() as u64));
        }
    }
}
