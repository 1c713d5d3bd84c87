//! How often what was survived. Counted where it is seen, written with whatever is written next.

use std::sync::atomic::{AtomicU64, Ordering};

use edged_model::generation::GenerationState;
use edged_model::report::BootCause;
use edged_model::survived::Survived;

use super::Agent;
use crate::store::{Opened, SavedSurvived, Store, inline_chain};

pub(super) struct Counters {
    saved: SavedSurvived,
    is_changed: bool,
    /// What this agent's threads have counted, as far as it is in `saved` already.
    taken_log_lines: u64,
    taken_fleet_failures: u64,
    /// Counted where the agent cannot be changed.
    writes_dropped: AtomicU64,
}

impl Counters {
    /// `keeper_pid`: the same keeper in the same boot has started another agent because one had ended.
    pub fn begin(store: &Store, opened: &Opened, (boot_id, keeper_pid): (&str, i32), cause: Option<BootCause>) -> Self {
        let before = store.survived().unwrap_or_else(|error| {
            tracing::warn!("what was survived so far: {}", inline_chain(&error));
            None
        });
        let mut saved = before.clone().unwrap_or_default();
        let now = &mut saved.survived;
        if let Opened::Mended { records } = opened {
            now.store_records_lost += records.len() as u64;
        }
        // With a second copy it was counted by who rebuilt it.
        if matches!(opened, Opened::Rebuilt { from_keep: false, .. }) {
            now.store_rebuilt += 1;
        }
        if before.is_some_and(|before| before.boot_id != boot_id) {
            match cause {
                Some(BootCause::PowerLoss) => now.power_losses += 1,
                Some(BootCause::Watchdog) => now.watchdog_resets += 1,
                Some(BootCause::Panic) => now.kernel_panics += 1,
                Some(BootCause::First | BootCause::Requested) | None => {}
            }
        } else if saved.boot_id == boot_id && saved.keeper_pid == keeper_pid {
            now.agent_restarts += 1;
        }
        (saved.boot_id, saved.keeper_pid) = (boot_id.to_owned(), keeper_pid);
        let writes_dropped = AtomicU64::new(0);
        Self { saved, is_changed: true, taken_log_lines: 0, taken_fleet_failures: 0, writes_dropped }
    }

    pub fn a_write_was_dropped(&self) {
        self.writes_dropped.fetch_add(1, Ordering::Relaxed);
    }
}

impl Agent {
    /// Counts one more of something.
    pub(super) fn count(&mut self, which: impl FnOnce(&mut Survived) -> &mut u64) {
        *which(&mut self.counters.saved.survived) += 1;
        self.counters.is_changed = true;
    }

    pub(super) fn count_end_of(&mut self, generation: GenerationState) {
        match generation {
            GenerationState::RolledBack => self.count(|survived| &mut survived.generations_rolled_back),
            GenerationState::Rejected => self.count(|survived| &mut survived.generations_rejected),
            _ => {}
        }
    }

    /// As of now.
    pub(super) fn survived(&self) -> Survived {
        let counters = &self.counters;
        let mut survived = counters.saved.survived;
        survived.log_lines_dropped += self.logs.dropped() - counters.taken_log_lines;
        survived.fleet_failures += self.fleet.failures() - counters.taken_fleet_failures;
        survived.writes_dropped += counters.writes_dropped.load(Ordering::Relaxed);
        survived.reports_dropped = self.store.dropped_reports().unwrap_or(survived.reports_dropped);
        survived
    }

    /// Once per beat, and with every change of a generation: a counter that races costs one record in ten seconds.
    pub(super) fn keep_counters(&mut self) {
        let survived = self.survived();
        if !self.counters.is_changed && survived == self.counters.saved.survived {
            return;
        }
        let counters = &mut self.counters;
        (counters.taken_log_lines, counters.taken_fleet_failures) = (self.logs.dropped(), self.fleet.failures());
        counters.writes_dropped.store(0, Ordering::Relaxed);
        (counters.saved.survived, counters.is_changed) = (survived, false);
        let saved = counters.saved.clone();
        let written = self.writes.submit(move |store| {
            if let Err(error) = store.save_survived(&saved) {
                tracing::error!("what was survived: {}", inline_chain(&error));
            }
        });
        self.warn_if_busy(written);
    }
}
