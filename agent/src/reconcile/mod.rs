//! The agent's loop: the only place that knows all stages. Events come in, the planner is asked, its actions are given to
//! tasks, their outcomes come back as events. Nothing in the loop waits for a disk, a network or a program.
//!
//! ```text
//!   keeper exits ┐                                      ┌> store thread
//!   probes       ├─> Message ─> world ─> plan ─> act ───┼> pull threads
//!   pulls, starts│                                      ├> keeper (launch, signal)
//!   fleet, api   ┘                                      └> probes, ports
//! ```

mod act;
mod answer;
mod backoff;
/// Why the machine was started.
mod boot;
/// Whether images are still what was unpacked.
mod check;
/// The only reader of clocks.
pub mod clock;
mod ends;
/// Commands of operators in workloads.
mod exec;
/// What runs out.
mod expiry;
mod generations;
mod health;
/// Images and volumes on the disk, for operators.
mod images;
mod intake;
/// Whether it suits to switch.
mod moment;
/// The freezer.
mod pause;
/// Images on their way.
mod pulling;
/// An operator takes everything away that manifests have brought.
mod reset;
/// Other limits for what runs.
mod resize;
/// Layers read slowly, again and again.
mod scrub;
/// What takes the disk, and when it goes.
mod space;
/// What a candidate needs beyond its images.
mod stage;
mod start_up;
mod status;
mod store_thread;
/// What was survived, counted.
mod survived;
/// Layers that could not be read.
mod suspect;
/// The clock, its floor, and what others say.
mod time;
/// The trust root in force, and the next one.
mod trust_root;
/// A newer program in the place of this one.
mod upgrade;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use edged_model::action::Plan;
use edged_model::api::{Answer, Event as StoryEvent};
use edged_model::disk::Pruned;
use edged_model::generation::{Generation, Pointers};
use edged_model::id::{DeviceId, Digest, Sequence, WorkloadName};
use edged_model::keeper::ChildExit;
use edged_model::quantity::{Now, Timestamp};
use edged_model::reason::Reason;
use edged_model::report::{BootCause, Refusal};
use edged_model::spec::Spec;
use edged_model::trust::TrustRoot;
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::api::Call;
use crate::config::Config;
use crate::execute::pull::room::Ticket;
use crate::execute::pull::{Order, Progress, PullContext, PullFailure, ReadyImage};
use crate::execute::start::StartContext;
use crate::network::ports::Ports;
use crate::network::sntp::{Heard, NobodyAnswers};
use crate::observe::ProbeOutcome;
use crate::observe::logs::Logs;
use crate::observe::took::Times;
use crate::report::{FleetLine, News, Offer, Taken};
use crate::runtime::cgroup::Cgroup;
use crate::runtime::keeper_link::{KeeperLink, LaunchError, Launched};
use crate::store::Store;

use edged_plan::transition::Change;
use edged_plan::world::World;
pub use start_up::run;
use store_thread::StoreThread;

/// Messages that may wait for the loop: each running task has at most a few under way.
const MESSAGES_DEPTH: usize = 1024;

/// The keeper is told this often that the loop turns.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// What comes back to the loop.
enum Message {
    Pulled {
        image: String,
        result: Box<Result<ReadyImage, PullFailure>>,
    },
    PullProgress {
        image: String,
        progress: Progress,
    },
    /// Of layers, for a candidate whose images were there.
    CopiesMade {
        generation: Sequence,
        result: Box<Result<(), PullFailure>>,
    },
    Started {
        workload: WorkloadName,
        /// What was started: another generation may have become the active one meanwhile.
        spec: Box<Spec>,
        result: Result<Launched, StartFailure>,
    },
    Resized {
        workload: WorkloadName,
        spec: Box<Spec>,
        result: Result<(), String>,
    },
    Changed {
        change: Box<Change>,
        failed: Option<String>,
        activated: bool,
    },
    /// The end of a run is on the disk.
    EndWritten {
        workload: WorkloadName,
    },
    Removed {
        workload: WorkloadName,
        failed: Option<String>,
    },
    /// An image's layers were looked at.
    ImageChecked {
        name: String,
        image: Box<ReadyImage>,
        is_whole: bool,
    },
    LayersChecked(check::Checked),
    /// A layer was read.
    Scrubbed(crate::execute::scrub::Scrubbed),
    /// Which file fs-verity refused to read.
    KernelSays(String),
    /// Images that an operator brought, or why not.
    Loaded(Box<images::LoadEnded>),
    Collected {
        result: Result<(Pruned, Vec<String>), String>,
        reply: Option<mpsc::Sender<Answer>>,
    },
    RootWritten {
        root: Box<TrustRoot>,
        by: String,
        failed: Option<String>,
        reply: oneshot::Sender<Result<Taken, Reason>>,
    },
    Probed {
        workload: WorkloadName,
        pid: i32,
        outcome: ProbeOutcome,
        took: Duration,
    },
    /// No generation is left on the disk.
    ResetBegun(Result<Pointers, String>),
    ResetEnded(Result<crate::execute::reset::Gone, String>),
    Offer(Box<Offer>),
    Again(Box<generations::Again>),
    Locks(Vec<crate::observe::locks::LockFile>),
    /// A newer program answered, and whoever asked was told.
    Upgrade {
        text: String,
        by: String,
    },
    Network(String),
    TimeHeard(Result<Heard, NobodyAnswers>),
}

enum StartFailure {
    /// It could not be prepared.
    Reason(Reason),
    Launch(LaunchError),
}

/// What is under way, so that it is not ordered twice.
#[derive(Default)]
struct UnderWay {
    /// Came while another change was being written, and is looked at when that is on the disk. One: who comes third is
    /// told to come again.
    offer: Option<Box<Offer>>,
    pulls: BTreeMap<String, Arc<Order>>,
    /// What operators load, by path.
    loads: BTreeSet<String>,
    /// While a plan is carried out.
    update: Option<Ticket>,
    starts: BTreeMap<WorkloadName, StartUnderWay>,
    removals: BTreeSet<WorkloadName>,
    signalled: BTreeSet<WorkloadName>,
    /// Whose limits are being changed, and whether the run ended meanwhile.
    resizes: BTreeMap<WorkloadName, Option<ChildExit>>,
    /// Ends that are being written; the keeper has them until then.
    ends: BTreeSet<WorkloadName>,
    /// What failed and is tried again later.
    failed: BTreeMap<String, backoff::Backoff>,
    change: bool,
    /// Who offered the generation that is being written, and hears of it when it is on the disk.
    acknowledge: Option<(Sequence, oneshot::Sender<Result<Taken, Reason>>)>,
}

impl UnderWay {
    /// Whether layers may be coming to the disk.
    fn is_fetching(&self) -> bool {
        !self.pulls.is_empty() || !self.loads.is_empty()
    }
}

/// A start that was ordered and not answered yet.
struct StartUnderWay {
    /// OOM kills of the group before it.
    oom_kills_before: u64,
    /// A program may end before the loop has read that it began: the two come by different ways.
    ended_already: Option<ChildExit>,
}

/// What is known of a run beyond what the planner needs.
struct Run {
    cgroup: Cgroup,
    /// OOM kills of the group before this run.
    oom_kills_before: u64,
    /// As it was started: a workload that leaves the manifest is ended by its own word too.
    stop_signal: i32,
    probe: Option<tokio::task::JoinHandle<()>>,
    look: Option<Look>,
    cpu_milli: Option<u64>,
    /// Whether it used its limit up and comes behind those who do not; `None` until that has been said.
    comes_behind: Option<bool>,
    /// Of the probes that it answered.
    probes: Times,
}

/// What a run had used when it was looked at last.
#[derive(Clone, Copy)]
struct Look {
    at_boot_ms: u64,
    cpu_us: u64,
    /// Periods of its limit of time in which it had to wait; `None`: its cgroup has gone.
    throttled_periods: Option<u64>,
}

struct Agent {
    config: Config,
    device: DeviceId,
    boot_id: String,
    keeper_version: String,
    boot_cause: Option<BootCause>,
    root: TrustRoot,
    store: Store,
    writes: StoreThread,
    link: KeeperLink,
    logs: Logs,
    ports: Ports,
    world: World,
    plan: Plan,
    images: BTreeMap<String, ReadyImage>,
    runs: BTreeMap<WorkloadName, Run>,
    under_way: UnderWay,
    staging: stage::Staging,
    collected: space::Collected,
    leases: moment::Leases,
    counters: survived::Counters,
    suspects: suspect::Suspects,
    scrub: scrub::Scrub,
    /// Of images that are being fetched, or could not be had.
    pull_tries: BTreeMap<String, status::Tries>,
    lanes: Arc<pulling::Lanes>,
    pull_context: Arc<PullContext>,
    start_context: StartContext,
    floor: Timestamp,
    reckoning: time::Reckoning,
    is_device: bool,
    /// Whether workloads have as much time as we; `None` until it has been said.
    shares_time: Option<bool>,
    /// Held by whoever reads all layers by an operator's word.
    checks_by_word: Arc<()>,
    refused: Option<Refusal>,
    /// An operator's, until all is gone.
    reset: Option<reset::UnderReset>,
    /// What the keeper says about a newer program.
    upgrade: Option<Reason>,
    is_settled: bool,
    concerns: expiry::Concerns,
    /// The device's story, for whoever follows it.
    story: broadcast::Sender<StoryEvent>,
    execs: health::Execs,
    fleet: FleetLine,
    inbox: mpsc::Sender<Message>,
}

impl Agent {
    /// The loop. Comes back when the keeper has gone.
    async fn turn(
        mut self,
        mut messages: mpsc::Receiver<Message>,
        mut exits: mpsc::Receiver<ChildExit>,
        mut calls: mpsc::Receiver<Call>,
    ) {
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        let mut ended = upgrade::Ended::listen();
        self.replan().await;
        loop {
            let next = self.plan.wake_at_boot_ms().into_iter().chain(self.report_at_boot_ms()).min();
            let wake =
                next.map_or(HEARTBEAT, |at| Duration::from_millis(at.saturating_sub(clock::boot_ms())).min(HEARTBEAT));
            tokio::select! {
                exit = exits.recv() => match exit {
                    Some(exit) => self.exited(exit).await,
                    None => return,
                },
                message = messages.recv() => {
                    if let Some(message) = message {
                        self.receive(message).await;
                    }
                }
                call = calls.recv() => {
                    if let Some(call) = call {
                        self.answer(call).await;
                    }
                }
                _ = heartbeat.tick() => self.beat().await,
                () = ended.by_the_keeper() => return self.end_for_another().await,
                () = tokio::time::sleep(wake) => {}
            }
            self.replan().await;
            self.share_time();
            self.scrub_on();
            self.reset_on();
            self.settle_once().await;
            self.report_if_due();
        }
    }

    /// Asks the planner and carries out what it orders.
    async fn replan(&mut self) {
        let now = self.now();
        self.look_whether_all_is_well(now);
        self.look_at_locks(now);
        self.plan = edged_plan::plan(&self.world.desired, &self.world.observed, now);
        // The images of an update are ordered in one plan: they are weighed together.
        self.under_way.update = Some(Ticket::alone());
        for action in self.plan.actions.clone() {
            self.act(action, now).await;
        }
        self.under_way.update = None;
        self.withdraw_pulls();
    }

    /// Who answers runs before every workload: it is little. What takes seconds, an image that is unpacked or checked, would
    /// leave them next to nothing meanwhile. The scrub is slow and steps back by itself.
    fn share_time(&mut self) {
        let by_word = Arc::strong_count(&self.checks_by_word) > 1;
        let works = by_word || self.under_way.is_fetching() || self.staging.under_way || self.collected.under_way;
        // On a host the groups around us are its own.
        if !self.is_device || self.shares_time == Some(works) {
            return;
        }
        // What the kernel refused once is said again with the next change, not at every turn.
        self.shares_time = Some(works);
        if let Err(error) = self.start_context.cgroups.share_time(works) {
            tracing::warn!("workloads' share of time: {}", crate::store::inline_chain(&error));
        }
    }

    fn look_whether_all_is_well(&mut self, now: Now) {
        let well = edged_plan::rollout::all_well(&self.world.desired, &self.world.observed);
        let since = &mut self.world.observed.all_well_since_boot_ms;
        *since = if well { since.or(Some(now.boot_ms)) } else { None };
    }

    async fn beat(&mut self) {
        if let Err(error) = self.link.heartbeat().await {
            tracing::warn!("heartbeat: {}", crate::store::inline_chain(&error));
        }
        self.look_at_program().await;
        self.sample();
        self.look_at_suspects();
        self.look_at_what_the_kernel_said();
        self.look_at_what_the_scrub_found();
        self.look_whether_the_scrub_presses();
        self.collect_if_due();
        self.floor_if_due();
        self.look_at_expiry();
        self.keep_counters();
    }

    /// Writes a line of the device's story: to the store, to whoever follows, to the log.
    fn tell(&self, workload: Option<&WorkloadName>, generation: Option<Sequence>, why: &Reason, by: &str) {
        tracing::info!(
            workload = workload.map(WorkloadName::as_str),
            generation = generation.map(|s| s.0),
            by,
            "{why}"
        );
        let event = StoryEvent {
            number: 0,
            at: self.now().wall,
            boot_id: self.boot_id.clone(),
            workload: workload.cloned(),
            generation,
            why: why.clone(),
            by: by.to_owned(),
        };
        let story = self.story.clone();
        let written = self.writes.submit(move |store| {
            let mut event = event;
            match store.append_event(event.clone(), crate::store::Durability::Together) {
                Ok(number) => event.number = number,
                Err(error) => tracing::error!("event: {}", crate::store::inline_chain(&error)),
            }
            // Nobody follows: the ordinary case.
            let _ = story.send(event);
        });
        if let Err(busy) = written {
            self.counters.a_write_was_dropped();
            tracing::error!("an event is lost: {busy}");
        }
        let is_old = workload.is_some_and(|name| self.fails_again(name));
        self.fleet.changed(if is_old { News::Again } else { News::Fresh });
    }

    /// And no operator has a hand in it.
    fn fails_again(&self, name: &WorkloadName) -> bool {
        let instance = self.world.observed.workloads.get(name);
        instance.is_some_and(|instance| instance.history.in_a_row > 1) && !self.world.desired.held.contains_key(name)
    }

    fn active(&self) -> Option<&Generation> {
        let desired = &self.world.desired;
        desired.generations.get(&desired.pointers.active?)
    }

    fn candidate(&self) -> Option<&Generation> {
        let desired = &self.world.desired;
        desired.generations.get(&desired.pointers.candidate?)
    }

    fn newest_digest(&self) -> Option<Digest> {
        let desired = &self.world.desired;
        desired.generations.get(&desired.pointers.highest_sequence).map(|generation| generation.digest)
    }
}
