//! A device's first steps, as a list that is run in order. A step that fails is told and the next one runs: a device
//! that comes up with one thing missing can be asked what is missing.
//!
//! Kernel command line: `edged.data=/dev/vda` names the data disk (an empty disk is formatted, anything else than ext4
//! is left alone), `edged.watchdog=60` the watchdog's timeout in seconds (0: off; default 60).

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use edged_sys::device::{Watchdog, boot_ms, load_module, raise_clock};
use nix::mount::{MsFlags, mount};

use crate::{KeeperConfig, log};

/// How often the watchdog is petted; well under any timeout it may have.
pub const WATCHDOG_PET_MS: u64 = 5_000;

/// The data disk's driver may need this long to find it.
const DISK_WAIT: Duration = Duration::from_secs(10);

const CGROUP: &str = "/sys/fs/cgroup";

type Step = (&'static str, fn(&KeeperConfig) -> io::Result<()>);

const STEPS: [Step; 9] = [
    ("a root that can be pivoted", |_| leave_rootfs()),
    ("kernel file systems", |_| kernel_filesystems()),
    ("modules", |_| modules()),
    ("cgroups", |_| cgroups()),
    ("loopback", |_| loopback()),
    ("hostname", |_| hostname()),
    ("data disk", data_disk),
    ("clock", clock),
    ("run directories", |_| run_directories()),
];

pub fn run(config: &KeeperConfig) {
    let begin = boot_ms();
    for (name, step) in STEPS {
        if let Err(error) = step(config) {
            log::line(&format!("boot: {name}: {error}"));
        }
    }
    log::line(&format!("edged {} is up after {} ms", env!("CARGO_PKG_VERSION"), boot_ms() - begin));
}

/// What the very first lines of the keeper need: `/proc/self/exe` to seal the binary, `/dev/kmsg` to say so.
/// [`kernel_filesystems`] mounts them again over the root that stays.
pub fn early() {
    for (fstype, target) in [("proc", "/proc"), ("devtmpfs", "/dev")] {
        let _ = fs::create_dir_all(target);
        let _ = mount(Some(fstype), target, Some(fstype), MsFlags::MS_NOSUID, None::<&str>);
    }
}

/// An initramfs is the kernel's first root, which pivot_root(2) refuses to move. A bind mount of it, moved over `/`, is
/// an ordinary mount with the same files.
fn leave_rootfs() -> io::Result<()> {
    fs::create_dir_all("/newroot")?;
    mount(Some("/"), "/newroot", None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    std::env::set_current_dir("/newroot")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    nix::unistd::chroot(".")?;
    std::env::set_current_dir("/")
}

fn kernel_filesystems() -> io::Result<()> {
    let nosuid = MsFlags::MS_NOSUID;
    let strict = nosuid | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    let list: [(&str, &str, MsFlags, &str); 8] = [
        ("proc", "/proc", strict, ""),
        ("sysfs", "/sys", strict, ""),
        ("devtmpfs", "/dev", nosuid, "mode=755"),
        ("devpts", "/dev/pts", nosuid | MsFlags::MS_NOEXEC, "ptmxmode=666,mode=620,gid=5"),
        ("tmpfs", "/dev/shm", nosuid | MsFlags::MS_NODEV, "mode=1777"),
        ("tmpfs", "/run", nosuid | MsFlags::MS_NODEV, "mode=755,size=16m"),
        ("tmpfs", "/tmp", nosuid | MsFlags::MS_NODEV, "mode=1777,size=16m"),
        ("cgroup2", CGROUP, strict, "nsdelegate,memory_recursiveprot"),
    ];
    let mut result = Ok(());
    for (fstype, target, flags, data) in list {
        // The kernel may have mounted some before us; /sys/fs/cgroup is there only once sysfs is.
        let _ = fs::create_dir_all(target);
        match mount(Some(fstype), target, Some(fstype), flags, Some(data)) {
            Ok(()) | Err(nix::errno::Errno::EBUSY) => {}
            Err(errno) => result = Err(io::Error::new(io::Error::from(errno).kind(), format!("{target}: {errno}"))),
        }
    }
    result
}

/// Loads what `/etc/modules-load.d/*.conf` names, in order (modules-load.d(5)), with what modules.dep says they need.
fn modules() -> io::Result<()> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let home = PathBuf::from("/lib/modules").join(release);
    let dependencies = fs::read_to_string(home.join("modules.dep")).unwrap_or_default();
    let mut files: Vec<_> = match fs::read_dir("/etc/modules-load.d") {
        Ok(entries) => entries.filter_map(Result::ok).map(|entry| entry.path()).collect(),
        Err(_) => return Ok(()),
    };
    files.sort();
    let mut missing = Vec::new();
    for file in files.iter().filter(|path| path.extension().is_some_and(|e| e == "conf")) {
        for name in fs::read_to_string(file)?.lines().map(str::trim) {
            if name.is_empty() || name.starts_with(['#', ';']) {
                continue;
            }
            for path in load_order(&dependencies, name) {
                if let Err(error) = load_module(&home.join(&path)) {
                    missing.push(format!("{path}: {error}"));
                }
            }
        }
    }
    if missing.is_empty() { Ok(()) } else { Err(io::Error::other(missing.join("; "))) }
}

/// The files to load for `name`, dependencies first (modules.dep lists them in reverse order; depmod(8)). Empty for
/// what is built into the kernel.
fn load_order(dependencies: &str, name: &str) -> Vec<String> {
    let wanted = name.replace('-', "_");
    let module_name = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split('.').next().unwrap_or(file).replace('-', "_")
    };
    for line in dependencies.lines() {
        let Some((path, needs)) = line.split_once(':') else { continue };
        if module_name(path) == wanted {
            let needs = needs.split_whitespace().rev();
            return needs.chain([path]).map(str::to_owned).collect();
        }
    }
    Vec::new()
}

/// All controllers for everybody, and the three groups of the design.
fn cgroups() -> io::Result<()> {
    let root = Path::new(CGROUP);
    let all = fs::read_to_string(root.join("cgroup.controllers"))?;
    let enable: String = all.split_whitespace().map(|name| format!("+{name} ")).collect();
    fs::write(root.join("cgroup.subtree_control"), &enable)?;
    let edged = root.join("edged");
    fs::create_dir_all(&edged)?;
    fs::write(edged.join("cgroup.subtree_control"), &enable)?;
    for name in ["keeper", "agent", "workloads"] {
        fs::create_dir_all(edged.join(name))?;
    }
    fs::write(edged.join("workloads/cgroup.subtree_control"), &enable)?;
    fs::write(edged.join("keeper/cgroup.procs"), "1")?;
    // What the kernel will not take from us under pressure. memory.min needs the same promise all the way down.
    fs::write(edged.join("memory.min"), "32M")?;
    fs::write(edged.join("keeper/memory.min"), "8M")?;
    fs::write(edged.join("agent/memory.min"), "24M")
}

/// Puts the agent into its own group with its own wall. Where there is no such group (a host), nothing happens.
pub fn place_agent(config: &KeeperConfig, pid: i32) {
    if !config.device {
        return;
    }
    let group = Path::new(CGROUP).join("edged/agent");
    let placed = fs::write(group.join("memory.max"), config.agent_memory_max_bytes.to_string())
        .and_then(|()| fs::write(group.join("cgroup.procs"), pid.to_string()));
    if let Err(error) = placed {
        log::line(&format!("the agent has no cgroup of its own: {error}"));
    }
}

/// The interface that every program expects: up before the first one runs. No network is touched by it.
fn loopback() -> io::Result<()> {
    use std::os::fd::AsFd;
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    edged_sys::device::interface_up(socket.as_fd(), "lo")
}

fn hostname() -> io::Result<()> {
    let name = fs::read_to_string("/etc/hostname")?;
    rustix::system::sethostname(name.trim().as_bytes()).map_err(Into::into)
}

/// The value of `key=` on the kernel command line.
fn parameter(key: &str) -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('=').map(str::to_owned))
}

/// What is on a disk, as far as its first block tells.
#[derive(Debug, PartialEq, Eq)]
enum Content {
    Empty,
    Ext4,
    Foreign,
}

const PROBE_BYTES: usize = 64 * 1024;

fn content(head: &[u8]) -> Content {
    // ext4's magic: little-endian 0xEF53 at 1024 + 56 (Documentation/filesystems/ext4/super.rst).
    if head.get(1080..1082) == Some(&[0x53, 0xef]) {
        Content::Ext4
    } else if head.iter().all(|byte| *byte == 0) {
        Content::Empty
    } else {
        Content::Foreign
    }
}

fn data_disk(config: &KeeperConfig) -> io::Result<()> {
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
    let mut disk = fs::File::open(device)?;
    disk.seek(SeekFrom::Start(0))?;
    disk.read_exact(&mut head)?;
    drop(disk);
    match content(&head) {
        Content::Empty => {
            log::line(&format!("{} is empty: formatting it", device.display()));
            tool("/sbin/mkfs.ext4", &["-q", "-L", "edged-data", "-E", "lazy_itable_init=1"], device, &[0])?;
        }
        // e2fsck(8): 0 clean, 1 mended, 2 mended and wants a reboot (only for a mounted root).
        Content::Ext4 => tool("/sbin/e2fsck", &["-p"], device, &[0, 1, 2])?,
        Content::Foreign => {
            return Err(io::Error::other(format!("{} holds something that is not ours", device.display())));
        }
    }
    let flags = MsFlags::MS_NOATIME | MsFlags::MS_NODEV;
    mount(Some(device), data, Some("ext4"), flags, Some("errors=remount-ro")).map_err(Into::into)
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

fn tool(program: &str, args: &[&str], device: &Path, good: &[i32]) -> io::Result<()> {
    let status = Command::new(program).args(args).arg(device).status()?;
    match status.code() {
        Some(code) if good.contains(&code) => Ok(()),
        _ => Err(io::Error::other(format!("{program}: {status}"))),
    }
}

/// The file whose time is the floor under the clock (as timesyncd(8) keeps one).
fn floor_file(data: &Path) -> PathBuf {
    data.join("clock")
}

/// A device without a battery wakes up in 1970: the clock starts no earlier than the build or the last time we knew.
fn clock(config: &KeeperConfig) -> io::Result<()> {
    let kept = fs::metadata(floor_file(&config.data)).and_then(|meta| meta.modified()).ok();
    let kept = kept.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    let kept = kept.and_then(|since| i64::try_from(since.as_secs()).ok()).unwrap_or(0);
    let floor = kept.max(config.built_at);
    if raise_clock(floor)? {
        log::line("the clock was behind what is known: it was set to the time floor");
    }
    Ok(())
}

/// Remembers the time for the next boot and lifts the clock to it.
pub fn keep_time_floor(data: &Path, unix_seconds: i64) {
    let file = floor_file(data);
    let since = Duration::from_secs(u64::try_from(unix_seconds).unwrap_or(0));
    let kept = fs::File::options().create(true).append(true).open(&file).and_then(|file| {
        file.set_modified(std::time::UNIX_EPOCH + since)?;
        file.sync_all()
    });
    if let Err(error) = kept.and_then(|()| raise_clock(unix_seconds).map(drop)) {
        log::line(&format!("the time floor: {error}"));
    }
}

fn run_directories() -> io::Result<()> {
    fs::create_dir_all("/run/edged")?;
    fs::create_dir_all("/var")?;
    // Programs write their pid files there; memory is the place for them.
    match std::os::unix::fs::symlink("/run", "/var/run") {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// The watchdog and when to pet it first. A hardware one is preferred to the kernel's own timer.
pub fn open_watchdog() -> Option<(Watchdog, u64)> {
    let timeout: i32 = parameter("edged.watchdog").and_then(|text| text.parse().ok()).unwrap_or(60);
    if timeout == 0 {
        return None;
    }
    let mut found: Vec<(bool, PathBuf, String)> = fs::read_dir("/sys/class/watchdog")
        .ok()?
        .filter_map(Result::ok)
        .map(|entry| {
            let identity = fs::read_to_string(entry.path().join("identity")).unwrap_or_default().trim().to_owned();
            let is_software = identity.starts_with("Software");
            (is_software, Path::new("/dev").join(entry.file_name()), identity)
        })
        .collect();
    found.sort();
    let (_, path, identity) = found.into_iter().next()?;
    match Watchdog::open(&path, timeout) {
        Ok(watchdog) => {
            log::line(&format!("watchdog: {identity}, {timeout} s"));
            Some((watchdog, 0))
        }
        Err(error) => {
            log::line(&format!("watchdog {}: {error}", path.display()));
            None
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
        assert_eq!(content(&head), Content::Ext4);
        head[1080] = 0;
        head[PROBE_BYTES - 1] = 1;
        assert_eq!(content(&head), Content::Foreign);
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let dep = "kernel/fs/overlayfs/overlay.ko.xz:\nkernel/net/bridge/bridge.ko.xz: kernel/net/802/stp.ko.xz kernel/net/llc/llc.ko.xz\n";
        assert_eq!(load_order(dep, "overlay"), ["kernel/fs/overlayfs/overlay.ko.xz"]);
        assert_eq!(
            load_order(dep, "bridge"),
            ["kernel/net/llc/llc.ko.xz", "kernel/net/802/stp.ko.xz", "kernel/net/bridge/bridge.ko.xz"]
        );
        assert!(load_order(dep, "ext4").is_empty());
    }
}
