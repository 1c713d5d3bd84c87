//! What is remembered of a layer until its end, in memory that is counted: the directories, whose times are set last.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// A path that is kept on its own, in a set: its place there, and what its own piece of memory costs.
pub const SET_ENTRY_BYTES: usize = 80;

type Time = (i64, u32);

/// Paths and times, in the order in which they came. Each path is kept as what it has other than the one before: those of an
/// archive have most of it in common.
#[derive(Debug, Default)]
pub struct Directories {
    /// Of each: how much of the path before, how much of its own, seconds, nanoseconds; and its own part.
    bytes: Vec<u8>,
    last: Vec<u8>,
}

const HEAD_BYTES: usize = 2 + 2 + 8 + 4;

impl Directories {
    /// A path has at most 4 KiB (`NAME_MAX_BYTES`).
    pub fn push(&mut self, path: &Path, (secs, nanos): Time) {
        let path = path.as_os_str().as_bytes();
        let shared = self.last.iter().zip(path).take(usize::from(u16::MAX)).take_while(|(a, b)| a == b).count();
        let own = &path[shared..];
        self.bytes.extend((shared as u16).to_ne_bytes());
        self.bytes.extend((own.len() as u16).to_ne_bytes());
        self.bytes.extend(secs.to_ne_bytes());
        self.bytes.extend(nanos.to_ne_bytes());
        self.bytes.extend(own);
        self.last.truncate(shared);
        self.last.extend(own);
    }

    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (PathBuf, Time)> + '_ {
        let (mut rest, mut path) = (self.bytes.as_slice(), Vec::new());
        std::iter::from_fn(move || {
            let (head, behind) = rest.split_at_checked(HEAD_BYTES)?;
            let [s0, s1, o0, o1, secs @ .., n0, n1, n2, n3] = *<&[u8; HEAD_BYTES]>::try_from(head).ok()?;
            let own = usize::from(u16::from_ne_bytes([o0, o1]));
            path.truncate(usize::from(u16::from_ne_bytes([s0, s1])));
            path.extend_from_slice(&behind[..own]);
            rest = &behind[own..];
            let time = (i64::from_ne_bytes(secs), u32::from_ne_bytes([n0, n1, n2, n3]));
            Some((PathBuf::from(OsString::from_vec(path.clone())), time))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_was_pushed_comes_again(list in prop::collection::vec(("[a-c/]{0,9}", any::<i64>(), any::<u32>()), 0..40)) {
            let mut directories = Directories::default();
            let list: Vec<_> = list.into_iter().map(|(path, secs, nanos)| (PathBuf::from(path), (secs, nanos))).collect();
            list.iter().for_each(|(path, time)| directories.push(path, *time));
            prop_assert_eq!(directories.iter().collect::<Vec<_>>(), list);
        }
    }

    #[test]
    fn the_directories_of_an_image_take_a_few_bytes_each() {
        let mut directories = Directories::default();
        for number in 0..20_000 {
            let path = format!("usr/lib/python3/dist-packages/package-{:04}/directory-{number:05}", number / 20);
            directories.push(Path::new(&path), (1_700_000_000, 0));
        }
        assert!(directories.bytes() < 20_000 * 24, "{}", directories.bytes());
    }
}
