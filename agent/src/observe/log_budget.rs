//! How much of what a workload prints is kept: so many bytes a second, and a burst that was saved up in silence
//! (systemd-journald limits its services in the same way, `RateLimitBurst=`). Flash wears out, and whoever writes logs
//! takes time from the workloads.

/// The most that is saved up, in seconds of silence.
const BURST_SECONDS: u64 = 16;

#[derive(Debug)]
pub struct LogBudget {
    bytes_per_second: u64,
    left_bytes: u64,
    at_boot_ms: u64,
}

impl LogBudget {
    pub fn new(bytes_per_second: u64, now_boot_ms: u64) -> Self {
        let left_bytes = bytes_per_second.saturating_mul(BURST_SECONDS);
        Self { bytes_per_second, left_bytes, at_boot_ms: now_boot_ms }
    }

    /// Whether so many bytes are kept. Those that are not cost nothing.
    pub fn spend(&mut self, bytes: usize, now_boot_ms: u64) -> bool {
        let silent_ms = now_boot_ms.saturating_sub(self.at_boot_ms);
        let earned = self.bytes_per_second.saturating_mul(silent_ms) / 1000;
        // Less than a byte is earned later.
        if earned > 0 {
            let most = self.bytes_per_second.saturating_mul(BURST_SECONDS);
            self.left_bytes = self.left_bytes.saturating_add(earned).min(most);
            self.at_boot_ms = now_boot_ms;
        }
        let is_kept = self.left_bytes >= bytes as u64;
        if is_kept {
            self.left_bytes -= bytes as u64;
        }
        is_kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_kept_and_then_what_the_rate_allows() {
        let mut budget = LogBudget::new(1000, 0);
        assert!(budget.spend(16_000, 0), "what was saved up before the first line");
        assert!(!budget.spend(1, 0));
        assert!(!budget.spend(600, 500) && budget.spend(500, 500));
        // A minute of silence saves no more than the burst.
        assert!(!budget.spend(16_001, 60_500) && budget.spend(16_000, 60_500));
    }

    #[test]
    fn however_often_it_is_asked_a_second_earns_the_same() {
        let mut budget = LogBudget::new(100, 0);
        assert!(budget.spend(1600, 0));
        let kept = (1..=1000).filter(|ms| budget.spend(1, *ms)).count();
        assert_eq!(kept, 100);
    }
}
