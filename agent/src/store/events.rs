//! The device's story: a ring of numbered events.

use edged_model::api::Event;

use super::record::number_key;
use super::{Durability, Store, StoreError, put, record, remove, trees};

/// Events kept: about half a mebibyte.
pub(super) const EVENTS_MAX: u64 = 2000;

impl Store {
    /// Appends to the story of the device; the oldest goes when there are too many. Returns the event's number.
    pub fn append_event(&self, mut event: Event, durability: Durability) -> Result<u64, StoreError> {
        let mut one = self.lock();
        event.number = one.next_event;
        let mut changes = vec![put(trees::EVENTS, &number_key(event.number), &event)?];
        if let Some(old) = event.number.checked_sub(EVENTS_MAX) {
            changes.push(remove(trees::EVENTS, &number_key(old)));
        }
        one.next_event += 1;
        self.commit(&one, &changes, durability)?;
        Ok(event.number)
    }

    /// The last `count` events that `wanted` lets through, oldest first.
    pub fn events(&self, count: usize, wanted: impl Fn(&Event) -> bool) -> Result<Vec<Event>, StoreError> {
        // What waits has happened.
        self.settle()?;
        let mut found = Vec::new();
        self.with_door(|door| {
            for key in door.keys_backwards(trees::EVENTS)? {
                if found.len() == count {
                    break;
                }
                let key = key?;
                let sealed = door.get(trees::EVENTS, &key)?.unwrap_or_default();
                found.extend(record::unseal::<Event>(trees::EVENTS, &key, &sealed).filter(|event| wanted(event)));
            }
            Ok(())
        })?;
        found.reverse();
        Ok(found)
    }
}
