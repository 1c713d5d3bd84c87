//! Files with holes: what GNU tar writes as type `S`, and as pax 0.0, 0.1 and 1.0 (tar manual, "Storing Sparse Files").

use tar::GnuSparseHeader;

use super::pax::{name, number};

/// Parts of one file; more than a real file has, and bounded in memory.
const SEGMENTS_MAX: usize = 1 << 16;

const TOO_MANY: &str = "a sparse file with too many parts";
const BAD: &str = "a sparse file's map that cannot be read";

/// Stored bytes and where they belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub offset: u64,
    pub length: u64,
}

/// In order, apart, inside the file, and together what is stored.
pub fn fits(segments: &[Segment], size: u64, stored: u64) -> bool {
    let mut end = 0_u64;
    let mut sum = 0_u64;
    for segment in segments {
        let Some(next) = segment.offset.checked_add(segment.length) else { return false };
        if segment.offset < end || next > size {
            return false;
        }
        end = next;
        // No overflow: the parts lie apart inside `size`.
        sum += segment.length;
    }
    sum == stored
}

pub fn add(segments: &mut Vec<Segment>, headers: &[GnuSparseHeader]) -> Result<(), &'static str> {
    for header in headers.iter().filter(|header| !header.is_empty()) {
        if segments.len() == SEGMENTS_MAX {
            return Err(TOO_MANY);
        }
        let (Ok(offset), Ok(length)) = (header.offset(), header.length()) else { return Err(BAD) };
        segments.push(Segment { offset, length });
    }
    Ok(())
}

fn pairs(numbers: &[u64]) -> Vec<Segment> {
    numbers.chunks_exact(2).map(|pair| Segment { offset: pair[0], length: pair[1] }).collect()
}

/// The `GNU.sparse.*` records of one entry.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SparseRecords {
    pub name: Option<Vec<u8>>,
    pub real_size: Option<u64>,
    major: Option<u64>,
    /// Offset, length, offset, length, …
    numbers: Vec<u64>,
}

impl SparseRecords {
    pub fn take(&mut self, key: &str, value: &[u8]) -> Result<(), &'static str> {
        match key {
            "name" => self.name = Some(name(value)?),
            "realsize" | "size" => self.real_size = Some(number(value)?),
            "major" => self.major = Some(number(value)?),
            "map" => {
                self.numbers = value.split(|byte| *byte == b',').map(number).collect::<Result<_, _>>()?;
                if !self.numbers.len().is_multiple_of(2) {
                    return Err(BAD);
                }
            }
            "offset" if self.numbers.len().is_multiple_of(2) => self.numbers.push(number(value)?),
            "numbytes" if self.numbers.len() % 2 == 1 => self.numbers.push(number(value)?),
            "offset" | "numbytes" => return Err(BAD),
            _ => {}
        }
        if self.numbers.len() > 2 * SEGMENTS_MAX { Err(TOO_MANY) } else { Ok(()) }
    }

    pub fn map_is_in_body(&self) -> bool {
        self.major == Some(1)
    }

    pub fn map(&self) -> Option<(u64, Vec<Segment>)> {
        if self.map_is_in_body() || self.numbers.is_empty() {
            return None;
        }
        Some((self.real_size?, pairs(&self.numbers)))
    }
}

/// The map of a pax 1.0 file as its blocks come in: a count, then pairs, one decimal number a line.
#[derive(Debug, Default)]
pub struct MapLines {
    line: Vec<u8>,
    wanted: Option<usize>,
    numbers: Vec<u64>,
}

impl MapLines {
    pub fn is_whole(&self) -> bool {
        self.wanted == Some(self.numbers.len())
    }

    pub fn add(&mut self, block: &[u8]) -> Result<(), &'static str> {
        for byte in block {
            if self.is_whole() {
                break;
            }
            if *byte != b'\n' {
                self.line.push(*byte);
                if self.line.len() > 20 {
                    return Err(BAD);
                }
                continue;
            }
            let value: u64 = number(&self.line)?;
            self.line.clear();
            match self.wanted {
                Some(_) => self.numbers.push(value),
                None => {
                    let count = usize::try_from(value).ok().filter(|count| *count <= SEGMENTS_MAX).ok_or(TOO_MANY)?;
                    self.wanted = Some(2 * count);
                }
            }
        }
        Ok(())
    }

    pub fn segments(&self) -> Vec<Segment> {
        pairs(&self.numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_must_fit_together() {
        let segment = |offset, length| Segment { offset, length };
        assert!(fits(&[segment(0, 10), segment(20, 5), segment(30, 0)], 30, 15));
        assert!(!fits(&[segment(0, 10), segment(5, 5)], 30, 15), "they overlap");
        assert!(!fits(&[segment(0, 10)], 5, 10), "outside");
        assert!(!fits(&[segment(u64::MAX, 2)], u64::MAX, 2), "overflow");
        assert!(!fits(&[segment(0, 10)], 30, 9), "not what is stored");
    }

    #[test]
    fn a_map_in_lines_stops_where_it_says() {
        let mut lines = MapLines::default();
        lines.add(b"2\n0\n1").unwrap();
        assert!(!lines.is_whole());
        lines.add(b"0\n512\n7\n\0\0\0").unwrap();
        assert!(lines.is_whole());
        assert_eq!(lines.segments(), [Segment { offset: 0, length: 10 }, Segment { offset: 512, length: 7 }]);
        assert!(MapLines::default().add(b"99999999\n").is_err());
        assert!(MapLines::default().add(b"-1\n").is_err());
    }
}
