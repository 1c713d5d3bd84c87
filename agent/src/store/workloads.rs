//! Holds, restart histories, images on disk.

use edged_model::id::{Digest, WorkloadName};
use edged_model::observed::{Hold, RestartHistory};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Durability, Store, StoreError, put, remove, trees};

/// What is remembered of one workload over restarts of the agent and the device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SavedHistory {
    /// The specification the history is about.
    pub spec: Option<Digest>,
    pub history: RestartHistory,
    pub boot_id: String,
}

impl Store {
    /// The operator's standing word on workloads.
    pub fn held(&self) -> Result<Vec<(WorkloadName, Hold)>, StoreError> {
        self.all_named(trees::HELD)
    }

    /// Sets or, with `None`, clears it. An operator's word is durable in both copies.
    pub fn hold(&self, name: &WorkloadName, hold: Option<Hold>) -> Result<(), StoreError> {
        let one = self.lock();
        if self.get::<Hold>(trees::HELD, name.as_str())? == hold {
            return Ok(());
        }
        let change = match hold {
            Some(hold) => put(trees::HELD, name.as_str(), &hold)?,
            None => remove(trees::HELD, name.as_str()),
        };
        self.commit_kept(&one, vec![change])
    }

    pub fn histories(&self) -> Result<Vec<(WorkloadName, SavedHistory)>, StoreError> {
        self.all_named(trees::HISTORY)
    }

    pub fn save_history(&self, name: &WorkloadName, history: &SavedHistory, d: Durability) -> Result<(), StoreError> {
        self.save_histories(std::slice::from_ref(&(name.clone(), history.clone())), d)
    }

    /// Several in one write: what a crash loop or a boot of many workloads wants.
    pub fn save_histories(&self, list: &[(WorkloadName, SavedHistory)], d: Durability) -> Result<(), StoreError> {
        let changes = list.iter().map(|(name, history)| put(trees::HISTORY, name.as_str(), history));
        let changes = changes.collect::<Result<Vec<_>, _>>()?;
        self.commit(&self.lock(), &changes, d)
    }

    /// A workload that is in no generation any more.
    pub fn forget_workload(&self, name: &WorkloadName) -> Result<(), StoreError> {
        self.hold(name, None)?;
        self.commit(&self.lock(), &[remove(trees::HISTORY, name.as_str())], Durability::Soon)
    }

    /// What is known of the images on disk, by the text the manifests use. The record's shape is its writer's.
    pub fn images<T: DeserializeOwned>(&self) -> Result<Vec<(String, T)>, StoreError> {
        self.all(trees::IMAGES)
    }

    pub fn image<T: DeserializeOwned>(&self, image: &str) -> Result<Option<T>, StoreError> {
        self.get(trees::IMAGES, image)
    }

    /// Only after the layers themselves are synced: the record says that they are there.
    pub fn put_image<T: Serialize>(&self, image: &str, record: &T) -> Result<(), StoreError> {
        self.commit(&self.lock(), &[put(trees::IMAGES, image, record)?], Durability::Now)
    }

    /// Durable before the layers go: a record of what is not there is worse than none.
    pub fn forget_image(&self, image: &str) -> Result<(), StoreError> {
        self.commit(&self.lock(), &[remove(trees::IMAGES, image)], Durability::Now)
    }
}
