//! A device's first steps, as two lists that are run in order: what is needed to reach one's own binary, and, once
//! that is sealed ([`crate::resume`]), the rest. A step that fails is told and the next one runs: a device that comes up
//! with one thing missing can be asked what is missing.
//!
//! | kernel command line | |
//! |---|---|
//! | `edged.data=/dev/vda` | the data disk: an empty one is formatted, anything else than ext4 is left alone |
//! | `edged.watchdog=60` | the watchdog's timeout in seconds; 0: off; 60 when nothing is said |
//! | `edged.hostname=name` | the host name; else `/etc/hostname` |

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use edged_sys::device::{Watchdog, boot_ms, load_module, raise_clock};
use nix::mount::{MsFlags, mount};

use crate::{KeeperConfig, log};

/// The data disk's driver may need this long to find it.
const DISK_WAIT: Duration = Duration::from_secs(10);

const CGROUP: &str = "/sys/fs/cgroup";

type Step = (&'static str, fn(&KeeperConfig) -> io::Result<()>);

const FIRST: [Step; 2] =
    [("a root that can be pivoted", |_| leave_rootfs()), ("kernel file systems", |_| kernel_filesystems())];

const REST: [Step; 8] = [
    ("ctrl-alt-del", |_| nix::sys::reboot::set_cad_enabled(false).map_err(Into::into)),
    ("modules", |_| modules()),
    ("cgroups", |_| cgroups()),
    ("loopback", |_| loopback()),
    ("hostname", |_| hostname()),
    ("data disk", data_disk),
    ("clock", clock),
    ("run directories", |_| run_directories()),
];

pub fn run_first(config: &KeeperConfig) {
    run(&FIRST, config);
}

pub fn run_rest(config: &KeeperConfig) {
    let begin = boot_ms();
    run(&REST, config);
    log::line(&format!("edged {} is up after {} ms", env!("CARGO_PKG_VERSION"), boot_ms() - begin));
}

fn run(steps: &[Step], config: &KeeperConfig) {
    for (name, step) in steps {
        match catch_unwind(AssertUnwindSafe(|| step(config))) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::line(&format!("boot: {name}: {error}")),
            // The hook has told what it was.
            Err(_) => log::line(&format!("boot: {name}: a fault")),
        }
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
    let edged = root.join("edged");
    for name in ["keeper", "agent", "workloads"] {
        fs::create_dir_all(edged.join(name))?;
    }
    let mut failed = Vec::new();
    let mut put = |path: &str, value: &str| {
        if let Err(error) = fs::write(root.join(path), value) {
            failed.push(format!("{path} = {value}: {error}"));
        }
    };
    for controller in all.split_whitespace() {
        // One by one: a controller that the kernel will not give shall not cost the others.
        for group in ["", "edged/", "edged/workloads/"] {
            put(&format!("{group}cgroup.subtree_control"), &format!("+{controller}"));
        }
    }
    put("edged/keeper/cgroup.procs", "1");
    // What the kernel will not take from us under pressure. memory.min needs the same promise all the way down.
    for (group, min) in [("edged", "32M"), ("edged/keeper", "8M"), ("edged/agent", "24M")] {
        put(&format!("{group}/memory.min"), min);
    }
    // Whoever supervises runs when it has something to do, and that is little: workloads share what is left. An idle group
    // (cgroup-v2.rst, cpu.idle) gives way at once; the shares among workloads stay what they are.
    for group in ["edged/keeper", "edged/agent"] {
        put(&format!("{group}/cpu.weight"), "10000");
    }
    put("edged/workloads/cpu.idle", "1");
    if failed.is_empty() { Ok(()) } else { Err(io::Error::other(failed.join("; "))) }
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
    let name = match parameter("edged.hostname") {
        Some(name) => name,
        None => fs::read_to_string("/etc/hostname")?,
    };
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

/// The blocks that ext4 keeps back are for who has CAP_SYS_RESOURCE, as the agent has, and for nobody else: not for the
/// uid 0 of a workload, which has the capability no more. So a workload that fills the disk leaves the store its room
/// (ext4(5), `resuid`).
const DATA_OPTIONS: &str = "errors=remount-ro,resuid=4294967293";

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
        Content::Ext4 => check_disk(device)?,
        Content::Foreign => {
            return Err(io::Error::other(format!("{} holds something that is not ours", device.display())));
        }
    }
    let flags = MsFlags::MS_NOATIME | MsFlags::MS_NODEV;
    mount(Some(device), data, Some("ext4"), flags, Some(DATA_OPTIONS)).map_err(Into::into)
}

/// e2fsck(8), where the image has it: 0 clean, 1 mended, 2 mended and wants a reboot (only of a mounted root). What it
/// will not mend by itself is mended all the same: nobody is here to be asked, and every file that matters has a digest
/// or a signature of its own.
fn check_disk(device: &Path) -> io::Result<()> {
    const E2FSCK: &str = "/sbin/e2fsck";
    if !Path::new(E2FSCK).exists() {
        log::line(&format!("there is no {E2FSCK}: {} is mounted unchecked", device.display()));
        return Ok(());
    }
    tool(E2FSCK, &["-p"], device, &[0, 1, 2]).or_else(|error| {
        log::line(&format!("{error}: mending {} by force", device.display()));
        tool(E2FSCK, &["-f", "-y"], device, &[0, 1, 2])
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

pub fn now_unix_seconds() -> i64 {
    edged_sys::device::wall_seconds()
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

/// The watchdog and how often to pet it. A hardware one is preferred to the kernel's own timer: with both loaded,
/// `/dev/watchdog` is whichever came first.
pub fn open_watchdog() -> Option<(Watchdog, u64)> {
    let timeout: i32 = parameter("edged.watchdog").and_then(|text| text.parse().ok()).unwrap_or(60);
    if timeout <= 0 {
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
            // A driver rounds, or has a timeout that cannot be changed.
            let seconds = watchdog.timeout_secs();
            log::line(&format!("watchdog: {identity}, {seconds} s"));
            Some((watchdog, petting_ms(seconds)))
        }
        Err(error) => {
            log::line(&format!("watchdog {}: {error}", path.display()));
            None
        }
    }
}

/// Three times within the timeout, and no less than every five seconds.
fn petting_ms(timeout_secs: i32) -> u64 {
    (u64::from(timeout_secs.max(1).unsigned_abs()) * 1000 / 3).min(5_000)
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
    fn the_steps_are_in_an_order_in_which_each_finds_what_it_needs() {
        let names: Vec<_> = FIRST.iter().chain(&REST).map(|(name, _)| *name).collect();
        let before = |first: &str, second: &str| {
            let place = |wanted| names.iter().position(|name| *name == wanted).expect(wanted);
            assert!(place(first) < place(second), "{first} must come before {second}");
        };
        // /newroot is bound before anything is mounted below the old one.
        before("a root that can be pivoted", "kernel file systems");
        // /proc/sys/kernel, uname's directory, /sys/fs/cgroup, /dev.
        before("kernel file systems", "modules");
        before("kernel file systems", "cgroups");
        // The disk's driver and ext4 may be modules; the floor lies on the disk.
        before("modules", "data disk");
        before("data disk", "clock");
        // mkfs and e2fsck run in the keeper's group, not in the root's.
        before("cgroups", "data disk");
    }

    #[test]
    fn a_watchdog_is_petted_well_within_its_time() {
        assert_eq!(petting_ms(60), 5_000);
        assert_eq!(petting_ms(3), 1_000);
        assert_eq!(petting_ms(0), 333);
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
