//! What runs out of what the device believes: in the status and the report as long as it is so, in the story once.

use std::collections::BTreeSet;

use edged_model::reason::{Code, Reason};
use edged_model::report::TrustReport;

use super::Agent;
use crate::store::Store;
use crate::verify::expiry;

/// What was said already, also by an agent before this one.
#[derive(Debug, Default)]
pub struct Concerns {
    told: BTreeSet<String>,
    /// The trust root that came with the device cannot be used, and why.
    pub factory: Option<Reason>,
}

impl Concerns {
    pub fn recall(store: &Store, factory: Option<Reason>) -> Self {
        let is_concern = |code| matches!(code, Code::Expired | Code::Expiring);
        // A story that cannot be read is said elsewhere; then one sentence comes twice.
        let story = store.events(usize::MAX, |event| is_concern(event.why.code)).unwrap_or_default();
        Self { told: story.into_iter().map(|event| event.why.text).collect(), factory }
    }
}

impl Agent {
    fn concerns(&self) -> Vec<Reason> {
        let desired = &self.world.desired;
        // A newer one that is on its way answers the question whether one has come.
        let newest = desired.pointers.candidate.max(desired.pointers.active);
        let wanted = newest.and_then(|sequence| desired.generations.get(&sequence));
        expiry::concerns(&self.root, wanted, self.now().wall)
    }

    pub(super) fn trust_report(&self) -> TrustReport {
        let concerns = self.concerns.factory.iter().cloned().chain(self.concerns()).collect();
        TrustReport {
            root: self.root.version,
            root_expires: self.root.expires,
            manifest_expires: self.active().map(|active| active.manifest.expires),
            concerns,
        }
    }

    pub(super) fn look_at_expiry(&mut self) {
        for why in self.concerns() {
            if self.concerns.told.insert(why.text.clone()) {
                self.tell(None, self.world.desired.pointers.active, &why, "agent");
            }
        }
    }
}
