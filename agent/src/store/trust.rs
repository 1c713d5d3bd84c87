//! What only rises or grows: trust root, time floor, digests of manifests that failed.

use edged_model::generation::Pointers;
use edged_model::id::Digest;
use edged_model::quantity::Timestamp;

use super::record::Blob;
use super::trees::{self, meta};
use super::{Store, StoreError, put, remove};

/// Failed manifests remembered; the oldest is forgotten first.
const FAILED_MAX: usize = 64;

impl Store {
    /// The envelope of the newest trust root, if one newer than the factory's was accepted.
    pub fn trust_root(&self) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.get::<Blob>(trees::META, meta::TRUST)?.map(|blob| blob.0))
    }

    /// Puts a verified trust root in place and its version with it, in one transaction. A lower version than the highest
    /// ever seen is refused.
    pub fn set_trust_root(&self, version: u64, envelope: &[u8]) -> Result<(), StoreError> {
        let one = self.lock();
        let pointers = self.pointers()?;
        let highest = pointers.highest_trust_version;
        if version < highest {
            return Err(StoreError::TrustRollback { given: version, highest });
        }
        let changes = vec![
            put(trees::META, meta::TRUST, &Blob(envelope.to_vec()))?,
            put(trees::META, meta::POINTERS, &Pointers { highest_trust_version: version, ..pointers })?,
        ];
        self.commit_kept(&one, changes)
    }

    pub fn time_floor(&self) -> Result<Timestamp, StoreError> {
        Ok(self.get(trees::META, meta::TIME_FLOOR)?.unwrap_or_default())
    }

    /// Lifts the time floor; it never falls. Costs a durable write: call it hourly, not each second.
    pub fn raise_time_floor(&self, to: Timestamp) -> Result<Timestamp, StoreError> {
        let one = self.lock();
        let floor = self.time_floor()?;
        if to > floor {
            self.commit_kept(&one, vec![put(trees::META, meta::TIME_FLOOR, &to)?])?;
        }
        Ok(floor.max(to))
    }

    /// A manifest that did not become good: its digest is not tried again until asked.
    pub fn remember_failed(&self, digest: Digest) -> Result<(), StoreError> {
        let one = self.lock();
        let mut known: Vec<(String, u64)> = self.all(trees::FAILED)?;
        known.sort_by_key(|(_, age)| *age);
        let age = known.last().map_or(0, |(_, age)| *age) + 1;
        let mut changes = vec![put(trees::FAILED, &digest.hex(), &age)?];
        known.retain(|(key, _)| *key != digest.hex());
        let spare = (known.len() + 1).saturating_sub(FAILED_MAX);
        changes.extend(known[..spare].iter().map(|(key, _)| remove(trees::FAILED, key)));
        self.commit_kept(&one, changes)
    }

    pub fn has_failed(&self, digest: Digest) -> Result<bool, StoreError> {
        Ok(self.get::<u64>(trees::FAILED, &digest.hex())?.is_some())
    }

    /// The operator asks for it again.
    pub fn forget_failed(&self, digest: Digest) -> Result<(), StoreError> {
        self.commit_kept(&self.lock(), vec![remove(trees::FAILED, &digest.hex())])
    }

    /// Oldest first.
    pub(super) fn failed(&self) -> Result<Vec<Digest>, StoreError> {
        let mut known: Vec<(String, u64)> = self.all(trees::FAILED)?;
        known.sort_by_key(|(_, age)| *age);
        let digest = |(key, _): &(String, u64)| Digest::parse(&format!("{}{key}", Digest::PREFIX)).ok();
        Ok(known.iter().filter_map(digest).collect())
    }
}
