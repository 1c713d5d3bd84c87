//! What the data disk of a device is formatted as.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

use crate::process;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Filesystem {
    #[default]
    Ext4,
    F2fs,
}

/// A part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub at_mib: u64,
    pub mib: u64,
}

impl Part {
    /// A file of its own beside the disk, for programs that know no parts.
    fn of(self, disk: &Path) -> Result<PathBuf> {
        let alone = disk.with_extension("part");
        let mut dd = Command::new("dd");
        dd.arg(format!("if={}", disk.display())).arg(format!("of={}", alone.display()));
        dd.args(["bs=1M", "conv=sparse", "status=none"]);
        process::run(dd.arg(format!("skip={}", self.at_mib)).arg(format!("count={}", self.mib)))?;
        Ok(alone)
    }
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

    /// The same for a part of a disk.
    pub fn check_part(self, disk: &Path, part: Part) -> Result<()> {
        self.check(&part.of(disk)?)
    }

    /// Mends a disk as a boot would; whether it can be used now.
    pub fn mend(self, disk: &Path) -> Result<bool> {
        let (program, _) = self.checker();
        Ok(Command::new(program).args(["-f", "-y"]).arg(disk).output()?.status.success())
    }

    /// Whether a boot could mend that part of a disk so that it can be used; the disk is left as it is.
    pub fn can_be_mended(self, disk: &Path, part: Part) -> Result<bool> {
        self.mend(&part.of(disk)?)
    }
}

/// A file on an ext4 disk that nobody has mounted, looked up and harmed by its path there (debugfs(8)).
#[derive(Debug)]
pub struct FileOnDisk {
    disk: PathBuf,
    path: String,
    bytes: u64,
}

impl FileOnDisk {
    /// The file of that name in whichever layer has it. Mends the disk first: what is in its journal alone is not found.
    pub fn in_a_layer(disk: &Path, name: &str) -> Result<Self> {
        ensure!(Filesystem::Ext4.mend(disk)? || Filesystem::Ext4.mend(disk)?, "{} cannot be mended", disk.display());
        let list = debugfs(disk, false, "ls -p /layers")?;
        let layers = list.lines().filter_map(|line| line.split('/').nth(5)).filter(|name| name.len() == 64);
        for layer in layers {
            let path = format!("/layers/{layer}/{name}");
            let stat = debugfs(disk, false, &format!("stat {path}"))?;
            let size = stat.split("Size: ").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
            if let Some(bytes) = size {
                return Ok(Self { disk: disk.to_owned(), path, bytes });
            }
        }
        bail!("no layer on {} has {name}", disk.display())
    }

    /// Changes a byte of each block but the first: with that, a program is started, and then has not what it needs.
    pub fn harm_all_but_the_first_block(&self) -> Result<()> {
        let blocks = debugfs(&self.disk, false, &format!("blocks {}", self.path))?;
        let blocks: Vec<u64> = blocks.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let stats = debugfs(&self.disk, false, "stats -h")?;
        let block_bytes = stats.lines().find_map(|line| line.strip_prefix("Block size:")).context("no block size")?;
        let block_bytes: u64 = block_bytes.trim().parse()?;
        // Behind its end may be what fs-verity keeps of it.
        let count = usize::try_from(self.bytes.div_ceil(block_bytes))?;
        ensure!(count > 1 && blocks.len() >= count, "{} has {count} blocks, or holes", self.path);
        let disk = File::options().read(true).write(true).open(&self.disk)?;
        for block in &blocks[1..count] {
            let (at, mut byte) = (block * block_bytes + 1, [0]);
            disk.read_exact_at(&mut byte, at)?;
            disk.write_all_at(&[byte[0] ^ 0x20], at)?;
        }
        disk.sync_all().map_err(Into::into)
    }

    /// Gives it another time of change.
    pub fn harm_metadata(&self) -> Result<()> {
        debugfs(&self.disk, true, &format!("set_inode_field {} mtime 20010101", self.path)).map(drop)
    }
}

fn debugfs(disk: &Path, writes: bool, request: &str) -> Result<String> {
    let mut command = Command::new("debugfs");
    if writes {
        command.arg("-w");
    }
    process::read(command.args(["-R", request]).arg(disk))
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
