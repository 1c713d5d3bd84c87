//! How many layers are fetched at a time, of all images together. Each has a decoder and buffers (a zstd one a window of
//! 8 MiB), and the agent has a wall; a slow link gains nothing from more of them either.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::config::Images;

/// Of all that are fetched together: a pull has 24 MiB.
const WINDOWS: u32 = 2;

/// One more of each, which only what is urgent may take: what runs lacks a layer, and does not wait for what may run later.
const FOR_URGENT: u32 = 1;

#[derive(Debug)]
pub struct Slots {
    free: Mutex<Free>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy)]
struct Free {
    layers: u32,
    windows: u32,
}

impl Free {
    fn has(self, has_window: bool, is_urgent: bool) -> bool {
        let kept = if is_urgent { 0 } else { FOR_URGENT };
        self.layers > kept && (!has_window || self.windows > kept)
    }
}

/// The right to fetch one layer.
#[derive(Debug)]
pub struct Slot<'s> {
    slots: &'s Slots,
    has_window: bool,
}

impl Default for Slots {
    /// As where nothing else is configured.
    fn default() -> Self {
        Self::new(Images::default().parallel)
    }
}

impl Slots {
    pub fn new(layers: u32) -> Self {
        let free = Free { layers: layers.max(1) + FOR_URGENT, windows: WINDOWS + FOR_URGENT };
        Self { free: Mutex::new(free), changed: Condvar::new() }
    }

    /// Waits for one; `None` as soon as it is of no use any more.
    pub fn take(&self, has_window: bool, is_urgent: bool, is_useless: &dyn Fn() -> bool) -> Option<Slot<'_>> {
        let waits = |free: &mut Free| !free.has(has_window, is_urgent) && !is_useless();
        let mut free = self.changed.wait_while(self.lock(), waits).unwrap_or_else(PoisonError::into_inner);
        if is_useless() {
            return None;
        }
        free.layers -= 1;
        free.windows -= u32::from(has_window);
        Some(Slot { slots: self, has_window })
    }

    /// Who waits may have become useless.
    pub fn look_again(&self) {
        // Under the lock, so that nobody goes to sleep between looking and being woken.
        let _free = self.lock();
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut free = self.slots.lock();
        free.layers += 1;
        free.windows += u32::from(self.has_window);
        self.slots.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Does not wait.
    fn try_take(slots: &Slots, has_window: bool, is_urgent: bool) -> Option<Slot<'_>> {
        let has_one = slots.lock().has(has_window, is_urgent);
        has_one.then(|| slots.take(has_window, is_urgent, &|| false)).flatten()
    }

    #[test]
    fn of_all_images_together_so_many_and_one_for_what_is_urgent() {
        let slots = Slots::new(3);
        let windows = [try_take(&slots, true, false), try_take(&slots, true, false)];
        assert!(windows.iter().all(Option::is_some));
        assert!(try_take(&slots, true, false).is_none(), "two windows");
        let third = try_take(&slots, false, false).unwrap();
        assert!(try_take(&slots, false, false).is_none(), "three layers");
        let urgent = try_take(&slots, true, true).unwrap();
        assert!(try_take(&slots, false, true).is_none());
        drop((urgent, third));
        assert!(try_take(&slots, true, false).is_none(), "the window for what is urgent stays free");
        assert!(try_take(&slots, false, false).is_some());
    }

    #[test]
    fn who_waits_goes_when_a_slot_is_free_or_when_it_is_of_no_use_any_more() {
        let slots = Slots::new(1);
        let (one, is_useless) = (slots.take(false, false, &|| false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| slots.take(false, false, &|| false).is_some());
            let gives_up = scope.spawn(|| slots.take(true, false, &|| is_useless.load(Ordering::Relaxed)).is_none());
            is_useless.store(true, Ordering::Relaxed);
            slots.look_again();
            assert!(gives_up.join().unwrap());
            drop(one);
            assert!(waits.join().unwrap());
        });
    }
}
