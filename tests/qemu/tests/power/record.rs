//! The run that is recorded, with all that writes to a disk:
//!
//! | generation | what happens |
//! |---|---|
//! | | first boot: the data disk is formatted |
//! | 1 | a first image is pulled, unpacked, and good |
//! | 2 | adds an image, switches one workload, fills its log so that it turns every few seconds |
//! | | a bad edged lies in the place of the one that runs, the operator has it take over; its agents fall, and it is sent away |
//! | | a newer one takes over and stays |
//! | 3 | does not become healthy: 2 comes back |
//! | 4 | without the second image |
//! | 2 | the operator's rollback |
//! | 5 | as 4: nothing needs the second image any more, and a collection takes it away |

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use edged_qemu::artifacts::Firmware;
use edged_qemu::machine::{Machine, Setup};
use edged_qemu::power::crash;
use edged_qemu::power::log::WriteLog;
use edged_qemu::power::system::{self, PROGRAM_DIR};
use edged_qemu::site::{PROMPT, Site, console_shows};
use edged_qemu::wait::{self, LONG};

const HEAD: &str = "apiVersion: edge/v1\ndevice: edge-1\nissued: 2026-01-01T00:00:00Z\nexpires: 2036-01-01T00:00:00Z\n\
                    update: { probation: 2s, deadline: 20s }\n";

/// Its log turns when half of that is full.
const LOG_MAX: &str = "16Ki";

/// Of each agent, in its program. With a `/` instead of the point there is no such directory, and the agent ends: after it
/// has opened its store, and after the program was tried.
const DOOR: &[u8] = b"agent.sock";

/// Puts another edged in the place of the one that runs, as package managers do it: a new file, synced, renamed over the old
/// one. One byte more makes it another program.
///
/// At its first start it does nothing, at the next ones what the operator wants next.
const FIT: &str = "#!/bin/sh
cd /program
put() {
    /bin/busybox cp -p edged edged.new
    case $1 in
    newer) echo >> edged.new ;;
    bad) for at in DOORS; do printf / | /bin/busybox dd of=edged.new bs=1 seek=$at conv=notrunc 2> /dev/null; done ;;
    esac
    /bin/busybox touch had.$1
    /bin/busybox sync
    /bin/busybox mv edged.new edged && echo a $1 one lies there
}
if [ ! -e had.none ]; then /bin/busybox touch had.none
elif [ ! -e had.bad ]; then put bad
elif [ -e edged.refused ] && [ ! -e had.newer ]; then put newer
fi
";

/// What the device has said by a moment of the recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// Taken: it must be known after any cut.
    Taken(u32),
    /// Good, and nothing else was under way: it must run after any cut, offline, or what was ordered next.
    Runs(u32),
}

/// What must hold at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promised {
    pub taken: Option<u32>,
    /// One of these is the active generation; none if nothing was promised.
    pub runs: Vec<u32>,
}

/// A part of the story, for whoever reads a failure.
#[derive(Debug, Clone, Copy)]
pub struct Chapter {
    pub begins: usize,
    pub name: &'static str,
    pub is_cut: bool,
}

pub struct Recording {
    /// The disk before the first boot.
    pub base: PathBuf,
    pub log: WriteLog,
    /// Number of requests the disk had been given when each promise was made.
    pub promises: Vec<(usize, Promise)>,
    pub chapters: Vec<Chapter>,
    pub setup: Setup,
}

impl Recording {
    /// The strongest promises that held before the first `cut` requests were over.
    pub fn promised(&self, cut: usize) -> Promised {
        let made = self.promises.iter().filter(|(at, _)| *at <= cut).count();
        let (before, after) = self.promises.split_at(made);
        let runs = |promise: &(usize, Promise)| if let Promise::Runs(n) = promise.1 { Some(n) } else { None };
        let taken = before.iter().filter_map(|(_, promise)| match promise {
            Promise::Taken(n) => Some(*n),
            Promise::Runs(_) => None,
        });
        let now = before.iter().rev().find_map(runs);
        // Also a generation that was to fail may be the active one: until it has.
        let next = after.iter().find_map(runs);
        let taken = taken.max();
        let runs = now.map_or(Vec::new(), |now| {
            [Some(now), next, taken.filter(|taken| *taken > now)].into_iter().flatten().collect()
        });
        Promised { taken, runs }
    }

    pub fn chapter(&self, cut: usize) -> &'static str {
        self.chapters.iter().rev().find(|chapter| chapter.begins <= cut).map_or("", |chapter| chapter.name)
    }

    /// From where to where the power may be cut.
    pub fn stretches(&self, requests: usize) -> Vec<(usize, usize)> {
        let ends = self.chapters.iter().skip(1).map(|chapter| chapter.begins).chain([requests]);
        let stretches = self.chapters.iter().zip(ends).filter(|(chapter, _)| chapter.is_cut);
        stretches.map(|(chapter, end)| (chapter.begins, end)).filter(|(from, to)| from < to).collect()
    }
}

struct Recorder<'a> {
    site: &'a Site,
    device: Machine,
    log: WriteLog,
    promises: Vec<(usize, Promise)>,
    chapters: Vec<Chapter>,
}

pub fn record(firmware: &Firmware, dir: &Path) -> Result<Recording> {
    let site = Site::start(dir, firmware.arch)?;
    let images = Images { programs: site.publish("programs")?, busybox: site.publish("busybox")? };
    let home = dir.join("device");
    let allowed =
        format!("\n[log]\nworkload-max = \"{LOG_MAX}\"\n\n[allow]\nbind = [\"{PROGRAM_DIR}\"]\nhost-users = true\n");
    let mut setup = site.device(&home)?.configure(&allowed);
    let fit = FIT.replace("DOORS", &places_of(DOOR, &system::program(firmware, &home)?)?);
    setup.files.push((format!("{}/fit", PROGRAM_DIR.trim_start_matches('/')), 0o755, fit.into_bytes()));
    let mut setup = system::on_disk(firmware, &home, &setup)?;
    let disk = setup.disk.clone().context("a device has a disk")?;
    let base = disk.with_extension("base");
    crash::copy(&disk, &base)?;
    let log = WriteLog::create(&home.join("writes.log"))?;
    setup.write_log = Some(log.path().to_owned());
    let device = Machine::boot(firmware, &home, &setup)?;
    let chapters = vec![Chapter { begins: 0, name: "first boot", is_cut: true }];
    let mut recorder = Recorder { site: &site, device, log, promises: Vec::new(), chapters };
    recorder.tell(&images)?;
    let Recorder { mut device, log, promises, chapters, .. } = recorder;
    device.kill()?;
    drop(device);
    setup.write_log = None;
    setup.forward.clear();
    setup.is_never_cut = true;
    Ok(Recording { base, log, promises, chapters, setup })
}

/// The places of the points in these words.
fn places_of(words: &[u8], program: &[u8]) -> Result<String> {
    let point = words.iter().position(|byte| *byte == b'.').context("no point")?;
    let found = program.windows(words.len()).enumerate().filter(|(_, window)| *window == words);
    let places: Vec<String> = found.map(|(at, _)| (at + point).to_string()).collect();
    ensure!(!places.is_empty(), "edged does not hold {}", String::from_utf8_lossy(words));
    Ok(places.join(" "))
}

struct Images {
    programs: String,
    busybox: String,
}

impl Images {
    fn steady(&self, args: &str) -> String {
        let image = &self.programs;
        format!(
            "  steady:\n    image: {image}\n    args: {args}\n    stopTimeout: 500ms\n    resources: {{ memory: 8Mi, cpu: 100m }}\n"
        )
    }

    fn shell(&self, name: &str, script: &str, more: &str) -> String {
        let image = &self.busybox;
        format!(
            "  {name}:\n    image: {image}\n    command: [/bin/sh, -c, '{script}']\n    stopTimeout: 500ms\n    \
             resources: {{ memory: 16Mi, cpu: 200m }}\n{more}"
        )
    }

    /// Two hundred bytes, ten times a second.
    fn chatter(&self) -> String {
        let line = "a line for the log ".repeat(10);
        self.shell("chatter", &format!("while true; do echo {line}; sleep 0.1; done"), "")
    }

    fn fitter(&self) -> String {
        let more = format!(
            "    usernsMode: host\n    restart: {{ policy: never }}\n    \
             mounts: [{{ target: /program, source: {{ bind: {PROGRAM_DIR} }} }}]\n"
        );
        self.shell("fitter", "exec /program/fit", &more)
    }
}

impl Recorder<'_> {
    fn chapter(&mut self, name: &'static str) -> Result<()> {
        self.begin(name, true)
    }

    fn begin(&mut self, name: &'static str, is_cut: bool) -> Result<()> {
        self.chapters.push(Chapter { begins: self.log.entries()?, name, is_cut });
        Ok(())
    }

    fn promise(&mut self, promise: Promise) -> Result<()> {
        self.promises.push((self.log.entries()?, promise));
        Ok(())
    }

    fn tell(&mut self, images: &Images) -> Result<()> {
        let two = images.steady("[ignore-term]") + &images.chatter() + &images.fitter();
        // It never answers, however slow the machine: the probation fails, and the second generation comes back.
        let three = images.steady("[hang]")
            + "    restart: { policy: always, attempts: 1, backoff: 100ms }\n    \
               health: { probe: { tcp: { port: 9 } }, startPeriod: 100ms, interval: 500ms, timeout: 1s, retries: 1 }\n";
        self.device.console.wait_for(PROMPT, LONG)?;
        self.chapter("generation 1: pull, unpack, switch")?;
        self.generation(1, &images.steady("[hang]"), "good")?;
        self.chapter("generation 2: pull, unpack, switch")?;
        self.generation(2, &two, "good")?;
        self.chapter("logs that turn")?;
        self.log_turns()?;
        self.bad_upgrade()?;
        self.chapter("edged is upgraded in place")?;
        self.upgrade()?;
        self.chapter("generation 3: fails, and 2 comes back")?;
        self.generation(3, &three, "rolled back")?;
        self.chapter("generation 4")?;
        self.generation(4, &images.steady("[hang]"), "good")?;
        self.chapter("rollback by hand to 2")?;
        self.rollback(2)?;
        self.chapter("generation 5")?;
        self.generation(5, &images.steady("[hang]"), "good")?;
        self.chapter("collection")?;
        self.collect()?;
        console_shows(&mut self.device, "ps", "running", LONG).map(drop)
    }

    fn generation(&mut self, sequence: u32, workloads: &str, ends: &str) -> Result<()> {
        let yaml = format!("{HEAD}sequence: {sequence}\nworkloads:\n{workloads}");
        self.site.push(&self.device, &self.site.keys.sign(&format!("generation-{sequence}"), &yaml)?)?;
        self.promise(Promise::Taken(sequence))?;
        generation_is(&mut self.device, sequence, ends)?;
        if ends == "good" { self.promise(Promise::Runs(sequence)) } else { Ok(()) }
    }

    /// The first line that was kept is not the first that was printed.
    fn log_turns(&mut self) -> Result<()> {
        let oldest = |text: &str| text.lines().find(|line| line.contains("a line for the log")).map(str::to_owned);
        let first = oldest(&console_shows(&mut self.device, "logs chatter --tail 2000", "a line for the log", LONG)?);
        let device = &mut self.device;
        wait::until("two turns of the log", LONG, || {
            let now = oldest(&device.console.ask("logs chatter --tail 2000", PROMPT, LONG)?);
            Ok((now.is_some() && now != first).then_some(()))
        })
    }

    fn fit(&mut self, what: &str) -> Result<()> {
        self.device.console.ask("restart fitter", PROMPT, LONG)?;
        console_shows(&mut self.device, "logs fitter", &format!("a {what} one lies there"), LONG)?;
        let said = self.device.console.ask("upgrade", PROMPT, LONG)?;
        ensure!(said.contains("takes over"), "{said}");
        Ok(())
    }

    /// Nobody can bring back what was put in place and booted before it was tried: the power stays on for that long.
    fn bad_upgrade(&mut self) -> Result<()> {
        self.begin("a bad edged lies there, not tried", false)?;
        self.fit("bad")?;
        self.chapter("a bad edged takes over and is sent away")?;
        console_shows(&mut self.device, "status -o json", "\"upgradesReturned\": 1", LONG)?;
        console_shows(&mut self.device, "ps", "running", LONG).map(drop)
    }

    fn upgrade(&mut self) -> Result<()> {
        self.fit("newer")?;
        console_shows(&mut self.device, "status -o json", "\"upgradeOnTrial\"", LONG)?;
        console_shows(&mut self.device, "ps", "running", LONG).map(drop)
    }

    fn rollback(&mut self, to: u32) -> Result<()> {
        let device = &mut self.device;
        // The step before may be on its way to the disk still.
        let said = wait::until("a rollback that is taken", LONG, || {
            let said = device.console.ask(&format!("rollback {to}"), PROMPT, LONG)?;
            Ok((!said.contains("say it again")).then_some(said))
        })?;
        active_is(device, &[to]).map_err(|error| error.context(said))?;
        generation_is(device, to, "good")?;
        self.promise(Promise::Runs(to))
    }

    fn collect(&mut self) -> Result<()> {
        let device = &mut self.device;
        let said = wait::until("a collection that is done", LONG, || {
            let said = device.console.ask("prune", PROMPT, LONG)?;
            Ok((!said.contains("try again")).then_some(said))
        })?;
        ensure!(said.contains("busybox"), "the image that nothing needs was not taken away:\n{said}");
        // The files go at once, the disk hears of it when the file system next writes down what it did.
        let (log, before) = (&self.log, self.log.entries()?);
        wait::until("the collection to reach the disk", LONG, || Ok((log.entries()? > before + 8).then_some(())))
    }
}

/// Waits until the list of generations says so.
fn generation_is(device: &mut Machine, sequence: u32, state: &str) -> Result<()> {
    let mut last = String::new();
    wait::until(&format!("generation {sequence} to be {state}"), 2 * LONG, || {
        last = device.console.ask("generations", PROMPT, LONG)?;
        let line = last.lines().find(|line| line.split_whitespace().next() == Some(&sequence.to_string()));
        Ok(line.is_some_and(|line| line.contains(state)).then_some(()))
    })
    .map_err(|error| error.context(format!("the last answer was:\n{last}")))
}

/// Waits until one of these is what `status` calls the generation.
pub fn active_is(device: &mut Machine, wanted: &[u32]) -> Result<()> {
    let mut last = String::new();
    let mut what = String::from("generation");
    for sequence in wanted {
        write!(what, " {sequence}")?;
    }
    wait::until(&format!("{what} to be active"), LONG, || {
        last = device.console.ask("status", PROMPT, LONG)?;
        let line = last.lines().find_map(|line| line.trim_start().strip_prefix("generation"));
        let active = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u32>().ok());
        Ok(active.is_some_and(|active| wanted.contains(&active)).then_some(()))
    })
    .map_err(|error| error.context(format!("the last status was:\n{last}")))
}
