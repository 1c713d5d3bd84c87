//! A device that is not there: a keeper with children, a disk, registries, programs, an operator, and the part of the
//! agent that carries plans out. Everything that the real ones do late, twice, wrong or not at all happens here by the
//! dice of one seed. What the world does to the planner's view goes through the real `edged_plan::world` and
//! `edged_plan::transition`.

use std::collections::{BTreeMap, BTreeSet};

use edged_model::action::{Action, Plan};
use edged_model::generation::{Generation, GenerationState};
use edged_model::id::{Digest, Sequence, WorkloadName};
use edged_model::manifest::{
    DependsOn, Health as Check, HealthAction, Manifest, Probe, Restart, RestartPolicy, Update, Workload,
};
use edged_model::observed::{Capacity, Desired, Hold, ImageStatus, Instance, InstanceState, RestartHistory};
use edged_model::quantity::{Bytes, MilliCpu, Now, Span, Timestamp};
use edged_model::reason::{Code, Reason};
use edged_model::spec::Spec;
use edged_model::workload::{Exit, ExitCause, ProbeOutcome};
use edged_plan::restart::{self, Verdict};
use edged_plan::transition::{self, Change};
use edged_plan::world::{Began, World};

const NAMES: [&str; 4] = ["api", "cam", "db", "job"];
const MEMORY: u64 = 130;
const PULL_RETRY_MS: u64 = 4_000;
/// What no manifest may ask for: it never starts well, in a calm world either.
const BROKEN: &str = "BROKEN";
/// Nobody will ever sign it.
pub const UNSIGNED: &str = "r.example/unsigned:1";

/// splitmix64: small, and the same everywhere.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A child of the keeper.
struct Child {
    pid: i32,
    spec: Spec,
    began: u64,
    /// When it will end, and how; `None`: it runs until it is told to stop.
    ends: Option<(u64, ExitCause)>,
    /// It ended; nobody has asked for its exit yet.
    exit: Option<(u64, ExitCause)>,
    told_to_stop: bool,
}

/// What is on its way.
enum Mail {
    /// From the agent to the keeper.
    Launch {
        name: WorkloadName,
        spec: Box<Spec>,
    },
    Started {
        name: WorkloadName,
        spec: Box<Spec>,
        pid: Option<i32>,
    },
    Exited {
        name: WorkloadName,
        pid: i32,
    },
    /// The end of a run is on the disk: the keeper may forget it.
    Written {
        name: WorkloadName,
    },
    Pulled {
        image: String,
    },
    Changed {
        change: Box<Change>,
        activated: bool,
    },
    Probed {
        name: WorkloadName,
        pid: i32,
    },
    Removed {
        name: WorkloadName,
    },
    /// From the agent to the kernel: other limits for this run, and another note for the keeper.
    Resize {
        name: WorkloadName,
        pid: i32,
        spec: Box<Spec>,
    },
    Resized {
        name: WorkloadName,
        spec: Digest,
        done: bool,
    },
}

/// What outlives the agent.
#[derive(Default)]
struct Disk {
    desired: Desired,
    histories: BTreeMap<WorkloadName, Saved>,
    /// Written and not synced: may be there after the next start, may be not.
    unsynced: BTreeMap<WorkloadName, Saved>,
    images: BTreeSet<String>,
}

#[derive(Clone)]
struct Saved {
    spec: Option<Digest>,
    history: RestartHistory,
    boot: u64,
}

#[derive(Default)]
struct UnderWay {
    pulls: BTreeSet<String>,
    starts: BTreeSet<WorkloadName>,
    removals: BTreeSet<WorkloadName>,
    ends: BTreeSet<WorkloadName>,
    resizes: BTreeSet<WorkloadName>,
    change: bool,
}

pub struct Sim {
    pub dice: Dice,
    pub boot_ms: u64,
    wall: i64,
    boot: u64,
    pub world: World,
    disk: Disk,
    keeper: BTreeMap<WorkloadName, Child>,
    mail: Vec<(u64, Mail)>,
    under_way: UnderWay,
    /// Jobs that were done in this boot, as nobody has asked for them again.
    pub done: BTreeMap<WorkloadName, Digest>,
    next_pid: i32,
    next_sequence: u64,
    /// While it storms things go wrong.
    pub storm: bool,
    /// What happened, for whoever has to understand a failure.
    pub story: Option<Vec<String>>,
}

fn reason(code: Code, text: &str) -> Reason {
    Reason::new(code, text)
}

impl Sim {
    pub fn new(seed: u64, tell: bool) -> Self {
        let mut sim = Self {
            dice: Dice::new(seed),
            boot_ms: 1_000,
            wall: 0,
            boot: 0,
            world: World::default(),
            disk: Disk::default(),
            keeper: BTreeMap::new(),
            done: BTreeMap::new(),
            mail: Vec::new(),
            under_way: UnderWay::default(),
            next_pid: 100,
            next_sequence: 1,
            storm: true,
            story: tell.then(Vec::new),
        };
        sim.start_agent();
        sim
    }

    pub fn tell(&mut self, line: impl FnOnce() -> String) {
        let at = self.boot_ms;
        if let Some(story) = &mut self.story {
            let line = line();
            story.push(format!("{at:>8} {line}"));
        }
    }

    pub fn now(&self) -> Now {
        Now { boot_ms: self.boot_ms, wall: Timestamp(self.wall) }
    }

    pub fn active(&self) -> Option<&Generation> {
        let desired = &self.world.desired;
        desired.generations.get(&desired.pointers.active?)
    }

    /// One turn of the agent's loop: ask the planner, check what it says, do it.
    pub fn turn(&mut self) -> Result<Plan, String> {
        let now = self.now();
        let well = edged_plan::rollout::all_well(&self.world.desired, &self.world.observed);
        let since = &mut self.world.observed.all_well_since_boot_ms;
        *since = if well { since.or(Some(now.boot_ms)) } else { None };
        let plan = edged_plan::plan(&self.world.desired, &self.world.observed, now);
        if self.dice.one_in(16) {
            crate::laws::same_question_same_answer(self, &plan)?;
        }
        crate::laws::nobody_is_forgotten(self, &plan)?;
        for action in plan.actions.clone() {
            crate::laws::of_an_action(self, &plan, &action)?;
            self.act(action);
            // The agent may be killed between any two actions.
            if self.storm && self.dice.one_in(150) {
                self.restart_agent();
                break;
            }
        }
        Ok(plan)
    }

    fn act(&mut self, action: Action) {
        self.tell(|| format!("act {action:?}"));
        match action {
            Action::Pull { image } => {
                if self.under_way.pulls.insert(image.clone()) {
                    let nothing = ImageStatus::Pulling { done: Bytes(0), total: Bytes(0) };
                    self.world.observed.images.insert(image.clone(), nothing);
                    self.send(Mail::Pulled { image });
                }
            }
            Action::Start { workload, generation, .. } => {
                let spec = self.world.desired.generations[&generation].manifest.workloads[&workload].clone();
                if !self.under_way.ends.contains(&workload) && self.under_way.starts.insert(workload.clone()) {
                    let now = self.now();
                    self.world.starting(&workload, spec.digest(), now);
                    self.send(Mail::Launch { name: workload, spec: Box::new(spec) });
                }
            }
            Action::Resize { workload, generation, .. } => {
                let spec = self.world.desired.generations[&generation].manifest.workloads[&workload].clone();
                let state = &self.world.observed.workloads[&workload].state;
                let InstanceState::Running { pid, .. } = *state else { return };
                if self.under_way.resizes.insert(workload.clone()) {
                    self.world.resizing(&workload, spec.digest());
                    self.send(Mail::Resize { name: workload, pid, spec: Box::new(spec) });
                }
            }
            Action::Stop { workload, why } => {
                let now = self.now();
                self.world.stopping(&workload, &why, now);
                // It may have ended by itself before it heard of that: it was stopped all the same.
                self.done.remove(&workload);
                self.save(&workload);
                self.signal(&workload, false);
            }
            Action::Kill { workload, .. } => self.signal(&workload, true),
            Action::Remove { workload } => {
                if self.under_way.removals.insert(workload.clone()) {
                    self.send(Mail::Removed { name: workload });
                }
            }
            Action::Transition { generation, to, why } => {
                if self.under_way.change {
                    return;
                }
                let now = self.now().wall;
                if let Some(change) =
                    transition::step(&self.world.desired, &self.world.observed, generation, to, &why, now)
                {
                    let activated = matches!(to, GenerationState::Activating | GenerationState::RolledBack);
                    self.under_way.change = true;
                    self.send(Mail::Changed { change: Box::new(change), activated });
                }
            }
        }
    }

    fn send(&mut self, mail: Mail) {
        let late = if self.storm { [0, 1, 10, 500, 3_000][self.dice.below(5) as usize] } else { 1 };
        self.mail.push((self.boot_ms + late, mail));
    }

    fn signal(&mut self, name: &WorkloadName, kill: bool) {
        let ignores = self.storm && self.dice.one_in(4);
        let zero = self.dice.one_in(2);
        let (now, late) = (self.boot_ms, self.dice.below(2_000));
        let Some(child) = self.keeper.get_mut(name).filter(|child| child.exit.is_none()) else { return };
        child.told_to_stop = true;
        if kill {
            child.ends = Some((now, ExitCause::Signal { signal: 9, core_dumped: false }));
        } else if !ignores {
            let how =
                if zero { ExitCause::Code { code: 0 } } else { ExitCause::Signal { signal: 15, core_dumped: false } };
            child.ends = Some((now + late, how));
        }
    }

    fn save(&mut self, name: &WorkloadName) {
        let instance = self.world.instance(name);
        let saved = Saved { spec: instance.spec, history: instance.history.clone(), boot: self.boot };
        self.disk.unsynced.insert(name.clone(), saved);
    }

    fn write_down(&mut self, name: &WorkloadName) {
        if let Some(saved) = self.disk.unsynced.remove(name) {
            self.disk.histories.insert(name.clone(), saved);
        }
    }

    fn hold(&mut self, name: &WorkloadName, hold: Option<Hold>) {
        for desired in [&mut self.world.desired, &mut self.disk.desired] {
            match hold {
                Some(hold) => desired.held.insert(name.clone(), hold),
                None => desired.held.remove(name),
            };
        }
    }

    /// Goes on to the next time at which something happens, at most `max_ms` ahead.
    pub fn pass(&mut self, plan: &Plan, max_ms: u64) -> Result<(), String> {
        let mails = self.mail.iter().map(|(at, _)| *at);
        let ends = self.keeper.values().filter(|child| child.exit.is_none());
        let ends = ends.filter_map(|child| child.ends.as_ref().map(|(at, _)| *at));
        let next = mails.chain(ends).chain(plan.wake_at_boot_ms()).min().unwrap_or(u64::MAX);
        let to = next.clamp(self.boot_ms, self.boot_ms + max_ms);
        // Time goes on even where everything happens at once.
        self.boot_ms = to.max(self.boot_ms + u64::from(next <= self.boot_ms));
        self.wall += 1;
        self.children_end();
        let mut due: Vec<Mail> = Vec::new();
        let now = self.boot_ms;
        let mut kept = Vec::new();
        for (at, mail) in self.mail.drain(..) {
            if at <= now { due.push(mail) } else { kept.push((at, mail)) }
        }
        self.mail = kept;
        for mail in due {
            self.deliver(mail)?;
        }
        Ok(())
    }

    fn children_end(&mut self) {
        let now = self.boot_ms;
        let mut ended = Vec::new();
        let wanted = self.active().map(|active| active.manifest.workloads.clone()).unwrap_or_default();
        for (name, child) in &mut self.keeper {
            if child.exit.is_none() && child.ends.as_ref().is_some_and(|(at, _)| *at <= now) {
                child.exit = child.ends.take();
                let is_done = matches!(child.exit, Some((_, ExitCause::Code { code: 0 })));
                let is_over =
                    !child.told_to_stop && !self.world.desired.held.contains_key(name) && wanted.contains_key(name);
                if is_done && is_over && child.spec.restart.policy != RestartPolicy::Always {
                    self.done.insert(name.clone(), child.spec.digest());
                }
                ended.push((name.clone(), child.pid));
            }
        }
        for (name, pid) in ended {
            self.tell(|| format!("{name} {pid} ends"));
            self.send(Mail::Exited { name, pid });
        }
    }

    fn deliver(&mut self, mail: Mail) -> Result<(), String> {
        match mail {
            Mail::Launch { name, spec } => self.launch(name, spec)?,
            Mail::Started { name, spec, pid } => self.started(&name, &spec, pid),
            Mail::Exited { name, pid } => self.exited(&name, pid),
            Mail::Written { name } => {
                self.write_down(&name);
                self.under_way.ends.remove(&name);
                self.keeper.remove(&name);
            }
            Mail::Pulled { image } => self.pulled(image),
            Mail::Changed { change, activated } => self.changed(*change, activated),
            Mail::Probed { name, pid } => self.probed(&name, pid),
            Mail::Resize { name, pid, spec } => self.resize(name, pid, *spec)?,
            Mail::Resized { name, spec, done } => {
                self.under_way.resizes.remove(&name);
                if done {
                    self.world.resized(&name, spec);
                } else {
                    self.world.not_resized(&name);
                }
                self.save(&name);
                // It ended meanwhile.
                if let Some(pid) = self.keeper.get(&name).filter(|child| child.exit.is_some()).map(|child| child.pid) {
                    self.exited(&name, pid);
                }
            }
            Mail::Removed { name } => {
                self.under_way.removals.remove(&name);
                let gone = |state: &InstanceState| matches!(state, InstanceState::Ended | InstanceState::Absent);
                if self.world.observed.workloads.get(&name).is_some_and(|instance| gone(&instance.state)) {
                    self.world.observed.workloads.remove(&name);
                    self.disk.histories.remove(&name);
                    self.disk.unsynced.remove(&name);
                    self.done.remove(&name);
                }
            }
        }
        Ok(())
    }

    fn launch(&mut self, name: WorkloadName, spec: Box<Spec>) -> Result<(), String> {
        if self.done.get(&name) != Some(&spec.digest()) {
            self.done.remove(&name);
        }
        if self.storm && self.dice.one_in(12) {
            self.send(Mail::Started { name, spec, pid: None });
            return Ok(());
        }
        crate::laws::of_a_launch(self, &name, &spec)?;
        self.done.remove(&name);
        self.next_pid += 1;
        let pid = self.next_pid;
        let ends = self.fate(&spec);
        self.tell(|| format!("{name} {pid} begins, ends {ends:?}"));
        let child = Child { pid, spec: (*spec).clone(), began: self.boot_ms, ends, exit: None, told_to_stop: false };
        self.keeper.insert(name.clone(), child);
        self.send(Mail::Started { name, spec, pid: Some(pid) });
        Ok(())
    }

    /// The run takes the limits and goes on; or too much is in use, or it is gone.
    fn resize(&mut self, name: WorkloadName, pid: i32, spec: Spec) -> Result<(), String> {
        let refuses = self.storm && self.dice.one_in(6);
        let living = self.keeper.get(&name).is_some_and(|child| child.pid == pid && child.exit.is_none());
        let done = living && !refuses;
        let digest = spec.digest();
        if done {
            crate::laws::of_a_resized(self, &name, &spec)?;
            self.tell(|| format!("{name} {pid} has other limits"));
            if let Some(child) = self.keeper.get_mut(&name) {
                child.spec = spec;
            }
        }
        self.send(Mail::Resized { name, spec: digest, done });
        Ok(())
    }

    /// How a run will end by itself.
    fn fate(&mut self, spec: &Spec) -> Option<(u64, ExitCause)> {
        let at = self.boot_ms + self.dice.below(3_000);
        let job = spec.restart.policy != RestartPolicy::Always;
        if spec.env.contains_key(BROKEN) {
            return Some((at, ExitCause::Code { code: 1 }));
        }
        if self.storm {
            match self.dice.below(8) {
                0 => return Some((at, ExitCause::Code { code: 3 })),
                1 => return Some((at, ExitCause::OutOfMemory)),
                2 => return Some((at, ExitCause::Signal { signal: 11, core_dumped: false })),
                _ => {}
            }
        }
        job.then_some((at, ExitCause::Code { code: 0 }))
    }

    fn started(&mut self, name: &WorkloadName, spec: &Spec, pid: Option<i32>) {
        self.under_way.starts.remove(name);
        let now = self.now();
        let Some(pid) = pid else {
            self.world.not_started(name, spec.digest());
            let cause = ExitCause::NotStarted { stage: "exec".to_owned(), errno: 2 };
            let exit = Exit { cause, at: now.wall, at_boot_ms: now.boot_ms, ran_ms: 0, peak_memory: None };
            self.world.ended(name, exit, &spec.restart);
            if matches!(self.world.desired.held.get(name), Some(Hold::Restart { .. })) {
                self.hold(name, None);
            }
            self.save(name);
            return;
        };
        let began = self.began(pid, spec);
        self.world.began(name, &began);
        if matches!(self.world.desired.held.get(name), Some(Hold::Restart { .. })) {
            self.hold(name, None);
        }
        self.save(name);
        if spec.health.is_some() {
            self.mail.push((self.boot_ms + 1_000, Mail::Probed { name: name.clone(), pid }));
        }
        // It ended before the loop has read that it began.
        if self.keeper.get(name).is_some_and(|child| child.pid == pid && child.exit.is_some()) {
            self.exited(name, pid);
        }
    }

    fn began(&self, pid: i32, spec: &Spec) -> Began {
        Began {
            pid,
            since_boot_ms: self.boot_ms,
            spec: spec.digest(),
            frame: Some(spec.digest_without_limits()),
            stop_timeout_ms: spec.stop_timeout.ms,
            checked: spec.health.is_some(),
        }
    }

    fn exited(&mut self, name: &WorkloadName, pid: i32) {
        if self.under_way.starts.contains(name) || self.under_way.resizes.contains(name) {
            return;
        }
        let Some(child) = self.keeper.get(name).filter(|child| child.pid == pid) else { return };
        let Some((at, cause)) = child.exit.clone() else { return };
        let policy = self.active().and_then(|active| active.manifest.workloads.get(name));
        let policy = policy.map_or_else(Restart::default, |workload| workload.restart.clone());
        let ran_ms = at.saturating_sub(child.began);
        let exit = Exit { cause, at: self.now().wall, at_boot_ms: at, ran_ms, peak_memory: None };
        self.world.ended(name, exit, &policy);
        self.save(name);
        let history = &self.world.observed.workloads[name].history;
        if restart::verdict(name, &policy, history) == Verdict::Now {
            self.keeper.remove(name);
        } else if self.under_way.ends.insert(name.clone()) {
            self.send(Mail::Written { name: name.clone() });
        }
    }

    fn pulled(&mut self, image: String) {
        self.under_way.pulls.remove(&image);
        let permanent = image == UNSIGNED;
        let status = if permanent || (self.storm && self.dice.one_in(3)) {
            let reason = reason(Code::RegistryUnavailable, "no");
            let retry_at_boot_ms = self.boot_ms + PULL_RETRY_MS;
            ImageStatus::Failed { reason, attempts: 1, retry_at_boot_ms, permanent }
        } else {
            self.disk.images.insert(image.clone());
            ImageStatus::Ready { digest: Digest::of(image.as_bytes()) }
        };
        self.world.observed.images.insert(image, status);
    }

    fn changed(&mut self, change: Change, activated: bool) {
        self.under_way.change = false;
        if self.storm && self.dice.one_in(10) {
            // The disk is full: nothing was written.
            return;
        }
        for desired in [&mut self.disk.desired, &mut self.world.desired] {
            desired.pointers = change.pointers;
            desired.generations.extend(change.generations.iter().map(|g| (g.sequence, g.clone())));
        }
        transition::forget_old(&mut self.world.desired, &self.world.observed);
        if activated {
            let wanted = self.active().map(|active| active.manifest.workloads.clone()).unwrap_or_default();
            self.done.retain(|name, _| wanted.contains_key(name));
            self.world.observed.active_since_boot_ms = Some(self.boot_ms);
            self.world.observed.all_well_since_boot_ms = None;
            for name in self.world.desired.held.keys().cloned().collect::<Vec<_>>() {
                self.hold(&name, None);
            }
        }
    }

    fn probed(&mut self, name: &WorkloadName, pid: i32) {
        let check = self.active().and_then(|active| active.manifest.workloads.get(name)?.health.clone());
        let lives = self.keeper.get(name).is_some_and(|child| child.pid == pid && child.exit.is_none());
        if !lives {
            return;
        }
        let lost = self.storm && self.dice.one_in(6);
        let failed = self.storm && self.dice.one_in(3);
        let outcome = if failed { ProbeOutcome::Failed { why: "refused".to_owned() } } else { ProbeOutcome::Passed };
        if let (Some(check), false) = (check, lost) {
            let now = self.now();
            self.world.probed(name, pid, &check, &outcome, now);
        }
        self.mail.push((self.boot_ms + 1_000, Mail::Probed { name: name.clone(), pid }));
    }

    /// Something goes wrong, or somebody wants something.
    pub fn strike(&mut self) {
        match self.dice.below(24) {
            0 | 1 => self.restart_agent(),
            2 => self.cut_power(),
            3 => {
                // The clock goes ahead or back by up to years.
                self.wall += self.dice.below(200_000_000) as i64 - 100_000_000;
                self.tell(|| "the clock jumps".to_owned());
            }
            4..=6 => self.operate(),
            7 => self.want_again(),
            8..=11 => self.offer(),
            12..=14 => self.crash_one(),
            15 => self.boot_ms += self.dice.below(120_000),
            _ => {}
        }
    }

    fn some_name(&mut self) -> WorkloadName {
        WorkloadName::parse(NAMES[self.dice.below(NAMES.len() as u64) as usize]).unwrap()
    }

    fn crash_one(&mut self) {
        let name = self.some_name();
        let now = self.boot_ms;
        if let Some(child) = self.keeper.get_mut(&name).filter(|child| child.exit.is_none()) {
            child.ends = Some((now, ExitCause::Signal { signal: 9, core_dumped: false }));
        }
    }

    /// As the agent does it: `start` takes a hold away and forgets the back-off; the others set one.
    fn operate(&mut self) {
        let name = self.some_name();
        if self.active().is_none_or(|active| !active.manifest.workloads.contains_key(&name)) {
            return;
        }
        let restart = Some(Hold::Restart { asked_boot_ms: self.boot_ms });
        let hold = [None, Some(Hold::Stopped), restart][self.dice.below(3) as usize];
        self.tell(|| format!("operator: {name} {hold:?}"));
        let instance = self.world.instance(&name);
        let is_running = matches!(instance.state, InstanceState::Running { .. });
        if hold != Some(Hold::Stopped) {
            instance.history.in_a_row = 0;
        }
        let hold = if hold.is_none() && !is_running { restart } else { hold };
        self.done.remove(&name);
        self.hold(&name, hold);
    }

    /// A new manifest, verified. Nobody is asked while another change is being written.
    pub fn offer(&mut self) {
        if self.under_way.change {
            return;
        }
        let manifest = self.manifest();
        self.tell(|| format!("offer {}: {:?}", manifest.sequence, manifest.workloads.keys().collect::<Vec<_>>()));
        for workload in manifest.workloads.values() {
            if matches!(self.world.observed.images.get(&workload.image), Some(ImageStatus::Failed { .. })) {
                self.world.observed.images.remove(&workload.image);
            }
        }
        let digest = Digest::of(&manifest.sequence.0.to_le_bytes());
        let generation = Generation::received(manifest, digest, Timestamp(0));
        let change = transition::received(&self.world.desired, generation, self.now().wall);
        self.under_way.change = true;
        self.send(Mail::Changed { change: Box::new(change), activated: false });
    }

    /// `edgectl rollback` and `retry`: an old generation is a candidate again.
    fn want_again(&mut self) {
        let pointers = self.world.desired.pointers;
        let known: Vec<Sequence> = self.world.desired.generations.keys().copied().collect();
        if self.under_way.change || known.is_empty() {
            return;
        }
        let sequence = known[self.dice.below(known.len() as u64) as usize];
        if pointers.active == Some(sequence) || pointers.candidate == Some(sequence) {
            return;
        }
        self.tell(|| format!("operator: generation {sequence} again"));
        let generation = self.world.desired.generations[&sequence].clone();
        let change = transition::received(&self.world.desired, generation, self.now().wall);
        self.under_way.change = true;
        self.send(Mail::Changed { change: Box::new(change), activated: false });
    }

    fn manifest(&mut self) -> Manifest {
        let mut manifest = Manifest { sequence: Sequence(self.next_sequence), ..Manifest::empty() };
        self.next_sequence += 1;
        let max_unavailable = 1 + u32::from(self.dice.one_in(3));
        manifest.update = Update {
            probation: Span::from_secs(5),
            deadline: Span::from_secs(60),
            max_unavailable,
            ..Update::default()
        };
        let mut before: Vec<WorkloadName> = Vec::new();
        for name in NAMES {
            if self.dice.one_in(3) {
                continue;
            }
            let name = WorkloadName::parse(name).unwrap();
            let known = self.active().and_then(|active| active.manifest.workloads.get(&name)).cloned();
            let is_job =
                |need: &WorkloadName| manifest.workloads.get(need).map(|w| w.restart.policy != RestartPolicy::Always);
            let can_stay =
                |w: &Spec| w.depends_on.iter().all(|(need, how)| is_job(need) == Some(*how == DependsOn::Completed));
            let workload = match known.filter(can_stay) {
                Some(known) if self.dice.one_in(2) => self.with_other_limits(known),
                _ => self.workload(&before, &manifest),
            };
            manifest.workloads.insert(name.clone(), workload);
            before.push(name);
        }
        manifest
    }

    fn with_other_limits(&mut self, mut workload: Spec) -> Spec {
        workload.resources.memory = Some(Bytes([20, 40, 60][self.dice.below(3) as usize]));
        workload
    }

    fn workload(&mut self, before: &[WorkloadName], manifest: &Manifest) -> Spec {
        let image =
            if self.dice.one_in(40) { UNSIGNED.to_owned() } else { format!("r.example/image:{}", self.dice.below(3)) };
        let mut workload = Spec::from(Workload::of_image(&image));
        workload.resources.memory = Some(Bytes([20, 40, 60][self.dice.below(3) as usize]));
        workload.resources.cpu = Some(MilliCpu(100));
        workload.stop_timeout = Span::from_secs(3);
        workload.restart = Restart {
            policy: [RestartPolicy::Always, RestartPolicy::Always, RestartPolicy::OnFailure, RestartPolicy::Never]
                [self.dice.below(4) as usize],
            backoff: Span::from_secs(1),
            backoff_max: Span::from_secs(4),
            stable_after: Span::from_secs(10),
            attempts: 2,
            no_restart_exit_codes: Vec::new(),
        };
        if self.dice.one_in(25) {
            workload.env.insert(BROKEN.to_owned(), "1".to_owned());
            workload.restart.policy = RestartPolicy::Always;
        }
        let job = workload.restart.policy != RestartPolicy::Always;
        if !job && self.dice.one_in(3) {
            workload.health = Some(Check {
                probe: Probe::Tcp { port: 1 },
                start_period: Span::from_secs(2),
                interval: Span::from_secs(1),
                timeout: Span::from_secs(1),
                retries: 2,
                action: if self.dice.one_in(3) { HealthAction::None } else { HealthAction::Restart },
            });
        }
        for need in before {
            if self.dice.one_in(3) {
                let is_job = manifest.workloads[need].restart.policy != RestartPolicy::Always;
                let condition = match (is_job, self.dice.one_in(2)) {
                    (true, _) => DependsOn::Completed,
                    (false, true) => DependsOn::Healthy,
                    (false, false) => DependsOn::Started,
                };
                workload.depends_on.insert(need.clone(), condition);
            }
        }
        workload
    }

    /// The agent is killed and starts again: its tasks are gone, the keeper's children are not.
    pub fn restart_agent(&mut self) {
        self.tell(|| "the agent is killed".to_owned());
        let mails = std::mem::take(&mut self.mail);
        for (_, mail) in mails {
            match mail {
                // What was in the socket already is read by the keeper before it answers `list`.
                Mail::Launch { name, spec } if self.dice.one_in(2) => {
                    let lives = self.keeper.contains_key(&name);
                    assert!(!lives, "launched beside a living one");
                    self.done.remove(&name);
                    self.next_pid += 1;
                    let ends = self.fate(&spec);
                    let (pid, began) = (self.next_pid, self.boot_ms);
                    self.keeper.insert(name, Child { pid, spec: *spec, began, ends, exit: None, told_to_stop: false });
                }
                Mail::Resize { name, pid, spec } if self.dice.one_in(2) => {
                    if let Some(child) = self.keeper.get_mut(&name).filter(|child| child.pid == pid) {
                        child.spec = *spec;
                    }
                }
                // A write that was on its way may be on the disk.
                Mail::Changed { change, activated } if self.dice.one_in(2) => {
                    let desired = &mut self.disk.desired;
                    desired.pointers = change.pointers;
                    desired.generations.extend(change.generations.iter().map(|g| (g.sequence, g.clone())));
                    let active = desired.pointers.active.and_then(|active| desired.generations.get(&active));
                    if let Some(active) = active.filter(|_| activated) {
                        self.done.retain(|name, _| active.manifest.workloads.contains_key(name));
                    }
                }
                _ => {}
            }
        }
        self.start_agent();
    }

    fn cut_power(&mut self) {
        self.tell(|| "the power is cut".to_owned());
        self.keeper.clear();
        self.done.clear();
        self.mail.clear();
        self.boot += 1;
        self.boot_ms = 500;
        self.start_agent();
    }

    /// As `reconcile::start_up` does it: load, then adopt.
    fn start_agent(&mut self) {
        self.under_way = UnderWay::default();
        self.world = World::default();
        for (name, saved) in std::mem::take(&mut self.disk.unsynced) {
            if self.dice.below(4) != 0 {
                self.disk.histories.insert(name, saved);
            }
        }
        self.world.desired = self.disk.desired.clone();
        self.world.observed.capacity =
            Capacity { memory_total: Bytes(MEMORY), cpu_total: MilliCpu(10_000), ..Capacity::default() };
        for image in &self.disk.images {
            let ready = ImageStatus::Ready { digest: Digest::of(image.as_bytes()) };
            self.world.observed.images.insert(image.clone(), ready);
        }
        for (name, saved) in self.disk.histories.clone() {
            let mut history = saved.history;
            if saved.boot != self.boot {
                history.last_exit = None;
                history.in_a_row = 0;
                history.ordered = None;
            }
            let state = if history.last_exit.is_some() { InstanceState::Ended } else { InstanceState::Absent };
            let instance = Instance { state, spec: saved.spec, history, ..Instance::default() };
            self.world.observed.workloads.insert(name, instance);
        }
        let young = |state| matches!(state, GenerationState::Activating | GenerationState::Probation);
        if self.active().is_some_and(|active| young(active.state)) {
            self.world.observed.active_since_boot_ms = Some(self.boot_ms);
        }
        let children: Vec<_> = self.keeper.iter().map(|(name, child)| (name.clone(), child.pid)).collect();
        for (name, pid) in children {
            let child = &self.keeper[&name];
            if child.exit.as_ref().is_some_and(|(at, _)| self.world.knows_end(&name, *at)) {
                self.keeper.remove(&name);
                continue;
            }
            let checked = child.spec.health.is_some();
            let began = Began { since_boot_ms: child.began, ..self.began(pid, &child.spec.clone()) };
            self.world.adopted(&name, &began);
            if self.world.was_restarted(&name, began.since_boot_ms) {
                self.hold(&name, None);
            }
            if self.keeper[&name].exit.is_some() {
                self.exited(&name, pid);
            } else if checked {
                self.mail.push((self.boot_ms + 1_000, Mail::Probed { name, pid }));
            }
        }
        transition::forget_old(&mut self.world.desired, &self.world.observed);
    }

    /// The storm is over: what does not answer will not answer better, but nothing goes wrong any more. Whoever was to
    /// crash later runs on.
    pub fn calm(&mut self) {
        self.tell(|| "it is calm".to_owned());
        self.storm = false;
        for child in self.keeper.values_mut().filter(|child| child.exit.is_none() && !child.told_to_stop) {
            let job = child.spec.restart.policy != RestartPolicy::Always;
            child.ends = if job { Some((self.boot_ms, ExitCause::Code { code: 0 })) } else { None };
            if child.spec.env.contains_key(BROKEN) {
                child.ends = Some((self.boot_ms, ExitCause::Code { code: 1 }));
            }
        }
    }

    /// Whether nothing is on its way but the next probe.
    pub fn is_quiet(&self) -> bool {
        self.mail.iter().all(|(_, mail)| matches!(mail, Mail::Probed { .. }))
            && self.keeper.values().all(|child| child.exit.is_none() && child.ends.is_none())
    }

    pub fn living(&self) -> impl Iterator<Item = (&WorkloadName, &Spec)> {
        self.keeper.iter().filter(|(_, child)| child.exit.is_none()).map(|(name, child)| (name, &child.spec))
    }

    pub fn is_starting(&self, name: &WorkloadName) -> bool {
        self.under_way.starts.contains(name)
    }

    pub fn is_broken(workload: &Spec) -> bool {
        workload.env.contains_key(BROKEN)
    }
}
