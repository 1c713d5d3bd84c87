//! Reads a tar archive as a stream: ustar, GNU and pax (pax(1), tar(5)), long names, extended attributes, sparse files in
//! all four spellings. Fields are the `tar` crate's to parse; the walk is done here because the archive is hostile:
//! whatever a header claims, a name costs at most [`NAME_MAX_BYTES`], the extensions of one entry at most
//! [`EXTENSION_MAX_BYTES`], and an attribute may hold any byte (a pax record ends by its length, not at a line's end).
//!
//! Where tools differ, this one reads as the tools that make and scan images do: links, directories and devices have no
//! body, whatever their size field says.

use std::io::{self, BufRead, Read, Seek, SeekFrom};

use tar::{EntryType, Header};

mod pax;
mod sparse;

pub use sparse::Segment;

const BLOCK: usize = 512;

/// Longer than any path Linux takes (PATH_MAX).
pub const NAME_MAX_BYTES: u64 = 4096;

/// Pax records of one entry: more than the largest extended attributes Linux keeps.
pub const EXTENSION_MAX_BYTES: u64 = 1 << 20;

/// All headers before an entry that speak of it, or of the whole archive: whatever they are, they come to an end.
const DESCRIPTION_MAX_BYTES: u64 = 2 * EXTENSION_MAX_BYTES;

#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("the archive cannot be read after entry `{after}`")]
    Read {
        after: String,
        #[source]
        source: io::Error,
    },
    #[error("the archive is damaged after entry `{after}`: {what}")]
    Damaged { after: String, what: &'static str },
}

/// One entry, its body still in the stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Item {
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: Kind,
    /// Of the file when it is unpacked.
    pub size: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime_secs: i64,
    pub mtime_nanos: u32,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    pub xattrs: Vec<(String, Vec<u8>)>,
    /// Where the stored bytes belong; `None`: it has no holes.
    pub segments: Option<Vec<Segment>>,
    /// What the archive has besides its header and content: extended headers, maps of sparse files.
    pub described_bytes: u64,
}

impl Item {
    /// Its name in a sentence. Made for an error only: of most entries nobody is told.
    pub fn shown_name(&self) -> String {
        printable(&self.name)
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Kind {
    #[default]
    File,
    HardLink,
    Symlink,
    Directory,
    Fifo,
    CharDevice,
    BlockDevice,
    Unknown,
}

impl Kind {
    fn of(entry_type: EntryType) -> Self {
        match entry_type {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Self::File,
            EntryType::Link => Self::HardLink,
            EntryType::Symlink => Self::Symlink,
            EntryType::Directory => Self::Directory,
            EntryType::Fifo => Self::Fifo,
            EntryType::Char => Self::CharDevice,
            EntryType::Block => Self::BlockDevice,
            _ => Self::Unknown,
        }
    }
}

/// What precedes an entry and speaks of it.
#[derive(Default)]
struct Extensions {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: pax::Records,
    /// How long all of them are.
    bytes: u64,
    /// There is one that wants an entry behind it.
    is_announced: bool,
}

pub struct ArchiveReader<R> {
    reader: R,
    /// Of the current body.
    left: u64,
    padding: u64,
    /// As it stands there: it is only made readable for an error.
    last_name: Vec<u8>,
}

impl<R: Read> ArchiveReader<R> {
    pub fn new(reader: R) -> Self {
        Self { reader, left: 0, padding: 0, last_name: Vec::new() }
    }

    /// The next entry; what was not read of the last one is passed over. `None` at the archive's end.
    pub fn next_item(&mut self) -> Result<Option<Item>, ArchiveError> {
        let mut extensions = Extensions::default();
        loop {
            if extensions.bytes > DESCRIPTION_MAX_BYTES {
                return Err(self.damaged("its extended headers are too large"));
            }
            if self.pass(self.left)? > 0 {
                return Err(self.damaged("it ends in the middle of a file"));
            }
            // Some writers end with the last file's last byte.
            let is_over = self.pass(self.padding)? > 0;
            (self.left, self.padding) = (0, 0);
            let header = if is_over { None } else { self.header()? };
            let Some(header) = header else {
                let cut = extensions.is_announced.then(|| self.damaged("it ends before the entry it speaks of"));
                return cut.map_or(Ok(None), Err);
            };
            let kind = header.entry_type();
            if is_extension(kind) {
                extensions.bytes = extensions.bytes.saturating_add(BLOCK as u64).saturating_add(self.size(&header)?);
                extensions.is_announced |= kind != EntryType::XGlobalHeader;
            }
            match kind {
                EntryType::GNULongName => extensions.name = Some(self.long_name(&header)?),
                EntryType::GNULongLink => extensions.link = Some(self.long_name(&header)?),
                EntryType::XHeader => {
                    let bytes = self.small_body(&header, EXTENSION_MAX_BYTES, "its extended header is too large")?;
                    extensions.pax = pax::Records::parse(&bytes).map_err(|what| self.damaged(what))?;
                }
                // Comments of the tool that wrote it.
                EntryType::XGlobalHeader => self.start_body(self.size(&header)?)?,
                _ => return self.item(&header, extensions).map(Some),
            }
        }
    }

    /// Reads of the current body.
    pub fn read_body(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let take = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if take == 0 {
            return Ok(0);
        }
        let count = self.reader.read(&mut buffer[..take]).map_err(|source| self.unreadable(source))?;
        if count == 0 {
            return Err(self.damaged("it ends in the middle of a file"));
        }
        self.left -= count as u64;
        Ok(count)
    }

    fn item(&mut self, header: &Header, extensions: Extensions) -> Result<Item, ArchiveError> {
        let pax = extensions.pax;
        let name = pax.sparse.name.clone().or(pax.path).or(extensions.name);
        let name = name.unwrap_or_else(|| header.path_bytes().into_owned());
        self.last_name.clone_from(&name);
        let kind = match Kind::of(header.entry_type()) {
            // The old way to write a directory (V7).
            Kind::File if name.ends_with(b"/") => Kind::Directory,
            kind => kind,
        };
        let link = pax.linkpath.or(extensions.link);
        let link = link.unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned());
        let stored = if matches!(kind, Kind::File | Kind::Unknown) {
            pax.size.map_or_else(|| self.size(header), Ok)?
        } else {
            0
        };
        let number = |value: io::Result<u64>, what| value.ok().and_then(|n| u32::try_from(n).ok()).ok_or(what);
        let uid = pax.uid.map_or_else(|| number(header.uid(), "an owner that is no number"), Ok);
        let gid = pax.gid.map_or_else(|| number(header.gid(), "a group that is no number"), Ok);
        let mode = header.mode().map_err(|_| "a mode that is no number");
        let mtime =
            pax.mtime.unwrap_or_else(|| (header.mtime().ok().and_then(|n| i64::try_from(n).ok()).unwrap_or(0), 0));
        let is_device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
        // Nobody reads it of anything else.
        let device = if is_device { device_numbers(header) } else { Ok((0, 0)) };
        let mut item = Item {
            name,
            link,
            kind,
            size: stored,
            mode: mode.map_err(|what| self.damaged(what))? & 0o7777,
            uid: uid.map_err(|what| self.damaged(what))?,
            gid: gid.map_err(|what| self.damaged(what))?,
            mtime_secs: mtime.0,
            mtime_nanos: mtime.1,
            device: device.map_err(|_| self.damaged("a device number that is none"))?,
            xattrs: pax.xattrs,
            segments: None,
            described_bytes: extensions.bytes,
        };
        let gnu_map = match header.entry_type() {
            EntryType::GNUSparse => Some(self.old_gnu_map(header)?),
            _ => None,
        };
        self.start_body(stored)?;
        if kind == Kind::File {
            let in_body = pax.sparse.map_is_in_body();
            if let Some((size, segments)) = gnu_map.or(pax.sparse.map()) {
                (item.size, item.segments) = (size, Some(segments));
            } else if in_body {
                item.size = pax.sparse.real_size.ok_or_else(|| self.damaged("a sparse file without its size"))?;
                item.segments = Some(self.map_in_body()?);
                item.described_bytes += stored - self.left;
            }
            let fits = item.segments.as_ref().is_none_or(|segments| sparse::fits(segments, item.size, self.left));
            if !fits {
                return Err(self.damaged("a sparse file whose parts do not fit together"));
            }
        }
        Ok(item)
    }

    /// A header whose checksum is right, or the end.
    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        let Some(header) = self.block()? else { return Ok(None) };
        if is_zero(&header) {
            // Two blocks of zeros end an archive; some writers leave it at one, or none.
            return match self.block()? {
                Some(next) if !is_zero(&next) => Err(self.damaged("something follows a block of zeros")),
                _ => Ok(None),
            };
        }
        let bytes = header.as_bytes();
        let sum_of = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        // Its own field counts as eight spaces.
        let sum = sum_of(&bytes[..148]) + 8 * u32::from(b' ') + sum_of(&bytes[156..]);
        if header.cksum().ok() != Some(sum) {
            return Err(self.damaged("the next header has a wrong checksum"));
        }
        Ok(Some(header))
    }

    fn block(&mut self) -> Result<Option<Header>, ArchiveError> {
        let mut block = Header::new_old();
        let mut filled = 0;
        while filled < BLOCK {
            let count = self.reader.read(&mut block.as_mut_bytes()[filled..]);
            match count.map_err(|source| self.unreadable(source))? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(self.damaged("it ends in the middle of a header")),
                count => filled += count,
            }
        }
        Ok(Some(block))
    }

    fn size(&self, header: &Header) -> Result<u64, ArchiveError> {
        header.entry_size().map_err(|_| self.damaged("a size that is no number"))
    }

    fn start_body(&mut self, size: u64) -> Result<(), ArchiveError> {
        let padded =
            size.checked_next_multiple_of(BLOCK as u64).ok_or_else(|| self.damaged("a size beyond all disks"))?;
        (self.left, self.padding) = (size, padded - size);
        Ok(())
    }

    fn small_body(&mut self, header: &Header, max: u64, what: &'static str) -> Result<Vec<u8>, ArchiveError> {
        let size = self.size(header)?;
        if size > max {
            return Err(self.damaged(what));
        }
        self.start_body(size)?;
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += self.read_body(&mut bytes[filled..])?;
        }
        Ok(bytes)
    }

    fn long_name(&mut self, header: &Header) -> Result<Vec<u8>, ArchiveError> {
        let mut name = self.small_body(header, NAME_MAX_BYTES + 1, "the next name is too long")?;
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        name.truncate(end);
        Ok(name)
    }

    /// The map of an old GNU sparse file: in its header and the blocks after it.
    fn old_gnu_map(&mut self, header: &Header) -> Result<(u64, Vec<Segment>), ArchiveError> {
        let bad = "a sparse file's map that cannot be read";
        let gnu = header.as_gnu().ok_or_else(|| self.damaged(bad))?;
        let size = gnu.real_size().map_err(|_| self.damaged(bad))?;
        let mut segments = Vec::new();
        sparse::add(&mut segments, &gnu.sparse).map_err(|what| self.damaged(what))?;
        let mut more = gnu.is_extended();
        while more {
            let mut extension = tar::GnuExtSparseHeader::new();
            self.reader.read_exact(extension.as_mut_bytes()).map_err(|source| self.unreadable(source))?;
            sparse::add(&mut segments, extension.sparse()).map_err(|what| self.damaged(what))?;
            more = extension.is_extended();
        }
        Ok((size, segments))
    }

    /// The map of a pax 1.0 sparse file: decimal lines at the beginning of its body, padded to a block.
    fn map_in_body(&mut self) -> Result<Vec<Segment>, ArchiveError> {
        let mut lines = sparse::MapLines::default();
        let mut block = [0; BLOCK];
        while !lines.is_whole() {
            let mut filled = 0;
            while filled < BLOCK {
                match self.read_body(&mut block[filled..])? {
                    0 => return Err(self.damaged("a sparse file's map that is cut off")),
                    count => filled += count,
                }
            }
            lines.add(&block).map_err(|what| self.damaged(what))?;
        }
        Ok(lines.segments())
    }

    /// Reads over so many bytes; gives those that were missing at the stream's end.
    fn pass(&mut self, mut bytes: u64) -> Result<u64, ArchiveError> {
        let mut waste = [0; 4096];
        while bytes > 0 {
            let take = waste.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
            match self.reader.read(&mut waste[..take]).map_err(|source| self.unreadable(source))? {
                0 => break,
                count => bytes -= count as u64,
            }
        }
        Ok(bytes)
    }

    fn damaged(&self, what: &'static str) -> ArchiveError {
        ArchiveError::Damaged { after: printable(&self.last_name), what }
    }

    fn unreadable(&self, source: io::Error) -> ArchiveError {
        ArchiveError::Read { after: printable(&self.last_name), source }
    }
}

/// Archives in a buffer that can be looked into.
impl<R: BufRead> ArchiveReader<R> {
    /// What there is next of the current body, at most `max`; empty at its end. It is taken by [`Self::consume`].
    pub fn peek_body(&mut self, max: usize) -> Result<&[u8], ArchiveError> {
        let take = max.min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if take == 0 {
            return Ok(&[]);
        }
        let is_over = match self.reader.fill_buf() {
            Ok(bytes) => bytes.is_empty(),
            Err(source) => return Err(self.unreadable(source)),
        };
        if is_over {
            return Err(self.damaged("it ends in the middle of a file"));
        }
        // Asked once more, since what it showed cannot be held over the errors above. Nothing is read for it.
        match self.reader.fill_buf() {
            Ok(bytes) => Ok(&bytes[..take.min(bytes.len())]),
            Err(source) => Err(ArchiveError::Read { after: printable(&self.last_name), source }),
        }
    }

    /// So much of what was shown.
    pub fn consume(&mut self, count: usize) {
        self.reader.consume(count);
        self.left = self.left.saturating_sub(count as u64);
    }
}

/// Archives that lie in a file.
impl<R: Read + Seek> ArchiveReader<R> {
    /// Where in the file the rest of the current body begins.
    pub fn position(&mut self) -> io::Result<u64> {
        self.reader.stream_position()
    }

    /// Passes over the current body without reading it. That it is there at all shows when it is read.
    pub fn seek_over_body(&mut self) -> io::Result<()> {
        let bytes = i64::try_from(self.left).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        self.reader.seek(SeekFrom::Current(bytes))?;
        self.left = 0;
        Ok(())
    }
}

/// Headers that only speak of what follows.
fn is_extension(kind: EntryType) -> bool {
    use EntryType::{GNULongLink, GNULongName, XGlobalHeader, XHeader};
    matches!(kind, GNULongName | GNULongLink | XHeader | XGlobalHeader)
}

/// Headers older than ustar have none.
fn device_numbers(header: &Header) -> io::Result<(u32, u32)> {
    Ok((header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0)))
}

fn is_zero(header: &Header) -> bool {
    header.as_bytes().iter().all(|byte| *byte == 0)
}

/// A name for people, whatever bytes it has and however long it is.
pub fn printable(raw: &[u8]) -> String {
    const SHOWN_MAX: usize = 200;
    let text: String = String::from_utf8_lossy(raw).chars().take(SHOWN_MAX).collect();
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
