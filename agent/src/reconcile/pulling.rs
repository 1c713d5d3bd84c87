//! Images on their way: ordered by the planner, looked at, weighed with the others of their update, fetched. None of that takes
//! a thread of the pool, where starts and answers have theirs, and an image that waits for another takes none at all: an
//! update may have any number of them.

use std::sync::Arc;

use edged_model::id::WorkloadName;
use edged_model::observed::ImageStatus;
use edged_model::quantity::Bytes;
use edged_model::reason::{Code, Reason};
use edged_plan::garbage::needed_images;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::status::Tries;
use super::{Agent, Message};
use crate::crash_point;
use crate::execute::copies;
use crate::execute::pull::room::{Disk, Ticket};
use crate::execute::pull::{self, Order, PullContext, PullFailure, ReadyImage};
use crate::execute::start::StartContext;

/// The longest pause between two tries of an image that cannot be had now.
const RETRY_MAX_MS: u64 = 300_000;
const RETRY_MS: u64 = 2_000;
/// A registry may ask for a longer one, up to this. As long as that rests what runs and was refused: what is wrong with it
/// may be put right where it comes from.
const ASKED_MAX_MS: u64 = 3_600_000;

/// Whoever sends wrong bytes may have done it by accident.
const WRONG_BYTES_BELIEVED: u32 = 3;

/// Images that are looked at together. It takes a few documents each.
const LOOKS: usize = 4;

/// How many images are on their way at a time. Layers are counted apart, of all images together ([`pull::slots::Slots`]).
pub struct Lanes {
    updates: Lane,
    /// What runs lacks them: they wait for no update.
    urgent: Lane,
}

struct Lane {
    looks: Semaphore,
    fetches: Semaphore,
}

impl Lanes {
    pub fn new(parallel: u32) -> Self {
        let fetches = usize::try_from(parallel).unwrap_or(1).max(1);
        let lane = || Lane { looks: Semaphore::new(LOOKS), fetches: Semaphore::new(fetches) };
        Self { updates: lane(), urgent: lane() }
    }

    fn of(&self, order: &Order) -> &Lane {
        if order.is_urgent { &self.urgent } else { &self.updates }
    }
}

/// One image on its way.
struct Pulling {
    image: String,
    order: Arc<Order>,
    ticket: Ticket,
    lanes: Arc<Lanes>,
    context: Arc<PullContext>,
    start_context: StartContext,
    /// Workloads that need a copy of its layers with ids of their own.
    users: Vec<WorkloadName>,
    inbox: mpsc::Sender<Message>,
}

impl Pulling {
    async fn run(self) {
        let (image, inbox) = (self.image.clone(), self.inbox.clone());
        let result = Box::new(self.look_weigh_fetch().await);
        // The loop has ended only when the agent ends.
        let _ = inbox.send(Message::Pulled { image, result }).await;
    }

    async fn look_weigh_fetch(self) -> Result<ReadyImage, PullFailure> {
        let Self { image, order, ticket, lanes, context, start_context, users, inbox } = self;
        let lane = lanes.of(&order);
        let turn = order.wait(lane.looks.acquire()).await?;
        let (asked, name) = (Arc::clone(&context), image.clone());
        let looked = on_own_thread(move || pull::look(&asked, &name)).await?;
        drop(turn);
        let needs = looked.needs().to_vec();
        let disk = || Disk::of(&context.data, context.disk_reserve);
        let promise = order.wait(ticket.weigh(&image, needs, &context.promises, disk)).await??;
        let _turn = order.wait(lane.fetches.acquire()).await?;
        on_own_thread(move || {
            let tell = |progress| {
                // A progress that finds no room is told by the next one.
                let _ = inbox.try_send(Message::PullProgress { image: image.clone(), progress });
            };
            let ready = pull::fetch(&context, looked, promise, &order, &tell)?;
            let users: Vec<_> = users.into_iter().map(|name| (name, ready.clone())).collect();
            copies::stage(&start_context, &users).map(|()| ready)
        })
        .await
    }
}

/// What may take hours takes no thread of the pool.
pub async fn on_own_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PullFailure> + Send + 'static,
) -> Result<T, PullFailure> {
    let (sender, receiver) = oneshot::channel();
    let thread = std::thread::Builder::new().name("pull".to_owned());
    let begun = thread.spawn(move || {
        // Nobody waits any more only when the agent ends.
        let _ = sender.send(work());
    });
    let failed = |why: String| PullFailure::passing(Code::ImageUnusable, why);
    begun.map_err(|error| failed(format!("no thread can be had: {error}")))?;
    receiver.await.unwrap_or_else(|_| Err(failed("a thread of edged ended unexpectedly".to_owned())))
}

impl Agent {
    pub(super) fn pull(&mut self, image: String) {
        // What a collection takes away must not be what a pull has just found there.
        if self.collected.under_way || self.under_way.pulls.contains_key(&image) {
            return;
        }
        let nothing = ImageStatus::Pulling { done: Bytes(0), total: Bytes(0) };
        let has_failed = matches!(self.world.observed.images.get(&image), Some(ImageStatus::Failed { .. }));
        let begun = Tries { since: self.now().wall, failed: 0, last_failure: None };
        let tries = self.pull_tries.remove(&image).filter(|_| has_failed).unwrap_or(begun);
        self.pull_tries.insert(image.clone(), tries);
        self.world.observed.images.insert(image.clone(), nothing);
        crash_point::pass("pull-ordered");
        let order = Arc::new(Order::new(self.is_active(&image)));
        self.under_way.pulls.insert(image.clone(), Arc::clone(&order));
        let pulling = Pulling {
            ticket: self.ticket(&image),
            users: self.own_id_users(&image),
            lanes: Arc::clone(&self.lanes),
            context: Arc::clone(&self.pull_context),
            start_context: self.start_context.clone(),
            inbox: self.inbox.clone(),
            image,
            order,
        };
        tokio::spawn(pulling.run());
    }

    /// What no generation needs any more (a newer one has come) is not fetched on: it holds up what is needed, and may cost
    /// money.
    pub(super) fn withdraw_pulls(&self) {
        if self.under_way.pulls.is_empty() {
            return;
        }
        let needed = needed_images(&self.world.desired);
        for (image, order) in &self.under_way.pulls {
            if !needed.contains(image.as_str()) && !order.is_withdrawn() {
                order.withdraw(&self.pull_context.slots);
            }
        }
    }

    pub(super) fn pulled(&mut self, image: String, result: Result<ReadyImage, PullFailure>) {
        let order = self.under_way.pulls.remove(&image);
        match result {
            Ok(ready) => {
                crash_point::pass("image-told");
                self.remember_image(image.clone(), ready.clone());
                self.world.observed.images.insert(image.clone(), ImageStatus::Ready { digest: ready.digest });
                let text = format!("image {image} ({}) is on disk and verified", ready.digest.short());
                self.tell(None, None, &Reason::new(Code::ImageReady, text), "agent");
                self.collected.no_room.remove(&image);
                self.pull_tries.remove(&image);
            }
            // If somebody wants it again by now, it is ordered again.
            Err(_) if order.is_some_and(|order| order.is_withdrawn()) => {
                self.world.observed.images.remove(&image);
                self.pull_tries.remove(&image);
            }
            Err(failure) => self.pull_failed(image, failure),
        }
    }

    /// Whether it belongs to what runs or to what is gone back to.
    pub(super) fn is_kept(&self, image: &str) -> bool {
        let pointers = self.world.desired.pointers;
        let kept = [pointers.active, pointers.last_good].into_iter().flatten();
        let mut kept = kept.filter_map(|sequence| self.world.desired.generations.get(&sequence));
        kept.any(|generation| generation.manifest.workloads.values().any(|workload| workload.image == image))
    }

    fn pull_failed(&mut self, image: String, failure: PullFailure) {
        let now = self.now();
        let begun = || Tries { since: now.wall, failed: 0, last_failure: None };
        let tries = self.pull_tries.entry(image.clone()).or_insert_with(begun);
        tries.failed = tries.failed.saturating_add(1);
        tries.last_failure = Some(failure.reason.clone());
        let attempts = tries.failed;
        let backoff = (RETRY_MS << attempts.min(10)).min(RETRY_MAX_MS);
        let asked = failure.retry_after.map_or(0, |after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
        let next = Next::after(&failure, attempts, self.is_kept(&image));
        if next == Next::Soon {
            self.count(|survived| &mut survived.pull_retries);
        }
        let asked = if next == Next::Later { ASKED_MAX_MS } else { asked };
        let permanent = self.found_no_room(&image, &failure.reason) || next == Next::Never;
        // The images of one update that does not fit all say the same, and are weighed together again: each alone might fit.
        let with_others = self.world.observed.images.values().find_map(|status| match status {
            ImageStatus::Failed { reason, retry_at_boot_ms, .. } if *reason == failure.reason => {
                Some(*retry_at_boot_ms)
            }
            _ => None,
        });
        if with_others.is_none() {
            self.tell(None, None, &failure.reason, "agent");
        }
        let alone = || now.boot_ms.saturating_add(pause_ms(backoff, asked));
        let retry_at_boot_ms = with_others.filter(|at| *at > now.boot_ms).unwrap_or_else(alone);
        self.refuse(&image, &failure.reason);
        let status = ImageStatus::Failed { reason: failure.reason, attempts, retry_at_boot_ms, permanent };
        self.world.observed.images.insert(image, status);
    }
}

/// When an image that failed is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Soon,
    /// What runs, or is gone back to, is never given up, whatever is said of its image.
    Later,
    Never,
}

impl Next {
    fn after(failure: &PullFailure, attempts: u32, is_kept: bool) -> Self {
        let may_be_an_accident = failure.reason.code == Code::DigestMismatch && attempts < WRONG_BYTES_BELIEVED;
        match failure.permanent && !may_be_an_accident {
            false => Self::Soon,
            true if is_kept => Self::Later,
            true => Self::Never,
        }
    }
}

/// Before the next try of an image, spread: whoever asks for a pause asks many devices at once.
fn pause_ms(backoff_ms: u64, asked_ms: u64) -> u64 {
    let mut random = [0; 1];
    // Without randomness the pause is only not spread.
    let _ = getrandom::fill(&mut random);
    let pause_ms = backoff_ms.max(asked_ms.min(ASKED_MAX_MS));
    pause_ms + pause_ms / 1024 * u64::from(random[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::execute::pull::slots::Slots;

    #[tokio::test]
    async fn what_waits_for_its_turn_ends_as_soon_as_nobody_wants_it() {
        let order = Order::default();
        let withdraw = async {
            tokio::task::yield_now().await;
            order.withdraw(&Slots::default());
        };
        let (waited, ()) = tokio::join!(order.wait(std::future::pending::<()>()), withdraw);
        assert!(waited.is_err());
        assert!(order.wait(std::future::ready(())).await.is_err(), "its turn comes too late");
    }

    #[test]
    fn an_update_is_refused_for_good_and_what_runs_is_asked_for_again() {
        let refused = |code| PullFailure { permanent: true, ..PullFailure::passing(code, String::new()) };
        let (unsigned, wrong) = (refused(Code::ImageUnsigned), refused(Code::DigestMismatch));
        assert_eq!([1, 2, 3].map(|tries| Next::after(&wrong, tries, false)), [Next::Soon, Next::Soon, Next::Never]);
        assert_eq!(Next::after(&unsigned, 1, false), Next::Never);
        assert_eq!([&unsigned, &wrong].map(|failure| Next::after(failure, 9, true)), [Next::Later; 2]);
        let gone = PullFailure::passing(Code::RegistryUnavailable, String::new());
        assert_eq!([true, false].map(|is_kept| Next::after(&gone, 99, is_kept)), [Next::Soon; 2]);
    }

    #[test]
    fn pauses_are_spread_and_longer_than_an_hour_by_that_alone() {
        let pauses: std::collections::BTreeSet<u64> = (0..100).map(|_| pause_ms(4_000, 0)).collect();
        assert!(pauses.iter().all(|pause| (4_000..5_000).contains(pause)) && pauses.len() > 10, "{pauses:?}");
        assert!((7_000..8_750).contains(&pause_ms(4_000, 7_000)), "what the registry asks for, if it is more");
        assert!((ASKED_MAX_MS..ASKED_MAX_MS / 4 * 5).contains(&pause_ms(4_000, u64::MAX)));
    }
}
