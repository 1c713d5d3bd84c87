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

    /// `protects`: with its feature `verity`, by which the agent has the kernel check layers whenever they are read
    /// (filesystems/fsverity.rst). Older kernels want blocks of a page then (ext4 before Linux 6.3).
    fn make(self, protects: bool) -> Tool {
        match (self, protects) {
            (Self::Ext4, false) => ("/sbin/mkfs.ext4", &["-q", "-L", "edged-data", "-E", "lazy_itable_init=1"]),
            (Self::Ext4, true) => (
                "/sbin/mkfs.ext4",
                &["-q", "-L", "edged-data", "-E", "lazy_itable_init=1", "-O", "verity", "-b", "4096"],
            ),
            (Self::F2fs, false) => ("/sbin/mkfs.f2fs", &["-q", "-l", "edged-data"]),
            (Self::F2fs, true) => ("/sbin/mkfs.f2fs", &["-q", "-l", "edged-data", "-O", "verity"]),
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

/// What is on a disk, as far as its first blocks tell.
#[derive(Debug, PartialEq, Eq)]
enum Content {
    Empty,
    Ours(Filesystem),
    Foreign,
}

const PROBE_BYTES: usize = 64 * 1024;

/// Both keep their superblock's magic number, little-endian, in the second KiB: ext4 0xEF53 at 56
/// (filesystems/ext4/super.rst), f2fs 0xF2F52010 at 0 (linux/f2fs_fs.h).
fn content(head: &[u8]) -> Content {
    if head.get(1080..1082) == Some(&[0x53, 0xef]) {
        Content::Ours(Filesystem::Ext4)
    } else if head.get(1024..1028) == Some(&[0x10, 0x20, 0xf5, 0xf2]) {
        Content::Ours(Filesystem::F2fs)
    } else if head.iter().all(|byte| *byte == 0) {
        Content::Empty
    } else {
        Content::Foreign
    }
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
    let mut head = vec![0; PROBE_BYTES];
    fs::File::open(device)?.read_exact(&mut head)?;
    let filesystem = match content(&head) {
        Content::Empty => {
            let filesystem = Filesystem::named(&parameter("edged.data-type").unwrap_or_else(|| "ext4".to_owned()))?;
            log::line(&format!("{} is empty: formatting it as {}", device.display(), filesystem.name()));
            // What it can is known when it is there.
            load(filesystem);
            run(filesystem.make(filesystem.protects()), device, &[0])?;
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
    run(usual, device, &[0, 1, 2]).or_else(|error| {
        log::line(&format!("{error}: mending {} by force", device.display()));
        run(by_force, device, &[0, 1, 2])
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
fn run((program, args): Tool, device: &Path, good: &[i32]) -> io::Result<()> {
    let output = Command::new(program).args(args).arg(device).output();
    let output = output.map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
    match output.status.code() {
        Some(code) if good.contains(&code) => Ok(()),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(io::Error::other(format!("{program}: {}; {}", output.status, said.trim())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_only_formatted_when_it_is_empty() {
        let mut head = vec![0; PROBE_BYTES];
        assert_eq!(content(&head), Content::Empty);
        head[1080..1082].copy_from_slice(&[0x53, 0xef]);
        assert_eq!(content(&head), Content::Ours(Filesystem::Ext4));
        head[1080] = 0;
        head[PROBE_BYTES - 1] = 1;
        assert_eq!(content(&head), Content::Foreign);
    }

    /// What the tools of today write is what is recognised.
    #[test]
    fn real_file_systems_are_recognised() {
        let dir = std::env::temp_dir().join(format!("edged-disk-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let all = [Filesystem::Ext4, Filesystem::F2fs].into_iter();
        for (filesystem, protects) in all.flat_map(|filesystem| [(filesystem, false), (filesystem, true)]) {
            let disk = dir.join(filesystem.name());
            fs::File::create(&disk).unwrap().set_len(128 << 20).unwrap();
            run(filesystem.make(protects), &disk, &[0]).unwrap();
            let mut head = vec![0; PROBE_BYTES];
            fs::File::open(&disk).unwrap().read_exact(&mut head).unwrap();
            assert_eq!(content(&head), Content::Ours(filesystem));
            check_disk(filesystem, &disk).unwrap();
            fs::remove_file(&disk).unwrap();
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn another_kind_of_disk_is_named() {
        assert!(Filesystem::named("btrfs").unwrap_err().to_string().contains("edged.data-type=btrfs"));
    }
}
