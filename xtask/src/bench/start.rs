//! From the request to exec: a workload started by the keeper as a device does it, beside the bare system calls of the
//! same container, in turns. The measuring itself is `agent/keeper/benches/start.rs`, built as what is shipped is.

use std::fs;

use anyhow::{Context, Result};
use edged_qemu::process;
use serde_json::Value;

use super::{Quantiles, runtime};
use crate::{progress, toolchain};

const ROUNDS: usize = 300;

/// As the bench names them, and as people do; each pair is measured against its first.
const ROWS: [[(&str, &str); 2]; 2] = [
    [("bare_with_network", "bare, new network namespace"), ("keeper_with_network", "edged, new network namespace")],
    [
        ("bare_with_ready_network", "bare, into a network namespace that is there"),
        ("keeper_with_ready_network", "edged, the workload's own, kept"),
    ],
];

pub fn run() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let [bundle, filter, bare] = runtime::prepare(dir.path())?;
    for name in ["upper", "work", "merged"] {
        fs::create_dir_all(bundle.join("work").join(name))?;
    }
    progress::step("building the bench of the keeper, static, release");
    let mut command = toolchain::bench("edged-keeper", "start")?;
    command.args([&bundle, &filter, &bare]).arg(ROUNDS.to_string());
    let said = process::read(&mut command)?;
    let figures: Value = serde_json::from_str(said.trim()).with_context(|| format!("the bench said: {said}"))?;
    Quantiles::print_head("from the request to exec, ms");
    for pair in ROWS {
        let mut floor = None;
        for (key, name) in pair {
            let times = figures[key].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
            let quantiles = Quantiles::of(times);
            quantiles.print(name, *floor.get_or_insert(quantiles));
        }
    }
    Ok(())
}
