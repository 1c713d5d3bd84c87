//! How soon a change is told. A change that comes after some quiet is told at once, and so are the few that follow from it (a
//! workload that is being stopped, then is); what changes all the time is told every five seconds, for each report is a
//! write to the flash. (The generic cell rate algorithm of ITU-T I.371, as rate limiters use it.)

/// Changes that are told one upon another, after so much quiet as they are worth.
const BURST: u64 = 4;
/// Of each.
const QUIET_MS: u64 = 5_000;
/// What changes together is told together.
const TOGETHER_MS: u64 = 250;

#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    /// Of whatever kind.
    last_boot_ms: u64,
    /// When all that was told has been paid for in quiet.
    paid_boot_ms: u64,
}

impl Pace {
    /// The earliest moment for a report of a change.
    pub fn change_at_boot_ms(&self, interval_ms: u64) -> u64 {
        let quiet_ms = QUIET_MS.min(interval_ms);
        let saved_ms = (BURST - 1) * quiet_ms;
        self.paid_boot_ms.saturating_sub(saved_ms).max(self.last_boot_ms.saturating_add(TOGETHER_MS.min(interval_ms)))
    }

    /// The earliest moment for one that nothing calls for but the time.
    pub fn routine_at_boot_ms(&self, interval_ms: u64) -> u64 {
        self.last_boot_ms.saturating_add(interval_ms)
    }

    pub fn change_is_told(&mut self, now_boot_ms: u64, interval_ms: u64) {
        self.paid_boot_ms = self.paid_boot_ms.max(now_boot_ms).saturating_add(QUIET_MS.min(interval_ms));
        self.last_boot_ms = now_boot_ms;
    }

    pub fn routine_is_told(&mut self, now_boot_ms: u64) {
        self.last_boot_ms = now_boot_ms;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL_MS: u64 = 300_000;

    /// Tells whatever may be told from `from` on, with something changed at every moment.
    fn told(pace: &mut Pace, from: u64, until: u64) -> Vec<u64> {
        let mut all = Vec::new();
        let mut now = from.max(pace.change_at_boot_ms(INTERVAL_MS));
        while now <= until {
            pace.change_is_told(now, INTERVAL_MS);
            all.push(now);
            now = pace.change_at_boot_ms(INTERVAL_MS);
        }
        all
    }

    #[test]
    fn a_change_after_quiet_is_told_at_once_and_a_storm_of_them_every_five_seconds() {
        let mut pace = Pace::default();
        let first = told(&mut pace, 100_000, 120_000);
        assert_eq!(first[..4], [100_000, 100_250, 100_500, 100_750]);
        assert_eq!(first[4..], [105_000, 110_000, 115_000, 120_000]);
        // Half of the quiet: half of the burst.
        assert_eq!(told(&mut pace, 130_000, 131_000), [130_000, 130_250]);
        // No more is saved up in a day.
        assert_eq!(told(&mut pace, 86_400_000, 86_404_999).len(), 4);
    }

    #[test]
    fn who_wants_reports_often_has_changes_as_often() {
        let mut pace = Pace::default();
        for _ in 0..20 {
            let now = pace.change_at_boot_ms(1_000);
            pace.change_is_told(now, 1_000);
        }
        // The first at 250 ms; each of them is paid for by a second, and three are ahead.
        assert_eq!(pace.change_at_boot_ms(1_000), 250 + 1_000 * (20 - 3));
        let mut pace = Pace::default();
        pace.routine_is_told(7);
        assert_eq!((pace.routine_at_boot_ms(100), pace.change_at_boot_ms(100)), (107, 107));
    }
}
