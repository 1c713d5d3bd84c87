//! `cargo xtask bench`: figures, never tests.

use std::path::Path;

use anyhow::Result;

use crate::build::{self, Arch};
use crate::setup::{self, Scope};
use crate::say;

/// Sizes of both programs per architecture. The budget is 8 MiB for the two together.
pub fn run() -> Result<()> {
    setup::ensure(Scope::Everything)?;
    let mut rows = Vec::new();
    for arch in [Arch::X86_64, Arch::Aarch64, Arch::Armv7] {
        let programs = build::firmware(arch)?;
        let kib = |path: &Path| Ok::<_, anyhow::Error>(std::fs::metadata(path)?.len() / 1024);
        rows.push((arch.name(), kib(&programs.edged)?, kib(&programs.edgectl)?));
    }
    say::step("sizes of the static programs");
    println!("{:<8} {:>12} {:>12} {:>14}", "arch", "edged KiB", "edgectl KiB", "of 8192 KiB");
    for (arch, edged, edgectl) in rows {
        println!("{arch:<8} {edged:>12} {edgectl:>12} {:>13}%", (edged + edgectl) * 100 / 8192);
    }
    Ok(())
}
