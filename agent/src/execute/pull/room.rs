//! Room on the disk. Before the first byte of a layer is fetched, all pulls of an update are weighed together: what they
//! need against what is free, what stays in reserve and what other pulls were promised. What does not fit is refused with
//! the numbers, and nothing was fetched. A compressed layer is not kept, so only what it unpacks to counts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use edged_model::id::Digest;
use edged_model::quantity::Bytes;
use edged_model::reason::{Code, Reason};

use super::PullFailure;

/// Images that are named when an update does not fit.
const NAMED_MAX: usize = 4;

/// The promises that were made and not kept yet, of all pulls of this device.
#[derive(Debug, Default)]
pub struct Promises(Mutex<Vec<Weak<Promise>>>);

impl Promises {
    fn outstanding(&self) -> u64 {
        let mut all = lock(&self.0);
        all.retain(|promise| promise.strong_count() > 0);
        all.iter().filter_map(Weak::upgrade).map(|promise| promise.outstanding()).fold(0, u64::saturating_add)
    }
}

/// What the data disk has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    pub free: u64,
    pub reserve: u64,
}

impl Disk {
    pub fn of(data: &Path, reserve: Bytes) -> Self {
        // A file system that cannot be asked says so when it is written to.
        let free = rustix::fs::statvfs(data).map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        Self { free, reserve: reserve.0 }
    }
}

/// What one layer takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    pub bytes: u64,
    is_guess: bool,
}

impl Need {
    pub fn known(bytes: u64) -> Self {
        Self { bytes, is_guess: false }
    }

    /// By a rule of thumb.
    pub fn guessed(bytes: u64) -> Self {
        Self { bytes, is_guess: true }
    }
}

/// What the pulls of one update may write together.
#[derive(Debug)]
pub struct Promise {
    disk: Disk,
    needed: u64,
    /// What could be had when it was made, and what of that is still there.
    usable: u64,
    left: AtomicU64,
}

impl Promise {
    /// Taken from by whoever writes.
    pub fn left(&self) -> &AtomicU64 {
        &self.left
    }

    fn taken(&self) -> u64 {
        self.usable.saturating_sub(self.left.load(Ordering::Relaxed))
    }

    fn outstanding(&self) -> u64 {
        self.needed.saturating_sub(self.taken())
    }

    /// It turned out to be more than was thought.
    pub fn was_too_small(&self, image: &str) -> PullFailure {
        let needed = Bytes(self.taken()).human();
        let [free, reserve] = [self.disk.free, self.disk.reserve].map(|bytes| Bytes(bytes).human());
        refusal(format!("{image} needs more than {needed}, {free} were free, {reserve} are in reserve"))
    }
}

fn refusal(text: String) -> PullFailure {
    let reason = Reason::new(Code::DiskDoesNotFit, text).next("free some room or use smaller images");
    PullFailure { reason, permanent: false, retry_after: None }
}

/// Pulls that begin together: the images of one update. None of them fetches a layer before each has said what it needs,
/// or has failed.
#[derive(Debug, Default)]
pub struct Together {
    weighing: Mutex<Weighing>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Weighing {
    /// Tickets that have said nothing yet.
    looking: usize,
    images: BTreeSet<String>,
    /// By chain id: a layer that two images share is fetched once.
    needs: BTreeMap<Digest, Need>,
    verdict: Option<Result<Arc<Promise>, PullFailure>>,
}

/// The right to be weighed. As long as one is held, nobody is told anything; dropped, it needs nothing.
#[derive(Debug)]
pub struct Ticket(Arc<Together>);

impl Ticket {
    /// For a pull of its own.
    pub fn alone() -> Self {
        Self::of(Arc::default())
    }

    /// Another one of the same update. To be asked for while one of them is held.
    #[must_use]
    pub fn another(&self) -> Self {
        Self::of(Arc::clone(&self.0))
    }

    fn of(together: Arc<Together>) -> Self {
        lock(&together.weighing).looking += 1;
        Self(together)
    }

    /// Says what `image` needs, waits for the others, and gets what all of them get.
    pub fn weigh(
        self,
        image: &str,
        needs: impl IntoIterator<Item = (Digest, Need)>,
        promises: &Promises,
        disk: &dyn Fn() -> Disk,
    ) -> Result<Arc<Promise>, PullFailure> {
        let together = Arc::clone(&self.0);
        let mut weighing = lock(&together.weighing);
        weighing.images.insert(image.to_owned());
        weighing.needs.extend(needs);
        drop(weighing);
        drop(self);
        let mut weighing = lock(&together.weighing);
        while weighing.looking > 0 {
            weighing = together.changed.wait(weighing).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(verdict) = &weighing.verdict {
            return verdict.clone();
        }
        let verdict = judge(&weighing, promises, disk());
        weighing.verdict = Some(verdict.clone());
        verdict
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.0.weighing).looking -= 1;
        self.0.changed.notify_all();
    }
}

fn judge(weighing: &Weighing, promises: &Promises, disk: Disk) -> Result<Arc<Promise>, PullFailure> {
    let needed = weighing.needs.values().map(|need| need.bytes).fold(0, u64::saturating_add);
    let others = promises.outstanding();
    let usable = disk.free.saturating_sub(disk.reserve).saturating_sub(others);
    if needed > usable {
        return Err(does_not_fit(weighing, needed, disk, others));
    }
    let promise = Arc::new(Promise { disk, needed, usable, left: AtomicU64::new(usable) });
    lock(&promises.0).push(Arc::downgrade(&promise));
    Ok(promise)
}

fn does_not_fit(weighing: &Weighing, needed: u64, disk: Disk, others: u64) -> PullFailure {
    let images = &weighing.images;
    let mut who: Vec<&str> = images.iter().take(NAMED_MAX).map(String::as_str).collect();
    if images.len() > NAMED_MAX {
        who.push("…");
    }
    let who = match images.len() {
        1 => format!("{} needs", who.concat()),
        count => format!("the {count} images {} need", who.join(", ")),
    };
    let [needed, free, reserve] = [needed, disk.free, disk.reserve].map(|bytes| Bytes(bytes).human());
    let others = match others {
        0 => String::new(),
        bytes => format!(", {} are promised to other images", Bytes(bytes).human()),
    };
    let is_guess = weighing.needs.values().any(|need| need.is_guess);
    let guess = if is_guess { " (a guess by what is to be fetched)" } else { "" };
    refusal(format!("{who} about {needed}{guess}, {free} are free, {reserve} are in reserve{others}"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn chain(number: u8) -> Digest {
        Digest::of(&[number])
    }

    fn mib(count: u64) -> Need {
        Need::known(count * MIB)
    }

    fn disk(free: u64, reserve: u64) -> impl Fn() -> Disk {
        move || Disk { free: free * MIB, reserve: reserve * MIB }
    }

    #[test]
    fn an_update_is_weighed_as_a_whole_and_what_two_images_share_once() {
        let weigh = |free| {
            let (promises, first) = (Promises::default(), Ticket::alone());
            let (second, third) = (first.another(), first.another());
            std::thread::scope(|scope| {
                let promises = &promises;
                let pull = |image: &'static str, ticket: Ticket, needs: Vec<(Digest, Need)>| {
                    scope.spawn(move || ticket.weigh(image, needs, promises, &disk(free, 10)))
                };
                let pulls = [
                    pull("one", first, vec![(chain(0), mib(20)), (chain(1), mib(5))]),
                    pull("two", second, vec![(chain(0), mib(20)), (chain(2), mib(15))]),
                ];
                // The third has failed: nobody waits for it any more.
                drop(third);
                pulls.map(|pull| pull.join().unwrap())
            })
        };
        let [one, two] = weigh(50);
        assert!(Arc::ptr_eq(&one.unwrap(), &two.unwrap()), "40 and 10 are 50");
        for refused in weigh(49) {
            let text = refused.unwrap_err().reason.text;
            assert!(text.contains("the 2 images one, two need about 40Mi, 49Mi are free, 10Mi are in"), "{text}");
        }
    }

    #[test]
    fn what_was_promised_and_not_written_yet_is_nobody_elses() {
        let promises = Promises::default();
        let weigh = |needs: u64| Ticket::alone().weigh("app", [(chain(0), mib(needs))], &promises, &disk(100, 0));
        let first = weigh(60).unwrap();
        let text = weigh(41).unwrap_err().reason.text;
        assert!(text.ends_with("60Mi are promised to other images"), "{text}");
        drop(weigh(40).unwrap());
        // Half of it is on the disk, which has that much less.
        first.left().fetch_sub(30 * MIB, Ordering::Relaxed);
        let after = Ticket::alone().weigh("app", [(chain(0), mib(40))], &promises, &disk(70, 0));
        drop(after.unwrap());
        drop(first);
        weigh(100).unwrap();
    }
    #[test]
    fn a_guess_is_called_one() {
        let weigh = |needs: [Need; 2]| {
            let needs = needs.into_iter().enumerate().map(|(number, need)| (chain(number as u8), need));
            Ticket::alone().weigh("app", needs, &Promises::default(), &disk(10, 0)).unwrap_err().reason.text
        };
        let text = weigh([mib(9), Need::guessed(3 * MIB)]);
        assert!(text.contains("needs about 12Mi (a guess by what is to be fetched), 10Mi are free"), "{text}");
        let text = weigh([mib(9), mib(3)]);
        assert!(text.contains("needs about 12Mi, 10Mi are free"), "{text}");
    }
}
