//! The static programs as shipped. On a device `edgectl` is a second name of `edged`: the one file is what counts
//! against the budget; `edgectl` alone is what an operator's workstation needs.

use std::fs;
use std::path::Path;

use anyhow::Result;
use edged_qemu::arch::Arch;

use crate::toolchain::{self, Profile};

/// Both programs together, on a device.
const BUDGET_BYTES: u64 = 8 << 20;

pub fn run() -> Result<()> {
    println!("{:<10} {:>18} {:>8} {:>14}", "", "edged and edgectl", "budget", "edgectl alone");
    for arch in Arch::ALL {
        let programs = toolchain::build(arch, Profile::Release, "edged", &["edged", "edgectl"])?;
        let size = |path: &Path| Ok::<_, anyhow::Error>(fs::metadata(path)?.len());
        let (edged, edgectl) = (size(&programs.join("edged"))?, size(&programs.join("edgectl"))?);
        let share = 100.0 * edged as f64 / BUDGET_BYTES as f64;
        println!("{:<10} {edged:>18} {share:>7.0}% {edgectl:>14}", arch.name());
    }
    Ok(())
}
