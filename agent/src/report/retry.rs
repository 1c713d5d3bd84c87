//! What an answer of the fleet means for a report, and how long to wait before the next try. Pure: statuses and random
//! numbers in, decisions out.

use std::time::Duration;

/// The pause after the first failure; it doubles from there.
const PAUSE_FIRST_MS: u64 = 1_000;
/// It grows no further than this.
const PAUSE_MAX_MS: u64 = 120_000;
/// The most that a `Retry-After` is obeyed: a fleet with a wrong header must not lose its devices for days.
const RETRY_AFTER_MAX_SECS: u64 = 3_600;

/// What an answer means for the report that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Taken,
    /// The fleet has it already, or will like it no better tomorrow: it leaves the outbox.
    Never,
    /// The fleet does not know our key. The report waits.
    NotEnrolled,
    /// The report waits.
    Later,
}

pub fn verdict(status: u16) -> Verdict {
    match status {
        200..=299 => Verdict::Taken,
        // 409: replayed. 400, 413, 415, 422: not a report to that fleet.
        400 | 409 | 413 | 415 | 422 => Verdict::Never,
        401 | 403 | 404 => Verdict::NotEnrolled,
        _ => Verdict::Later,
    }
}

/// The pause after `failures` failures in a row: doubling, bounded, and spread by `random` over its upper half, so that
/// the devices of a fleet that came back do not all come at once. Never shorter than what the fleet asks.
pub fn pause(failures: u32, retry_after_secs: Option<u64>, random: u16) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let full_ms = (PAUSE_FIRST_MS << doublings).min(PAUSE_MAX_MS);
    let spread_ms = |ms: u64| ms * u64::from(random) / u64::from(u16::MAX);
    let own_ms = full_ms / 2 + spread_ms(full_ms / 2);
    let asked_ms = retry_after_secs.map_or(0, |secs| {
        let asked_ms = secs.min(RETRY_AFTER_MAX_SECS) * 1000;
        asked_ms + spread_ms(asked_ms / 8)
    });
    Duration::from_millis(own_ms.max(asked_ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_what_can_never_arrive_is_given_up() {
        for (status, expected) in [
            (202, Verdict::Taken),
            (409, Verdict::Never),
            (400, Verdict::Never),
            (403, Verdict::NotEnrolled),
            (404, Verdict::NotEnrolled),
            (408, Verdict::Later),
            (429, Verdict::Later),
            (301, Verdict::Later),
            (500, Verdict::Later),
            (503, Verdict::Later),
        ] {
            assert_eq!(verdict(status), expected, "{status}");
        }
    }

    proptest! {
        #[test]
        fn pauses_grow_stay_bounded_and_obey_the_fleet(failures in 0..u32::MAX, asked in proptest::option::of(0..u64::MAX), random: u16) {
            let own = pause(failures, None, random);
            prop_assert!(own >= Duration::from_millis(500) && own <= Duration::from_secs(120));
            prop_assert!(pause(failures.saturating_add(1), None, random) >= own);
            let obeyed = pause(failures, asked, random);
            prop_assert!(obeyed >= own && obeyed >= Duration::from_secs(asked.unwrap_or(0).min(3600)));
            prop_assert!(obeyed <= Duration::from_secs(3600 + 450));
        }
    }
}
