//! From a start to the loop: the store, what is trusted, what lives, who listens. The way after a crash is the way after
//! a power cut is the way at the first boot.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use edged_model::generation::GenerationState;
use edged_model::id::{Digest, WorkloadName};
use edged_model::keeper::ChildState;
use edged_model::moment::Moment;
use edged_model::observed::{Capacity, Desired, ImageStatus, Instance, InstanceState};
use edged_model::quantity::{Bytes, MilliCpu, Timestamp};
use edged_model::reason::{Code, Reason};
use edged_model::report::BootCause;
use edged_model::trust::RoleName;
use edged_plan::garbage::needed_images;
use tokio::sync::{broadcast, mpsc};

use super::boot;
use super::pulling::Lanes;
use super::{Agent, MESSAGES_DEPTH, Message, UnderWay, clock, time, trust_root};
use crate::api::{self, console};
use crate::config::{Config, Places};
use crate::content::Content;
use crate::crash_point;
use crate::execute::copies::LayerWay;
use crate::execute::pull::slots::Slots;
use crate::execute::pull::{self, PullContext, ReadyImage, is_whole};
use crate::execute::start::{StartContext, cpu_milli};
use crate::execute::user_ids::Ranges;
use crate::execute::volumes::VolumeIds;
use crate::network::{interface, ports::Ports};
use crate::observe::{kernel_log, logs::Logs, pressure};
use crate::registry::Floor;
use crate::registry::traffic::{Clock, Limits, Traffic};
use crate::report::{FleetLine, Offer, key, push};
use crate::runtime::cgroup::CgroupRoot;
use crate::runtime::keeper_link::KeeperLink;
use crate::runtime::kernel;
use crate::store::{Store, inline_chain, opened_reason};
use crate::verify::{image_policy, trust};
use edged_plan::world::{Began, World};

/// Manifests that may wait for the loop: one of the fleet and a few pushes, each of at most 1 MiB.
const OFFERS_DEPTH: usize = 4;
/// Requests that may wait for the loop: as many as there may be clients.
const CALLS_DEPTH: usize = 32;
/// Followers of the story may lag this far behind.
const STORY_DEPTH: usize = 64;

/// Runs the agent until the keeper goes.
pub async fn run(places: Places, config: Config, socket: OwnedFd, is_device: bool) -> anyhow::Result<()> {
    use anyhow::Context;
    std::fs::create_dir_all(places.run()).with_context(|| format!("{}", places.run().display()))?;
    std::fs::create_dir_all(places.data()).with_context(|| format!("{}", places.data().display()))?;
    let (link, exits) = KeeperLink::connect(socket)?;
    // Opening the store may take long after a power cut: the keeper hears of us meanwhile.
    link.heartbeat().await?;
    let opening = (places.clone(), config.fleet.outbox_max);
    let (store, opened) = tokio::task::spawn_blocking(move || Store::open(&opening.0, opening.1)).await??;
    crash_point::pass("store-opened");
    link.heartbeat().await?;
    let floor = store.time_floor()?.max(Timestamp(crate::BUILT_AT));
    let beside = places.config_file.with_file_name("trust.cose");
    let factory = config.device.trust_root.clone().unwrap_or(beside);
    let (root, root_problem) = trust_root::first(&factory, &store, clock::now(0, floor).wall)?;
    crash_point::pass("root-taken");
    let instance = (!is_device).then(|| Digest::of(places.data().as_os_str().as_encoded_bytes()).short());
    let cgroups = CgroupRoot::detect(instance.as_deref())?;
    let content = Content::open(&places)?.with_fs_verity(config.images.fs_verity);
    crash_point::pass("content-opened");
    let capacity = capacity(&config);
    if is_device {
        cgroups.limit_all(capacity.memory_total.0.saturating_sub(capacity.memory_reserve.0))?;
    }
    let logs = Logs::start(places.log(), config.log.workload_max, config.log.rate)?;
    let key = key::load_or_make(&places.device_key())?;
    crash_point::pass("key-made");
    let fleet = FleetLine::new(key, config.device.id.clone(), config.device.groups.clone());
    let (inbox, messages) = mpsc::channel(MESSAGES_DEPTH);
    let (story, _) = broadcast::channel(STORY_DEPTH);
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
    let pull_context = PullContext {
        content: content.clone(),
        registries: config.registry.clone(),
        images: config.images.clone(),
        keys: trust::role_spki(&root, RoleName::Image),
        threshold: trust_root::image_threshold(&root),
        rules: image_policy::rules(&root),
        data: places.data().to_owned(),
        disk_reserve: config.limits.disk_reserve,
        promises: Arc::default(),
        slots: Arc::new(Slots::new(config.images.parallel)),
        traffic: Arc::new(traffic(&config, &places)),
        floor: Floor::default(),
    };
    pull_context.floor.raise(floor);
    let layer_way =
        LayerWay::new(config.runtime.idmapped_layers, Arc::clone(&pull_context.promises), config.limits.disk_reserve);
    let boot_cause = if is_device { boot::cause(&store, &places.keep(), &boot_id) } else { None };
    let keeper_pid = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    let counters = super::survived::Counters::begin(&store, &opened, (&boot_id, keeper_pid), boot_cause);
    let found_reset = store.found_reset()?;
    let mut agent = Agent {
        device: config.device.id.clone(),
        boot_cause,
        counters,
        boot_id,
        keeper_version: String::new(),
        root,
        writes: super::StoreThread::start(store.clone())?,
        link,
        logs,
        ports: Ports::default(),
        world: World::default(),
        plan: edged_model::action::Plan::default(),
        images: images(&store, &content)?,
        runs: BTreeMap::new(),
        under_way: UnderWay::default(),
        staging: super::stage::Staging::default(),
        collected: super::space::Collected::default(),
        leases: super::moment::Leases::default(),
        pull_tries: BTreeMap::new(),
        lanes: Arc::new(Lanes::new(config.images.parallel)),
        suspects: super::suspect::Suspects::default(),
        scrub: super::scrub::Scrub::recall(&content),
        pull_context: Arc::new(pull_context),
        start_context: StartContext {
            places: places.clone(),
            content,
            cgroups,
            has_mqueue: has_mqueue(),
            allow: config.allow.clone(),
            user_namespaces: config.runtime.user_namespaces,
            user_ids: Arc::new(Ranges::open(places.user_ids(), &places.userns(), config.runtime.user_ids)),
            layer_way: Arc::new(layer_way),
            volume_ids: Arc::new(VolumeIds::open(places.volume_ids(), config.runtime.user_ids)),
        },
        floor,
        reckoning: time::Reckoning::new(store.time_floor()?),
        is_device,
        shares_time: None,
        checks_by_word: Arc::default(),
        refused: None,
        reset: super::reset::UnderReset::found(found_reset),
        upgrade: None,
        is_settled: false,
        concerns: super::expiry::Concerns::recall(&store, root_problem.clone()),
        story,
        execs: super::health::Execs::default(),
        fleet,
        inbox,
        store,
        config,
    };
    agent.load(capacity)?;
    crash_point::pass("world-loaded");
    let overtaken = super::reset::overtaken(found_reset);
    for why in opened_reason(&opened).into_iter().chain(root_problem).chain(overtaken) {
        agent.tell(None, None, &why, "agent");
    }
    let runs = agent.adopt().await?;
    crash_point::pass("all-adopted");
    agent.check_if_unclean(runs);
    agent.look_at_program().await;
    let calls = agent.open_doors(&places, is_device).await?;
    crash_point::pass("doors-open");
    agent.turn(messages, exits, calls).await;
    Ok(())
}

/// Said once, as every workload would have a `/dev/mqueue` otherwise.
fn has_mqueue() -> bool {
    let has = kernel::has_filesystem(kernel::MQUEUE);
    if !has {
        let option = kernel::option_of_filesystem(kernel::MQUEUE).unwrap_or_default();
        tracing::warn!("workloads get no /dev/mqueue: this kernel has no POSIX message queues ({option})");
    }
    has
}

/// What this machine has to give.
fn capacity(config: &Config) -> Capacity {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    Capacity {
        memory_total: pressure::memory().map_or(Bytes(0), |memory| memory.total),
        memory_reserve: config.limits.memory_reserve,
        cpu_total: MilliCpu(cores * 1000 * u64::from(config.limits.cpu_overcommit.max(1))),
        cpu_reserve: config.limits.cpu_reserve,
        disk_free: Bytes(0),
        disk_reserve: config.limits.disk_reserve,
    }
}

/// The images on record whose layers are all there.
fn images(store: &Store, content: &Content) -> anyhow::Result<BTreeMap<String, ReadyImage>> {
    Ok(store.images::<ReadyImage>()?.into_iter().filter(|(_, image)| is_whole(content, image)).collect())
}

impl Agent {
    /// Images that a generation needs and that a store made anew does not know: the records beside the layers do.
    fn recall_images(&mut self) {
        for name in needed_images(&self.world.desired) {
            if !self.images.contains_key(name)
                && let Some(image) = pull::ready(&self.pull_context, name)
            {
                self.images.insert(name.to_owned(), image);
            }
        }
    }

    /// The world as the store remembers it.
    fn load(&mut self, capacity: Capacity) -> anyhow::Result<()> {
        self.world.desired = Desired {
            pointers: self.store.pointers()?,
            generations: self.store.generations()?.into_iter().map(|g| (g.sequence, g)).collect(),
            held: self.store.held()?.into_iter().collect(),
        };
        self.world.observed.capacity = capacity;
        self.world.observed.moment = Moment {
            boot_id: self.boot_id.clone(),
            timezone: self.config.update.timezone,
            locks: Vec::new(),
            locks_unseen: true,
        };
        self.recall_images();
        for (name, image) in &self.images {
            self.world.observed.images.insert(name.clone(), ImageStatus::Ready { digest: image.digest });
        }
        for (name, saved) in self.store.histories()? {
            let mut history = saved.history;
            if saved.boot_id != self.boot_id {
                // A new boot is a new start: its times mean nothing now, and a failure of yesterday holds nobody up.
                history.last_exit = None;
                history.in_a_row = 0;
            }
            let state = if history.last_exit.is_some() { InstanceState::Ended } else { InstanceState::Absent };
            let instance = Instance { state, spec: saved.spec, history, ..Instance::default() };
            self.world.observed.workloads.insert(name, instance);
        }
        let is_young = |state| matches!(state, GenerationState::Activating | GenerationState::Probation);
        if self.active().is_some_and(|active| is_young(active.state)) {
            self.world.observed.active_since_boot_ms = Some(clock::boot_ms());
        }
        Ok(())
    }

    /// Takes over what the keeper has: living runs with their output, ends that nobody has written down.
    /// How many run.
    async fn adopt(&mut self) -> anyhow::Result<usize> {
        let (children, keeper_version) = self.link.list().await?;
        self.keeper_version = keeper_version;
        let adopted = children.iter().filter(|(child, _)| child.exit.is_none() && !child.key.contains('/')).count();
        for (child, outputs) in children {
            self.adopt_one(child, outputs).await;
            crash_point::pass("child-adopted");
        }
        edged_plan::transition::forget_old(&mut self.world.desired, &self.world.observed);
        let (code, text) = match adopted {
            0 => {
                let mut cause = self.boot_cause.map(|cause| format!("; {cause}")).unwrap_or_default();
                let words = self.boot_cause.filter(|cause| *cause == BootCause::Panic);
                if let Some((line, file)) = words.and_then(|_| boot::last_words(self.start_context.places.data())) {
                    cause.push_str(&format!(" ({line}; all of it in {})", file.display()));
                }
                (Code::Boot, format!("the agent {} starts{cause}", crate::VERSION))
            }
            n => (
                Code::AgentRestarted,
                format!("the agent {} starts and takes over {n} running workloads", crate::VERSION),
            ),
        };
        self.tell(None, self.world.desired.pointers.active, &Reason::new(code, text), "agent");
        Ok(adopted)
    }

    async fn adopt_one(&mut self, child: ChildState, outputs: Vec<OwnedFd>) {
        let Ok(name) = WorkloadName::parse(&child.key) else {
            // A probe of the agent before us: nobody waits for it any more.
            let _ = self.link.signal(&child.key, nix::sys::signal::Signal::SIGKILL as i32).await;
            if let Some(exit) = child.exit {
                self.exited(exit).await;
            }
            return;
        };
        self.take_outputs(&name, outputs);
        let spec = self.active().and_then(|active| active.manifest.workloads.get(&name)).cloned();
        let (noted, frame) = super::resize::noted(&child.note);
        let began = Began {
            pid: child.pid,
            since_boot_ms: child.started_boot_ms,
            spec: noted,
            frame,
            stop_timeout_ms: child.stop.timeout_ms,
            checked: spec.as_ref().is_some_and(|spec| spec.health.is_some()),
        };
        if child.exit.as_ref().is_some_and(|exit| self.world.knows_end(&name, exit.boot_ms)) {
            return self.forget(&child.key).await;
        }
        self.world.adopted(&name, &began);
        if self.world.was_restarted(&name, began.since_boot_ms) {
            self.hold(&name, None);
        }
        match child.exit {
            Some(exit) => self.exited(exit).await,
            None => {
                // The agent before us may have ended before it did this; where limits differ the planner sets all of them.
                if let Some(spec) = spec.filter(|spec| spec.digest() == began.spec)
                    && let Err(error) = self.start_context.cgroups.open(name.as_str()).limit_cpu(cpu_milli(&spec))
                {
                    tracing::error!(workload = %name, "its limit of time: {}", inline_chain(&error));
                }
                self.watch(&name, child.pid, child.stop.signal, None).await;
            }
        }
    }

    fn listen_to_the_kernel(&self) {
        let inbox = self.inbox.clone();
        tokio::spawn(async move {
            // A file that finds no room is told by the next that cannot be read.
            let tell = |file| drop(inbox.try_send(Message::KernelSays(file)));
            if let Err(error) = kernel_log::follow(tell).await {
                tracing::info!("what the kernel says of damaged files is not heard: {error}");
            }
        });
    }

    /// Everything that listens or asks outside.
    async fn open_doors(&mut self, places: &Places, is_device: bool) -> anyhow::Result<mpsc::Receiver<api::Call>> {
        let (calls, receiver) = mpsc::channel(CALLS_DEPTH);
        let allowed = api::peer::Allowed::group_named(&self.config.api.group);
        api::listen(&places.socket(), allowed, calls.clone())?;
        if let Some(tty) = self.config.console.tty.clone() {
            let verbs = crate::cli::console::ConsoleVerbs;
            let prompt = format!("edged {}", self.device);
            tokio::spawn(console::run(tty, self.config.console.mode, prompt, calls, verbs));
        }
        let (offers, mut offered) = mpsc::channel::<Offer>(OFFERS_DEPTH);
        let inbox = self.inbox.clone();
        tokio::spawn(async move {
            while let Some(offer) = offered.recv().await {
                if inbox.send(Message::Offer(Box::new(offer))).await.is_err() {
                    return;
                }
            }
        });
        fn wall() -> Timestamp {
            clock::now(0, Timestamp(crate::BUILT_AT)).wall
        }
        self.fleet.trusts(self.root.version);
        let (known, floor) = (self.newest_digest(), &self.pull_context.floor);
        if let Err(why) = self.fleet.start(&self.config.fleet, &self.store, known, offers.clone(), wall, floor) {
            self.tell(None, None, &why, "agent");
        }
        if let Err(error) = push::listen(&self.config.api, &self.device, &places.keep(), offers).await {
            let text = inline_chain(&error);
            self.tell(None, None, &Reason::new(Code::Network, text), "agent");
        }
        // A host has somebody who looks after its clock, unless it is told otherwise.
        let asks = is_device || !self.config.time.servers.is_empty();
        let time = if asks { Some(time::start(&self.config.time, self.inbox.clone())?) } else { None };
        if is_device {
            let inbox = self.inbox.clone();
            // A state that finds no room is told by the next one.
            let tell = move |state: interface::State| {
                if let (Some(servers), false) = (&time, state.time_servers.is_empty()) {
                    let _ = servers.try_send(state.time_servers.clone());
                }
                drop(inbox.try_send(Message::Network(state.text)));
            };
            tokio::spawn(interface::run(self.config.network.clone(), "/etc/resolv.conf".into(), tell));
        }
        self.listen_to_the_kernel();
        Ok(receiver)
    }
}

fn traffic(config: &Config, places: &Places) -> Traffic {
    let limits = Limits {
        bytes_per_sec: config.images.rate_max.map(|bytes| bytes.0),
        bytes_per_day: config.images.daily_max.map(|bytes| bytes.0),
    };
    let clock = Clock { boot_ms: clock::boot_ms, unix_secs: || clock::unix_ms() / 1000 };
    Traffic::new(limits, clock, places.content().join("traffic"))
}
