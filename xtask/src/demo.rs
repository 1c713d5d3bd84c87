//! From a clean checkout to a device that shows its status. Placeholder until the programs it types exist.
use anyhow::{Result, bail};
use edged_qemu::arch::Arch;

pub fn run(_arch: Arch, _keep: bool) -> Result<()> {
    bail!("the demo needs edgectl and edgefleet, which are not merged yet")
}
