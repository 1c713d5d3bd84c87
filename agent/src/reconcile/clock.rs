//! The only place of the agent that reads clocks. Everything else is handed a [`Now`].

use edged_model::quantity::{Now, Timestamp};
use nix::sys::time::TimeValLike as _;
use nix::time::{ClockId, clock_gettime};

/// Both clocks, the wall clock never behind the time floor (a device without a battery wakes up in 1970). `ahead_ms`: what
/// the clock is known to be behind and was not set to.
pub fn now(ahead_ms: i64, floor: Timestamp) -> Now {
    Now { boot_ms: boot_ms(), wall: Timestamp(unix_ms().saturating_add(ahead_ms) / 1000).max(floor) }
}

/// CLOCK_BOOTTIME in milliseconds: counts through suspend and never jumps (clock_gettime(2)).
pub fn boot_ms() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |t| {
        u64::try_from(t.tv_sec()).unwrap_or(0) * 1000 + u64::try_from(t.tv_nsec()).unwrap_or(0) / 1_000_000
    })
}

/// The wall clock as it is, in milliseconds: for log lines.
pub fn unix_ms() -> i64 {
    clock_gettime(ClockId::CLOCK_REALTIME).map_or(0, |t| t.num_milliseconds())
}
