//! How soon a change is told. A change that comes after some quiet is told at once, and so are the few that follow from it (a
//! workload that is being stopped, then is); what changes all the time is told every five seconds, for each report is a
//! write to the flash. (The generic cell rate algorithm of ITU-T I.371, as rate limiters use it.) A workload that fails
//! again and again has a pace of its own: it holds up nothing that is new.

use super::Due;

/// Changes of one kind that are told one upon another, after so much quiet as they are worth.
const BURST: u64 = 4;
/// Of each.
const QUIET_MS: u64 = 5_000;
/// What changes together is told together.
const TOGETHER_MS: u64 = 250;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    Fresh,
    /// It has happened to this workload before, and not been well since.
    Again,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    /// Of whatever kind.
    last_boot_ms: u64,
    fresh: Kind,
    again: Kind,
}

#[derive(Debug, Clone, Copy, Default)]
struct Kind {
    /// Something changed that no report has told.
    waits: bool,
    /// When all that was told has been paid for in quiet.
    paid_boot_ms: u64,
}

impl Kind {
    fn due_at_boot_ms(self, quiet_ms: u64) -> Option<u64> {
        self.waits.then_some(self.paid_boot_ms.saturating_sub((BURST - 1) * quiet_ms))
    }
}

impl Pace {
    pub fn changed(&mut self, news: News) {
        match news {
            News::Fresh => self.fresh.waits = true,
            News::Again => self.again.waits = true,
        }
    }

    /// When the next report is due, as things are.
    pub fn due_at_boot_ms(&self, interval_ms: u64) -> u64 {
        let together = self.last_boot_ms.saturating_add(TOGETHER_MS.min(interval_ms));
        let kinds =
            [self.fresh, self.again].into_iter().filter_map(|kind| kind.due_at_boot_ms(QUIET_MS.min(interval_ms)));
        kinds.min().map_or(self.last_boot_ms.saturating_add(interval_ms), |at| at.max(together))
    }

    /// What a report that is made now is for; `None`: none is due. It tells all that waits, and is paid for once.
    pub fn tell(&mut self, now_boot_ms: u64, interval_ms: u64) -> Option<Due> {
        if now_boot_ms < self.due_at_boot_ms(interval_ms) {
            return None;
        }
        let quiet_ms = QUIET_MS.min(interval_ms);
        let is_due = |kind: &Kind| kind.due_at_boot_ms(quiet_ms).is_some_and(|at| at <= now_boot_ms);
        let payer = [&mut self.fresh, &mut self.again].into_iter().find(|kind| is_due(kind));
        let due = if payer.is_some() { Due::Change } else { Due::Routine };
        if let Some(kind) = payer {
            kind.paid_boot_ms = kind.paid_boot_ms.max(now_boot_ms).saturating_add(quiet_ms);
        }
        (self.fresh.waits, self.again.waits, self.last_boot_ms) = (false, false, now_boot_ms);
        Some(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL_MS: u64 = 300_000;

    /// Tells whatever may be told from `from` on, with something changed at every moment.
    fn told(pace: &mut Pace, news: &[News], from: u64, until: u64) -> Vec<u64> {
        let mut all = Vec::new();
        let change = |pace: &mut Pace| news.iter().for_each(|news| pace.changed(*news));
        change(pace);
        let mut now = from.max(pace.due_at_boot_ms(INTERVAL_MS));
        while now <= until {
            assert_eq!(pace.tell(now, INTERVAL_MS), Some(Due::Change));
            all.push(now);
            change(pace);
            now = pace.due_at_boot_ms(INTERVAL_MS);
        }
        all
    }

    #[test]
    fn a_change_after_quiet_is_told_at_once_and_a_storm_of_them_every_five_seconds() {
        for kind in [News::Fresh, News::Again] {
            let mut pace = Pace::default();
            let first = told(&mut pace, &[kind], 100_000, 120_000);
            assert_eq!(first[..4], [100_000, 100_250, 100_500, 100_750]);
            assert_eq!(first[4..], [105_000, 110_000, 115_000, 120_000]);
            // Half of the quiet: half of the burst.
            assert_eq!(told(&mut pace, &[kind], 130_000, 131_000), [130_000, 130_250]);
            // No more is saved up in a day.
            assert_eq!(told(&mut pace, &[kind], 86_400_000, 86_404_999).len(), 4);
        }
    }

    #[test]
    fn who_fails_again_and_again_holds_up_nothing_that_is_new() {
        let mut pace = Pace::default();
        told(&mut pace, &[News::Again], 100_000, 200_100);
        assert_eq!(pace.due_at_boot_ms(INTERVAL_MS), 205_000);
        pace.changed(News::Fresh);
        assert_eq!(told(&mut pace, &[News::Fresh], 200_300, 200_900), [200_300, 200_550, 200_800]);
        // Both storms together: two reports in five seconds, each of which tells all there is.
        let both = told(&mut pace, &[News::Fresh, News::Again], 300_000, 400_000);
        assert!((40..=48).contains(&both.len()), "{both:?}");
    }

    #[test]
    fn nothing_has_changed_and_the_time_has_come() {
        let mut pace = Pace::default();
        assert_eq!(pace.tell(INTERVAL_MS - 1, INTERVAL_MS), None);
        assert_eq!(pace.tell(INTERVAL_MS, INTERVAL_MS), Some(Due::Routine));
        assert_eq!(pace.due_at_boot_ms(INTERVAL_MS), 2 * INTERVAL_MS);
    }

    #[test]
    fn who_wants_reports_often_has_changes_as_often() {
        let mut pace = Pace::default();
        for _ in 0..20 {
            pace.changed(News::Fresh);
            let now = pace.due_at_boot_ms(1_000);
            assert_eq!(pace.tell(now, 1_000), Some(Due::Change));
        }
        pace.changed(News::Fresh);
        // The first at 250 ms; each of them is paid for by a second, and three are ahead.
        assert_eq!(pace.due_at_boot_ms(1_000), 250 + 1_000 * (20 - 3));
        let mut pace = Pace::default();
        assert_eq!(pace.tell(100, 100), Some(Due::Routine));
        pace.changed(News::Fresh);
        assert_eq!(pace.due_at_boot_ms(100), 200);
    }
}
