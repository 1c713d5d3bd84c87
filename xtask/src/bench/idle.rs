//! What an idle device writes in a day, in `agent/tests/device/idle.rs`: a real device with twenty workloads and a real fleet.
//! More than the day may cost is a failure.

use std::process::Command;

use anyhow::{Result, ensure};
use edged_qemu::artifacts::Artifacts;

use crate::setup::{self, Need};

pub fn run() -> Result<()> {
    setup::ensure(&[Need::HostTests])?;
    setup::cosign(&Artifacts::find())?;
    crate::test::host_programs()?;
    let mut test = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    test.args(["test", "--quiet", "--package", "edged", "--test", "device", "idle::", "--", "--nocapture"]);
    test.env("EDGED_COSIGN", Artifacts::find().cosign()?);
    let status = test.status()?;
    ensure!(status.success(), "the idle device: {status}");
    Ok(())
}
