//! What could not be done (a disk that is full or broken) is not tried again with every turn of the loop. No clock of its
//! own.

const FIRST_MS: u64 = 1_000;
const MAX_MS: u64 = 60_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backoff {
    failures: u32,
    until_boot_ms: u64,
}

impl Backoff {
    pub fn is_over(&self, now_boot_ms: u64) -> bool {
        self.until_boot_ms <= now_boot_ms
    }

    pub fn failed(&mut self, now_boot_ms: u64) {
        let wait_ms = (FIRST_MS << self.failures.min(10)).min(MAX_MS);
        self.failures = self.failures.saturating_add(1);
        self.until_boot_ms = now_boot_ms.saturating_add(wait_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_and_is_bounded() {
        let mut backoff = Backoff::default();
        assert!(backoff.is_over(0));
        for wait_ms in [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000] {
            backoff.failed(5);
            assert!(!backoff.is_over(5 + wait_ms - 1) && backoff.is_over(5 + wait_ms), "{backoff:?}");
        }
    }
}
