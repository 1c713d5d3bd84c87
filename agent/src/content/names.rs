//! The names in a directory, in order, however many they are. So many bytes of them are kept at a time; for those behind
//! them the directory is read again. One that an ordinary image has is read once.
//!
//! The order is that of the names as a layer's table shows them (`table`).

use std::cmp::Ordering;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::Dir;

/// Of one directory, and of all on the way to it together: some forty thousand names.
pub const KEPT_MAX_BYTES: usize = 1 << 20;

/// Where a name is in the text.
#[derive(Debug, Clone, Copy)]
struct Place {
    begin: u32,
    length: u32,
}

/// What is left of a directory.
#[derive(Debug, Default)]
pub struct Names {
    text: Vec<u8>,
    places: Vec<Place>,
    next: usize,
    /// What was given out before, where nothing of the text says so any more.
    last: Option<Vec<u8>>,
    /// There are more in the directory than are kept.
    is_cut: bool,
}

impl Names {
    /// The first names of the directory, those behind `after`.
    pub fn read(directory: OwnedFd, after: Option<Vec<u8>>, max_bytes: usize) -> io::Result<Self> {
        let mut names = Self { last: after, ..Self::default() };
        let mut end: Option<Vec<u8>> = None;
        for entry in Dir::new(directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let is_behind = names.last.as_ref().is_none_or(|last| order(name, last) == Ordering::Greater);
            if name == b"." || name == b".." || !is_behind {
                continue;
            }
            if end.as_ref().is_some_and(|end| order(name, end) == Ordering::Greater) {
                names.is_cut = true;
                continue;
            }
            names.push(name);
            if names.bytes() > max_bytes {
                names.sort();
                end = names.halve();
            }
        }
        names.sort();
        Ok(names)
    }

    pub fn next(&mut self) -> Option<&[u8]> {
        let place = *self.places.get(self.next)?;
        self.next += 1;
        Some(self.name(place))
    }

    /// Behind which name the directory is to be read again, now that there is no next one.
    pub fn goes_on_after(&mut self) -> Option<Vec<u8>> {
        if !self.is_cut {
            return None;
        }
        self.drop_kept();
        self.last.take()
    }

    /// Gives back what it has of the names that were not given out yet: they are read again when they are needed.
    pub fn drop_kept(&mut self) {
        // Without one that was given out nobody would know where to go on.
        let Some(given) = self.next.checked_sub(1) else { return };
        self.last = Some(self.name(self.places[given]).to_vec());
        self.is_cut |= self.next < self.places.len();
        (self.text, self.places, self.next) = (Vec::new(), Vec::new(), 0);
    }

    /// What is kept.
    pub fn bytes(&self) -> usize {
        self.text.len() + self.places.len() * size_of::<Place>()
    }

    fn name(&self, place: Place) -> &[u8] {
        &self.text[place.begin as usize..(place.begin + place.length) as usize]
    }

    fn push(&mut self, name: &[u8]) {
        // The text is cut long before 4 GiB.
        let (begin, length) = (self.text.len() as u32, name.len() as u32);
        self.text.extend_from_slice(name);
        self.places.push(Place { begin, length });
    }

    fn sort(&mut self) {
        let mut places = std::mem::take(&mut self.places);
        places.sort_unstable_by(|a, b| order(self.name(*a), self.name(*b)));
        self.places = places;
    }

    /// Keeps the first half; its last name.
    fn halve(&mut self) -> Option<Vec<u8>> {
        let half = self.places.len().div_ceil(2);
        let mut kept = Self { last: self.last.take(), is_cut: true, ..Self::default() };
        self.places[..half].iter().for_each(|place| kept.push(self.name(*place)));
        *self = kept;
        self.places.last().map(|place| self.name(*place).to_vec())
    }
}

/// As the escaped names sort, byte by byte, without writing them.
pub fn order(a: &[u8], b: &[u8]) -> Ordering {
    match a.iter().zip(b).find(|(a, b)| a != b) {
        Some((a, b)) => rank(*a).cmp(&rank(*b)),
        None => a.len().cmp(&b.len()),
    }
}

/// How a byte sorts: one that is escaped by its backslash, and then by what it is.
fn rank(byte: u8) -> (u8, u8) {
    if super::table::is_escaped(byte) { (b'\\', byte) } else { (byte, 0) }
}

#[cfg(test)]
mod tests {
    use super::super::table::escaped;
    use super::*;
    use proptest::prelude::*;
    use std::fs::File;
    use std::os::unix::ffi::OsStrExt;

    fn all(directory: &std::path::Path, max_bytes: usize, drop_after: usize) -> Vec<Vec<u8>> {
        let open = || OwnedFd::from(File::open(directory).unwrap());
        let mut names = Names::read(open(), None, max_bytes).unwrap();
        let mut found = Vec::new();
        loop {
            assert!(names.bytes() <= max_bytes, "{} are kept", names.bytes());
            if let Some(name) = names.next() {
                found.push(name.to_vec());
                if found.len() % drop_after == 0 {
                    names.drop_kept();
                }
            } else if let Some(last) = names.goes_on_after() {
                names = Names::read(open(), Some(last), max_bytes).unwrap();
            } else {
                return found;
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn every_name_comes_once_and_in_the_tables_order_however_few_are_kept(
            names in prop::collection::btree_set(prop::collection::vec(prop::sample::select(&b"ab\\~^ \x01\xff\x80Z["[..]), 1..5), 1..60),
            max_bytes in 40_usize..900, drop_after in 1_usize..30,
        ) {
            let dir = tempfile::tempdir().unwrap();
            for name in &names {
                File::create(dir.path().join(std::ffi::OsStr::from_bytes(name))).unwrap();
            }
            let mut wanted: Vec<_> = names.into_iter().collect();
            wanted.sort_by_key(|name| escaped(name));
            prop_assert_eq!(all(dir.path(), max_bytes, drop_after), wanted);
        }
    }
}
