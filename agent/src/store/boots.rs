//! The boot that this store last saw.

use edged_model::report::BootCause;
use serde::{Deserialize, Serialize};

use super::trees::{self, meta};
use super::{Durability, Store, StoreError, put};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastBoot {
    /// `/proc/sys/kernel/random/boot_id` (random(4)).
    pub boot_id: String,
    pub cause: BootCause,
}

impl Store {
    /// `None` on the first boot, and after a loss of the database: it is not among what is kept twice.
    pub fn last_boot(&self) -> Result<Option<LastBoot>, StoreError> {
        self.get(trees::META, meta::LAST_BOOT)
    }

    pub fn note_boot(&self, boot: &LastBoot) -> Result<(), StoreError> {
        self.commit(&self.lock(), &[put(trees::META, meta::LAST_BOOT, boot)?], Durability::Now)
    }
}
