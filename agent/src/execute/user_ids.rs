//! Which ids of the device a workload's own ids are: each gets a range that nobody else has, and keeps it for as long as
//! it is in the manifest. Files on the disk carry the ids inside, so a lost table loses nothing but the numbers.
//!
//! `user-ids` in the data directory: one line for each workload, its name and the number of its range.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use edged_model::id::WorkloadName;
use edged_model::keeper::IdMapping;

use crate::config::UserIds;
use crate::store::{StoreError, keep};

/// As many as there are in a range: what Debian's and Fedora's useradd(8) give a user too.
pub const IDS_PER_WORKLOAD: u32 = 65_536;

#[derive(Debug, thiserror::Error)]
pub enum UserIdsError {
    #[error("no user ids are left for {workload}: {ranges} ranges of {IDS_PER_WORKLOAD} are in use")]
    NoneLeft { workload: WorkloadName, ranges: u32 },
    #[error(transparent)]
    Write(#[from] StoreError),
}

/// The only writer of its file.
#[derive(Debug)]
pub struct Ranges {
    file: PathBuf,
    ids: UserIds,
    taken: Mutex<Taken>,
}

#[derive(Debug)]
struct Taken {
    numbers: BTreeMap<WorkloadName, u32>,
    /// Asked for since the agent began, and not given back: of these one cannot be sure that nobody runs with them.
    handed_out: BTreeSet<WorkloadName>,
}

impl Ranges {
    /// What is not there or cannot be read counts as nothing given yet; but whoever runs keeps what its pinned user
    /// namespace says (`pins`, see [`super::isolate`]).
    pub fn open(file: PathBuf, pins: &Path, ids: UserIds) -> Self {
        keep::sweep_unfinished(file.parent().unwrap_or(Path::new("/")));
        let mut text = fs::read_to_string(&file).unwrap_or_default();
        for pin in fs::read_dir(pins).into_iter().flatten().flatten() {
            let pin = pin.file_name();
            let Some((name, outside)) = pin.to_str().and_then(|pin| pin.split_once('.')) else { continue };
            let above = outside.parse::<u32>().ok().and_then(|outside| outside.checked_sub(ids.first()));
            if let Some(number) = above.filter(|above| above % IDS_PER_WORKLOAD == 0) {
                text.push_str(&format!("\n{name} {}", number / IDS_PER_WORKLOAD));
            }
        }
        let taken = Mutex::new(Taken { numbers: parse(&text, ranges(ids)), handed_out: BTreeSet::new() });
        Self { file, ids, taken }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The range of `workload`; a new one is on the disk before anybody runs with it.
    pub fn of(&self, workload: &WorkloadName) -> Result<IdMapping, UserIdsError> {
        let mut taken = self.taken();
        if let Some(number) = taken.numbers.get(workload).copied() {
            taken.handed_out.insert(workload.clone());
            return Ok(self.mapping(number));
        }
        let ranges = ranges(self.ids);
        let free = (0..ranges).find(|number| !taken.numbers.values().any(|other| other == number));
        let number = free.ok_or_else(|| UserIdsError::NoneLeft { workload: workload.clone(), ranges })?;
        taken.numbers.insert(workload.clone(), number);
        if let Err(error) = write(&self.file, &taken.numbers) {
            taken.numbers.remove(workload);
            return Err(error);
        }
        taken.handed_out.insert(workload.clone());
        Ok(self.mapping(number))
    }

    /// The range that `workload` has, if it has one.
    pub fn known(&self, workload: &WorkloadName) -> Option<IdMapping> {
        self.taken().numbers.get(workload).map(|number| self.mapping(*number))
    }

    /// A workload was removed. `keep`: its range stays its own, because something on the disk has its ids.
    pub fn release(&self, workload: &WorkloadName, keep: impl Fn(u32) -> bool) -> Result<(), UserIdsError> {
        let mut taken = self.taken();
        taken.handed_out.remove(workload);
        self.give_back(&mut taken, |name, first| name == workload && !keep(first))
    }

    /// Gives the ranges back that no workload in `known` has and nothing on the disk.
    pub fn release_unknown(
        &self,
        known: &BTreeSet<WorkloadName>,
        keep: impl Fn(u32) -> bool,
    ) -> Result<(), UserIdsError> {
        let mut taken = self.taken();
        let handed_out = taken.handed_out.clone();
        let is_known = |name: &WorkloadName| known.contains(name) || handed_out.contains(name);
        self.give_back(&mut taken, |name, first| !is_known(name) && !keep(first))
    }

    fn give_back(&self, taken: &mut Taken, goes: impl Fn(&WorkloadName, u32) -> bool) -> Result<(), UserIdsError> {
        let before = taken.numbers.len();
        taken.numbers.retain(|name, number| !goes(name, self.mapping(*number).outside));
        if taken.numbers.len() == before { Ok(()) } else { write(&self.file, &taken.numbers) }
    }

    fn mapping(&self, number: u32) -> IdMapping {
        IdMapping { inside: 0, outside: self.ids.first() + number * IDS_PER_WORKLOAD, count: IDS_PER_WORKLOAD }
    }
}

fn ranges(ids: UserIds) -> u32 {
    ids.count() / IDS_PER_WORKLOAD
}

/// Two workloads never share a range, whatever the file says.
fn parse(text: &str, ranges: u32) -> BTreeMap<WorkloadName, u32> {
    let mut taken: BTreeMap<WorkloadName, u32> = BTreeMap::new();
    for line in text.lines() {
        let Some((name, number)) = line.split_once(' ') else { continue };
        if let (Ok(name), Ok(number)) = (WorkloadName::parse(name), number.parse())
            && number < ranges
            && !taken.contains_key(&name)
            && !taken.values().any(|other| *other == number)
        {
            taken.insert(name, number);
        }
    }
    taken
}

fn write(path: &Path, taken: &BTreeMap<WorkloadName, u32>) -> Result<(), UserIdsError> {
    let text: String = taken.iter().map(|(name, number)| format!("{name} {number}\n")).collect();
    Ok(keep::durable(path, text.as_bytes(), 0o644)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> WorkloadName {
        WorkloadName::parse(text).unwrap()
    }

    #[test]
    fn a_range_is_kept_given_back_and_never_shared() {
        let dir = tempfile::tempdir().unwrap();
        let (file, pins) = (dir.path().join("user-ids"), dir.path().join("userns"));
        let ids = UserIds::new(1_000_000, 3 * IDS_PER_WORKLOAD + 1).unwrap();
        let first = Ranges::open(file.clone(), &pins, ids);
        let web = first.of(&name("web")).unwrap();
        assert_eq!((web.outside, web.count), (1_000_000, IDS_PER_WORKLOAD));
        let db = first.of(&name("db")).unwrap();
        assert_eq!(db.outside, 1_065_536);
        drop(first);
        let second = Ranges::open(file.clone(), &pins, ids);
        assert_eq!(second.of(&name("db")).unwrap(), db, "kept over a start");
        second.release(&name("web"), |first| first == 1_000_000).unwrap();
        assert_eq!(second.known(&name("web")), Some(web), "something on the disk has its ids");
        let known = BTreeSet::from([name("db")]);
        second.release_unknown(&known, |_| false).unwrap();
        assert_eq!(second.known(&name("web")), None);
        second.of(&name("web")).unwrap();
        second.release_unknown(&known, |_| false).unwrap();
        assert_eq!(second.known(&name("web")), Some(web), "somebody may be about to run with it");
        second.release(&name("web"), |_| false).unwrap();
        assert_eq!(second.of(&name("cache")).unwrap(), web, "given to the next");
        second.of(&name("web")).unwrap();
        let none = second.of(&name("one-more")).unwrap_err().to_string();
        assert!(none.contains("one-more") && none.contains("3 ranges"), "{none}");
        fs::write(&file, "web 1\ndb 1\nnonsense\nfar 99\n").unwrap();
        let damaged = Ranges::open(file.clone(), &pins, ids);
        assert_ne!(damaged.of(&name("web")).unwrap(), damaged.of(&name("db")).unwrap());
        fs::remove_file(&file).unwrap();
        fs::create_dir(&pins).unwrap();
        fs::write(pins.join("db.1000000"), "").unwrap();
        fs::write(pins.join("db.7"), "").unwrap();
        let lost = Ranges::open(file, &pins, ids);
        assert_ne!(lost.of(&name("web")).unwrap().outside, 1_000_000, "db runs with it");
        assert_eq!(lost.of(&name("db")).unwrap().outside, 1_000_000);
    }
}
