//! How long a device takes to be of use: from the kernel's hand-off to its first process until the keeper is up, and
//! until the workload of its last good generation runs, with no network. Times are those at which the lines come out of
//! the serial port, under emulation: figures to compare, not to promise.

use std::time::Instant;

use anyhow::{Result, ensure};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::Artifacts;
use edged_qemu::filesystem::Filesystem;
use edged_qemu::machine::Machine;
use edged_qemu::site::{Site, console_shows};
use edged_qemu::wait::LONG;

use super::median_and_p95;
use crate::image;
use crate::setup::{self, Need};
use crate::toolchain::Profile;
use crate::workloads;

const BOOTS: usize = 5;

pub fn run() -> Result<()> {
    setup::cosign(&Artifacts::find())?;
    crate::test::host_programs()?;
    println!("{:<34} {:>12} {:>12}", "from the kernel's hand-off, ms", "keeper up", "workload");
    for arch in [Arch::X86_64, Arch::Aarch64] {
        setup::ensure(&[Need::Boot(arch)])?;
        let firmware = image::build(arch, Filesystem::Ext4, Profile::Release, None)?;
        workloads::build_all(arch)?;
        let dir = Artifacts::find().run_dir("bench-boot", arch)?;
        let site = Site::start(&dir, arch)?;
        let programs = site.publish("programs")?;
        let home = dir.join("device");
        let mut setup = site.device(&home)?;
        // The kernel tells when it hands over.
        setup.kernel.push("loglevel=7".to_owned());
        prepare(&site, Machine::boot(&firmware, &home, &setup)?, &programs)?;
        let mut keeper = Vec::new();
        let mut workload = Vec::new();
        for _ in 0..BOOTS {
            let (up, runs) = boot_once(&mut Machine::boot(&firmware, &home, &setup)?)?;
            keeper.push(up);
            workload.push(runs);
        }
        let ((keeper, _), (workload, _)) = (median_and_p95(keeper), median_and_p95(workload));
        println!("{:<34} {keeper:>12.0} {workload:>12.0}", format!("{arch}, median of {BOOTS}"));
        dir.remove();
    }
    Ok(())
}

/// So many workloads that wait for ever.
pub fn idle_manifest(image: &str, count: usize, memory: &str, cpu: &str) -> String {
    let mut yaml = "apiVersion: edge/v1\ndevice: edge-1\nsequence: 1\nissued: 2026-01-01T00:00:00Z\n\
                    expires: 2036-01-01T00:00:00Z\nupdate: { probation: 1s }\nworkloads:\n"
        .to_owned();
    for number in 0..count {
        yaml.push_str(&format!(
            "  w{number}:\n    image: {image}\n    args: [hang]\n    resources: {{ memory: {memory}, cpu: {cpu} }}\n"
        ));
    }
    yaml
}

/// Makes the disk as it is in the field: formatted, with a good generation and its image on it.
fn prepare(site: &Site, mut device: Machine, image: &str) -> Result<()> {
    let manifest = idle_manifest(image, 1, "8Mi", "100m");
    site.push(&device, &site.keys.sign("boot", &manifest)?)?;
    console_shows(&mut device, "generations", "good", LONG)?;
    device.console.say("poweroff")?;
    device.wait_for_power_off(LONG)
}

fn boot_once(device: &mut Machine) -> Result<(f64, f64)> {
    device.cable(false)?;
    device.kernel.wait_for("as init process", LONG)?;
    let begin = Instant::now();
    let log = device.kernel.wait_for("is up after", LONG)?;
    ensure!(!log.contains("formatting"), "the disk was empty:\n{log}");
    let up = begin.elapsed().as_secs_f64() * 1000.0;
    device.kernel.wait_for("w0 runs (pid", LONG)?;
    let runs = begin.elapsed().as_secs_f64() * 1000.0;
    console_shows(device, "ps", "running", LONG)?;
    Ok((up, runs))
}
