//! Two hundred workloads at once: `edgectl apply` of a manifest that has them, on a device that has their image and runs one
//! of them, until all run; and SIGKILL for all of them, until two hundred others run.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::Result;
use edged_qemu::wait::{self, LONG};

use super::device::{Device, children};
use super::median_and_p95;
use super::restart::{kill, runs_sample};

const WORKLOADS: usize = 200;
/// A device of its own for each: a second crash within a short time waits on purpose.
const ROUNDS: usize = 3;

pub fn run() -> Result<()> {
    let (mut starts, mut crashes) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut device = Device::start("bench-many")?;
        // The image is there.
        device.run_idle(1)?;
        let signed = device.sign_idle(WORKLOADS)?;
        starts.push(until_so_many_run(&device, WORKLOADS - 1, || device.apply(&signed))?);
        device.wait_until_good()?;
        let before = running(&device)?;
        crashes.push(until_so_many_run(&device, WORKLOADS, || before.iter().copied().try_for_each(kill))?);
        device.switch_off()?;
    }
    println!("{:<40} {:>10} {:>14}", format!("{WORKLOADS} workloads, {ROUNDS} rounds, ms"), "median", "each");
    for (what, times) in [("a manifest, until all run", starts), ("crashed at once, until all run again", crashes)] {
        let (median, _) = median_and_p95(times);
        println!("{what:<40} {median:>10.0} {:>14.2}", median / WORKLOADS as f64);
    }
    Ok(())
}

/// The workloads' own processes.
fn running(device: &Device) -> Result<BTreeSet<u32>> {
    Ok(children(device.keeper)?.into_iter().filter(|pid| runs_sample(*pid)).collect())
}

/// Other than those that ran before the deed.
fn until_so_many_run(device: &Device, count: usize, deed: impl FnOnce() -> Result<()>) -> Result<f64> {
    let before = running(device)?;
    let begin = Instant::now();
    deed()?;
    wait::until(&format!("{count} workloads"), LONG, || {
        Ok((running(device)?.difference(&before).count() >= count).then(|| begin.elapsed().as_secs_f64() * 1000.0))
    })
}
