//! From the request to exec: a workload started by the keeper as a device does it, beside the bare system calls of the
//! same container, in turns. The measuring itself is `agent/keeper/benches/start.rs`, in the shipped profile.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use edged_qemu::artifacts::Artifacts;
use edged_qemu::process;
use serde_json::Value;

use super::{median_and_p95, runtime};
use crate::progress;

const ROUNDS: usize = 100;

/// As the bench names them, and as people do; each pair is measured against its first.
const ROWS: [[(&str, &str); 2]; 2] = [
    [("bare_with_network", "bare, new network namespace"), ("keeper_with_network", "edged, new network namespace")],
    [("bare", "bare, no network namespace"), ("keeper_with_ready_network", "edged, the workload's own, kept")],
];

pub fn run() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let [bundle, filter, bare] = runtime::prepare(dir.path())?;
    for name in ["upper", "work", "merged"] {
        fs::create_dir_all(bundle.join("work").join(name))?;
    }
    progress::step("building the bench of the keeper, release");
    let mut command = Command::new("cargo");
    command.current_dir(Artifacts::find().root()).args(["bench", "--quiet", "--package", "edged-keeper"]);
    command.args(["--bench", "start", "--"]).args([&bundle, &filter, &bare]).arg(ROUNDS.to_string());
    let said = process::read(&mut command)?;
    let figures: Value = serde_json::from_str(said.trim()).with_context(|| format!("the bench said: {said}"))?;
    println!("{:<46} {:>8} {:>8} {:>8}", "from the request to exec, ms", "median", "p95", "to bare");
    for pair in ROWS {
        let mut floor = None;
        for (key, name) in pair {
            let times = figures[key].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
            let (median, p95) = median_and_p95(times);
            println!("{name:<46} {median:>8.2} {p95:>8.2} {:>7.2}x", median / *floor.get_or_insert(median));
        }
    }
    Ok(())
}
