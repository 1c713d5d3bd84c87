//! Disks as a cut may have left them: made, booted, looked at; several machines at a time.

use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use edged_qemu::artifacts::Firmware;
use edged_qemu::filesystem::Filesystem;
use edged_qemu::machine::{Machine, Setup};
use edged_qemu::power::crash::{Flushes, Follower};
use edged_qemu::power::log::Request;
use edged_qemu::power::system::{DATA, SYSTEM};
use edged_qemu::site::PROMPT;
use edged_qemu::wait::{self, LONG};
use fastrand::Rng;

use crate::record::{Promised, Recording, active_is, record};

/// Disks that ignored every flush and are tried until one is found wanting.
const CONTROLS: usize = 5;

/// A long run is of use until so many have failed.
const FAILURES: usize = 5;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

pub fn anywhere(firmware: &Firmware, dir: &Path, cuts: usize) -> Result<()> {
    let seed = number("EDGED_SEED").unwrap_or(7);
    let long = if std::env::var_os("EDGED_QEMU_SOAK").is_some() { 1000 } else { cuts };
    let cuts = number("EDGED_CUTS").and_then(|cuts| usize::try_from(cuts).ok()).unwrap_or(long);
    let begin = Instant::now();
    let recording = record(firmware, dir)?;
    let requests = recording.log.read()?;
    let reached_the_disk = recording.promises.windows(2).all(|pair| pair[0].0 < pair[1].0);
    let promised = recording.promises.last().map_or(0, |(at, _)| *at);
    ensure!(requests.len() >= promised, "the log has a hole after {} of {promised} requests", requests.len());
    ensure!(reached_the_disk, "the device made promises and wrote nothing: {:?}", recording.promises);
    println!("{} requests to the disk, {:?}; seed {seed}", requests.len(), recording.promises);
    println!("recorded in {} s: {:?}", begin.elapsed().as_secs(), recording.chapters);
    let mut rng = Rng::with_seed(seed);
    let moments = moments(&requests, recording.stretches(requests.len()), cuts, &mut rng);
    let run =
        Run { firmware, dir, recording: &recording, requests: &requests, seed, progress: Progress::of(moments.len()) };
    run.all(&moments)?;
    run.control(&mut rng)
}

struct Run<'a> {
    firmware: &'a Firmware,
    dir: &'a Path,
    recording: &'a Recording,
    requests: &'a [Request],
    seed: u64,
    progress: Mutex<Progress>,
}

impl Run<'_> {
    /// Each worker has its own stretch of the recording, and so its own disk that follows the log.
    fn all(&self, moments: &[usize]) -> Result<()> {
        let workers = number("EDGED_MACHINES").and_then(|n| usize::try_from(n).ok());
        let workers = workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let stretch = moments.len().div_ceil(workers).max(1);
        std::thread::scope(|scope| {
            let work = |(number, moments)| scope.spawn(move || self.stretch(number, moments));
            let started: Vec<_> = moments.chunks(stretch).enumerate().map(work).collect();
            started.into_iter().try_for_each(|worker| match worker.join() {
                Ok(result) => result,
                Err(_) => bail!("a worker panicked"),
            })
        })?;
        let progress = self.lock();
        println!(
            "{} cuts in {:.0} s: {:.1} s each",
            progress.done,
            progress.begin.elapsed().as_secs_f64(),
            progress.each()
        );
        match progress.failures.as_slice() {
            [] => Ok(()),
            failures => bail!("{} of {} cuts:\n{}", failures.len(), progress.done, failures.join("\n\n")),
        }
    }

    fn stretch(&self, worker: usize, moments: &[usize]) -> Result<()> {
        let path = |what: &str| self.dir.join(format!("{what}-{worker}.img"));
        let mut follower = Follower::new(&self.recording.base, &self.recording.log, self.requests, &path("follows"))?;
        let disk = path("crashed");
        for cut in moments {
            if self.lock().failures.len() >= FAILURES {
                return Ok(());
            }
            follower.cut(*cut, Flushes::Kept, &mut self.chance(*cut), &disk)?;
            let promised = self.recording.promised(*cut);
            let home = self.dir.join(format!("crashed-{worker}"));
            let failure = match look(self.firmware, &home, &self.recording.setup, &disk, &promised) {
                Ok(()) => None,
                Err(error) => {
                    let kept = self.dir.join(format!("failed-{cut}.img"));
                    let mut failure = self.failure(*cut, &promised, &kept, &error);
                    // What it said would be lost with the next.
                    let saved = follower
                        .cut(*cut, Flushes::Kept, &mut self.chance(*cut), &kept)
                        .and_then(|()| Ok(std::fs::rename(&home, kept.with_extension(""))?));
                    if let Err(lost) = saved {
                        failure.push_str(&format!("\nnot all of it could be kept: {lost:#}"));
                    }
                    Some(failure)
                }
            };
            self.lock().one_more(self.recording.chapter(*cut), failure);
        }
        Ok(())
    }

    /// What a cut leaves does not depend on what other cuts there are.
    fn chance(&self, cut: usize) -> Rng {
        Rng::with_seed(self.seed ^ ((cut as u64) << 16))
    }

    fn failure(&self, cut: usize, promised: &Promised, kept: &Path, error: &anyhow::Error) -> String {
        format!(
            "cut after request {cut} of {} ({}), promised {promised:?}; the disk as it was: {}\n{error:#}",
            self.requests.len(),
            self.recording.chapter(cut),
            kept.display()
        )
    }

    /// The same look must find fault with a disk that forgets what it was told to flush.
    fn control(&self, rng: &mut Rng) -> Result<()> {
        let (follows, disk) = (self.dir.join("follows.img"), self.dir.join("control.img"));
        let filesystem = self.firmware.filesystem;
        for _ in 0..CONTROLS {
            let Recording { base, log, setup, .. } = self.recording;
            Follower::new(base, log, self.requests, &follows)?.cut(
                self.requests.len(),
                Flushes::Ignored,
                rng,
                &disk,
            )?;
            let promised = self.recording.promised(self.requests.len());
            let is_whole = Filesystem::Ext4.can_be_mended(&disk, SYSTEM)?
                && filesystem.can_be_mended(&disk, DATA)?
                && look(self.firmware, &self.dir.join("control"), setup, &disk, &promised).is_ok();
            if !is_whole {
                return Ok(());
            }
        }
        bail!("{CONTROLS} disks that ignored every flush looked whole: this test cannot fail")
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is told while it goes on: a thousand cuts take hours.
struct Progress {
    begin: Instant,
    all: usize,
    done: usize,
    failures: Vec<String>,
}

impl Progress {
    fn of(all: usize) -> Mutex<Self> {
        Mutex::new(Self { begin: Instant::now(), all, done: 0, failures: Vec::new() })
    }

    /// Seconds for a cut, all machines together.
    fn each(&self) -> f64 {
        self.begin.elapsed().as_secs_f64() / self.done.max(1) as f64
    }

    fn one_more(&mut self, chapter: &str, failure: Option<String>) {
        self.done += 1;
        let left = (self.all - self.done) as f64 * self.each();
        // Not by print!, which tests keep to themselves until they fail.
        let mut out = std::io::stderr().lock();
        let _ = writeln!(
            out,
            "power: {} of {} cuts, {} failed, {:.1} s each, {:.0} min left ({chapter})",
            self.done,
            self.all,
            self.failures.len() + usize::from(failure.is_some()),
            self.each(),
            left / 60.0
        );
        if let Some(failure) = &failure {
            let _ = writeln!(out, "{failure}");
        }
        self.failures.extend(failure);
    }
}

/// Boots a disk with the network out, and looks whether what was promised holds.
fn look(firmware: &Firmware, dir: &Path, setup: &Setup, disk: &Path, promised: &Promised) -> Result<()> {
    let setup = Setup { disk: Some(disk.to_owned()), ..setup.clone() };
    let mut device = Machine::boot(firmware, dir, &setup)?;
    device.cable(false)?;
    device.console.wait_for(PROMPT, LONG)?;
    if let Some(taken) = promised.taken {
        let list = device.console.ask("generations", PROMPT, LONG)?;
        let mut known = list.lines().filter_map(|line| line.split_whitespace().next()?.parse::<u32>().ok());
        ensure!(known.any(|known| known >= taken), "generation {taken} was taken and is not known:\n{list}");
    }
    if !promised.runs.is_empty() {
        active_is(&mut device, &promised.runs)?;
        all_run(&mut device)?;
        // Whatever became of the log, it is read to its end.
        let logs = device.console.ask("logs steady", PROMPT, LONG)?;
        ensure!(!logs.contains("error"), "{logs}");
    }
    device.console.say("poweroff")?;
    device.wait_for_power_off(LONG)?;
    Filesystem::Ext4.check_part(disk, SYSTEM).context("the system's part")?;
    firmware.filesystem.check_part(disk, DATA).context("the data's part")
}

/// Every workload of the active generation: what does not run has been done.
fn all_run(device: &mut Machine) -> Result<()> {
    let mut last = String::new();
    wait::until("every workload to run", LONG, || {
        last = device.console.ask("ps", PROMPT, LONG)?;
        // Behind the head; lines further in tell more of the one before, the last is the next prompt.
        let rows = last.lines().skip(1).filter(|line| line.split_whitespace().count() > 2 && !line.starts_with(' '));
        let mut rows = rows.peekable();
        let is_there = rows.peek().is_some();
        Ok((is_there && rows.all(|row| row.contains("running") || row.contains("completed"))).then_some(()))
    })
    .map_err(|error| error.context(format!("the last answer was:\n{last}")))
}

/// As many moments in each stretch as in any other that has so many, each in a part of its own; and among them those next to
/// a flush, where a missing one would show. With fewer moments than stretches, chance says which are left out.
fn moments(requests: &[Request], mut stretches: Vec<(usize, usize)>, count: usize, rng: &mut Rng) -> Vec<usize> {
    rng.shuffle(&mut stretches);
    let longest = stretches.iter().map(|(begin, end)| end - begin).max().unwrap_or(0);
    let mut parts = vec![0; stretches.len()];
    // One after the other, as cards are dealt.
    let turns =
        (0..longest).flat_map(|turn| stretches.iter().enumerate().filter(move |(_, (from, to))| turn < to - from));
    turns.take(count).for_each(|(stretch, _)| parts[stretch] += 1);
    let mut moments = Vec::with_capacity(count);
    for ((begin, end), parts) in stretches.into_iter().zip(parts) {
        let at = |part: usize| begin + part * (end - begin) / parts;
        for part in 0..parts {
            let (from, to) = (at(part), at(part + 1));
            let near: Vec<usize> = (from..to).filter(|at| requests[*at] == Request::Flush).collect();
            moments.push(match (near.is_empty(), rng.bool()) {
                // Just before it is answered.
                (false, true) => near[rng.usize(..near.len())],
                _ => rng.usize(from..to),
            });
        }
    }
    moments.sort_unstable();
    moments
}

#[test]
fn every_stretch_has_its_moments() {
    let requests: Vec<Request> = (0..1000)
        .map(|n| match n % 7 {
            0 => Request::Flush,
            _ => Request::Write { at: n * 512, length: 512, data: 0, is_durable: false },
        })
        .collect();
    let stretches = vec![(0, 10), (10, 20), (30, 900), (900, 1000)];
    let found = moments(&requests, stretches.clone(), 40, &mut Rng::with_seed(1));
    assert!(found.is_sorted() && found.len() == 40, "{found:?}");
    assert!(found.windows(2).all(|two| two[0] != two[1]), "one moment is cut once: {found:?}");
    assert!(!found.iter().any(|at| (20..30).contains(at)), "{found:?}");
    for (from, to) in &stretches {
        let inside = found.iter().filter(|at| (*from..*to).contains(at)).count();
        assert!(inside == 10, "{inside} between {from} and {to}: {found:?}");
    }
    // The short ones have no more than they are long.
    assert_eq!(moments(&requests, stretches.clone(), 400, &mut Rng::with_seed(1)).len(), 400);
    assert_eq!(moments(&requests, vec![(0, 10)], 400, &mut Rng::with_seed(1)).len(), 10);
    assert_eq!(moments(&requests, stretches, 3, &mut Rng::with_seed(1)).len(), 3);
}
