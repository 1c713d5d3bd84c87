//! The data disk: found, made when it is empty, mended when it needs it, mounted. What is not ours is left alone, and a
//! device without a disk runs from memory and says so.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
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

/// A program and its arguments; the disk comes last.
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
    /// We were about to format it when the power went.
    Unfinished,
    Ours(Filesystem),
    Foreign,
}

const PROBE_BYTES: usize = 64 * 1024;
/// Where both kinds of file system have their superblock, and where f2fs has its copy (linux/f2fs_fs.h).
const SUPERBLOCK: usize = 1024;
const F2FS_COPY: usize = 4096 + SUPERBLOCK;

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// The file system that the first blocks tell of, and how far it reaches. Numbers are little-endian: filesystems/ext4/super.rst
/// has those of ext4, linux/f2fs_fs.h those of f2fs.
fn superblock(head: &[u8]) -> Option<(Filesystem, u64)> {
    let is_ext4 = number(head, SUPERBLOCK + 0x38) == Some([0x53, 0xef]);
    if is_ext4 {
        let word = |at: usize| number(head, SUPERBLOCK + at).map_or(0, u32::from_le_bytes);
        let blocks = u64::from(word(0x150)) << 32 | u64::from(word(0x4));
        return Some((Filesystem::Ext4, blocks.saturating_mul(1024 << word(0x18).min(6))));
    }
    let is_f2fs = |at: &usize| number(head, *at) == Some([0x10, 0x20, 0xf5, 0xf2]);
    let at = [SUPERBLOCK, F2FS_COPY].into_iter().find(is_f2fs)?;
    let blocks = number(head, at + 36).map_or(0, u64::from_le_bytes);
    Some((Filesystem::F2fs, blocks.saturating_mul(4096)))
}

fn content(device: &Path) -> io::Result<Content> {
    let mut disk = fs::File::open(device)?;
    let mut head = vec![0; PROBE_BYTES];
    disk.read_exact(&mut head)?;
    let there = superblock(&head);
    Ok(match there {
        _ if format::is_unfinished(&mut disk, there.map(|(_, extent)| extent))? => Content::Unfinished,
        Some((filesystem, _)) => Content::Ours(filesystem),
        None if head.iter().all(|byte| *byte == 0) => Content::Empty,
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
    let content = content(device)?;
    let filesystem = match content {
        Content::Empty | Content::Unfinished => {
            let filesystem = Filesystem::named(&parameter("edged.data-type").unwrap_or_else(|| "ext4".to_owned()))?;
            let what = if content == Content::Empty { "is empty" } else { "was being formatted when the power went" };
            log::line(&format!("{} {what}: formatting it as {}", device.display(), filesystem.name()));
            // What it can is known when it is there.
            load(filesystem);
            format::format(filesystem, filesystem.protects(), device)?;
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
