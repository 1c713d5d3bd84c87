//! Figures. A figure stands here only when this program measures it.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::Artifacts;
use edged_qemu::machine::{Machine, Setup, blank_disk};
use edged_qemu::wait;

use crate::image;
use crate::setup::{self, Need};
use crate::toolchain::{self, Profile};

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Bench {
    /// Sizes of both static binaries, per architecture
    Sizes,
    /// Power-on to the keeper's first line, in QEMU
    Boot,
}

/// Both binaries together, as shipped.
const BUDGET_BYTES: u64 = 8 << 20;
const BOOTS: usize = 5;

pub fn run(what: &[Bench]) -> Result<()> {
    let what = if what.is_empty() { &[Bench::Sizes, Bench::Boot][..] } else { what };
    for bench in what {
        match bench {
            Bench::Sizes => sizes()?,
            Bench::Boot => boot()?,
        }
    }
    Ok(())
}

fn sizes() -> Result<()> {
    println!("{:<10} {:>12} {:>12} {:>12} {:>8}", "", "edged", "edgectl", "together", "budget");
    for arch in Arch::ALL {
        let programs = toolchain::build(arch, Profile::Release, "edged", &["edged", "edgectl"])?;
        let size = |path: &Path| Ok::<_, anyhow::Error>(fs::metadata(path)?.len());
        let (edged, edgectl) = (size(&programs.join("edged"))?, size(&programs.join("edgectl"))?);
        let share = 100.0 * (edged + edgectl) as f64 / BUDGET_BYTES as f64;
        println!("{:<10} {edged:>12} {edgectl:>12} {:>12} {share:>7.1}%", arch.name(), edged + edgectl);
    }
    Ok(())
}

/// Wall time on this machine: QEMU's own start, the kernel and the keeper's first steps on a formatted disk.
fn boot() -> Result<()> {
    let artifacts = Artifacts::find();
    for arch in [Arch::X86_64, Arch::Aarch64] {
        setup::ensure(&[Need::Boot(arch)])?;
        let firmware = image::build(arch, Profile::Release, None)?;
        let dir = artifacts.run_dir("bench-boot", arch)?;
        let disk = dir.join("data.img");
        blank_disk(&disk, 256)?;
        let setup = Setup { disk: Some(disk), ..Setup::default() };
        let mut times = Vec::new();
        // The first boot formats the disk and does not count.
        for round in 0..=BOOTS {
            let begin = Instant::now();
            let mut machine = Machine::boot(&firmware, &dir, &setup)?;
            machine.kernel.wait_for("is up after", wait::LONG)?;
            if round > 0 {
                times.push(begin.elapsed().as_millis());
            }
        }
        times.sort_unstable();
        let median = times.get(BOOTS / 2).context("no boots")?;
        println!("{arch}: power-on to keeper up, median of {BOOTS}: {median} ms (all: {times:?})");
    }
    Ok(())
}
