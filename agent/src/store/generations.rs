//! Generations and pointers. A change of both is one transaction, on the disk before the call comes back.

use edged_model::generation::{Generation, GenerationState, Pointers};
use edged_model::id::Sequence;
use edged_model::quantity::Timestamp;
use edged_model::reason::Reason;

use super::record::{Blob, number_key};
use super::trees::{self, meta};
use super::{Durability, Store, StoreError, put, remove};

/// Generations that nothing points at are kept for people to look at, as many as this.
const HISTORY_MAX: usize = 8;

impl Store {
    pub fn pointers(&self) -> Result<Pointers, StoreError> {
        Ok(self.get(trees::META, meta::POINTERS)?.unwrap_or_default())
    }

    pub fn generation(&self, sequence: Sequence) -> Result<Option<Generation>, StoreError> {
        self.get(trees::GENERATIONS, &number_key(sequence.0))
    }

    /// All that are known, lowest sequence first.
    pub fn generations(&self) -> Result<Vec<Generation>, StoreError> {
        Ok(self.all(trees::GENERATIONS)?.into_iter().map(|(_, generation)| generation).collect())
    }

    /// The signed envelope as it came.
    pub fn envelope(&self, sequence: Sequence) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.get::<Blob>(trees::ENVELOPES, &number_key(sequence.0))?.map(|blob| blob.0))
    }

    /// Generations in their new states, perhaps with a new one's envelope, and the pointers that go with them. Whatever
    /// the caller says, the two highest numbers never fall. Generations that nothing points at any more go, but for the
    /// newest few.
    pub fn transition(
        &self,
        changed: &[Generation],
        envelope: Option<(Sequence, &[u8])>,
        pointers: &Pointers,
    ) -> Result<(), StoreError> {
        let one = self.lock();
        let before = self.pointers()?;
        let pointers = Pointers {
            highest_sequence: pointers.highest_sequence.max(before.highest_sequence),
            highest_trust_version: pointers.highest_trust_version.max(before.highest_trust_version),
            ..*pointers
        };
        let mut changes = vec![put(trees::META, meta::POINTERS, &pointers)?];
        for generation in changed {
            changes.push(put(trees::GENERATIONS, &number_key(generation.sequence.0), generation)?);
        }
        if let Some((sequence, bytes)) = envelope {
            changes.push(put(trees::ENVELOPES, &number_key(sequence.0), &Blob(bytes.to_vec()))?);
        }
        for sequence in pointers.needed() {
            let comes = changed.iter().any(|generation| generation.sequence == sequence);
            if !comes && self.generation(sequence)?.is_none() {
                return Err(StoreError::NoSuchGeneration { sequence });
            }
            let comes = envelope.is_some_and(|(with, _)| with == sequence);
            if !comes && self.envelope(sequence)?.is_none() {
                return Err(StoreError::NoSuchGeneration { sequence });
            }
        }
        let mut others = self.with_door(|door| door.keys(trees::GENERATIONS))?;
        let needed = pointers.needed().chain(changed.iter().map(|generation| generation.sequence));
        let needed: Vec<String> = needed.map(|sequence| number_key(sequence.0)).collect();
        others.retain(|key| !needed.contains(key));
        for key in &others[..others.len().saturating_sub(HISTORY_MAX)] {
            changes.push(remove(trees::GENERATIONS, key));
            changes.push(remove(trees::ENVELOPES, key));
        }
        // `keep/` knows active and last good and the two numbers: other moves need not be written there.
        let kept = |p: &Pointers| (p.active, p.last_good, p.highest_sequence, p.highest_trust_version);
        let matters = |generation: &Generation| {
            let sequence = Some(generation.sequence);
            sequence == pointers.active || sequence == pointers.last_good
        };
        if kept(&before) != kept(&pointers) || changed.iter().any(matters) {
            self.commit_kept(&one, changes)
        } else {
            self.commit(&one, &changes, Durability::Now)
        }
    }

    /// [`Store::transition`] of one generation that the store has.
    pub fn move_generation(
        &self,
        sequence: Sequence,
        state: GenerationState,
        reason: Option<Reason>,
        at: Timestamp,
        pointers: &Pointers,
    ) -> Result<Generation, StoreError> {
        let known = self.generation(sequence)?.ok_or(StoreError::NoSuchGeneration { sequence })?;
        let moved = Generation { state, reason, since: at, ..known };
        self.transition(std::slice::from_ref(&moved), None, pointers)?;
        Ok(moved)
    }
}
