//! The records of a pax extended header: `LENGTH KEY=VALUE\n` (pax(1)). Only what an unpacker needs is kept.

use super::sparse::SparseRecords;

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Records {
    pub path: Option<Vec<u8>>,
    pub linkpath: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mtime: Option<(i64, u32)>,
    pub xattrs: Vec<(String, Vec<u8>)>,
    pub sparse: SparseRecords,
}

/// Names that an attribute may have in a layer. `trusted.overlay.*` would command overlayfs, and the labels of the
/// builder's machine mean nothing here.
fn is_kept(name: &str) -> bool {
    name.starts_with("user.") || name == "security.capability"
}

impl Records {
    pub fn parse(mut bytes: &[u8]) -> Result<Self, &'static str> {
        const BAD: &str = "an extended header that cannot be read";
        let mut records = Self::default();
        while !bytes.is_empty() {
            // Some writers pad with zeros.
            if bytes.iter().all(|byte| *byte == 0) {
                break;
            }
            let space = bytes.iter().position(|byte| *byte == b' ').ok_or(BAD)?;
            let length: usize = text(&bytes[..space]).and_then(|text| text.parse().ok()).ok_or(BAD)?;
            if length <= space + 1 || length > bytes.len() || bytes[length - 1] != b'\n' {
                return Err(BAD);
            }
            let record = &bytes[space + 1..length - 1];
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(BAD)?;
            records.take(text(&record[..equals]).ok_or(BAD)?, &record[equals + 1..])?;
            bytes = &bytes[length..];
        }
        Ok(records)
    }

    fn take(&mut self, key: &str, value: &[u8]) -> Result<(), &'static str> {
        match key {
            "path" => self.path = Some(name(value)?),
            "linkpath" => self.linkpath = Some(name(value)?),
            "size" => self.size = Some(number(value)?),
            "uid" => self.uid = Some(number(value)?),
            "gid" => self.gid = Some(number(value)?),
            "mtime" => self.mtime = Some(time(value).ok_or("a time that is none")?),
            _ => {
                if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                    if is_kept(name) {
                        self.xattrs.push((name.to_owned(), value.to_vec()));
                    }
                } else if let Some(key) = key.strip_prefix("GNU.sparse.") {
                    self.sparse.take(key, value)?;
                }
            }
        }
        Ok(())
    }
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

pub(super) fn name(value: &[u8]) -> Result<Vec<u8>, &'static str> {
    if value.len() as u64 > super::NAME_MAX_BYTES { Err("the next name is too long") } else { Ok(value.to_vec()) }
}

pub(super) fn number<T: std::str::FromStr>(value: &[u8]) -> Result<T, &'static str> {
    let digits = text(value).filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    digits.and_then(|text| text.parse().ok()).ok_or("a number that is none")
}

/// Seconds with a fraction: `1234567890.123456789`, possibly before 1970.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let text = text(value)?;
    let (secs, fraction) = text.split_once('.').unwrap_or((text, ""));
    let whole: i64 = secs.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nine: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanos: u32 = nine.parse().ok()?;
    // -1.25 is 0.75 after -2.
    if text.starts_with('-') && nanos > 0 {
        Some((whole.checked_sub(1)?, 1_000_000_000 - nanos))
    } else {
        Some((whole, nanos))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_may_hold_any_byte() {
        let mut bytes = b"30 mtime=1234567890.123456789\n".to_vec();
        // The value of a capability attribute that has a line feed and an equals sign in it.
        let value = b"\x01\0\0\x02\n=\0\0";
        let record = [b"SCHILY.xattr.security.capability=".as_slice(), value, b"\n"].concat();
        bytes.extend_from_slice(format!("{} ", record.len() + 3).as_bytes());
        bytes.extend_from_slice(&record);
        let records = Records::parse(&bytes).unwrap();
        assert_eq!(records.mtime, Some((1_234_567_890, 123_456_789)));
        assert_eq!(records.xattrs, [("security.capability".to_owned(), value.to_vec())]);
    }

    #[test]
    fn attributes_that_command_the_kernel_are_left_out() {
        let record = "41 SCHILY.xattr.trusted.overlay.opaque=y\n";
        assert_eq!(record.len(), 41);
        assert_eq!(Records::parse(record.as_bytes()).unwrap().xattrs, []);
    }

    #[test]
    fn records_that_lie_about_their_length_are_refused() {
        for bad in ["5 a=b\n", "99999999999999999999 a=b\n", "7 a=b\n", "0 a=b\n", "x a=b\n", "6 a=bc\n", "5 ab\n\n"] {
            assert!(Records::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_before_1970() {
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"-1"), Some((-1, 0)));
        assert_eq!(time(b"1.x"), None);
    }
}
