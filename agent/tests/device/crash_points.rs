//! The agent dies at every step of every action, and the same world comes about: the same generation, one instance of
//! each workload, what did not change untouched, nothing left behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use edged::crash_point::{FILE_ENV, POINTS};
use edged_qemu::wait;
use serde_json::Value;

use crate::rig::{Device, Factory, PATIENCE, head, until};

/// What brings the agent past a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scene {
    /// The first start of a device.
    Birth,
    /// The agent is killed, and the next one starts.
    Start,
    /// The same with a store that was truncated meanwhile.
    Damage,
    /// A generation that changes, adds and removes workloads, and a job that is to be done once.
    Update,
    /// The same with an image that is not on the device yet.
    Pull,
    /// A generation that does not become well.
    Rollback,
    /// An operator's `prune`.
    Collect,
    /// With a fleet that takes reports.
    Report,
    /// Only the limits of a workload that runs are others.
    Limits,
    /// An image with a layer that is kept while it comes.
    Large,
    /// A start after a power cut that has damaged a layer.
    Check,
    /// The next trust root.
    Trust,
    /// An operator's `reset`.
    Reset,
    /// A workload that prints more than a segment of its log takes.
    Print,
}

use Scene::{Birth, Check, Collect, Damage, Large, Limits, Print, Pull, Report, Reset, Rollback, Start, Trust, Update};

/// The point, and how often it is passed before the agent dies there.
const PLAN: [(Scene, &str, u32); 78] = [
    (Birth, "store-written", 1),
    (Birth, "store-written", 2),
    (Birth, "store-synced", 1),
    (Birth, "keep-bodies-written", 1),
    (Birth, "file-written", 1),
    (Birth, "file-named", 1),
    (Birth, "keep-saved", 1),
    (Birth, "key-made", 1),
    (Birth, "world-loaded", 1),
    (Birth, "all-adopted", 1),
    (Birth, "doors-open", 1),
    (Start, "store-opening", 1),
    (Start, "store-opened", 1),
    (Start, "root-taken", 1),
    (Start, "content-opened", 1),
    (Start, "world-loaded", 1),
    (Start, "child-adopted", 1),
    (Start, "child-adopted", 2),
    (Start, "all-adopted", 1),
    (Start, "doors-open", 1),
    (Damage, "store-set-aside", 1),
    (Damage, "store-empty", 1),
    (Damage, "store-rebuilt", 1),
    (Damage, "store-written", 2),
    (Damage, "keep-saved", 1),
    (Update, "manifest-verified", 1),
    (Update, "store-written", 1),
    (Update, "store-written", 3),
    (Update, "store-written", 8),
    (Update, "store-written", 11),
    (Update, "store-synced", 1),
    (Update, "store-synced", 2),
    (Update, "keep-bodies-written", 1),
    (Update, "keep-bodies-written", 2),
    (Update, "keep-previous-linked", 1),
    (Update, "file-written", 1),
    (Update, "file-written", 2),
    (Update, "file-named", 1),
    (Update, "file-named", 2),
    (Update, "keep-saved", 1),
    (Update, "keep-saved", 2),
    (Update, "change-written", 1),
    (Update, "change-written", 2),
    (Update, "change-written", 3),
    (Update, "change-written", 4),
    (Update, "change-taken", 1),
    (Update, "change-taken", 3),
    (Update, "start-ordered", 1),
    (Update, "place-made", 1),
    (Update, "cgroup-made", 1),
    (Update, "namespace-made", 1),
    (Update, "start-prepared", 1),
    (Update, "start-sent", 1),
    (Update, "start-sent", 2),
    (Update, "start-unlimited", 1),
    (Update, "start-answered", 1),
    (Update, "start-taken", 1),
    (Update, "stop-told", 1),
    (Update, "stop-signalled", 1),
    (Update, "kill-signalled", 1),
    (Update, "end-seen", 1),
    (Update, "end-told", 1),
    (Update, "end-written", 1),
    (Update, "end-forgotten", 1),
    (Update, "cgroup-removed", 1),
    (Update, "namespace-removed", 1),
    (Update, "place-removed", 1),
    (Update, "workload-forgotten", 1),
    (Pull, "pull-ordered", 1),
    (Pull, "layer-unpacked", 1),
    (Pull, "layer-synced", 1),
    (Pull, "layer-named", 1),
    (Pull, "documents-written", 1),
    (Pull, "image-recorded", 1),
    (Pull, "image-told", 1),
    (Pull, "image-stored", 1),
    (Rollback, "failure-remembered", 1),
    (Rollback, "change-written", 4),
];

const LATER: [(Scene, &str, u32); 35] = [
    (Collect, "layer-moved-aside", 1),
    (Collect, "layer-removed", 1),
    (Collect, "record-removed", 1),
    (Limits, "limits-set", 1),
    (Limits, "limits-noted", 1),
    (Limits, "limits-told", 1),
    (Large, "partial-begun", 1),
    (Large, "partial-synced", 1),
    // After one that has left something.
    (Large, "partial-synced 1\npartial-resumed", 1),
    (Large, "partial-removed", 1),
    (Check, "check-begun", 1),
    (Check, "check-found", 1),
    (Check, "check-removed", 1),
    (Check, "check-written", 1),
    (Check, "check-done", 1),
    (Trust, "root-verified", 1),
    (Trust, "root-written", 1),
    (Trust, "root-in-force", 1),
    (Print, "log-full", 1),
    (Print, "log-full", 3),
    (Print, "log-rotated", 1),
    (Reset, "reset-told", 1),
    (Reset, "store-synced", 1),
    (Reset, "reset-begun", 1),
    (Reset, "stop-signalled", 1),
    (Reset, "workload-forgotten", 2),
    (Reset, "layer-removed", 1),
    (Reset, "reset-images-gone", 1),
    (Reset, "reset-places-gone", 1),
    (Reset, "reset-volumes-gone", 1),
    (Reset, "store-synced", 2),
    (Reset, "reset-ended", 1),
    (Report, "report-numbered", 1),
    (Report, "report-waiting", 1),
    (Report, "report-taken", 1),
];

/// Each death makes the keeper wait longer before it starts another agent: after these, a fresh device.
const DEATHS_EACH: usize = 6;

struct Story {
    factory: Factory,
    image: String,
    device: Device,
    armed: PathBuf,
    devices: u32,
    /// The newest number that was used, and the generation that shall be there.
    sequence: u32,
    active: u32,
    images: u32,
    steady: Option<i32>,
    /// Not with a store that was lost: it does not know which jobs are done.
    jobs_are_counted: bool,
    config: String,
    /// The newest trust root, and its version.
    root: (PathBuf, u64),
    /// Limits of `steady`.
    steady_mebibytes: u64,
}

/// Layers are kept while they come, however quick they are; and a segment of a log is full at once.
const CONFIG: &str = "[images]\nkeep-partial-after = \"0s\"\n[log]\nworkload-max = \"8Ki\"\n";

impl Story {
    fn begin() -> Self {
        let factory = Factory::start();
        let image = factory.publish_busybox();
        let armed = factory.path("crash-point");
        let device = factory.device_called("device-0", CONFIG, &[(FILE_ENV, &armed)]);
        let (config, steady) = (CONFIG.to_owned(), None);
        let root = (factory.keys.trust_root(), 1);
        let mut story = Self {
            factory,
            image,
            device,
            armed,
            devices: 0,
            sequence: 0,
            active: 0,
            images: 0,
            steady,
            jobs_are_counted: true,
            config,
            root,
            steady_mebibytes: 8,
        };
        story.update(None);
        story
    }

    /// Another device takes the place of this one, perhaps to die at its birth.
    fn renew(&mut self, dies_at: Option<(&'static str, u32)>) {
        self.devices += 1;
        (self.sequence, self.active, self.steady, self.jobs_are_counted) = (0, 0, None, true);
        self.root = (self.factory.keys.trust_root(), 1);
        if let Some((point, times)) = dies_at {
            self.arm(point, times);
        }
        self.switch_on();
        self.update(None);
    }

    fn switch_on(&mut self) {
        let name = format!("device-{}", self.devices);
        self.device = self.factory.device_called(&name, &self.config, &[(FILE_ENV, &self.armed)]);
    }

    fn arm(&self, point: &'static str, times: u32) {
        assert!(POINTS.contains(&last_of(point)));
        let written = self.armed.with_extension("written");
        fs::write(&written, format!("{point} {times}")).unwrap();
        fs::rename(&written, &self.armed).unwrap();
    }

    /// `deaf` hears no signal; `steady` and `job` never change; two take turns; `once` is new each time.
    fn manifest(&self, sequence: u32, image: Option<&str>, changes: &str) -> String {
        let own = &self.image;
        let walls = "resources: { memory: 8Mi, cpu: 100m }";
        let steady = self.steady_mebibytes;
        let turn = if sequence.is_multiple_of(2) { "even" } else { "odd" };
        let head = head(sequence).replace("probation: 2s", "probation: 300ms");
        format!(
            "{head}volumes: {{ data: {{}} }}\nworkloads:\n  \
             steady:\n    image: {own}\n    command: [/bin/sleep, \"100000\"]\n    \
             resources: {{ memory: {steady}Mi, cpu: 100m }}\n    networkMode: bridge\n  \
             deaf:\n    image: {}\n    command: [/bin/sh, -c, '{changes}']\n    {walls}\n    restart: {{ attempts: 1, backoff: 100ms }}\n  \
             {turn}:\n    image: {own}\n    command: [/bin/sleep, \"100000\"]\n    {walls}\n    networkMode: bridge\n  \
             once-{sequence}:\n    image: {own}\n    command: [/bin/sh, -c, 'echo done >> /data/once-{sequence}']\n    {walls}\n    \
             restart: {{ policy: never }}\n    mounts: [{{ source: {{ volume: data }}, target: /data }}]\n",
            image.unwrap_or(own)
        )
    }

    fn expected(&self) -> BTreeSet<String> {
        let turn = if self.active.is_multiple_of(2) { "even" } else { "odd" };
        let names = ["steady", "deaf", turn, &format!("once-{}", self.active)];
        names.into_iter().map(str::to_owned).collect()
    }

    /// Offered again and again, as a fleet does, until the device has it.
    fn offer(&mut self, yaml: &str) {
        let file = self.factory.sign(&format!("m{}", self.sequence), yaml);
        self.offer_file(&file);
    }

    fn offer_file(&self, file: &Path) {
        let mut last = String::new();
        let taken = wait::until("the device to take it", PATIENCE, || {
            let output = self.device.push_command(file).output()?;
            last = String::from_utf8_lossy(&output.stderr).into_owned();
            Ok((output.status.success() || last.contains("was tried already")).then_some(()))
        });
        taken.unwrap_or_else(|error| panic!("{error:#}: {last}\n{}", self.device.said()));
    }

    fn update(&mut self, image: Option<&str>) {
        let program = format!("exec sleep {}00000", self.sequence + 1);
        self.update_to(image, &program);
    }

    fn update_to(&mut self, image: Option<&str>, program: &str) {
        self.sequence += 1;
        let yaml = self.manifest(self.sequence, image, program);
        self.active = self.sequence;
        self.offer(&yaml);
        self.settle("an update");
    }

    /// The power was cut, and a byte of the layer that everything runs from is another.
    fn damage_a_layer(&mut self) -> PathBuf {
        self.device.stop();
        let layers = fs::read_dir(self.device.path("layers")).unwrap().flatten();
        let mut pages = layers.map(|layer| layer.path().join("www/index.html"));
        let page = pages.find(|page| page.exists()).expect("a layer with a page");
        let before = fs::metadata(&page).unwrap().modified().unwrap();
        let file = fs::File::options().write(true).open(&page).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"H", 0).unwrap();
        file.set_modified(before).unwrap();
        fs::write(self.device.path("content/in-use"), "another boot").unwrap();
        page
    }

    /// Asked for until it has begun: an agent that died before that knows nothing of it. Then nothing is left, and nobody has
    /// to ask again.
    fn reset(&self) {
        let left = || -> Option<Vec<String>> {
            let status = self.status()?;
            let is_over = status["generation"].is_null() && status["workloads"].as_array()?.is_empty();
            let dirs =
                ["workloads", "log", "volumes", "content/blobs", "content/images", "content/tables", "run/netns"];
            let in_dirs = dirs.iter().chain(["layers"].iter()).flat_map(|dir| {
                fs::read_dir(self.device.path(dir)).into_iter().flatten().flatten().map(|entry| entry.path())
            });
            let left = in_dirs.filter(|path| !path.ends_with("ingest")).map(|path| path.display().to_string());
            let left: Vec<String> = left.chain((!is_over).then(|| "a generation".to_owned())).collect();
            Some(left)
        };
        until("the reset to begin", || {
            let words = ["reset", "--workloads", "--volumes", "--yes"];
            let _ = self.device.edgectl(&words);
            self.status()?["generation"].is_null().then_some(())
        });
        let mut last = Vec::new();
        let over = wait::until("the end of the reset", PATIENCE, || {
            last = left().unwrap_or_else(|| vec!["no answer".to_owned()]);
            Ok((last.is_empty() && !self.armed.exists()).then_some(()))
        });
        over.unwrap_or_else(|error| panic!("{error:#}: {last:#?}\n{}", self.device.said()));
        let mark = || edged::store::keep::load(&self.device.path("keep")).ok()??.summary.reset.is_none().then_some(());
        until("no mark", mark);
    }

    /// The next trust root, of the same keys.
    fn rotate(&mut self) {
        let (old, version) = (self.root.0.clone(), self.root.1 + 1);
        let new = self.factory.path(&format!("trust-{}-{version}.cose", self.devices));
        let mut rotate = self.factory.keys.edgectl();
        rotate.args(["trust", "rotate", "--key"]).arg(self.factory.keys.private("root")).arg("--from").arg(&old);
        edged_qemu::process::run(rotate.arg("-o").arg(&new)).unwrap();
        self.offer_file(&new);
        self.root = (new, version);
    }

    fn new_image(&mut self) -> String {
        self.images += 1;
        let own = self.factory.path(&format!("own-{}", self.images));
        fs::create_dir_all(own.join("data")).unwrap();
        fs::write(own.join("data/blob"), self.images.to_string().repeat(1000)).unwrap();
        self.factory.publish_over_busybox(&format!("app-{}", self.images), &own)
    }

    fn play(&mut self, scene: Scene, point: &'static str, times: u32) {
        match scene {
            Birth => self.renew(Some((point, times))),
            Start => {
                self.arm(point, times);
                self.device.kill_agent();
            }
            Damage => {
                let db = fs::File::options().write(true).open(self.device.path("state/db")).unwrap();
                self.arm(point, times);
                db.set_len(100).unwrap();
                self.device.kill_agent();
                self.jobs_are_counted = false;
            }
            Update | Report => {
                self.arm(point, times);
                self.update(None);
            }
            Pull => {
                let image = self.new_image();
                self.arm(point, times);
                self.update(Some(&image));
            }
            Rollback => {
                self.sequence += 1;
                let yaml = self.manifest(self.sequence, None, "exit 3");
                // The generation that comes back brings its job, which the failed one had not: it begins anew.
                self.jobs_are_counted = false;
                self.arm(point, times);
                self.offer(&yaml);
            }
            Limits => {
                self.steady_mebibytes = 8 + (self.steady_mebibytes + 1) % 4;
                self.arm(point, times);
                self.update(None);
            }
            Large => {
                self.images += 1;
                let image = crate::disk::noise(&self.factory, &format!("large-{}", self.images), 6);
                self.arm(point, times);
                self.update(Some(&image));
            }
            Check => {
                let page = self.damage_a_layer();
                self.arm(point, times);
                self.switch_on();
                // Each start is a new one.
                self.steady = None;
                self.settle("a check of the layers");
                until("the whole page", || (fs::read(&page).ok()? == b"here\n").then_some(()));
                let mark = fs::read_to_string(self.device.path("content/in-use")).unwrap();
                assert_eq!(mark, fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim());
            }
            Trust => {
                self.arm(point, times);
                self.rotate();
                let version = self.root.1;
                until("the next root in force", || (self.status()?["trust"]["root"] == version).then_some(()));
            }
            Print => {
                let program = format!(
                    "n=0; while true; do echo line $n of {} {}; n=$((n+1)); [ $((n%40)) = 0 ] && sleep 0.1; done",
                    self.sequence + 1,
                    "x".repeat(40)
                );
                self.arm(point, times);
                self.update_to(None, &program);
                // What was on its way when the agent died may be gone; what was not read waited in the pipe.
                until("lines of the next agent", || {
                    let log = self.device.edgectl(&["logs", "deaf", "--tail", "1000"]);
                    let log = String::from_utf8_lossy(&log.stdout).into_owned();
                    let mark = format!(" of {} ", self.sequence);
                    let last =
                        log.lines().filter_map(|line| line.split_once(&mark)?.0.rsplit_once("line ")).next_back()?;
                    (last.1.parse::<u32>().ok()? > 200 && !self.armed.exists()).then_some(())
                });
                let bytes: u64 = fs::read_dir(self.device.path("log/deaf"))
                    .unwrap()
                    .map(|segment| segment.unwrap().metadata().unwrap().len())
                    .sum();
                assert!(bytes <= 10 << 10, "{bytes} bytes of log");
            }
            Reset => {
                let used = self.factory.keys.trust_root().with_file_name(format!("m{}.cose", self.sequence));
                self.arm(point, times);
                self.reset();
                let why = self.device.refuse(&used);
                assert!(why.contains("the highest seen"), "{why}");
                (self.steady, self.jobs_are_counted) = (None, true);
                self.update(None);
            }
            Collect => {
                let image = self.new_image();
                self.update(Some(&image));
                self.update(None);
                self.arm(point, times);
                // The answer does not come: who would give it is dead.
                let _ = self.device.edgectl(&["prune"]);
                self.settle("a collection");
                // What is half gone is fetched again.
                self.update(Some(&image));
            }
        }
        let what = format!("{scene:?} with a death at {point}, time {times}");
        until(&format!("{what}: the agent passed there"), || (!self.armed.exists()).then_some(()));
        self.settle(&what);
        if scene == Report {
            until("an empty outbox", || {
                let status: Value =
                    serde_json::from_slice(&self.device.edgectl(&["status", "-o", "json"]).stdout).ok()?;
                (status["fleet"]["waitingReports"] == 0 && status["fleet"]["problem"].is_null()).then_some(())
            });
        }
    }

    /// Waits until the world is as it must be.
    fn settle(&mut self, what: &str) {
        let mut last = String::new();
        let settled = wait::until(what, PATIENCE, || {
            last = self.wrong().err().unwrap_or_default();
            Ok(last.is_empty().then_some(()))
        });
        settled.unwrap_or_else(|error| panic!("{error:#}: {last}\n{}", self.device.said()));
        let steady = self.device.pid("steady");
        assert_eq!(*self.steady.get_or_insert(steady), steady, "{what}: what did not change was restarted");
        let said = self.device.said();
        assert!(!said.contains("panicked"), "{said}");
    }

    fn status(&self) -> Option<Value> {
        serde_json::from_slice(&self.device.edgectl(&["status", "-o", "json"]).stdout).ok()
    }

    fn wrong(&self) -> Result<(), String> {
        let check = |holds: bool, what: &dyn Fn() -> String| if holds { Ok(()) } else { Err(what()) };
        let output = self.device.edgectl(&["status", "-o", "json"]);
        let status: Value = serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
        let generation = &status["generation"];
        check(generation["sequence"] == self.active && generation["state"] == "good", &|| format!("{generation:#}"))?;
        check(status["candidate"].is_null(), &|| format!("{:#}", status["candidate"]))?;

        let workloads = status["workloads"].as_array().ok_or("no workloads")?;
        let name = |workload: &Value| workload["name"].as_str().unwrap_or_default().to_owned();
        let names: BTreeSet<String> = workloads.iter().map(name).collect();
        check(names == self.expected(), &|| format!("{names:?}"))?;
        for workload in workloads {
            let phase = if name(workload).starts_with("once") { "completed" } else { "running" };
            check(workload["phase"] == phase, &|| format!("{workload:#}"))?;
        }
        // One process for each that runs, and nobody else's child.
        let mut pids: Vec<i32> = workloads
            .iter()
            .filter_map(|workload| workload["pid"].as_i64())
            .filter_map(|pid| pid.try_into().ok())
            .collect();
        pids.push(self.device.agent().ok_or("no agent")?);
        pids.sort_unstable();
        let mut children = self.device.children();
        children.sort_unstable();
        check(children == pids, &|| format!("the keeper has {children:?}, wanted are {pids:?}"))?;

        let in_dir = |dir: &str| -> BTreeSet<String> {
            let entries = fs::read_dir(self.device.path(dir)).into_iter().flatten().flatten();
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        };
        let places = in_dir("workloads");
        check(places.is_subset(&names), &|| format!("places are left: {places:?}"))?;
        let pins: BTreeSet<String> =
            in_dir("run/netns").into_iter().filter_map(|pin| Some(pin.strip_prefix("w-")?.to_owned())).collect();
        check(pins.is_subset(&names), &|| format!("namespaces are left: {pins:?}"))?;
        for dir in ["keep", "content/blobs", "content/images"] {
            let unfinished: Vec<_> = in_dir(dir).into_iter().filter(|name| name.contains(".new-")).collect();
            check(unfinished.is_empty(), &|| format!("files are left in {dir}: {unfinished:?}"))?;
        }
        let kept = in_dir("content/partial");
        check(kept.is_empty(), &|| format!("beginnings of layers are left: {kept:?}"))?;
        let staged = in_dir("layers/ingest");
        check(staged.is_empty(), &|| format!("layers are left: {staged:?}"))?;
        let limit = self.limit_of_steady();
        let wanted = self.steady_mebibytes << 20;
        check(limit == Some(wanted), &|| format!("steady may use {limit:?} bytes, wanted are {wanted}"))?;
        let groups = self.groups();
        check(groups.is_subset(&names), &|| format!("cgroups are left: {groups:?}"))?;

        let done =
            fs::read_to_string(self.device.path(&format!("volumes/data/once-{}", self.active))).unwrap_or_default();
        let times = done.lines().count();
        check(times == 1 || times > 1 && !self.jobs_are_counted, &|| format!("the job was done {times} times"))
    }

    fn limit_of_steady(&self) -> Option<u64> {
        let output = self.device.edgectl(&["inspect", "steady", "-o", "json"]);
        let inspect: Value = serde_json::from_slice(&output.stdout).ok()?;
        let limits = &inspect["limits"];
        ["memory.max", "memory.limit_in_bytes"].iter().find_map(|file| limits[file].as_str())?.parse().ok()
    }

    /// The cgroups beside that of `steady`.
    fn groups(&self) -> BTreeSet<String> {
        let output = self.device.edgectl(&["inspect", "steady", "-o", "json"]);
        let inspect: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let group = PathBuf::from(inspect["cgroup"].as_str().unwrap_or_default());
        let Some(parent) = group.parent().filter(|_| group.is_absolute()) else { return BTreeSet::new() };
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        let groups = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        groups.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }
}

/// Devices beside each other: what takes time is waiting.
const DEVICES: usize = 4;

/// Each device takes the next death of the plan as soon as it is done with one.
fn play(plan: &[(Scene, &'static str, u32)]) {
    let next = AtomicUsize::new(0);
    let take = || plan.get(next.fetch_add(1, Ordering::Relaxed));
    std::thread::scope(|scope| {
        for _ in 0..DEVICES.min(plan.len()) {
            scope.spawn(|| play_on_one_device(take));
        }
    });
}

fn play_on_one_device<'p>(take: impl Fn() -> Option<&'p (Scene, &'static str, u32)>) {
    let Some(mut death) = take() else { return };
    let mut story = Story::begin();
    let mut deaths = 0;
    loop {
        let (scene, point, times) = death;
        if deaths >= DEATHS_EACH {
            story.renew(None);
            deaths = 0;
        }
        if *scene == Birth {
            deaths = 0;
        }
        let begin = std::time::Instant::now();
        story.play(*scene, point, *times);
        deaths += if matches!(scene, Start | Damage | Check) { 2 } else { 1 };
        eprintln!("{scene:?} {point} {times}: {:?}", begin.elapsed());
        let Some(next) = take() else { return };
        death = next;
    }
}

/// Several deaths one after the other are told by the last of them.
fn last_of(point: &'static str) -> &'static str {
    point.lines().next_back().unwrap_or(point)
}

fn of(scenes: &[Scene]) -> Vec<(Scene, &'static str, u32)> {
    PLAN.iter().chain(&LATER).filter(|(scene, ..)| scenes.contains(scene)).copied().collect()
}

#[test]
fn every_crash_point_is_played() {
    let played: BTreeSet<&str> = PLAN.iter().chain(&LATER).map(|(_, point, _)| last_of(point)).collect();
    assert_eq!(played, BTreeSet::from(POINTS));
}

#[test]
fn an_agent_that_dies_while_it_starts_is_followed_by_one_that_finds_the_same_world() {
    play(&of(&[Birth, Start]));
}

#[test]
fn an_agent_that_dies_while_it_rebuilds_its_store_is_followed_by_one_that_finds_the_same_world() {
    play(&of(&[Damage]));
}

#[test]
fn an_agent_that_dies_at_any_step_of_an_update_is_followed_by_one_that_finishes_it() {
    play(&of(&[Update]));
}

#[test]
fn an_agent_that_dies_while_it_pulls_or_collects_is_followed_by_one_that_finishes_it() {
    play(&of(&[Pull, Collect]));
}

#[test]
fn an_agent_that_dies_while_limits_change_or_a_log_turns_is_followed_by_one_that_goes_on() {
    play(&of(&[Limits, Print]));
}

#[test]
fn an_agent_that_dies_while_it_keeps_a_layer_that_comes_is_followed_by_one_that_asks_for_the_rest() {
    play(&of(&[Large]));
}

#[test]
fn an_agent_that_dies_while_it_checks_its_layers_is_followed_by_one_that_checks_the_rest() {
    play(&of(&[Check]));
}

#[test]
fn an_agent_that_dies_while_it_takes_a_trust_root_is_followed_by_one_that_has_the_old_or_the_new() {
    play(&of(&[Trust]));
}

#[test]
fn an_agent_that_dies_while_the_workloads_are_reset_is_followed_by_one_that_takes_the_rest_away() {
    play(&of(&[Reset]));
}

#[test]
fn an_agent_that_dies_while_a_generation_fails_is_followed_by_one_that_goes_back() {
    play(&of(&[Rollback]));
}

#[test]
fn an_agent_that_dies_while_it_reports_is_followed_by_one_that_reports() {
    let mut story = Story::begin();
    let fleet = story.factory.fleet();
    story.config += &format!(
        "[fleet]\nurl = \"{}\"\nca = \"{}\"\nenroll-token = \"{}\"\nreport-interval = \"2s\"\n",
        fleet.url_seen_from_host(),
        story.factory.authority.cert().display(),
        fleet.enroll_token().unwrap()
    );
    story.renew(None);
    for (scene, point, times) in of(&[Report]) {
        story.play(scene, point, times);
    }
    let seen: Value = serde_json::from_str(&fleet.tool(&["device", crate::rig::DEVICE]).unwrap()).unwrap();
    assert_eq!(seen["report"]["generation"]["sequence"], story.active, "{seen:#}");
}
