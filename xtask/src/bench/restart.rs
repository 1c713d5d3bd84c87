//! From a crash to running again: SIGKILL for a workload's process, until another one stands in its place. Beside it, in
//! turns, a start of the same workload: the operator's word on the agent's socket, until its process runs. And podman with
//! `--restart always` and the same program.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use edged_qemu::arch::Arch;
use edged_qemu::process;

use super::device::{Device, children};
use super::median_and_p95;
use crate::progress;
use crate::toolchain::{self, Profile};

const WORKLOADS: usize = 20;
const PATIENCE: Duration = Duration::from_secs(20);

pub fn run() -> Result<()> {
    let mut device = Device::start("bench-restart")?;
    device.run_idle(WORKLOADS)?;
    let (mut ours, mut starts) = (Vec::new(), Vec::new());
    // Each is killed once: the second crash of one within a short time waits on purpose. A stop by an operator and a
    // start after it count as nothing that went wrong.
    for (name, pid) in device.pids()? {
        device.stop(&name)?;
        until(|| children(device.keeper).is_ok_and(|now| !now.contains(&pid)))?;
        let word = device.word_to_start(&name)?;
        let (took, pid) = until_another_runs(device.keeper, || word.say())?;
        starts.push(took);
        device.wait_for(&name, pid)?;
        let (took, pid) = until_another_runs(device.keeper, || kill(pid))?;
        ours.push(took);
        device.wait_for(&name, pid)?;
    }
    device.switch_off()?;
    let (start, start_p95) = median_and_p95(starts);
    let (median, p95) = median_and_p95(ours);
    println!("{:<32} {:>10} {:>10}", "ms", "median", "p95");
    println!("{:<32} {start:>10.1} {start_p95:>10.1}", "a start, from the word to it");
    println!("{:<32} {median:>10.1} {p95:>10.1}", "crash to running again");
    println!("{:<32} {:>9.2}x", "the second of the first", median / start);
    match podman() {
        Ok(theirs) => {
            let (peer, peer_p95) = median_and_p95(theirs);
            println!("{:<32} {peer:>10.1} {peer_p95:>10.1}", "podman --restart always");
            println!("{:<32} {:>9.1}x", "edged is faster by", peer / median);
        }
        Err(error) => progress::step(&format!("podman was not measured: {error:#}")),
    }
    Ok(())
}

/// How long it takes after `deed` until another process of ours runs the sample, and which.
fn until_another_runs(keeper: u32, deed: impl FnOnce() -> Result<()>) -> Result<(f64, u32)> {
    let before = children(keeper)?;
    let mut found = None;
    let begin = Instant::now();
    deed()?;
    until(|| {
        let now = children(keeper).unwrap_or_default();
        found = now.into_iter().find(|pid| !before.contains(pid) && runs_sample(*pid));
        found.is_some()
    })?;
    let took = begin.elapsed().as_secs_f64() * 1000.0;
    Ok((took, found.context("nothing runs")?))
}

/// Not by kill(1), whose own start would be measured.
pub(super) fn kill(pid: u32) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("no process")?;
    Ok(rustix::process::kill_process(pid, rustix::process::Signal::KILL)?)
}

fn until(mut holds: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        ensure!(Instant::now() < deadline, "nothing stands in its place after {PATIENCE:?}");
        // What is measured is shorter than any pause.
        std::thread::yield_now();
    }
    Ok(())
}

/// The program itself, not the supervisor on its way to execute it.
pub(super) fn runs_sample(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sample")
}

fn podman() -> Result<Vec<f64>> {
    const NAME: &str = "edged-bench";
    let arch = Arch::host().context("this machine's architecture is none of ours")?;
    let sample = toolchain::build(arch, Profile::Firmware, "sample-programs", &["sample"])?.join("sample");
    let root = tempfile::tempdir()?;
    for dir in ["proc", "sys", "dev", "tmp", "etc", "run"] {
        fs::create_dir(root.path().join(dir))?;
    }
    fs::copy(sample, root.path().join("sample"))?;
    let _removed = process::run(Command::new("podman").args(["rm", "-f", NAME]));
    let result = podman_runs(NAME, root.path());
    process::run(Command::new("podman").args(["rm", "-f", "-t", "0", NAME]))?;
    result
}

fn podman_runs(name: &str, root: &Path) -> Result<Vec<f64>> {
    let mut run = Command::new("podman");
    // Its default, crun, refuses a host with both versions of cgroups.
    run.args([
        "--runtime",
        "runc",
        "run",
        "-d",
        "--name",
        name,
        "--restart",
        "always",
        "--network",
        "none",
        "--ulimit",
        "nofile=1024:1024",
    ]);
    run.args(["--ulimit", "nproc=1024:1024", "--memory", "8m", "--rootfs"]).arg(root).args(["/sample", "hang"]);
    process::run(&mut run)?;
    let pid = || -> Result<u32> {
        let text = process::read(Command::new("podman").args(["inspect", "-f", "{{.State.Pid}}", name]))?;
        Ok(text.trim().parse()?)
    };
    let mut times = Vec::new();
    for _ in 0..WORKLOADS {
        let before = samples()?;
        ensure!(!before.is_empty(), "podman's workload does not run (pid {})", pid()?);
        let begin = Instant::now();
        kill(before[0])?;
        until(|| samples().is_ok_and(|now| now.iter().any(|pid| !before.contains(pid))))?;
        times.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(times)
}

/// Every process on this machine that runs the sample program.
fn samples() -> Result<Vec<u32>> {
    let pids = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(pids.filter(|pid| runs_sample(*pid)).collect())
}
