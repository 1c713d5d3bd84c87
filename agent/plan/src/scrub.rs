//! The scrub of layers: when a pass begins, which layer is read next, when the next piece, and what it makes way for. Who
//! reads is told here; nothing is read here.
//!
//! Of pressure on the processors nothing is asked: a reader that lets everybody go first is among those who wait, and would
//! see itself. That of the disk it makes too, so the threshold is far above what a mebibyte a second does to a slow card.

use std::collections::BTreeSet;

use edged_model::id::Digest;
use edged_model::quantity::{Span, Timestamp};
use edged_model::report::Pressure;
use edged_model::scrub::ScrubPause;

/// At the beginning others have much to do.
const BEGINNING_MS: u64 = 600_000;
/// `some avg10` in hundredths of a percent.
const DISK_PRESSURE: u32 = 5_000;
const MEMORY_PRESSURE: u32 = 2_000;
/// It is not woken for less than this: a few large pieces cost a device less than many small ones.
const DEBT_MS: u64 = 500;

/// What may stand in its way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Around {
    /// How long the agent runs.
    pub up_ms: u64,
    pub pulls: bool,
    /// Staging, or writing down a generation's next step.
    pub switches: bool,
    pub on_probation: bool,
    pub starts: bool,
    /// Layers are looked at, taken away or put in another's place.
    pub checks: bool,
    /// Absent where the kernel does not measure it.
    pub pressure: Option<Pressure>,
}

/// Whether to stand still, and for what.
pub fn pause(around: &Around, every: Span) -> Option<ScrubPause> {
    let presses = |pressure: Pressure| pressure.io >= DISK_PRESSURE || pressure.memory >= MEMORY_PRESSURE;
    let reasons = [
        (around.pulls, ScrubPause::Pull),
        (around.switches, ScrubPause::Switch),
        (around.on_probation, ScrubPause::Probation),
        (around.starts, ScrubPause::Start),
        (around.checks, ScrubPause::Check),
        (around.pressure.is_some_and(presses), ScrubPause::Pressure),
        (around.up_ms < every.ms.min(BEGINNING_MS), ScrubPause::Beginning),
    ];
    reasons.into_iter().find(|(holds, _)| *holds).map(|(_, pause)| pause)
}

/// When the next pass is due. A time that has not come yet was written by a clock that was wrong, and nothing waits for it.
pub fn due(last_began: Option<Timestamp>, every: Span, wall: Timestamp) -> Timestamp {
    match last_began {
        Some(began) if began <= wall => {
            Timestamp(began.0.saturating_add(i64::try_from(every.ms / 1000).unwrap_or(i64::MAX)))
        }
        _ => wall,
    }
}

/// First what runs or may have to run at once, then the rest.
pub fn next_layer(
    needed: &BTreeSet<Digest>,
    rest: &BTreeSet<Digest>,
    at: Option<Digest>,
    done: &BTreeSet<Digest>,
) -> Option<Digest> {
    let is_left = |layer: &Digest| !done.contains(layer);
    let begun = at.filter(|layer| is_left(layer) && (needed.contains(layer) || rest.contains(layer)));
    begun.or_else(|| needed.iter().chain(rest).copied().find(is_left))
}

/// What was read since the reader was last let go on, and when that was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    since_ms: u64,
    bytes: u64,
}

/// What to do before the next piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    Now,
    In { ms: u64 },
    WhenLetGoOn,
}

impl Pace {
    pub fn new(now_ms: u64) -> Self {
        Self { since_ms: now_ms, bytes: 0 }
    }

    pub fn has_read(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// `bytes_per_sec`: on the average. What was not read during a pause is not made up for.
    pub fn next_piece(&mut self, is_paused: bool, bytes_per_sec: u64, now_ms: u64) -> Piece {
        if is_paused {
            *self = Self { since_ms: now_ms, ..*self };
            return Piece::WhenLetGoOn;
        }
        let earned_ms = now_ms.saturating_sub(self.since_ms);
        let spent_ms = u128::from(self.bytes) * 1000 / u128::from(bytes_per_sec.max(1));
        let spent_ms = u64::try_from(spent_ms).unwrap_or(u64::MAX);
        // A machine that slept, or a disk slower than the rate, earns nothing for later.
        if earned_ms >= spent_ms {
            *self = Self::new(now_ms);
            return Piece::Now;
        }
        match spent_ms - earned_ms {
            debt_ms if debt_ms < DEBT_MS => Piece::Now,
            debt_ms => Piece::In { ms: debt_ms },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EVERY: Span = Span::from_secs(30 * 86_400);
    const QUIET: Around = Around {
        up_ms: BEGINNING_MS,
        pulls: false,
        switches: false,
        on_probation: false,
        starts: false,
        checks: false,
        pressure: Some(Pressure { memory: 300, cpu: 9_900, io: 2_000 }),
    };

    #[test]
    fn it_makes_way_for_everybody_and_for_no_processor() {
        assert_eq!(pause(&QUIET, EVERY), None);
        assert_eq!(pause(&Around { pressure: None, ..QUIET }, EVERY), None, "a kernel without PSI");
        let busy = |memory, io| Around { pressure: Some(Pressure { memory, cpu: 0, io }), ..QUIET };
        let cases = [
            (Around { pulls: true, ..QUIET }, ScrubPause::Pull),
            (Around { switches: true, ..QUIET }, ScrubPause::Switch),
            (Around { on_probation: true, ..QUIET }, ScrubPause::Probation),
            (Around { starts: true, ..QUIET }, ScrubPause::Start),
            (Around { checks: true, ..QUIET }, ScrubPause::Check),
            (busy(2_000, 0), ScrubPause::Pressure),
            (busy(0, 5_000), ScrubPause::Pressure),
            (Around { up_ms: BEGINNING_MS - 1, ..QUIET }, ScrubPause::Beginning),
        ];
        for (around, expected) in cases {
            assert_eq!(pause(&around, EVERY), Some(expected), "{around:?}");
        }
        assert_eq!(
            pause(&Around { up_ms: 1_000, ..QUIET }, Span::from_secs(1)),
            None,
            "who wants it often gets it early"
        );
    }

    #[test]
    fn a_pass_is_due_after_the_period_and_a_wrong_clock_holds_nothing_up() {
        let now = Timestamp(10_000_000);
        assert_eq!(due(None, EVERY, now), now);
        assert_eq!(due(Some(Timestamp(9_000_000)), EVERY, now), Timestamp(9_000_000 + 30 * 86_400));
        assert!(due(Some(Timestamp(1_000_000)), EVERY, now) <= now);
        assert_eq!(due(Some(Timestamp(10_000_001)), EVERY, now), now, "from a clock that was ahead");
    }

    fn digests(names: &str) -> BTreeSet<Digest> {
        names.split(' ').filter(|name| !name.is_empty()).map(|name| Digest::of(name.as_bytes())).collect()
    }

    #[test]
    fn what_is_needed_comes_first_and_what_was_begun_before_it() {
        let (needed, rest) = (digests("a b"), digests("c d"));
        let one = |name: &str| Digest::of(name.as_bytes());
        let next = |at, done: &str| next_layer(&needed, &rest, at, &digests(done));
        assert!(needed.contains(&next(None, "").unwrap()));
        assert_eq!(next(None, "a"), Some(one("b")));
        assert!(rest.contains(&next(None, "a b").unwrap()));
        assert_eq!(next(Some(one("d")), ""), Some(one("d")));
        assert_eq!(next(Some(one("gone")), "a b c"), Some(one("d")), "taken away meanwhile");
        assert_eq!(next(Some(one("d")), "a b c d"), None);
    }

    proptest! {
        /// Pieces of any size, disks of any speed, pauses of any length.
        #[test]
        fn the_rate_holds_over_any_time_and_it_always_goes_on(
            rate in 1_024_u64..64 << 20,
            steps in prop::collection::vec((1_u64..=128 << 10, 0_u64..200, prop::option::weighted(0.1, 0_u64..100_000)), 1..300),
        ) {
            let (mut now, mut unpaused_ms, mut read, mut last) = (0_u64, 0_u64, 0_u64, 0_u64);
            let mut pace = Pace::new(now);
            for (bytes, took_ms, paused_ms) in steps {
                if let Some(paused_ms) = paused_ms {
                    prop_assert_eq!(pace.next_piece(true, rate, now), Piece::WhenLetGoOn);
                    now += paused_ms;
                    prop_assert_eq!(pace.next_piece(true, rate, now), Piece::WhenLetGoOn);
                }
                let mut waits = 0;
                while let Piece::In { ms } = pace.next_piece(false, rate, now) {
                    now += ms;
                    unpaused_ms += ms;
                    waits += 1;
                    prop_assert!(waits < 2, "after the time that it named it goes on");
                }
                // Half a second ahead at most, and the piece of before.
                prop_assert!(read <= rate * (unpaused_ms + DEBT_MS) / 1000 + last + 1, "{} in {} ms", read, unpaused_ms);
                (now, unpaused_ms) = (now + took_ms, unpaused_ms + took_ms);
                read += bytes;
                last = bytes;
                pace.has_read(bytes);
            }
        }
    }
}
