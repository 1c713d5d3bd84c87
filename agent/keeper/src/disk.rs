//! The data disk: found, made when it is empty, mended when it needs it, mounted. What is not ours is left alone, and a
//! device without a disk runs from memory and says so.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use crate::boot::parameter;
use crate::{KeeperConfig, log, modules};

mod format;

/// The data disk's driver may need this long to find it.
const DISK_WAIT: Duration = Duration::from_secs(10);

/// A file system that the data disk may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filesystem {
    Ext4,
    /// For flash without a controller's cleverness in front of it.
    F2fs,
}

/// A program and its arguments; the disk comes behind them.
type Tool = (&'static str, &'static [&'static str]);

impl Filesystem {
    fn named(name: &str) -> io::Result<Self> {
        match name {
            "ext4" => Ok(Self::Ext4),
            "f2fs" => Ok(Self::F2fs),
            _ => Err(io::Error::other(format!("edged.data-type={name} is neither ext4 nor f2fs"))),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::F2fs => "f2fs",
        }
    }

    /// The device and the size come last. `protects`: with its feature `verity`, by which the agent has the kernel check
    /// layers whenever they are read (filesystems/fsverity.rst). Older kernels want blocks of a page then (ext4 before Linux
    /// 6.3).
    fn make(self, protects: bool) -> Command {
        let ((program, usual), more): (Tool, &[&str]) = match self {
            Self::Ext4 => {
                (("/sbin/mkfs.ext4", &["-q", "-L", LABEL, "-E", "lazy_itable_init=1"]), &["-O", "verity", "-b", "4096"])
            }
            Self::F2fs => (("/sbin/mkfs.f2fs", &["-q", "-l", LABEL]), &["-O", "verity"]),
        };
        let mut command = Command::new(program);
        command.args(usual).args(if protects { more } else { &[] });
        command
    }

    /// Over what is there.
    fn by_force(self) -> &'static str {
        match self {
            Self::Ext4 => "-F",
            Self::F2fs => "-f",
        }
    }

    /// Whether the running kernel knows this file system's feature `verity`: one that does not might not mount it.
    fn protects(self) -> bool {
        const PAGE_BYTES: usize = 4096;
        Path::new("/sys/fs").join(self.name()).join("features/verity").exists()
            && rustix::param::page_size() == PAGE_BYTES
    }

    /// What an ordinary start asks for, and what is done when that gives up. Nobody is here to be asked, and every file
    /// that matters has a digest or a signature of its own.
    fn mend(self) -> [Tool; 2] {
        match self {
            Self::Ext4 => [("/sbin/e2fsck", &["-p"]), ("/sbin/e2fsck", &["-f", "-y"])],
            Self::F2fs => [("/sbin/fsck.f2fs", &["-a"]), ("/sbin/fsck.f2fs", &["-f", "-y"])],
        }
    }

    /// The options of the mount, the most that is wanted first: an older kernel may not know all of f2fs's.
    ///
    /// The blocks that are kept back are for who has CAP_SYS_RESOURCE, as the agent has, and for nobody else: not for the
    /// uid 0 of a workload, which has the capability no more. So a workload that fills the disk leaves the store its room
    /// (ext4(5), `resuid`; f2fs.rst, `reserve_root`). `fsync_mode=strict`: what is synced stays as it does on ext4, a
    /// rename with its directory.
    fn options(self) -> &'static [&'static str] {
        match self {
            Self::Ext4 => &["errors=remount-ro,resuid=4294967293"],
            Self::F2fs => &[
                "fsync_mode=strict,errors=remount-ro,reserve_root=4096,resuid=2147483647",
                "fsync_mode=strict,reserve_root=4096,resuid=2147483647",
            ],
        }
    }
}

/// What is on a disk, as far as its first blocks and its end tell.
#[derive(Debug, PartialEq, Eq)]
enum Content {
    Empty,
    /// We had begun to format it and were not done.
    Unfinished,
    Ours(Filesystem),
    Foreign,
}

/// As far as the furthest of those that begin with nothing (btrfs: 64 KiB).
const PROBE_BYTES: usize = 128 * 1024;
/// Both kinds of file system have it here, and nothing before it.
const SUPERBLOCK: usize = 1024;
const LABEL: &str = "edged-data";

/// The file system that the first blocks tell of.
#[derive(Debug, PartialEq, Eq)]
struct Superblock {
    filesystem: Filesystem,
    /// How far it reaches.
    bytes: u64,
    /// Whether it has the name that we give.
    is_named_ours: bool,
}

impl Superblock {
    /// Numbers are little-endian: filesystems/ext4/super.rst has those of ext4, linux/f2fs_fs.h those of f2fs.
    fn of(head: &[u8]) -> Option<Self> {
        let block = head.get(SUPERBLOCK..)?;
        let word = |at: usize| bytes_at(block, at).map_or(0, u32::from_le_bytes);
        if bytes_at(block, 0x38) == Some([0x53, 0xef]) {
            let blocks = u64::from(word(0x150)) << 32 | u64::from(word(0x4));
            let bytes = blocks.saturating_mul(1024 << word(0x18).min(6));
            let is_named_ours = block[0x78..].starts_with(LABEL.as_bytes());
            return Some(Self { filesystem: Filesystem::Ext4, bytes, is_named_ours });
        }
        if word(0) == 0xf2f5_2010 {
            let blocks = bytes_at(block, 36).map_or(0, u64::from_le_bytes);
            let bytes = blocks.saturating_mul(1 << word(16).clamp(12, 16));
            let name: Vec<u8> = LABEL.encode_utf16().flat_map(u16::to_le_bytes).collect();
            return Some(Self { filesystem: Filesystem::F2fs, bytes, is_named_ours: block[124..].starts_with(&name) });
        }
        None
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn head(disk: &fs::File) -> io::Result<Vec<u8>> {
    let mut head = vec![0; PROBE_BYTES];
    disk.read_exact_at(&mut head, 0)?;
    Ok(head)
}

fn is_empty(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

fn content(device: &Path) -> io::Result<Content> {
    let disk = fs::File::open(device)?;
    let head = head(&disk)?;
    let there = Superblock::of(&head);
    // The tools leave the first KiB empty: what has something there was never ours.
    let is_unfinished = is_empty(&head[..SUPERBLOCK]) && format::is_unfinished(&disk, there.as_ref());
    Ok(match there {
        _ if is_unfinished => Content::Unfinished,
        Some(Superblock { filesystem, .. }) => Content::Ours(filesystem),
        None if is_empty(&head) => Content::Empty,
        None => Content::Foreign,
    })
}

pub fn mount_data(config: &KeeperConfig) -> io::Result<()> {
    fs::create_dir_all(&config.data)?;
    let Some(device) = parameter("edged.data") else {
        log::line("no edged.data= on the kernel command line: state is in memory and gone at the next boot");
        return memory_disk(config);
    };
    match mount_disk(Path::new(&device), &config.data) {
        Ok(()) => Ok(()),
        Err(error) => {
            log::line("the data disk cannot be used: state is in memory and gone at the next boot");
            memory_disk(config)?;
            Err(error)
        }
    }
}

fn memory_disk(config: &KeeperConfig) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), &config.data, Some("tmpfs"), flags, Some("mode=755")).map_err(Into::into)
}

fn mount_disk(device: &Path, data: &Path) -> io::Result<()> {
    wait_for_block_device(device)?;
    let found = content(device)?;
    let filesystem = match found {
        Content::Empty | Content::Unfinished => {
            let filesystem = Filesystem::named(&parameter("edged.data-type").unwrap_or_else(|| "ext4".to_owned()))?;
            let what = if found == Content::Empty { "is empty" } else { "was not formatted to its end" };
            log::line(&format!("{} {what}: formatting it as {}", device.display(), filesystem.name()));
            // What it can is known when it is there.
            load(filesystem);
            format::format(filesystem, filesystem.protects(), device, found == Content::Unfinished)?;
            filesystem
        }
        Content::Ours(filesystem) => {
            check_disk(filesystem, device)?;
            filesystem
        }
        Content::Foreign => {
            return Err(io::Error::other(format!("{} holds something that is not ours", device.display())));
        }
    };
    load(filesystem);
    mount_with_what_it_knows(filesystem, device, data)
}

fn load(filesystem: Filesystem) {
    if let Err(error) = modules::load(filesystem.name()) {
        log::line(&format!("{}: {error}", filesystem.name()));
    }
}

fn mount_with_what_it_knows(filesystem: Filesystem, device: &Path, data: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_NOATIME | MsFlags::MS_NODEV;
    let mut result = Err(Errno::EINVAL);
    for options in filesystem.options() {
        result = mount(Some(device), data, Some(filesystem.name()), flags, Some(*options));
        if result != Err(Errno::EINVAL) {
            break;
        }
        log::line(&format!("this kernel does not mount {} with {options}", filesystem.name()));
    }
    result.map_err(Into::into)
}

/// By the file system's own program, where the image has it: 0 clean, 1 mended, 2 mended and wants a reboot (only of a
/// mounted root; fsck(8)).
fn check_disk(filesystem: Filesystem, device: &Path) -> io::Result<()> {
    let [usual, by_force] = filesystem.mend();
    if !Path::new(usual.0).exists() {
        log::line(&format!("there is no {}: {} is mounted unchecked", usual.0, device.display()));
        return Ok(());
    }
    let run = |(program, args): Tool| done(Command::new(program).args(args).arg(device), &[0, 1, 2]);
    run(usual).or_else(|error| {
        log::line(&format!("{error}: mending {} by force", device.display()));
        run(by_force)
    })
}

/// The driver announces the disk when it has found it: looked for again until then, with a deadline.
fn wait_for_block_device(device: &Path) -> io::Result<()> {
    let deadline = Instant::now() + DISK_WAIT;
    loop {
        match fs::metadata(device) {
            Ok(meta) if meta.file_type().is_block_device() => return Ok(()),
            Ok(_) => return Err(io::Error::other(format!("{} is no disk", device.display()))),
            Err(error) if Instant::now() >= deadline => {
                return Err(io::Error::new(error.kind(), format!("{}: {error}", device.display())));
            }
            // Nothing else is running yet, and nothing can: this is the one pause the keeper makes.
            #[expect(clippy::disallowed_methods, reason = "the boot has nothing else to do until the disk is there")]
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// f2fs's programs tell their work in full: only what goes wrong is for the boot's log.
fn done(command: &mut Command, good: &[i32]) -> io::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
    match output.status.code() {
        Some(code) if good.contains(&code) => Ok(()),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(io::Error::other(format!("{program}: {}; {}", output.status, said.trim())))
        }
    }
}

#[cfg(test)]
mod tests;
