//! Disks as a power cut may leave them.
//!
//! Up to the last flush before the cut every write is there: the disk has said so. What came after may be there or not,
//! in any order, and a request that was under way may be there in part: torn between two of its sectors.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use fastrand::Rng;

use super::log::{Request, SECTOR, WriteLog};
use crate::process;

/// What the disk is taken to do when it is told to flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flushes {
    Kept,
    /// As if nobody had asked for one: the control that must lose something, or the whole test could not fail.
    Ignored,
}

/// Where sectors of one request may part: those of old disks and those of new ones.
const TEARS: [u64; 2] = [SECTOR, 4096];

/// A request, and the part of it (from, to) that got to the medium.
type Part = (Request, u64, u64);

/// What is on the medium when the power goes.
#[derive(Debug, PartialEq, Eq)]
pub struct Survivors {
    /// All of so many requests: they were flushed.
    pub flushed: usize,
    /// And these, in the order in which they got there.
    pub rest: Vec<Part>,
}

/// What is on the medium when the power goes after the first `cut` requests.
pub fn survivors(requests: &[Request], cut: usize, flushes: Flushes, rng: &mut Rng) -> Survivors {
    let given = &requests[..cut.min(requests.len())];
    let flushed = match flushes {
        Flushes::Kept => given.iter().rposition(|request| *request == Request::Flush).unwrap_or(0),
        Flushes::Ignored => 0,
    };
    let mut rest = Vec::new();
    for request in &given[flushed..] {
        let Some((request, _, length)) = whole(request) else { continue };
        match request {
            Request::Write { is_durable: true, .. } if flushes == Flushes::Kept => rest.push((request, 0, length)),
            // Half of what nobody waited for is lost; of a quarter of the rest only a part came through.
            _ if rng.bool() => {}
            _ if rng.u8(..4) == 0 => {
                let tear = TEARS[rng.usize(..TEARS.len())];
                let parts = length.div_ceil(tear);
                let (from, to) = (rng.u64(..parts), rng.u64(1..=parts));
                let (from, to) = (from.min(to - 1) * tear, (to * tear).min(length));
                rest.push((request, from, to));
            }
            _ => rest.push((request, 0, length)),
        }
    }
    // Two writes to one place reach it in the order in which they were given: a disk does not reorder those.
    let mut order: Vec<usize> = (0..rest.len()).collect();
    rng.shuffle(&mut order);
    let mut shuffled: Vec<_> = order.into_iter().map(|index| (index, rest[index])).collect();
    sort_overlapping(&mut shuffled);
    Survivors { flushed, rest: shuffled.into_iter().map(|(_, part)| part).collect() }
}

fn whole(request: &Request) -> Option<Part> {
    match request {
        Request::Write { length, .. } | Request::Discard { length, .. } => Some((*request, 0, *length)),
        Request::Flush => None,
    }
}

/// Swaps what overlaps back into the order in which it was given.
fn sort_overlapping(parts: &mut [(usize, Part)]) {
    let range = |request: &Request| match request {
        Request::Write { at, length, .. } | Request::Discard { at, length } => (*at, *at + *length),
        Request::Flush => (0, 0),
    };
    let mut later: std::collections::BTreeMap<u64, Vec<usize>> = std::collections::BTreeMap::new();
    for (slot, (_, (request, ..))) in parts.iter().enumerate() {
        later.entry(range(request).0).or_default().push(slot);
    }
    // Almost all overlaps are rewrites of one and the same block: those that begin at one place are sorted among
    // themselves, in the slots they have.
    for slots in later.values().filter(|slots| slots.len() > 1) {
        let mut same: Vec<_> = slots.iter().map(|slot| parts[*slot]).collect();
        same.sort_by_key(|(index, _)| *index);
        for (slot, part) in slots.iter().zip(same) {
            parts[*slot] = part;
        }
    }
}

/// A disk that follows the log from cut to cut: each costs what was written since the one before, and a copy of what is
/// not empty.
#[derive(Debug)]
pub struct Follower<'a> {
    requests: &'a [Request],
    log: File,
    disk: File,
    path: PathBuf,
    /// Requests that are on it.
    done: usize,
}

impl<'a> Follower<'a> {
    /// `base`: the disk as it was when the log began. `path`: where to keep the one that follows.
    pub fn new(base: &Path, log: &WriteLog, requests: &'a [Request], path: &Path) -> Result<Self> {
        copy(base, path)?;
        let disk = OpenOptions::new().write(true).open(path)?;
        Ok(Self { requests, log: File::open(log.path())?, disk, path: path.to_owned(), done: 0 })
    }

    /// Makes the disk `to` as a cut after the first `cut` requests may have left it. Cuts come in rising order.
    pub fn cut(&mut self, cut: usize, flushes: Flushes, rng: &mut Rng, to: &Path) -> Result<()> {
        let Survivors { flushed, rest } = survivors(self.requests, cut, flushes, rng);
        ensure!(flushed >= self.done, "a cut at {flushed} after one at {}", self.done);
        for part in self.requests[self.done..flushed].iter().filter_map(whole) {
            put(&self.log, &self.disk, &part)?;
        }
        self.done = flushed;
        copy(&self.path, to)?;
        let disk = OpenOptions::new().write(true).open(to)?;
        rest.iter().try_for_each(|part| put(&self.log, &disk, part))
    }
}

impl Drop for Follower<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Holes stay holes: a disk is mostly empty.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut cp = Command::new("cp");
    process::run(cp.args(["--sparse=auto", "--reflink=auto"]).arg(from).arg(to)).map(drop)
}

fn put(log: &File, disk: &File, (request, from, end): &Part) -> Result<()> {
    let mut bytes = vec![0; usize::try_from(end - from)?];
    match request {
        Request::Write { at, data, .. } => {
            log.read_exact_at(&mut bytes, data + from)?;
            disk.write_all_at(&bytes, at + from)?;
        }
        // What a discarded block holds is anybody's guess; zeros are what most disks answer.
        Request::Discard { at, .. } => disk.write_all_at(&bytes, at + from)?,
        Request::Flush => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(at: u64, is_durable: bool) -> Request {
        Request::Write { at, length: 4096, data: at, is_durable }
    }

    #[test]
    fn what_was_flushed_is_always_there_and_the_rest_is_not() {
        let requests = [write(0, false), Request::Flush, write(8192, false), write(16384, true)];
        let mut kept = 0;
        for seed in 0..200 {
            let there = survivors(&requests, requests.len(), Flushes::Kept, &mut Rng::with_seed(seed));
            assert_eq!(there.flushed, 1);
            assert!(there.rest.iter().any(|(request, from, to)| *request == requests[3] && (*from, *to) == (0, 4096)));
            kept += usize::from(there.rest.iter().any(|(request, ..)| *request == requests[2]));
        }
        assert!((50..150).contains(&kept), "{kept} of 200");
    }

    #[test]
    fn the_control_loses_what_was_flushed() {
        let requests = [write(0, false), Request::Flush];
        let of = |seed| survivors(&requests, 2, Flushes::Ignored, &mut Rng::with_seed(seed));
        let lost = (0..100).filter(|seed| of(*seed) == Survivors { flushed: 0, rest: Vec::new() });
        assert!(lost.count() > 20);
    }

    #[test]
    fn two_writes_to_one_place_keep_their_order() {
        let first = Request::Write { at: 0, length: 512, data: 1, is_durable: false };
        let second = Request::Write { at: 0, length: 512, data: 2, is_durable: false };
        for seed in 0..200 {
            let there = survivors(&[first, second], 2, Flushes::Kept, &mut Rng::with_seed(seed)).rest;
            let at = |request| there.iter().position(|(found, ..)| *found == request);
            assert!(at(first).zip(at(second)).is_none_or(|(first, second)| first < second));
        }
    }

    /// From cut to cut the same disks as each made anew.
    #[test]
    fn a_follower_makes_the_disks_that_the_whole_log_makes() {
        let dir = tempfile::tempdir().unwrap();
        let [base, written, at_once, after, next] =
            ["base", "log", "once", "after", "next"].map(|name| dir.path().join(name));
        fs::write(&base, vec![0; 32 << 10]).unwrap();
        fs::write(&written, (0..8_u8).flat_map(|block| vec![block + 1; 4096]).collect::<Vec<_>>()).unwrap();
        let mut requests = Vec::new();
        for block in 0..8 {
            requests.push(Request::Write {
                at: (block % 4) * 4096,
                length: 4096,
                data: block * 4096,
                is_durable: false,
            });
            requests.push(Request::Flush);
        }
        let log = WriteLog::of(&written);
        let follower = |name: &str| Follower::new(&base, &log, &requests, &dir.path().join(name)).unwrap();
        let mut one = follower("one");
        one.cut(4, Flushes::Kept, &mut Rng::with_seed(3), &after).unwrap();
        one.cut(16, Flushes::Kept, &mut Rng::with_seed(5), &next).unwrap();
        follower("another").cut(16, Flushes::Kept, &mut Rng::with_seed(5), &at_once).unwrap();
        assert_eq!(fs::read(&next).unwrap(), fs::read(&at_once).unwrap());
        assert_eq!(fs::read(&next).unwrap()[..4096], [5; 4096]);
        assert!(one.cut(4, Flushes::Kept, &mut Rng::with_seed(3), &after).is_err(), "it does not go back");
    }
}
