//! Disks as a power cut may leave them.
//!
//! Up to the last flush before the cut every write is there: the disk has said so. What came after may be there or not,
//! in any order, and a request that was under way may be there in part: torn between two of its sectors.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use fastrand::Rng;

use super::log::{Request, SECTOR, WriteLog};

/// What the disk is taken to do when it is told to flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flushes {
    Kept,
    /// As if nobody had asked for one: the control that must lose something, or the whole test could not fail.
    Ignored,
}

/// Where sectors of one request may part: those of old disks and those of new ones.
const TEARS: [u64; 2] = [SECTOR, 4096];

/// The requests that are on the medium when the power goes after the first `cut` requests; in the order in which they
/// got there, each with the part of it that did.
pub fn survivors(requests: &[Request], cut: usize, flushes: Flushes, rng: &mut Rng) -> Vec<(Request, u64, u64)> {
    let given = &requests[..cut.min(requests.len())];
    let flushed = match flushes {
        Flushes::Kept => given.iter().rposition(|request| *request == Request::Flush).unwrap_or(0),
        Flushes::Ignored => 0,
    };
    let whole = |request: &Request| match request {
        Request::Write { length, .. } | Request::Discard { length, .. } => Some((*request, 0, *length)),
        Request::Flush => None,
    };
    let mut there: Vec<_> = given[..flushed].iter().filter_map(whole).collect();
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
    there.extend(shuffled.into_iter().map(|(_, part)| part));
    there
}

/// Swaps what overlaps back into the order in which it was given.
fn sort_overlapping(parts: &mut [(usize, (Request, u64, u64))]) {
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

/// Makes the disk `to` out of `base` (as it was when the log began) and what survived.
pub fn build(base: &Path, log: &WriteLog, parts: &[(Request, u64, u64)], to: &Path) -> Result<()> {
    fs::copy(base, to).with_context(|| format!("copying {}", base.display()))?;
    let disk = OpenOptions::new().write(true).open(to)?;
    let written = File::open(log.path())?;
    let mut bytes = Vec::new();
    for (request, from, end) in parts {
        bytes.clear();
        bytes.resize(usize::try_from(end - from)?, 0);
        match request {
            Request::Write { at, data, .. } => {
                written.read_exact_at(&mut bytes, data + from)?;
                disk.write_all_at(&bytes, at + from)?;
            }
            // What a discarded block holds is anybody's guess; zeros are what most disks answer.
            Request::Discard { at, .. } => disk.write_all_at(&bytes, at + from)?,
            Request::Flush => {}
        }
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
            assert_eq!(there[0].0, requests[0]);
            assert!(there.iter().any(|(request, from, to)| *request == requests[3] && (*from, *to) == (0, 4096)));
            kept += usize::from(there.iter().any(|(request, ..)| *request == requests[2]));
        }
        assert!((50..150).contains(&kept), "{kept} of 200");
    }

    #[test]
    fn the_control_loses_what_was_flushed() {
        let requests = [write(0, false), Request::Flush];
        let lost =
            (0..100).filter(|seed| survivors(&requests, 2, Flushes::Ignored, &mut Rng::with_seed(*seed)).is_empty());
        assert!(lost.count() > 20);
    }

    #[test]
    fn two_writes_to_one_place_keep_their_order() {
        let first = Request::Write { at: 0, length: 512, data: 1, is_durable: false };
        let second = Request::Write { at: 0, length: 512, data: 2, is_durable: false };
        for seed in 0..200 {
            let there = survivors(&[first, second], 2, Flushes::Kept, &mut Rng::with_seed(seed));
            let at = |request| there.iter().position(|(found, ..)| *found == request);
            assert!(at(first).zip(at(second)).is_none_or(|(first, second)| first < second));
        }
    }
}
