//! An operator's reset of the workloads: what is gone by its first write, and the mark that stays until the rest is gone too.
//! What only rises is not touched: neither the highest sequence and root version nor the root, the time floor, the digests
//! that failed, the numbers of reports.

use edged_model::generation::Pointers;
use edged_model::id::Sequence;
use serde::{Deserialize, Serialize};

use super::trees::{self, meta};
use super::{Store, StoreError, put, remove};

/// What an operator wants gone. In both copies as long as something of it may be left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reset {
    pub volumes: bool,
}

/// A reset that an agent finds when it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundReset {
    None,
    Unfinished(Reset),
    /// By this generation.
    Overtaken(Sequence),
}

impl Store {
    pub fn reset(&self) -> Result<Option<Reset>, StoreError> {
        self.get(trees::META, meta::RESET)
    }

    /// What is left to do of one that an agent before us began. `Overtaken`: a generation is wanted although no agent that
    /// knows the mark takes one before it is gone. An older one has, after a downgrade: that word is the later one, and
    /// the mark goes.
    pub fn found_reset(&self) -> Result<FoundReset, StoreError> {
        let Some(reset) = self.reset()? else { return Ok(FoundReset::None) };
        let Pointers { active, last_good, candidate, .. } = self.pointers()?;
        let Some(newest) = [active, last_good, candidate].into_iter().flatten().max() else {
            return Ok(FoundReset::Unfinished(reset));
        };
        self.end_reset()?;
        Ok(FoundReset::Overtaken(newest))
    }

    /// No generation is active, good or stored any more, nothing is held, and the mark is there: in one transaction.
    pub fn begin_reset(&self, reset: Reset) -> Result<Pointers, StoreError> {
        let one = self.lock();
        let pointers = Pointers { active: None, last_good: None, candidate: None, ..self.pointers()? };
        let mut changes = vec![put(trees::META, meta::POINTERS, &pointers)?, put(trees::META, meta::RESET, &reset)?];
        for tree in [trees::GENERATIONS, trees::ENVELOPES, trees::HELD] {
            changes.extend(self.with_door(|door| door.keys(tree))?.iter().map(|key| remove(tree, key)));
        }
        self.commit_kept(&one, changes)?;
        Ok(pointers)
    }

    /// Nothing is left of what was to go.
    pub fn end_reset(&self) -> Result<(), StoreError> {
        self.commit_kept(&self.lock(), vec![remove(trees::META, meta::RESET)])
    }
}
