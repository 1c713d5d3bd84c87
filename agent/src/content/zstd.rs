//! Zstandard (RFC 8878) as a stream: frame after frame, skippable ones passed over, as seekable layers have them. The
//! window is bounded before the decoder allocates it: RFC 8878 asks for 8 MiB, and a device has no more to spare. Frames are
//! told apart here, so that the decoder sees none of the formats of zstd's first years.

use std::io::{self, BufRead, Read};

use edged_sys::unzstd::Decoder;

const WINDOW_MAX_LOG: u8 = 23;
/// What one decoder has for its window.
pub const WINDOW_MAX_BYTES: u64 = 1 << WINDOW_MAX_LOG;
const MAGIC: u32 = 0xfd2f_b528;
/// The low four bits are free.
const SKIPPABLE: u32 = 0x184d_2a50;

/// The longest beginning of a frame that is needed to read its header, the magic number with it.
pub const HEADER_MAX_BYTES: usize = 18;

/// What a frame says of itself (RFC 8878, 3.1.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub window: u64,
    /// Of what it unpacks to, where its writer knew.
    pub content_size: Option<u64>,
}

impl Header {
    /// `None`: this is no frame, or not enough of one.
    pub fn parse(begin: &[u8]) -> Option<Self> {
        let header = begin.strip_prefix(&MAGIC.to_le_bytes())?;
        header.get(..header_bytes(*header.first()?)).map(read_header)
    }
}

/// By its first byte, how long a header is.
fn header_bytes(descriptor: u8) -> usize {
    let single_segment = descriptor & 0x20 != 0;
    1 + usize::from(!single_segment) + dictionary_bytes(descriptor) + size_bytes(descriptor)
}

fn dictionary_bytes(descriptor: u8) -> usize {
    [0, 1, 2, 4][usize::from(descriptor & 3)]
}

fn size_bytes(descriptor: u8) -> usize {
    match descriptor >> 6 {
        0 => usize::from(descriptor & 0x20 != 0),
        1 => 2,
        2 => 4,
        _ => 8,
    }
}

/// A whole header.
fn read_header(header: &[u8]) -> Header {
    let descriptor = header[0];
    let size_bytes = size_bytes(descriptor);
    let content_size = (size_bytes > 0).then(|| {
        let mut size = [0; 8];
        size[..size_bytes].copy_from_slice(&header[header.len() - size_bytes..]);
        // A size of two bytes counts from 256.
        u64::from_le_bytes(size) + if size_bytes == 2 { 256 } else { 0 }
    });
    let window = match content_size {
        Some(size) if descriptor & 0x20 != 0 => size,
        _ => {
            let base = 1_u64 << (10 + (header[1] >> 3));
            base + base / 8 * u64::from(header[1] & 7)
        }
    };
    Header { window, content_size }
}

/// At the end of a seek table (zstd's contrib/seekable_format).
pub const SEEK_FOOTER_BYTES: usize = 9;
const SEEK_MAGIC: u32 = 0x8f92_eab1;
/// A layer of frames of 4 MiB has fewer.
const SEEK_FRAMES_MAX: usize = 1 << 16;

/// How long the seek table is that ends with this footer, as a skippable frame; `None`: there is none.
pub fn seek_table_bytes(footer: &[u8]) -> Option<usize> {
    let (frames, entry) = seek_footer(footer)?;
    (frames <= SEEK_FRAMES_MAX).then(|| 8 + frames * entry + SEEK_FOOTER_BYTES)
}

fn seek_footer(footer: &[u8]) -> Option<(usize, usize)> {
    let footer: &[u8; SEEK_FOOTER_BYTES] = footer.try_into().ok()?;
    let [a, b, c, d, descriptor, magic @ ..] = *footer;
    let has_checksums = descriptor & 0x80 != 0;
    let frames = usize::try_from(u32::from_le_bytes([a, b, c, d])).ok()?;
    (u32::from_le_bytes(magic) == SEEK_MAGIC).then_some((frames, if has_checksums { 12 } else { 8 }))
}

/// What all frames of a stream of `size` bytes unpack to, by its seek table; `None` if that speaks of another stream.
pub fn seek_table_content(table: &[u8], size: u64) -> Option<u64> {
    let (_, entry) = seek_footer(table.get(table.len().checked_sub(SEEK_FOOTER_BYTES)?..)?)?;
    let entries = table.get(8..table.len() - SEEK_FOOTER_BYTES)?.chunks_exact(entry);
    let number = |bytes: &[u8]| bytes.try_into().map_or(0, |bytes| u64::from(u32::from_le_bytes(bytes)));
    let sum = |at: usize| entries.clone().map(|entry| number(&entry[at..at + 4])).sum::<u64>();
    (sum(0) + table.len() as u64 == size).then(|| sum(4))
}

pub struct ZstdReader<R> {
    input: R,
    /// Made for the first frame.
    decoder: Option<Decoder>,
    /// Of the frame that has begun, what was read to look at it and not decoded yet.
    header: Vec<u8>,
    in_frame: bool,
}

impl<R: BufRead> ZstdReader<R> {
    pub fn new(input: R) -> Self {
        Self { input, decoder: None, header: Vec::new(), in_frame: false }
    }

    /// Begins the next frame; false at the end.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            let mut magic = [0; 4];
            if !read_whole_or_none(&mut self.input, &mut magic)? {
                return Ok(false);
            }
            let number = u32::from_le_bytes(magic);
            if number & !0xf == SKIPPABLE {
                let mut length = [0; 4];
                self.input.read_exact(&mut length)?;
                let length = u64::from(u32::from_le_bytes(length));
                if io::copy(&mut self.input.by_ref().take(length), &mut io::sink())? != length {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                continue;
            }
            if number != MAGIC {
                return Err(bad("not a zstd frame"));
            }
            let header = self.frame_header()?;
            self.header = [magic.as_slice(), &header].concat();
            self.in_frame = true;
            return Ok(true);
        }
    }

    /// The header behind the magic number, its window checked.
    fn frame_header(&mut self) -> io::Result<Vec<u8>> {
        let mut header = vec![0; 1];
        self.input.read_exact(&mut header)?;
        header.resize(header_bytes(header[0]), 0);
        self.input.read_exact(&mut header[1..])?;
        let window = read_header(&header).window;
        if window > WINDOW_MAX_BYTES {
            return Err(bad(&format!(
                "its zstd window of {window} bytes is more than the {WINDOW_MAX_BYTES} this device has for it"
            )));
        }
        Ok(header)
    }

    /// Decodes what is there now; nothing may come of it, without being the end.
    fn step(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let damaged = |error: edged_sys::unzstd::DecodeError| bad(&error.to_string());
        let decoder = match &mut self.decoder {
            Some(decoder) => decoder,
            none => none.insert(Decoder::new(WINDOW_MAX_LOG).map_err(damaged)?),
        };
        if !self.header.is_empty() {
            let step = decoder.decode(&self.header, buffer).map_err(damaged)?;
            self.header.drain(..step.read);
            self.in_frame = !step.is_end;
            return Ok(step.written);
        }
        let input = self.input.fill_buf()?;
        let is_over = input.is_empty();
        let step = decoder.decode(input, buffer).map_err(damaged)?;
        self.input.consume(step.read);
        self.in_frame = !step.is_end;
        if is_over && step.written == 0 && self.in_frame {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(step.written)
    }
}

impl<R: BufRead> Read for ZstdReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.in_frame && !self.next_frame()? {
                return Ok(0);
            }
            let count = self.step(buffer)?;
            if count > 0 {
                return Ok(count);
            }
        }
    }
}

fn bad(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// False at the end of the stream; an end in the middle is an error.
fn read_whole_or_none(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..])? {
            0 if filled == 0 => return Ok(false),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
    }
    Ok(true)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// The frames with a seek table behind them.
    pub fn seekable(frames: &[Vec<u8>], contents: &[usize], with_checksums: bool) -> Vec<u8> {
        let mut table = Vec::new();
        for (frame, content) in frames.iter().zip(contents) {
            table.extend((frame.len() as u32).to_le_bytes());
            table.extend((*content as u32).to_le_bytes());
            table.extend(if with_checksums { vec![7; 4] } else { Vec::new() });
        }
        table.extend((frames.len() as u32).to_le_bytes());
        table.push(if with_checksums { 0x80 } else { 0 });
        table.extend(SEEK_MAGIC.to_le_bytes());
        let head = [0x184d_2a5e_u32.to_le_bytes(), (table.len() as u32).to_le_bytes()].concat();
        [frames.concat(), head, table].concat()
    }

    pub fn zstd(args: &[&str], input: &[u8]) -> Vec<u8> {
        let mut child = Command::new("zstd")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("zstd is installed");
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        assert!(output.status.success());
        output.stdout
    }

    #[test]
    fn frames_one_after_the_other_with_skippable_ones_between() {
        let text: Vec<u8> = (0..300_000_u32).flat_map(|n| n.to_string().into_bytes()).collect();
        let mut packed = zstd(&["-q", "-c"], &text);
        packed.extend_from_slice(&[0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]);
        packed.extend(zstd(&["-q", "-c", "-19"], b"the end"));
        packed.extend(zstd(&["-q", "-c", "--no-check"], b""));
        let mut out = Vec::new();
        ZstdReader::new(packed.as_slice()).read_to_end(&mut out).unwrap();
        assert!(out == [text.as_slice(), b"the end"].concat());
        for end in [0, 3, 7, packed.len() / 2, packed.len() - 1] {
            let result = ZstdReader::new(&packed[..end]).read_to_end(&mut Vec::new());
            assert!(result.is_err() || end == 0, "{end}");
        }
    }

    #[test]
    fn a_window_larger_than_the_device_has_is_refused_before_it_costs_anything() {
        let packed = zstd(&["-q", "-c", "--ultra", "-22", "--long=27"], &vec![7; 1 << 20]);
        let error = ZstdReader::new(packed.as_slice()).read_to_end(&mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("window"), "{error}");
    }
}
