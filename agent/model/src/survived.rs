//! What a device has survived, counted over its life.

use serde::{Deserialize, Serialize};

/// Each counter only rises. They are written with the next durable write, or within ten seconds, and lie in both copies of
/// the state: a cut may cost the last few of them, a damaged store at most those since the last change of `keep/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Survived {
    /// Agents that followed one that had ended, under the same keeper.
    pub agent_restarts: u64,
    /// Boots after the power was gone or somebody pressed reset; never on a host.
    pub power_losses: u64,
    pub watchdog_resets: u64,
    pub kernel_panics: u64,
    /// The state store was damaged, and rebuilt from its second copy.
    pub store_rebuilt: u64,
    /// Damaged records that nothing depends on, taken out.
    pub store_records_lost: u64,
    pub generations_rolled_back: u64,
    pub generations_rejected: u64,
    /// Newer programs of edged whose agents fell, so that the one before came back.
    pub upgrades_returned: u64,
    /// Damaged layers that were found and fetched again.
    pub layers_damaged: u64,
    /// Fetches of images that failed and were, or will be, tried again.
    pub pull_retries: u64,
    /// Requests to the fleet that failed.
    pub fleet_failures: u64,
    /// Reports that never reached the fleet: a full outbox lets the oldest go.
    pub reports_dropped: u64,
    /// Lines of logs that came faster than the disk takes them.
    pub log_lines_dropped: u64,
    /// Records of the story and of restarts that a disk too slow or too full did not take.
    pub writes_dropped: u64,
}
