//! Room on the disk. Before the first byte of a layer is fetched, all pulls of an update are weighed together: what they
//! need against what is free, what stays in reserve and what other pulls were promised. What does not fit is refused with
//! the numbers, and nothing was fetched. A compressed layer is kept only where there is more room than that
//! ([`Promise::spare`]), so only what it unpacks to counts.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use edged_model::id::Digest;
use edged_model::quantity::Bytes;
use edged_model::reason::{Code, Reason};
use tokio::sync::Notify;

use super::PullFailure;

/// Images that are named when an update does not fit.
const NAMED_MAX: usize = 4;

/// More than any number: somebody lacks room, and nobody knows how much.
const UNKNOWN: u64 = u64::MAX;

/// The promises that were made and not kept yet, of all pulls of this device.
#[derive(Debug, Default)]
pub struct Promises {
    made: Arc<Mutex<Vec<Weak<Promise>>>>,
    /// What was missing for the largest that could not be made, or [`UNKNOWN`].
    lacking: Arc<AtomicU64>,
}

impl Promises {
    /// How much room has to be made for what was refused since this was last asked; `None`: nothing was, or nobody knows.
    pub fn take_lacking(&self) -> Option<u64> {
        Some(self.lacking.swap(0, Ordering::Relaxed)).filter(|bytes| ![0, UNKNOWN].contains(bytes))
    }

    /// A write found no room.
    pub fn lack_unknown(&self) {
        self.lacking.store(UNKNOWN, Ordering::Relaxed);
    }

    /// The same promises for what is weighed at a start. No room is made for that: what it lacks must not be taken for what
    /// a pull lacks.
    #[must_use]
    pub fn of_a_start(&self) -> Self {
        Self { made: Arc::clone(&self.made), lacking: Arc::default() }
    }

    fn outstanding(&self) -> u64 {
        let mut all = lock(&self.made);
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

    fn at_most(&self) -> u64 {
        if self.is_guess { self.bytes.saturating_mul(2) } else { self.bytes }
    }
}

/// What the pulls of one update may write together.
#[derive(Debug)]
pub struct Promise {
    disk: Disk,
    needed: u64,
    /// Where that is a guess, it may be twice as much.
    may_need: u64,
    /// What could be had when it was made, and what of that is still there.
    usable: u64,
    left: AtomicU64,
    /// What was taken for something that could be done without.
    spared: AtomicU64,
    /// Of [`Promises`].
    lacking: Arc<AtomicU64>,
}

impl Promise {
    /// Taken from by whoever unpacks.
    pub fn left(&self) -> &AtomicU64 {
        &self.left
    }

    /// Takes `bytes` for something that could be done without; false where the layers may need them.
    pub fn spare(&self, bytes: u64) -> bool {
        // First of all: who looks meanwhile must not take it for something that was unpacked.
        self.spared.fetch_add(bytes, Ordering::Relaxed);
        let take = |left: u64| {
            let left = left.checked_sub(bytes)?;
            (left >= self.may_need.saturating_sub(self.unpacked(left))).then_some(left)
        };
        let is_taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok();
        if !is_taken {
            self.spared.fetch_sub(bytes, Ordering::Relaxed);
        }
        is_taken
    }

    /// What [`Promise::spare`] took is free again.
    pub fn give_back(&self, bytes: u64) {
        self.left.fetch_add(bytes, Ordering::Relaxed);
        self.spared.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// While so much is left.
    fn unpacked(&self, left: u64) -> u64 {
        self.usable.saturating_sub(left).saturating_sub(self.spared.load(Ordering::Relaxed))
    }

    fn outstanding(&self) -> u64 {
        self.needed.saturating_sub(self.unpacked(self.left.load(Ordering::Relaxed)))
    }

    /// It turned out to be more than was thought.
    pub fn was_too_small(&self, image: &str) -> PullFailure {
        self.lacking.store(UNKNOWN, Ordering::Relaxed);
        let needed = Bytes(self.unpacked(self.left.load(Ordering::Relaxed))).human();
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
    changed: Notify,
}

#[derive(Debug, Default)]
struct Weighing {
    /// Tickets that have said nothing yet.
    looking: usize,
    /// What each image needs, by chain id: a layer that two of them share is fetched once.
    images: BTreeMap<String, BTreeMap<Digest, Need>>,
    verdict: Option<Result<Arc<Promise>, PullFailure>>,
}

impl Weighing {
    fn add(&mut self, image: &str, needs: impl IntoIterator<Item = (Digest, Need)>) {
        self.images.insert(image.to_owned(), needs.into_iter().collect());
    }

    fn needs(&self) -> BTreeMap<Digest, Need> {
        self.images.values().flatten().map(|(chain, need)| (*chain, *need)).collect()
    }
}

/// The right to be weighed. As long as one is held, nobody is told anything; dropped, it needs nothing.
#[derive(Debug)]
pub struct Ticket(Arc<Together>);

impl Ticket {
    /// For a pull of its own, or the first of an update.
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

    /// Says what `image` needs, waits for the others, and gets what all of them get. No thread is held meanwhile: an update
    /// may have more images than there are threads to look for them.
    pub async fn weigh(
        self,
        image: &str,
        needs: impl IntoIterator<Item = (Digest, Need)>,
        promises: &Promises,
        disk: impl FnOnce() -> Disk,
    ) -> Result<Arc<Promise>, PullFailure> {
        let together = Arc::clone(&self.0);
        lock(&together.weighing).add(image, needs);
        drop(self);
        let mut waits = Waits { together: &together, image: Some(image) };
        loop {
            let changed = together.changed.notified();
            if let Some(mut weighing) = together.once_all_have_looked() {
                waits.image = None;
                let verdict = weighing.verdict.take().unwrap_or_else(|| judge(&weighing, promises, disk()));
                return weighing.verdict.insert(verdict).clone();
            }
            changed.await;
        }
    }
}

impl Together {
    fn once_all_have_looked(&self) -> Option<MutexGuard<'_, Weighing>> {
        Some(lock(&self.weighing)).filter(|weighing| weighing.looking == 0)
    }
}

/// Nobody is weighed who went while he waited.
struct Waits<'w> {
    together: &'w Together,
    image: Option<&'w str>,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        if let Some(image) = self.image {
            lock(&self.together.weighing).images.remove(image);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.0.weighing).looking -= 1;
        self.0.changed.notify_waiters();
    }
}

/// For what belongs to no update, or comes on top of one.
pub fn weigh_alone(
    image: &str,
    needs: impl IntoIterator<Item = (Digest, Need)>,
    promises: &Promises,
    disk: Disk,
) -> Result<Arc<Promise>, PullFailure> {
    let mut weighing = Weighing::default();
    weighing.add(image, needs);
    judge(&weighing, promises, disk)
}

fn judge(weighing: &Weighing, promises: &Promises, disk: Disk) -> Result<Arc<Promise>, PullFailure> {
    let needs = weighing.needs();
    let sum = |of: fn(&Need) -> u64| needs.values().map(of).fold(0, u64::saturating_add);
    let (needed, may_need) = (sum(|need| need.bytes), sum(Need::at_most));
    let others = promises.outstanding();
    let usable = disk.free.saturating_sub(disk.reserve).saturating_sub(others);
    if needed > usable {
        // What the disk has too little already, for its reserve and for what was promised, has to be made room for as well.
        let wanted = needed.saturating_add(disk.reserve).saturating_add(others);
        promises.lacking.fetch_max(wanted.saturating_sub(disk.free), Ordering::Relaxed);
        return Err(does_not_fit(weighing, needed, disk, others));
    }
    let (left, spared) = (AtomicU64::new(usable), AtomicU64::new(0));
    let lacking = Arc::clone(&promises.lacking);
    let promise = Arc::new(Promise { disk, needed, may_need, usable, left, spared, lacking });
    lock(&promises.made).push(Arc::downgrade(&promise));
    Ok(promise)
}

fn does_not_fit(weighing: &Weighing, needed: u64, disk: Disk, others: u64) -> PullFailure {
    let images = &weighing.images;
    let mut who: Vec<&str> = images.keys().take(NAMED_MAX).map(String::as_str).collect();
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
    let is_guess = weighing.needs().values().any(|need| need.is_guess);
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

    fn disk(free: u64, reserve: u64) -> Disk {
        Disk { free: free * MIB, reserve: reserve * MIB }
    }

    fn alone(needs: impl IntoIterator<Item = Need>, promises: &Promises, free: u64) -> Result<Arc<Promise>, String> {
        let needs = needs.into_iter().enumerate().map(|(number, need)| (chain(number as u8), need));
        weigh_alone("app", needs, promises, disk(free, 0)).map_err(|refused| refused.reason.text)
    }

    #[tokio::test]
    async fn an_update_is_weighed_as_a_whole_and_what_two_images_share_once() {
        let weigh = async |free| {
            let (promises, first) = (Promises::default(), Ticket::alone());
            let (second, third) = (first.another(), first.another());
            let one = [(chain(0), mib(20)), (chain(1), mib(5))];
            let two = [(chain(0), mib(20)), (chain(2), mib(15))];
            let disk = || disk(free, 10);
            let failed = async {
                tokio::task::yield_now().await;
                // Nobody waits for it any more.
                drop(third);
            };
            let (one, two, ()) = tokio::join!(
                first.weigh("one", one, &promises, disk),
                second.weigh("two", two, &promises, disk),
                failed
            );
            [one, two]
        };
        let [one, two] = weigh(50).await;
        assert!(Arc::ptr_eq(&one.unwrap(), &two.unwrap()), "40 and 10 are 50");
        for refused in weigh(49).await {
            let text = refused.unwrap_err().reason.text;
            assert!(text.contains("the 2 images one, two need about 40Mi, 49Mi are free, 10Mi are in"), "{text}");
        }
    }

    #[tokio::test]
    async fn who_goes_while_he_waits_is_not_weighed() {
        let (promises, first) = (Promises::default(), Ticket::alone());
        let (second, looks) = (first.another(), first.another());
        let disk = || disk(50, 0);
        let withdrawn = first.weigh("large", [(chain(0), mib(90))], &promises, disk);
        let stays = second.weigh("small", [(chain(1), mib(40))], &promises, disk);
        let goes = async {
            tokio::select! {
                biased;
                _ = withdrawn => panic!("nobody is told anything while one looks"),
                () = tokio::task::yield_now() => {}
            }
            drop(looks);
        };
        let (promise, ()) = tokio::join!(stays, goes);
        assert_eq!(promise.unwrap().outstanding(), 40 * MIB);
    }

    #[test]
    fn what_was_promised_and_not_written_yet_is_nobody_elses() {
        let promises = Promises::default();
        let first = alone([mib(60)], &promises, 100).unwrap();
        let text = alone([mib(41)], &promises, 100).unwrap_err();
        assert!(text.ends_with("60Mi are promised to other images"), "{text}");
        assert_eq!((promises.take_lacking(), promises.take_lacking()), (Some(MIB), None), "41 and 60 are one too many");
        drop(alone([mib(40)], &promises, 100).unwrap());
        // Half of it is on the disk, which has that much less.
        first.left().fetch_sub(30 * MIB, Ordering::Relaxed);
        drop(alone([mib(40)], &promises, 70).unwrap());
        // What could be done without counts on top of it.
        assert!(first.spare(10 * MIB));
        assert!(alone([mib(31)], &promises, 60).unwrap_err().ends_with("30Mi are promised to other images"));
        drop(first);
        alone([mib(100)], &promises, 100).unwrap();
    }

    #[test]
    fn what_a_disk_has_too_little_for_its_reserve_and_its_promises_is_lacking_too() {
        let promises = Promises::default();
        weigh_alone("app", [(chain(0), mib(6))], &promises, disk(60, 64)).unwrap_err();
        assert_eq!(promises.take_lacking(), Some(10 * MIB), "four for the reserve, six for the image");
        let _promised = weigh_alone("first", [(chain(0), mib(30))], &promises, disk(100, 64)).unwrap();
        // Somebody else has written meanwhile.
        weigh_alone("app", [(chain(1), mib(6))], &promises, disk(84, 64)).unwrap_err();
        assert_eq!(promises.take_lacking(), Some(16 * MIB), "ten for the first, six for this one");
    }

    #[test]
    fn what_nobody_can_count_is_more_than_any_number_and_what_a_start_lacks_is_asked_for_by_nobody() {
        let promises = Promises::default();
        let promise = alone([mib(60)], &promises, 100).unwrap();
        let _ = promise.was_too_small("app");
        alone([mib(41)], &promises, 100).unwrap_err();
        assert_eq!(promises.take_lacking(), None, "it was larger than it said: nobody knows by how much");
        alone([mib(41)], &promises, 100).unwrap_err();
        promises.lack_unknown();
        assert_eq!(promises.take_lacking(), None, "a write found no room");

        let of_start = promises.of_a_start();
        let text = alone([mib(41)], &of_start, 100).unwrap_err();
        assert!(text.ends_with("60Mi are promised to other images"), "{text}");
        assert_eq!(promises.take_lacking(), None);
        let copies = alone([mib(30)], &of_start, 100).unwrap();
        let _ = copies.was_too_small("app");
        alone([mib(20)], &promises, 100).unwrap_err();
        assert_eq!(promises.take_lacking(), Some(10 * MIB), "and is promised to it all the same");
    }

    #[test]
    fn what_could_be_done_without_takes_nothing_that_layers_need() {
        let promise = alone([mib(60)], &Promises::default(), 100).unwrap();
        assert!(promise.spare(30 * MIB) && !promise.spare(11 * MIB) && promise.spare(10 * MIB));
        // However far the layers are.
        promise.left().fetch_sub(45 * MIB, Ordering::Relaxed);
        assert!(!promise.spare(1));
        promise.give_back(40 * MIB);
        assert_eq!((promise.outstanding(), promise.spare(40 * MIB), promise.spare(1)), (15 * MIB, true, false));
        // A guess may be wrong.
        let guessed = alone([mib(10), Need::guessed(30 * MIB)], &Promises::default(), 100).unwrap();
        assert!(guessed.spare(30 * MIB) && !guessed.spare(1));
    }

    #[test]
    fn a_guess_is_called_one() {
        let weigh = |needs: [Need; 2]| alone(needs, &Promises::default(), 10).unwrap_err();
        let text = weigh([mib(9), Need::guessed(3 * MIB)]);
        assert!(text.contains("needs about 12Mi (a guess by what is to be fetched), 10Mi are free"), "{text}");
        let text = weigh([mib(9), mib(3)]);
        assert!(text.contains("needs about 12Mi, 10Mi are free"), "{text}");
    }
}
