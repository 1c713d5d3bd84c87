//! Somebody wants an image, for now.

use std::sync::atomic::{AtomicBool, Ordering};

use edged_model::reason::Code;
use tokio::sync::Notify;

use super::PullFailure;
use super::slots::Slots;

#[derive(Debug, Default)]
pub struct Order {
    /// What runs lacks it: it does not wait for what may run later.
    pub is_urgent: bool,
    is_withdrawn: AtomicBool,
    told: Notify,
}

impl Order {
    pub fn new(is_urgent: bool) -> Self {
        Self { is_urgent, ..Self::default() }
    }

    /// Nobody wants it any more: it ends soon, in a failure.
    pub fn withdraw(&self, slots: &Slots) {
        self.is_withdrawn.store(true, Ordering::Relaxed);
        self.told.notify_waiters();
        slots.look_again();
    }

    /// Waits for something, as long as it is wanted.
    pub async fn wait<T>(&self, what: impl Future<Output = T>) -> Result<T, PullFailure> {
        let withdrawn = async {
            let told = self.told.notified();
            if !self.is_withdrawn() {
                told.await;
            }
        };
        tokio::select! {
            biased;
            () = withdrawn => Err(PullFailure::passing(Code::ImageUnusable, "nobody wants it any more".to_owned())),
            got = what => Ok(got),
        }
    }

    pub fn is_withdrawn(&self) -> bool {
        self.is_withdrawn.load(Ordering::Relaxed)
    }
}
