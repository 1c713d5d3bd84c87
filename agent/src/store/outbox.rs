//! Reports that wait for a network: bounded, oldest dropped first, and counted.

use super::record::{Blob, number_key};
use super::trees::{self, meta};
use super::{Change, Durability, Store, StoreError, put, record, remove};

/// Report numbers promised to the disk at once. An agent begins above what was promised, whatever was used of it: the fleet
/// refuses a number that it has seen.
const NUMBERS_AHEAD: u64 = 1000;

impl Store {
    /// Puts a report into the outbox; the oldest go when it is full, and are counted. Returns its place.
    pub fn push_report(&self, report: &[u8], durability: Durability) -> Result<u64, StoreError> {
        let mut one = self.lock();
        let number = one.next_report;
        let waiting = self.with_door(|door| door.keys(trees::OUTBOX))?;
        let spare = &waiting[..(waiting.len() + 1).saturating_sub(self.inner.outbox_max.max(1)).min(waiting.len())];
        let mut changes = vec![put(trees::OUTBOX, &number_key(number), &Blob(report.to_vec()))?];
        changes.extend(spare.iter().map(|key| remove(trees::OUTBOX, key)));
        if !spare.is_empty() {
            changes.push(put(trees::META, meta::DROPPED, &(self.dropped_reports()? + spare.len() as u64))?);
        }
        one.next_report += 1;
        self.commit(&one, &changes, durability)?;
        Ok(number)
    }

    /// The oldest report and its place. Damaged ones are thrown away on the way, and counted.
    pub fn oldest_report(&self) -> Result<Option<(u64, Vec<u8>)>, StoreError> {
        for key in self.with_door(|door| door.keys(trees::OUTBOX))? {
            let Some(sealed) = self.with_door(|door| door.get(trees::OUTBOX, &key))? else { continue };
            match (key.parse(), record::unseal::<Blob>(trees::OUTBOX, &key, &sealed)) {
                (Ok(number), Some(blob)) => return Ok(Some((number, blob.0))),
                _ => {
                    let one = self.lock();
                    let dropped = put(trees::META, meta::DROPPED, &(self.dropped_reports()? + 1))?;
                    self.commit(&one, &[remove(trees::OUTBOX, &key), dropped], Durability::Soon)?;
                }
            }
        }
        Ok(None)
    }

    /// The fleet has it, and knows from it how many were dropped. A cut before this is on the disk sends it twice; its own
    /// number tells the fleet.
    pub fn report_arrived(&self, number: u64, told_dropped: u64) -> Result<(), StoreError> {
        let one = self.lock();
        let mut changes = vec![remove(trees::OUTBOX, &number_key(number))];
        changes.extend(self.newly_told(told_dropped)?);
        self.commit(&one, &changes, Durability::Soon)
    }

    /// A report that never was in the outbox told the fleet this.
    pub fn dropped_told(&self, told_dropped: u64) -> Result<(), StoreError> {
        let one = self.lock();
        match self.newly_told(told_dropped)? {
            None => Ok(()),
            Some(change) => self.commit(&one, &[change], Durability::Soon),
        }
    }

    fn newly_told(&self, told_dropped: u64) -> Result<Option<Change>, StoreError> {
        let is_news = told_dropped > self.told_dropped()?;
        is_news.then(|| put(trees::META, meta::DROPPED_TOLD, &told_dropped)).transpose()
    }

    /// The fleet will never take it.
    pub fn remove_report(&self, number: u64) -> Result<(), StoreError> {
        self.commit(&self.lock(), &[remove(trees::OUTBOX, &number_key(number))], Durability::Soon)
    }

    pub fn waiting_reports(&self) -> Result<u64, StoreError> {
        Ok(self.with_door(|door| door.keys(trees::OUTBOX))?.len() as u64)
    }

    /// Over the device's whole life: what a report says is as right when one before it was lost.
    pub fn dropped_reports(&self) -> Result<u64, StoreError> {
        Ok(self.get(trees::META, meta::DROPPED)?.unwrap_or(0))
    }

    /// Of those, how many the fleet knows of: the highest count in a report that arrived.
    fn told_dropped(&self) -> Result<u64, StoreError> {
        Ok(self.get(trees::META, meta::DROPPED_TOLD)?.unwrap_or(0))
    }

    pub fn untold_dropped(&self) -> Result<u64, StoreError> {
        Ok(self.dropped_reports()?.saturating_sub(self.told_dropped()?))
    }

    /// A number for the next report: higher than any before, over all boots and rebuilds. That it is used is on the disk
    /// before it is.
    pub fn next_report_number(&self) -> Result<u64, StoreError> {
        let mut one = self.lock();
        let ceiling = self.get::<u64>(trees::META, meta::REPORT_CEILING)?.unwrap_or(0);
        let next = one.last_report_number.unwrap_or(ceiling) + 1;
        if next > ceiling {
            self.commit_kept(&one, vec![put(trees::META, meta::REPORT_CEILING, &(next + NUMBERS_AHEAD))?])?;
        }
        one.last_report_number = Some(next);
        Ok(next)
    }
}
