//! What the supervisor costs: proportional set size (proc(5), `smaps_rollup`) of keeper and agent.

use std::fs;

use anyhow::{Context, Result};

use super::device::Device;

/// Keeper and agent with twenty idle workloads.
const BUDGET_KIB: u64 = 8 << 10;
/// More for each workload.
const BUDGET_EACH_KIB: u64 = 64;
const WORKLOADS: usize = 20;

pub fn run() -> Result<()> {
    let mut device = Device::start("bench-memory")?;
    let empty = measure(&device)?;
    device.run_idle(WORKLOADS)?;
    let full = measure(&device)?;
    println!("{:<24} {:>10} {:>10} {:>10}", "PSS in KiB", "keeper", "agent", "together");
    for (name, [keeper, agent]) in [("no workloads", empty), ("20 idle workloads", full)] {
        println!("{name:<24} {keeper:>10} {agent:>10} {:>10}", keeper + agent);
    }
    let each = (full.iter().sum::<u64>() as f64 - empty.iter().sum::<u64>() as f64) / WORKLOADS as f64;
    let share = 100.0 * full.iter().sum::<u64>() as f64 / BUDGET_KIB as f64;
    println!(
        "{share:.0}% of the budget of {BUDGET_KIB} KiB; {each:.0} KiB for each workload (budget {BUDGET_EACH_KIB})"
    );
    device.switch_off()
}

fn measure(device: &Device) -> Result<[u64; 2]> {
    Ok([pss_kib(device.keeper)?, pss_kib(device.agent()?)?])
}

fn pss_kib(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss in smaps_rollup")?;
    line.split_whitespace().next().and_then(|number| number.parse().ok()).context("Pss is no number")
}
