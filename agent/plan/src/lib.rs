//! The planner: `(desired, observed, now) -> plan`. Pure: no I/O, no clock of its own, no thread; it depends on the
//! model alone.
//!
//! ```text
//!  candidate ──rollout──> Staged ──> Activating ──> Probation ──> Good
//!                                        │              └──> RolledBack (the last good one is active again)
//!                                  per workload: diff, order, restart
//! ```
//!
//! Laws (checked in `tests/laws.rs`):
//! - a converged world's plan has no action;
//! - what did not change is neither stopped nor started;
//! - a workload has one run at a time, of one generation;
//! - a workload starts only when what it depends on has got that far;
//! - whoever waits says why, and either a time or an event ends the wait;
//! - a transition that switches generations stands alone: nothing that depends on it is ordered before it was written.

#![forbid(unsafe_code)]

/// Does it fit: memory, CPU.
pub mod fit;
/// Which images and workloads nobody needs any more.
pub mod garbage;
/// Whether it suits to switch.
mod moment;
/// The order in which workloads start.
pub mod order;
/// The word and the reason that people are shown for one workload.
pub mod phase;
/// Whether and when an ended workload starts again.
pub mod restart;
/// The life of generations.
pub mod rollout;
/// Room in the middle of a switch.
mod room;
/// Layers read slowly, again and again.
pub mod scrub;
/// What a generation's step means for the records.
pub mod transition;
/// How many may be down at once.
mod turns;
/// What one workload needs.
mod workload;
/// How events become what the planner sees.
pub mod world;

use edged_model::action::{Action, Plan};
use edged_model::generation::GenerationState;
use edged_model::observed::{Desired, Observed};
use edged_model::quantity::Now;

/// What to do now. Called again after every event and when [`Plan::wake_at_boot_ms`] has come.
pub fn plan(desired: &Desired, observed: &Observed, now: Now) -> Plan {
    let mut plan = Plan::default();
    rollout::candidate(desired, observed, now, &mut plan);
    rollout::active(desired, observed, now, &mut plan);
    // Only a transition that makes another generation the active one changes what the workloads need. Nobody waits for
    // the others: a disk that is full must not delay a restart.
    let switches = plan.actions.iter().any(|action| match action {
        Action::Transition { to, .. } => matches!(to, GenerationState::Activating | GenerationState::RolledBack),
        _ => false,
    });
    if !switches {
        workload::all(desired, observed, now, &mut plan);
        rollout::restock(desired, observed, now, &mut plan);
    }
    plan
}
