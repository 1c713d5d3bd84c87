//! The power goes at any moment, and what the device had promised holds.
//!
//! One run is recorded: first boot, a first generation pulled, unpacked and good; a second that adds an image and
//! switches one workload; a third that does not become healthy and is rolled back. Then disks are made as a power cut at
//! some moment may have left them, and each is booted, with the network out.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use edged_qemu::artifacts::Firmware;
use edged_qemu::filesystem::Filesystem;
use edged_qemu::machine::{Machine, Setup};
use edged_qemu::power::crash::{self, Flushes};
use edged_qemu::power::log::{Request, WriteLog};
use edged_qemu::site::{PROMPT, Site, console_shows};
use edged_qemu::story;
use edged_qemu::wait::{self, LONG};
use fastrand::Rng;

const HEAD: &str = "apiVersion: edge/v1\ndevice: edge-1\nissued: 2026-01-01T00:00:00Z\nexpires: 2036-01-01T00:00:00Z\n\
                    update: { probation: 2s, deadline: 20s }\n";

/// On each of the two architectures, which makes twenty-four; the long run has a thousand on each, and
/// `EDGED_CUTS` any other number.
const CUTS: usize = 12;
/// On one architecture.
const CUTS_ON_F2FS: usize = 5;

/// What the device has said by a moment of the recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Promise {
    /// Taken: it must be known after any cut.
    Taken(u32),
    /// Good: it must run after any cut, offline.
    Good(u32),
}

struct Recording {
    base: PathBuf,
    log: WriteLog,
    /// Number of requests the disk had been given when each promise was made.
    promises: Vec<(usize, Promise)>,
    setup: Setup,
}

impl Recording {
    /// The strongest promises that held before the first `cut` requests were over.
    fn promised(&self, cut: usize) -> (Option<u32>, Option<u32>) {
        let made = || self.promises.iter().filter(move |(at, _)| *at <= cut).map(|(_, promise)| *promise);
        let taken = made().filter_map(|promise| if let Promise::Taken(n) = promise { Some(n) } else { None }).max();
        let good = made().filter_map(|promise| if let Promise::Good(n) = promise { Some(n) } else { None }).max();
        (taken, good)
    }
}

fn record(firmware: &Firmware, dir: &Path) -> Result<Recording> {
    let site = Site::start(dir, firmware.arch)?;
    let (programs, busybox) = (site.publish("programs")?, site.publish("busybox")?);
    let home = dir.join("device");
    let mut setup = site.device(&home)?;
    let disk = setup.disk.clone().context("a device has a disk")?;
    let base = disk.with_extension("base");
    std::fs::copy(&disk, &base)?;
    let log = WriteLog::create(&home.join("writes.log"))?;
    setup.write_log = Some(log.path().to_owned());
    let mut device = Machine::boot(firmware, &home, &setup)?;
    let mut promises = Vec::new();

    let steady = |args: &str| {
        format!(
            "  steady:\n    image: {programs}\n    args: {args}\n    stopTimeout: 500ms\n    resources: {{ memory: 8Mi, cpu: 100m }}\n"
        )
    };
    let shell = |script: &str| {
        format!(
            "  shell:\n    image: {busybox}\n    command: [/bin/sh, -c, '{script}']\n    \
             stopTimeout: 500ms\n    resources: {{ memory: 8Mi, cpu: 100m }}\n"
        )
    };
    let first = format!("{HEAD}sequence: 1\nworkloads:\n{}", steady("[hang]"));
    let second = format!(
        "{HEAD}sequence: 2\nworkloads:\n{}{}",
        steady("[ignore-term]"),
        shell("while true; do echo a line for the log; sleep 0.05; done")
    );
    // It never answers: the probation fails, and the second generation comes back.
    let third = format!(
        "{HEAD}sequence: 3\nworkloads:\n{}    restart: {{ policy: always, attempts: 1, backoff: 100ms }}\n",
        steady("[crash]")
    );
    for (sequence, yaml, ends) in [(1, first, "good"), (2, second, "good"), (3, third, "rolled back")] {
        site.push(&device, &site.keys.sign(&format!("generation-{sequence}"), &yaml)?)?;
        promises.push((log.entries()?, Promise::Taken(sequence)));
        generation_is(&mut device, sequence, ends)?;
        if ends == "good" {
            promises.push((log.entries()?, Promise::Good(sequence)));
        }
    }
    console_shows(&mut device, "ps", "running", LONG)?;
    device.kill()?;
    drop(device);
    setup.write_log = None;
    setup.forward.clear();
    Ok(Recording { base, log, promises, setup })
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

/// Boots a disk with the network out, and looks whether what was promised holds.
fn look(
    firmware: &Firmware,
    dir: &Path,
    setup: &Setup,
    disk: &Path,
    promised: (Option<u32>, Option<u32>),
) -> Result<()> {
    let setup = Setup { disk: Some(disk.to_owned()), ..setup.clone() };
    let mut device = Machine::boot(firmware, dir, &setup)?;
    device.cable(false)?;
    device.console.wait_for(PROMPT, LONG)?;
    let (taken, good) = promised;
    if let Some(taken) = taken {
        let list = device.console.ask("generations", PROMPT, LONG)?;
        let known = list.lines().filter_map(|line| line.split_whitespace().next()?.parse::<u32>().ok());
        ensure!(known.clone().any(|known| known >= taken), "generation {taken} was taken and is not known:\n{list}");
    }
    if let Some(good) = good {
        // The one before must not be what runs; one after may be on its way.
        generation_is_active(&mut device, good)?;
        console_shows(&mut device, "ps", "running", LONG)?;
    }
    device.console.say("poweroff")?;
    device.wait_for_power_off(LONG)?;
    firmware.filesystem.check(disk)
}

fn generation_is_active(device: &mut Machine, at_least: u32) -> Result<()> {
    let mut last = String::new();
    wait::until(&format!("generation {at_least} or later to be active"), LONG, || {
        last = device.console.ask("status", PROMPT, LONG)?;
        let line = last.lines().find_map(|line| line.trim_start().strip_prefix("generation"));
        let active = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u32>().ok());
        Ok(active.is_some_and(|active| active >= at_least).then_some(()))
    })
    .map_err(|error| error.context(format!("the last status was:\n{last}")))
}

/// Moments: one in every part of the recording, and among them those next to a flush, where a missing one would show.
fn moments(requests: &[Request], count: usize, rng: &mut Rng) -> Vec<usize> {
    let flushes: Vec<usize> =
        requests.iter().enumerate().filter(|(_, request)| **request == Request::Flush).map(|(at, _)| at).collect();
    let mut moments: Vec<usize> = (0..count)
        .map(|part| {
            let (from, to) = (part * requests.len() / count, (part + 1) * requests.len() / count);
            let near: Vec<&usize> = flushes.iter().filter(|at| (from..to).contains(at)).collect();
            match (near.is_empty(), rng.bool()) {
                // Just before it is answered.
                (false, true) => *near[rng.usize(..near.len())],
                _ => rng.usize(from..to.max(from + 1)),
            }
        })
        .collect();
    moments.dedup();
    moments
}

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn what_was_promised_holds_after_a_cut_at_any_moment() {
    story::tell("power", |firmware, dir| cut_anywhere(firmware, dir, CUTS));
}

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn what_was_promised_holds_on_f2fs_too() {
    story::tell_on(Filesystem::F2fs, "power-f2fs", |firmware, dir| cut_anywhere(firmware, dir, CUTS_ON_F2FS));
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn cut_anywhere(firmware: &Firmware, dir: &Path, cuts: usize) -> Result<()> {
    let seed = number("EDGED_SEED").unwrap_or(7);
    let long = if std::env::var_os("EDGED_QEMU_SOAK").is_some() { 1000 } else { cuts };
    let cuts = number("EDGED_CUTS").and_then(|cuts| usize::try_from(cuts).ok()).unwrap_or(long);
    let recording = record(firmware, dir)?;
    let requests = recording.log.read()?;
    let reached_the_disk = recording.promises.windows(2).all(|pair| pair[0].0 < pair[1].0);
    ensure!(reached_the_disk, "the device made promises and wrote nothing: {:?}", recording.promises);
    println!("{} requests to the disk, {:?}; seed {seed}", requests.len(), recording.promises);
    let mut rng = Rng::with_seed(seed);
    let disk = dir.join("crashed.img");
    let build = |cut, flushes, rng: &mut Rng| {
        let parts = crash::survivors(&requests, cut, flushes, rng);
        crash::build(&recording.base, &recording.log, &parts, &disk)
    };
    for cut in moments(&requests, cuts, &mut rng) {
        build(cut, Flushes::Kept, &mut rng)?;
        let promised = recording.promised(cut);
        look(firmware, &dir.join("crashed"), &recording.setup, &disk, promised)
            .with_context(|| format!("cut after request {cut} of {}, promised {promised:?}", requests.len()))?;
    }
    // The same look must find fault with a disk that forgets what it was told to flush.
    for _ in 0..5 {
        build(requests.len(), Flushes::Ignored, &mut rng)?;
        let promised = recording.promised(requests.len());
        let is_whole = firmware.filesystem.mend(&disk)?
            && look(firmware, &dir.join("control"), &recording.setup, &disk, promised).is_ok();
        if !is_whole {
            return Ok(());
        }
    }
    bail!("five disks that ignored every flush looked whole: this test cannot fail")
}
