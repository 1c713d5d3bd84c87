//! What registries may cost: bytes per second and bytes per day (UTC), for all pulls together. Counted is what bodies bring;
//! headers and encryption add a few per cent. The day's count is on the disk before the bytes it speaks of have come: a
//! restart forgets none of them.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use edged_model::quantity::Bytes;
use edged_model::reason::Code;

use super::RegistryError;

const DAY_SECS: i64 = 86_400;
/// The count on the disk runs ahead by this part of the budget: so often at most it is written a day.
const WRITES_PER_DAY: u64 = 64;
/// With a rate limit, reads are small enough that a pause is short.
const READS_PER_SEC: u64 = 8;

/// The clocks, as functions: pulls run on threads of their own and take long.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    pub boot_ms: fn() -> u64,
    pub unix_secs: fn() -> i64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    pub bytes_per_sec: Option<u64>,
    pub bytes_per_day: Option<u64>,
}

#[derive(Debug)]
pub struct Traffic {
    limits: Limits,
    clock: Clock,
    /// Where the day's count is kept.
    file: PathBuf,
    count: Mutex<Count>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Count {
    /// Since 1970.
    day: i64,
    used: u64,
    /// What the disk says was used: never less.
    saved: u64,
    /// By when what has come would have come at the allowed rate, in microseconds of the boot clock.
    paid_until_us: u64,
}

impl Count {
    /// Another day begins anew. A clock that is put back does not: what was used stays used.
    fn on(mut self, day: i64) -> Self {
        if day > self.day {
            (self.used, self.saved) = (0, 0);
        }
        self.day = day;
        self
    }
}

/// The day's bytes are used up.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the {per_day} bytes of today are used")]
pub struct Spent {
    per_day: u64,
    next_day_in_secs: u64,
}

impl Spent {
    pub(super) fn told(self, what: &str) -> RegistryError {
        let text = format!(
            "{what}: the data budget of {} a day is used; it goes on at 00:00 UTC, in {} min",
            Bytes(self.per_day).human(),
            self.next_day_in_secs.div_ceil(60)
        );
        let mut error = RegistryError::new(Code::DataBudget, text, false);
        error.reason = error.reason.next("raise `images.daily-max` in agent.toml, or bring the image on a stick");
        error.retry_after = Some(Duration::from_secs(self.next_day_in_secs));
        error
    }
}

impl Traffic {
    /// Goes on counting where `file` says that an earlier run stopped.
    pub fn new(limits: Limits, clock: Clock, file: PathBuf) -> Self {
        let kept = std::fs::read_to_string(&file).unwrap_or_default();
        let mut numbers = kept.split_whitespace();
        let day = numbers.next().and_then(|day| day.parse().ok()).unwrap_or(0);
        let used = numbers.next().and_then(|used| used.parse().ok()).unwrap_or(0);
        let count = Count { day, used, saved: used, paid_until_us: 0 };
        Self { limits, clock, file, count: Mutex::new(count) }
    }

    /// Without limits; for whoever reads no clock.
    pub fn free() -> Self {
        Self::new(Limits::default(), Clock { boot_ms: || 0, unix_secs: || 0 }, PathBuf::new())
    }

    pub fn has_budget(&self) -> bool {
        self.limits.bytes_per_day.is_some()
    }

    pub fn boot_ms(&self) -> u64 {
        (self.clock.boot_ms)()
    }

    pub(super) fn unix_secs(&self) -> i64 {
        (self.clock.unix_secs)()
    }

    fn lock(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What may be read at once.
    pub(super) fn allowed(&self, wanted: usize) -> Result<usize, Spent> {
        let at_this_rate = self.limits.bytes_per_sec.map_or(u64::MAX, |rate| (rate / READS_PER_SEC).max(512));
        let mut allowed = at_this_rate.min(wanted as u64);
        if let Some(per_day) = self.limits.bytes_per_day {
            let now = (self.clock.unix_secs)();
            let mut count = self.lock();
            let before = count.day;
            *count = count.on(now.div_euclid(DAY_SECS));
            if count.day != before {
                self.save(*count);
            }
            let left = per_day.saturating_sub(count.used);
            if left == 0 {
                let next_day_in_secs = u64::try_from(DAY_SECS - now.rem_euclid(DAY_SECS)).unwrap_or(0);
                return Err(Spent { per_day, next_day_in_secs });
            }
            allowed = allowed.min(left);
            if count.used + allowed > count.saved {
                count.saved = (count.used + allowed + per_day / WRITES_PER_DAY).min(per_day);
                self.save(*count);
            }
        }
        Ok(usize::try_from(allowed).unwrap_or(wanted))
    }

    /// Takes note of what came; gives how long to wait now.
    fn came(&self, bytes: u64) -> Duration {
        let mut count = self.lock();
        count.used = count.used.saturating_add(bytes);
        let Some(rate) = self.limits.bytes_per_sec else { return Duration::ZERO };
        let now_us = (self.clock.boot_ms)().saturating_mul(1_000);
        let cost_us = bytes.saturating_mul(1_000_000) / rate.max(1);
        count.paid_until_us = count.paid_until_us.max(now_us).saturating_add(cost_us);
        Duration::from_micros(count.paid_until_us - now_us)
    }

    /// The disk has the exact count again.
    pub fn settle(&self) {
        let mut count = self.lock();
        if self.has_budget() && count.saved != count.used {
            count.saved = count.used;
            self.save(*count);
        }
    }

    fn save(&self, count: Count) {
        let text = format!("{} {}\n", count.day, count.saved);
        if let Err(error) = crate::content::durable(&self.file, text.as_bytes()) {
            // Nobody can be told who would not hear of the full disk anyway; the count in memory goes on.
            tracing::warn!("the day's data count: {}", crate::store::inline_chain(&error));
        }
    }
}

/// A body that is counted, held back and cut off.
pub struct Metered<R> {
    inner: R,
    traffic: Arc<Traffic>,
}

impl<R> Metered<R> {
    pub(super) fn new(inner: R, traffic: &Arc<Traffic>) -> Self {
        Self { inner, traffic: Arc::clone(traffic) }
    }
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let allowed = self.traffic.allowed(buffer.len()).map_err(io::Error::other)?;
        let count = self.inner.read(&mut buffer[..allowed])?;
        let wait = self.traffic.came(count as u64);
        if !wait.is_zero() {
            #[expect(clippy::disallowed_methods, reason = "this thread reads one body, and slowly is what was asked")]
            std::thread::sleep(wait);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicI64, Ordering};

    static UNIX_SECS: AtomicI64 = AtomicI64::new(0);

    #[test]
    fn a_day_has_so_many_bytes_over_restarts_and_whatever_the_clock_does() {
        let dir = tempfile::tempdir().unwrap();
        let clock = Clock { boot_ms: || 0, unix_secs: || UNIX_SECS.load(Ordering::Relaxed) };
        let limits = Limits { bytes_per_sec: None, bytes_per_day: Some(1_000) };
        let another = || Arc::new(Traffic::new(limits, clock, dir.path().join("traffic")));
        let read = |traffic: &Arc<Traffic>, bytes: usize| {
            Metered::new(io::repeat(1).take(bytes as u64), traffic).read_to_end(&mut Vec::new())
        };
        let at = |day: i64, secs: i64| UNIX_SECS.store(day * DAY_SECS + secs, Ordering::Relaxed);
        at(20_000, 80_000);
        let traffic = another();
        assert_eq!(read(&traffic, 600).unwrap(), 600);
        traffic.settle();
        let traffic = another();
        let error = read(&traffic, 401).unwrap_err();
        let told = error.get_ref().unwrap().downcast_ref::<Spent>().unwrap().told("x");
        assert_eq!((told.reason.code, told.retry_after), (Code::DataBudget, Some(Duration::from_secs(6_400))));
        // Killed in the middle, and the clock put back: it never gets more.
        at(19_000, 0);
        assert!(read(&another(), 1).is_err());
        at(19_001, 0);
        assert_eq!(read(&another(), 900).unwrap(), 900);
        assert!(read(&another(), 200).is_err(), "it was not settled: what might have come counts");
    }

    #[test]
    fn bytes_cost_time_and_idle_time_saves_up_nothing() {
        let clock = Clock { boot_ms: || 5_000, unix_secs: || 0 };
        let limits = Limits { bytes_per_sec: Some(1_000), bytes_per_day: None };
        let traffic = Traffic::new(limits, clock, PathBuf::new());
        assert_eq!(traffic.allowed(1 << 20).unwrap(), 512);
        assert_eq!(traffic.came(100), Duration::from_millis(100));
        assert_eq!(traffic.came(100), Duration::from_millis(200));
    }
}
