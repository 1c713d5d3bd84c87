//! What the data disk of a device is formatted as.

use std::fmt;
use std::path::Path;
use std::process::Command;
use std::str::FromStr;

use anyhow::{Result, ensure};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Filesystem {
    #[default]
    Ext4,
    F2fs,
}

impl Filesystem {
    /// As `edged.data-type=` and mount(8) spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::F2fs => "f2fs",
        }
    }

    /// The checker and its words for looking only.
    fn checker(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Ext4 => ("e2fsck", &["-fn"]),
            Self::F2fs => ("fsck.f2fs", &["-f", "--dry-run"]),
        }
    }

    /// Looks through a disk without changing it; an error has all that the checker said.
    pub fn check(self, disk: &Path) -> Result<()> {
        let (program, look_only) = self.checker();
        let output = Command::new(program).args(look_only).arg(disk).output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        // fsck.f2fs ends with 0 when it only looks, and tells in words.
        let is_clean = output.status.success() && !said.contains("[Fail]");
        ensure!(is_clean, "{} finds faults:\n{said}", self.name());
        Ok(())
    }

    /// Mends a disk as a boot would; whether it can be used now.
    pub fn mend(self, disk: &Path) -> Result<bool> {
        let (program, _) = self.checker();
        Ok(Command::new(program).args(["-f", "-y"]).arg(disk).output()?.status.success())
    }
}

impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Filesystem {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = [Self::Ext4, Self::F2fs].into_iter().find(|filesystem| filesystem.name() == text);
        found.ok_or_else(|| format!("`{text}` is neither ext4 nor f2fs"))
    }
}
