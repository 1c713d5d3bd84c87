//! How long the last few hundred of something took. No clock: it is told.

use edged_model::api::Took;

/// Enough for a ninety-ninth part, and a kilobyte.
const KEPT: usize = 256;

/// The last of them, in a ring.
#[derive(Debug, Default)]
pub struct Times {
    us: Vec<u32>,
    next: usize,
    all: u64,
}

impl Times {
    pub fn add(&mut self, us: u64) {
        let us = u32::try_from(us).unwrap_or(u32::MAX);
        if self.us.len() < KEPT {
            self.us.push(us);
        } else {
            self.us[self.next] = us;
        }
        self.next = (self.next + 1) % KEPT;
        self.all += 1;
    }

    /// `None` as long as there is nothing to tell.
    pub fn took(&self) -> Option<Took> {
        let mut sorted = self.us.clone();
        sorted.sort_unstable();
        let part = |hundredths: usize| sorted.get((sorted.len() * hundredths).div_ceil(100).max(1) - 1).copied();
        Some(Took { times: self.all, median_us: part(50)?.into(), p99_us: part(99)?.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_count() {
        let mut times = Times::default();
        assert_eq!(times.took(), None);
        times.add(7);
        assert_eq!(times.took(), Some(Took { times: 1, median_us: 7, p99_us: 7 }));
        (1..=100).for_each(|us| times.add(us));
        assert_eq!(times.took(), Some(Took { times: 101, median_us: 50, p99_us: 99 }));
        (0..256).for_each(|_| times.add(u64::MAX));
        assert_eq!(times.took().map(|took| took.median_us), Some(u64::from(u32::MAX)));
    }
}
