//! Everything that must hold, stage by stage, in one summary. A stage that fails does not stop the next one.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::{ARCH_ENV, Artifacts};
use edged_qemu::filesystem::Filesystem;
use edged_qemu::process::line;

use crate::image;
use crate::progress;
use crate::setup::{self, Need};
use crate::toolchain::Profile;
use crate::workloads;

#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub quick: bool,
    pub soak: bool,
}

/// The variable that tells stories to take their time.
const SOAK_ENV: &str = "EDGED_QEMU_SOAK";

/// How many programs the keeper's tests start to see that no end is lost, and how many they start in a soak.
const STARTS_ENV: &str = "EDGED_STARTS";
const SOAK_STARTS: &str = "100000";

/// The tests of a device on the host wait most of their time (for a back-off, a probation): more at once than there are
/// cores on a small machine.
const THREADS_ENV: &str = "RUST_TEST_THREADS";
const LEAST_THREADS: usize = 5;

/// The host's programs that stories run.
const HOST_PROGRAMS: [&str; 4] = ["--package", "edged", "--package", "edge-fleet"];

struct Stage {
    name: String,
    took: Duration,
    passed: u32,
    failed: u32,
    note: String,
}

#[derive(Default)]
struct Summary {
    stages: Vec<Stage>,
}

impl Summary {
    fn stage(&mut self, name: &str, run: impl FnOnce() -> Result<Outcome>) {
        progress::step(name);
        let begin = Instant::now();
        let outcome = run().unwrap_or_else(|error| {
            eprintln!("{error:#}");
            Outcome { passed: 0, failed: 1, note: error.to_string().lines().next().unwrap_or_default().to_owned() }
        });
        let Outcome { passed, failed, note } = outcome;
        self.stages.push(Stage { name: name.to_owned(), took: begin.elapsed(), passed, failed, note });
    }

    fn finish(&self) -> Result<()> {
        println!("\n{:<28} {:>7} {:>7} {:>9}", "stage", "passed", "failed", "seconds");
        for stage in &self.stages {
            let seconds = stage.took.as_secs_f64();
            println!("{:<28} {:>7} {:>7} {seconds:>9.1}  {}", stage.name, stage.passed, stage.failed, stage.note);
        }
        let passed: u32 = self.stages.iter().map(|stage| stage.passed).sum();
        let failed: u32 = self.stages.iter().map(|stage| stage.failed).sum();
        println!("\n{passed} passed, {failed} failed");
        if failed > 0 {
            bail!("{failed} of {} checks failed", passed + failed);
        }
        Ok(())
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    passed: u32,
    failed: u32,
    note: String,
}

impl Outcome {
    fn of(status: ExitStatus) -> Self {
        Self { passed: u32::from(status.success()), failed: u32::from(!status.success()), note: String::new() }
    }
}

pub fn run(options: &Options) -> Result<()> {
    let arches: &[Arch] = match (options.quick, options.soak) {
        (true, _) => &[],
        (false, false) => &[Arch::X86_64, Arch::Aarch64],
        (false, true) => &Arch::ALL,
    };
    let mut needs = vec![Need::HostTests];
    for arch in arches {
        needs.extend([Need::Build(*arch), Need::Boot(*arch)]);
    }
    setup::ensure(&needs)?;
    // Without it the tests that sign with the real signer say so and fail, each by its own name.
    if let Err(error) = setup::cosign(&Artifacts::find()) {
        progress::step(&format!("no cosign: {error:#}"));
    }

    let mut summary = Summary::default();
    summary.stage("format", || check(cargo().args(["fmt", "--all", "--check"])));
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    summary.stage("clippy", || check(cargo().args(clippy)));
    std::thread::scope(|scope| {
        let beside = |arch: Arch| scope.spawn(move || device_beside(arch));
        // Tests wait most of their time, and an emulated device is one thread: what the stories boot is built beside them,
        // with what they leave.
        let mut built = arches.first().copied().map(beside);
        host_tests(&mut summary, options.soak);
        for (position, arch) in arches.iter().enumerate() {
            if let Some(built) = built.take() {
                summary.stage(&format!("device for {arch}"), || joined(built));
            }
            built = arches.get(position + 1).copied().map(beside);
            summary.stage(&format!("stories on {arch}"), || stories(*arch, options.soak));
        }
    });
    summary.finish()
}

fn host_tests(summary: &mut Summary, soak: bool) {
    summary.stage("unit, property, host tests", || {
        let mut command = cargo();
        if soak {
            command.env(STARTS_ENV, SOAK_STARTS);
        }
        // Said by nobody but .cargo/config.toml.
        if std::env::var(THREADS_ENV).map_or(true, |said| said == LEAST_THREADS.to_string()) {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            command.env(THREADS_ENV, cores.max(LEAST_THREADS).to_string());
        }
        tests(command.args(["test", "--workspace", "--no-fail-fast"]))
    });
    summary.stage("licences, sources, bans", || deny(&["bans", "licenses", "sources"]));
    summary.stage("advisories", advisories);
}

fn device_beside(arch: Arch) -> Result<Outcome> {
    // Of this thread alone, and of the programs it starts: setpriority(2), NOTES.
    rustix::process::setpriority_process(None, 19).context("cannot step back behind the tests")?;
    device(arch)
}

fn joined(built: ScopedJoinHandle<Result<Outcome>>) -> Result<Outcome> {
    built.join().unwrap_or_else(|_| bail!("the build beside the tests panicked"))
}

fn cargo() -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(Artifacts::find().root());
    if let Ok(cosign) = Artifacts::find().cosign() {
        command.env("EDGED_COSIGN", cosign);
    }
    command
}

fn check(command: &mut Command) -> Result<Outcome> {
    let status = command.status().with_context(|| format!("cannot run {}", line(command)))?;
    Ok(Outcome::of(status))
}

/// Builds all that the stories of one architecture boot, push and type.
fn device(arch: Arch) -> Result<Outcome> {
    host_programs()?;
    for filesystem in data_types(arch) {
        image::build(arch, *filesystem, Profile::Firmware, None)?;
    }
    workloads::build_all(arch)?;
    Ok(Outcome { passed: 1, failed: 0, note: String::new() })
}

/// The other file system is tried on one architecture: its kernel is a large one, and the file system is the same.
fn data_types(arch: Arch) -> &'static [Filesystem] {
    if arch == Arch::X86_64 { &[Filesystem::Ext4, Filesystem::F2fs] } else { &[Filesystem::Ext4] }
}

/// `edgectl` and `edgefleet` for this machine.
pub fn host_programs() -> Result<()> {
    progress::step("building edgectl and edgefleet for this machine");
    progress::run(cargo().args(["build", "--quiet"]).args(HOST_PROGRAMS))
}

/// One after another: two emulated devices on two cores only slow each other down.
fn stories(arch: Arch, soak: bool) -> Result<Outcome> {
    let mut command = cargo();
    command.args(["test", "--package", "edged-qemu", "--no-fail-fast", "--test", "*"]);
    command.args(["--", "--ignored", "--test-threads=1"]);
    if !data_types(arch).contains(&Filesystem::F2fs) {
        command.args(["--skip", "f2fs"]);
    }
    command.env("EDGED_QEMU", "1").env(ARCH_ENV, arch.name());
    if soak {
        command.env(SOAK_ENV, "1");
    }
    tests(&mut command)
}

/// Runs tests, passes their output on, and counts.
fn tests(command: &mut Command) -> Result<Outcome> {
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run {}", line(command)))?;
    let mut outcome = Outcome { passed: 0, failed: 0, note: String::new() };
    let mut ignored = 0;
    for text in BufReader::new(child.stdout.take().context("no output")?).lines() {
        let text = text?;
        println!("{text}");
        if let Some([passed, failed, skipped]) = counts(&text) {
            outcome.passed += passed;
            outcome.failed += failed;
            ignored += skipped;
        }
    }
    let status = child.wait()?;
    if !status.success() && outcome.failed == 0 {
        outcome.failed = 1;
        "ended before all tests had run".clone_into(&mut outcome.note);
    } else if ignored > 0 {
        outcome.note = format!("{ignored} left to their own stage");
    }
    Ok(outcome)
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; …`
fn counts(text: &str) -> Option<[u32; 3]> {
    let rest = text.strip_prefix("test result: ")?.split_once(". ")?.1;
    let mut numbers = rest.split("; ").map(|part| part.split(' ').next()?.parse().ok());
    Some([numbers.next()??, numbers.next()??, numbers.next()??])
}

fn has_cargo_deny() -> bool {
    let version = Command::new("cargo").args(["deny", "--version"]).output();
    version.is_ok_and(|output| output.status.success())
}

fn deny(what: &[&str]) -> Result<Outcome> {
    if !has_cargo_deny() {
        progress::step("installing cargo-deny (a few minutes, once)");
        progress::run(Command::new("cargo").args(["install", "--quiet", "--locked", "cargo-deny"]))?;
    }
    check(cargo().args(["deny", "--workspace", "check", "--hide-inclusion-graph"]).args(what))
}

/// The database of advisories is a git repository elsewhere: without a way there this stage says so and is not counted.
fn advisories() -> Result<Outcome> {
    let fetched = cargo().args(["deny", "fetch", "db"]).output().context("cannot run cargo deny")?;
    if !fetched.status.success() {
        let note = "not checked: the advisory database cannot be reached".to_owned();
        return Ok(Outcome { passed: 0, failed: 0, note });
    }
    deny(&["advisories"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_line_of_a_test_run_is_counted() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(counts(line), Some([12, 3, 1]));
        assert_eq!(counts("test result_is_kept ... ok"), None);
    }
}
