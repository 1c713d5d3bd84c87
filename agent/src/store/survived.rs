//! What the device has survived: in the database, and in `keep/` with whatever is written there next.

use edged_model::survived::Survived;
use serde::{Deserialize, Serialize};

use super::trees::{self, meta};
use super::{Durability, Store, StoreError, put};

/// The counters, and the agent that counted last.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SavedSurvived {
    pub survived: Survived,
    pub boot_id: String,
    /// The process of its keeper.
    pub keeper_pid: i32,
}

impl Store {
    pub fn survived(&self) -> Result<Option<SavedSurvived>, StoreError> {
        self.get(trees::META, meta::SURVIVED)
    }

    /// Without a flush of its own: counters are not worth a page of flash each. The caller settles.
    pub fn save_survived(&self, saved: &SavedSurvived) -> Result<(), StoreError> {
        self.commit(&self.lock(), &[put(trees::META, meta::SURVIVED, saved)?], Durability::Along)
    }
}
