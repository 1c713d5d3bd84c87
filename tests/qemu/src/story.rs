//! How a story is told: on the architecture under test, in a directory of its own that stays when the story fails.

use std::path::Path;

use anyhow::Result;

use crate::artifacts::{Artifacts, Firmware};
use crate::filesystem::Filesystem;

/// Runs it. What went wrong is printed with all its causes, and where the logs are.
pub fn tell(name: &str, story: impl FnOnce(&Firmware, &Path) -> Result<()>) {
    tell_on(Filesystem::Ext4, name, story);
}

/// The same on a data disk of another kind.
pub fn tell_on(filesystem: Filesystem, name: &str, story: impl FnOnce(&Firmware, &Path) -> Result<()>) {
    let artifacts = Artifacts::find();
    let prepared = Artifacts::arch_under_test().and_then(|arch| Ok((arch, artifacts.run_dir(name, arch)?)));
    let (arch, dir) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => panic!("{error:#}"),
    };
    match story(&artifacts.firmware_on(arch, filesystem), &dir) {
        Ok(()) => dir.remove(),
        Err(error) => panic!("{error:#}\nall logs are in {}", dir.display()),
    }
}
