//! How long until all is as it was: after `kill -9` of the agent, on this machine, until the next one answers for all
//! workloads; and after a power cut, in QEMU, from the kernel's hand-off until all workloads run, with no network.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::Artifacts;
use edged_qemu::filesystem::Filesystem;
use edged_qemu::machine::Machine;
use edged_qemu::process;
use edged_qemu::site::{PROMPT, Site, console_shows};
use edged_qemu::wait::{self, LONG};

use super::device::Device;
use super::{boot, median_and_p95};
use crate::image;
use crate::toolchain::Profile;
use crate::workloads;

const WORKLOADS: usize = 20;
const KILLS: usize = 5;
const CUTS: usize = 3;

pub fn run() -> Result<()> {
    let rows = [
        ("agent killed, until its successor answers", after_kills()?),
        ("power cut, from hand-off until all run", after_cuts()?),
    ];
    println!("{:<46} {:>10} {:>10}", format!("{WORKLOADS} workloads, ms"), "median", "p95");
    for (what, times) in rows {
        let (median, p95) = median_and_p95(times);
        println!("{what:<46} {median:>10.0} {p95:>10.0}");
    }
    Ok(())
}

fn after_kills() -> Result<Vec<f64>> {
    (0..KILLS).map(|_| after_kill()).collect()
}

/// Of a device that was just made: an agent that dies again soon is started again later, on purpose.
fn after_kill() -> Result<f64> {
    let mut device = Device::start("bench-recovery")?;
    device.run_idle(WORKLOADS)?;
    let (before, agent) = (device.pids()?, device.agent()?);
    let begin = Instant::now();
    process::run(Command::new("kill").args(["-KILL", &agent.to_string()]))?;
    // The same pids from another agent: nothing was started again.
    wait::until("the next agent", LONG, || {
        let is_another = device.agent().is_ok_and(|now| now != agent);
        Ok((is_another && device.pids().is_ok_and(|now| now == before)).then_some(()))
    })?;
    let took = begin.elapsed().as_secs_f64() * 1000.0;
    device.switch_off()?;
    Ok(took)
}

fn after_cuts() -> Result<Vec<f64>> {
    let arch = Arch::X86_64;
    let firmware = image::build(arch, Filesystem::Ext4, Profile::Release, None)?;
    workloads::build_all(arch)?;
    let dir = Artifacts::find().run_dir("bench-recovery-power", arch)?;
    let site = Site::start(&dir, arch)?;
    let programs = site.publish("programs")?;
    let home = dir.join("device");
    let mut setup = site.device(&home)?;
    setup.kernel.push("loglevel=7".to_owned());
    let mut device = Machine::boot(&firmware, &home, &setup)?;
    let manifest = boot::idle_manifest(&programs, WORKLOADS, "6Mi", "20m");
    site.push(&device, &site.keys.sign("recovery", &manifest)?)?;
    console_shows(&mut device, "generations", "good", 2 * LONG)?;
    let mut times = Vec::new();
    for _ in 0..CUTS {
        device.kill()?;
        device = Machine::boot(&firmware, &home, &setup)?;
        device.cable(false)?;
        device.kernel.wait_for("as init process", LONG)?;
        let begin = Instant::now();
        let runs = |log: &str| log.matches(" runs (pid").count();
        wait::until("all workloads", LONG, || Ok((runs(&device.kernel.history()) >= WORKLOADS).then_some(())))?;
        times.push(begin.elapsed().as_secs_f64() * 1000.0);
        let ps = device.console.ask("ps", PROMPT, LONG)?;
        let running = ps.matches("running").count();
        (running == WORKLOADS).then_some(()).with_context(|| format!("{running} run:\n{ps}"))?;
    }
    device.kill()?;
    dir.remove();
    Ok(times)
}
