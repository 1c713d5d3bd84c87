//! The strict reading of CBOR (RFC 8949). What is signed must have one reading, so a document is checked in a pass of
//! its own before it is decoded: definite lengths, shortest forms, sorted and unique keys, no tags or floats, bounded
//! depth and size, nothing after the end. The pass allocates nothing, whatever a length claims.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_cbor::Value;

use crate::reason::{Code, Reason};
use crate::value::{ValueError, ValueReader};

/// Nesting beyond this is refused.
pub const MAX_DEPTH: u32 = 32;
/// Documents beyond this are refused.
pub const MAX_DOCUMENT_BYTES: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CborError {
    #[error("the document has {bytes} bytes; {MAX_DOCUMENT_BYTES} are allowed")]
    TooLarge { bytes: usize },
    #[error("nested deeper than {MAX_DEPTH} at byte {at}")]
    TooDeep { at: usize },
    #[error("ends in the middle of an item at byte {at}")]
    Truncated { at: usize },
    #[error("claims {claimed} bytes or items at byte {at}, where {left} bytes are left")]
    LengthClaim { at: usize, claimed: u64, left: usize },
    #[error("{bytes} bytes after the end")]
    Trailing { bytes: usize },
    #[error("duplicate key at byte {at}")]
    DuplicateKey { at: usize },
    #[error("{what} at byte {at}")]
    NotDeterministic { what: &'static str, at: usize },
    #[error("{why}")]
    UnknownField { why: String },
    #[error("{why}")]
    Shape { why: String },
}

impl CborError {
    /// The code under which people and programs know it.
    pub fn code(&self) -> Code {
        match self {
            Self::TooLarge { .. } => Code::TooLarge,
            Self::TooDeep { .. } => Code::TooDeep,
            Self::DuplicateKey { .. } => Code::DuplicateKey,
            Self::Truncated { .. } | Self::LengthClaim { .. } | Self::NotDeterministic { .. } => Code::NotCbor,
            Self::Trailing { .. } => Code::Malformed,
            Self::UnknownField { .. } => Code::UnknownField,
            Self::Shape { .. } => Code::Malformed,
        }
    }

    pub fn reason(&self, what: &str) -> Reason {
        let next = match self {
            Self::TooLarge { .. } | Self::TooDeep { .. } => "make it smaller and flatter, and sign it again",
            Self::UnknownField { .. } | Self::Shape { .. } => "correct it and sign it again",
            _ => "send the file as `edgectl` wrote it: it was cut, changed, or made by another program",
        };
        Reason::new(self.code(), format!("{what}: {self}")).next(next)
    }
}

/// The keys a map may have: COSE headers have numbers, our documents text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    Text,
    TextOrInteger,
}

/// Checks that `bytes` is exactly one deterministic item.
pub fn check(bytes: &[u8], keys: Keys) -> Result<(), CborError> {
    if bytes.len() > MAX_DOCUMENT_BYTES {
        return Err(CborError::TooLarge { bytes: bytes.len() });
    }
    let mut reader = Reader { bytes, at: 0, keys };
    reader.item(0)?;
    match bytes.len() - reader.at {
        0 => Ok(()),
        left => Err(CborError::Trailing { bytes: left }),
    }
}

/// Checks, then decodes.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CborError> {
    check(bytes, Keys::Text)?;
    read(bytes)
}

/// Decodes what came from one of our own programs on this device: in any form that CBOR has for it.
pub fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CborError> {
    let value: Value = serde_cbor::from_slice(bytes).map_err(|error| CborError::Shape { why: error.to_string() })?;
    T::deserialize(ValueReader::new(value)).map_err(|error| {
        let why = shape_text(&error);
        match crate::validate::is_unknown_field(error.text()) {
            true => CborError::UnknownField { why },
            false => CborError::Shape { why },
        }
    })
}

/// As [`read`], for what is nearly always right and has to be quick: no tree of values in between, which for a launch is
/// hundreds of small pieces of memory. Only what is wrong is read once more, to say where.
pub fn read_quickly<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CborError> {
    serde_cbor::from_slice(bytes).or_else(|_| read(bytes))
}

/// Where the document is not as it should be, and how: `workloads.web.imgae: unknown field; did you mean `image`?`
pub fn shape_text(error: &ValueError) -> String {
    let text = crate::validate::explain(error.text());
    printable(&match error.path().as_str() {
        "" => text,
        path => format!("{path}: {text}"),
    })
}

/// A sentence is shown on terminals and kept: whatever a document holds, it stays short and without control characters.
pub(crate) fn printable(text: &str) -> String {
    const MAX: usize = 400;
    let clean = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut short: String = text.chars().take(MAX).map(clean).collect();
    if text.chars().nth(MAX).is_some() {
        short.push('…');
    }
    short
}

/// The deterministic encoding: keys sorted, shortest forms.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CborError> {
    let shape = |error: serde_cbor::Error| CborError::Shape { why: error.to_string() };
    // The map of a `Value` is ordered as RFC 8949, 4.2.1 wants text keys.
    let value = serde_cbor::value::to_value(value).map_err(shape)?;
    serde_cbor::to_vec(&value).map_err(shape)
}

struct Reader<'b> {
    bytes: &'b [u8],
    at: usize,
    keys: Keys,
}

impl<'b> Reader<'b> {
    fn byte(&mut self) -> Result<u8, CborError> {
        let byte = *self.bytes.get(self.at).ok_or(CborError::Truncated { at: self.at })?;
        self.at += 1;
        Ok(byte)
    }

    /// Major type and argument (RFC 8949, 3).
    fn head(&mut self) -> Result<(u8, u64), CborError> {
        let at = self.at;
        let first = self.byte()?;
        let (major, info) = (first >> 5, first & 0x1f);
        let (extra, least) = match info {
            0..=23 => return Ok((major, u64::from(info))),
            24 => (1, 24),
            25 => (2, 1 << 8),
            26 => (4, 1 << 16),
            27 => (8, 1 << 32),
            _ => return Err(CborError::NotDeterministic { what: "an indefinite length", at }),
        };
        let mut argument = 0_u64;
        for _ in 0..extra {
            argument = argument << 8 | u64::from(self.byte()?);
        }
        if major != 7 && argument < least {
            return Err(CborError::NotDeterministic { what: "a number longer than it needs to be", at });
        }
        Ok((major, argument))
    }

    fn item(&mut self, depth: u32) -> Result<(), CborError> {
        let at = self.at;
        if depth > MAX_DEPTH {
            return Err(CborError::TooDeep { at });
        }
        let (major, argument) = self.head()?;
        let claim = |left| CborError::LengthClaim { at, claimed: argument, left };
        let left = self.bytes.len() - self.at;
        match major {
            0 | 1 => Ok(()),
            2 | 3 => {
                let length = usize::try_from(argument).ok().filter(|length| *length <= left).ok_or(claim(left))?;
                let content = &self.bytes[self.at..self.at + length];
                if major == 3 && std::str::from_utf8(content).is_err() {
                    return Err(CborError::NotDeterministic { what: "text that is not UTF-8", at });
                }
                self.at += length;
                Ok(())
            }
            4 => {
                if argument > left as u64 {
                    return Err(claim(left));
                }
                (0..argument).try_for_each(|_| self.item(depth + 1))
            }
            5 => {
                if argument > left as u64 / 2 {
                    return Err(claim(left));
                }
                self.map(argument, depth)
            }
            6 => Err(CborError::NotDeterministic { what: "a tag", at }),
            _ => match self.bytes[at] {
                // false, true, null.
                0xf4..=0xf6 => Ok(()),
                _ => Err(CborError::NotDeterministic { what: "a float or an undefined value", at }),
            },
        }
    }

    fn map(&mut self, entries: u64, depth: u32) -> Result<(), CborError> {
        let mut previous: Option<&'b [u8]> = None;
        for _ in 0..entries {
            let at = self.at;
            let major = self.bytes.get(at).ok_or(CborError::Truncated { at })? >> 5;
            let allowed = major == 3 || (self.keys == Keys::TextOrInteger && major <= 1);
            if !allowed {
                return Err(CborError::NotDeterministic { what: "a key of another kind than text", at });
            }
            self.item(depth + 1)?;
            let key = &self.bytes[at..self.at];
            match previous.map(|previous| previous.cmp(key)) {
                Some(std::cmp::Ordering::Equal) => return Err(CborError::DuplicateKey { at }),
                Some(std::cmp::Ordering::Greater) => {
                    return Err(CborError::NotDeterministic { what: "a key out of order", at });
                }
                _ => previous = Some(key),
            }
            self.item(depth + 1)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn refused(bytes: &[u8]) -> Code {
        check(bytes, Keys::Text).unwrap_err().code()
    }

    #[test]
    fn what_is_refused() {
        assert_eq!(refused(b""), Code::NotCbor);
        assert_eq!(refused(&[0xa2, 0x61, b'a', 0x01, 0x61, b'a', 0x02]), Code::DuplicateKey);
        assert_eq!(refused(&[0xa2, 0x61, b'b', 0x01, 0x61, b'a', 0x02]), Code::NotCbor);
        assert_eq!(refused(&[0x01, 0x01]), Code::Malformed);
        assert_eq!(refused(&[0x9f, 0xff]), Code::NotCbor);
        assert_eq!(refused(&[0x18, 0x01]), Code::NotCbor);
        assert_eq!(refused(&[0xfb; 9]), Code::NotCbor);
        // 2^60 bytes, 2^60 items, 2^60 entries.
        for major in [0x5b, 0x7b, 0x9b, 0xbb] {
            assert_eq!(refused(&[major, 0x10, 0, 0, 0, 0, 0, 0, 0]), Code::NotCbor);
        }
        assert_eq!(refused(&vec![0x81; 10_000]), Code::TooDeep);
        assert_eq!(refused(&vec![0; MAX_DOCUMENT_BYTES + 1]), Code::TooLarge);
        assert_eq!(refused(&[0xa1, 0x01, 0x01]), Code::NotCbor);
        assert!(check(&[0xa1, 0x01, 0x01], Keys::TextOrInteger).is_ok());
    }

    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Pair {
        a: u8,
        list: Vec<u8>,
    }

    #[test]
    fn a_structure_is_a_map_and_nothing_else() {
        let pair = Pair { a: 1, list: vec![2] };
        assert_eq!(decode::<Pair>(&encode(&pair).unwrap()).unwrap(), pair);
        // [1, [2]]: serde alone would read it.
        let array = [0x82, 0x01, 0x81, 0x02];
        assert_eq!(decode::<Pair>(&array).unwrap_err().code(), Code::Malformed);
        let nested = [[0x81].as_slice(), &array].concat();
        assert_eq!(decode::<Vec<Pair>>(&nested).unwrap_err().code(), Code::Malformed);
    }

    #[test]
    fn a_hostile_name_makes_no_long_or_wild_sentence() {
        let name = "\u{1b}[2J".repeat(1000);
        let error = decode::<Pair>(&encode(&BTreeMap::from([(name, 1)])).unwrap()).unwrap_err();
        assert_eq!(error.code(), Code::UnknownField);
        let text = error.to_string();
        assert!(text.chars().count() <= 401 && !text.chars().any(char::is_control), "{text}");
    }

    #[test]
    fn a_word_in_a_value_is_not_taken_for_an_unknown_field() {
        let bytes = encode(&BTreeMap::from([("a", "unknown field `x`")])).unwrap();
        assert_eq!(decode::<Pair>(&bytes).unwrap_err().code(), Code::Malformed);
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = check(&bytes, Keys::TextOrInteger);
        }

        #[test]
        fn what_is_encoded_is_accepted_and_cut_anywhere_is_not(map in proptest::collection::btree_map(".{0,40}", any::<i64>(), 0..20)) {
            let bytes = encode(&map).unwrap();
            prop_assert_eq!(decode::<BTreeMap<String, i64>>(&bytes).unwrap(), map);
            for end in 0..bytes.len() {
                prop_assert!(check(&bytes[..end], Keys::Text).is_err());
            }
        }
    }
}
