//! A device's whole life for its state store, in `agent/tests/store_life.rs`: the real store in memory, because what is
//! counted are bytes and not the patience of this machine's disk.

use std::process::Command;

use anyhow::{Result, ensure};

const GENERATIONS: &str = "10000";
const RESTARTS: &str = "1000000";

pub fn run() -> Result<()> {
    let mut test = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // A million restarts are minutes with an optimised store, and an hour without.
    test.args(["test", "--quiet", "--profile", "firmware", "--package", "edged", "--test", "store_life"]);
    test.args(["--", "--nocapture"]);
    test.env("EDGED_STORE_GENERATIONS", GENERATIONS).env("EDGED_STORE_RESTARTS", RESTARTS).env("TMPDIR", "/dev/shm");
    let status = test.status()?;
    ensure!(status.success(), "the store did not survive its life: {status}");
    Ok(())
}
