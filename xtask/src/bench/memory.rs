//! What the supervisor costs: proportional set size (proc(5), `smaps_rollup`) of keeper and agent.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use edged_qemu::wait;

use super::device::Device;

/// Keeper and agent with twenty idle workloads.
const BUDGET_KIB: u64 = 8 << 10;
/// More for each workload.
const BUDGET_EACH_KIB: u64 = 64;
const WORKLOADS: usize = 20;

const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than a thread waits for work before it ends.
const STEADY: Duration = Duration::from_secs(2);

pub fn run() -> Result<()> {
    let mut device = Device::start("bench-memory")?;
    let empty = measure(&device)?;
    device.run_idle(1)?;
    let one = measure(&device)?;
    device.run_idle(WORKLOADS)?;
    let full = measure(&device)?;
    println!("{:<24} {:>10} {:>10} {:>10}", "PSS in KiB", "keeper", "agent", "together");
    for (name, [keeper, agent]) in [("no workload", empty), ("one idle workload", one), ("20 idle workloads", full)] {
        println!("{name:<24} {keeper:>10} {agent:>10} {:>10}", keeper + agent);
    }
    let sum = |of: [u64; 2]| of.iter().sum::<u64>() as f64;
    let share = 100.0 * sum(full) / BUDGET_KIB as f64;
    // The first one pays for the code that nothing before it had run.
    let further = (sum(full) - sum(one)) / (WORKLOADS - 1) as f64;
    println!("{share:.0}% of the budget of {BUDGET_KIB} KiB");
    println!(
        "{:.0} KiB for the first workload, {further:.0} KiB for each further one (budget {BUDGET_EACH_KIB})",
        sum(one) - sum(empty)
    );
    device.switch_off()
}

/// Of keeper and agent, once neither changes any more: what a start needed is given back a moment later.
fn measure(device: &Device) -> Result<[u64; 2]> {
    let mut steady = ([0, 0], Instant::now());
    wait::until("memory that does not change", PATIENCE, || {
        let now = [pss_kib(device.keeper)?, pss_kib(device.agent()?)?];
        if steady.0 != now {
            steady = (now, Instant::now());
        }
        Ok((steady.1.elapsed() > STEADY).then_some(now))
    })
}

fn pss_kib(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss in smaps_rollup")?;
    line.split_whitespace().next().and_then(|number| number.parse().ok()).context("Pss is no number")
}
