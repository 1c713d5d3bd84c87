//! A device's first steps, as two lists that are run in order: what is needed to reach one's own binary, and, once
//! that is sealed ([`crate::resume`]), the rest. A step that fails is told and the next one runs: a device that comes up
//! with one thing missing can be asked what is missing.
//!
//! | kernel command line | |
//! |---|---|
//! | `edged.data=/dev/vda` | the data disk: an empty one is formatted, what is neither ext4 nor f2fs is left alone |
//! | `edged.data-type=f2fs` | what an empty one is formatted as: `ext4` (when nothing is said) or `f2fs` |
//! | `edged.watchdog=60` | the watchdog's timeout in seconds; 0: off; 60 when nothing is said |
//! | `edged.hostname=name` | the host name; else `/etc/hostname` |

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use edged_sys::device::{Watchdog, boot_ms, raise_clock};
use nix::mount::{MsFlags, mount};

use crate::{KeeperConfig, disk, log, modules};

const CGROUP: &str = "/sys/fs/cgroup";

type Step = (&'static str, fn(&KeeperConfig) -> io::Result<()>);

const FIRST: [Step; 2] =
    [("a root that can be pivoted", |_| leave_rootfs()), ("kernel file systems", |_| kernel_filesystems())];

const REST: [Step; 10] = [
    ("ctrl-alt-del", |_| nix::sys::reboot::set_cad_enabled(false).map_err(Into::into)),
    ("modules", |_| modules::load_listed()),
    ("last words of the kernel", |_| last_words()),
    ("cgroups", |_| cgroups()),
    ("kernel limits", |_| kernel_limits()),
    ("loopback", |_| loopback()),
    ("hostname", |_| hostname()),
    ("data disk", disk::mount_data),
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

/// What a kernel that panicked has left (pstore(5) of the kernel's documentation, admin-guide/ramoops.rst), on boards that
/// have a place for it.
fn last_words() -> io::Result<()> {
    const PSTORE: &str = "/sys/fs/pstore";
    if !Path::new(PSTORE).is_dir() {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    mount(Some("pstore"), PSTORE, Some("pstore"), flags, None::<&str>).map_err(Into::into)
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
    // (cgroup-v2.rst, cpu.idle) gives way at once; the shares among workloads stay what they are. While the agent has work
    // that takes long it makes both equals (the agent's `cgroup/v2.rs` knows this weight).
    for group in ["edged/keeper", "edged/agent"] {
        put(&format!("{group}/cpu.weight"), "10000");
    }
    put("edged/workloads/cpu.idle", "1");
    if failed.is_empty() { Ok(()) } else { Err(io::Error::other(failed.join("; "))) }
}

/// What the kernel has only so much of for the whole machine, or for one user, who is the same for all workloads: whoever
/// takes it all leaves its neighbours none. Each of these costs memory, and that is counted against who takes it
/// (`memory.max`): that wall is enough, and these numbers are put out of reach.
const SHARED: [(&str, &str); 4] = [
    // The kernel's own choice is a tenth of the memory (fs.rst).
    ("/proc/sys/fs/file-max", "1073741824"),
    // inotify(7): 128 for all workloads together.
    ("/proc/sys/fs/inotify/max_user_instances", "1048576"),
    ("/proc/sys/fs/inotify/max_user_watches", "1073741824"),
    // io_setup(2).
    ("/proc/sys/fs/aio-max-nr", "1073741824"),
];

fn kernel_limits() -> io::Result<()> {
    let failed: Vec<_> = SHARED
        .iter()
        .filter_map(|(path, value)| fs::write(path, value).err().map(|error| format!("{path}: {error}")))
        .collect();
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
pub fn parameter(key: &str) -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('=').map(str::to_owned))
}

/// The file whose time is the floor under the clock (as timesyncd(8) keeps one), as the agent told it.
fn floor_file(data: &Path) -> PathBuf {
    data.join("clock")
}

/// The same, as the device went down. Apart from what was told: else it would be taken for that the next time, and be gone
/// beyond once more.
fn end_file(data: &Path) -> PathBuf {
    data.join("clock-end")
}

/// A device without a battery wakes up in 1970: the clock starts no earlier than the build or the last time we knew.
fn clock(config: &KeeperConfig) -> io::Result<()> {
    let kept = [floor_file(&config.data), end_file(&config.data)].iter().filter_map(|file| kept_time(file)).max();
    let floor = kept.unwrap_or(0).max(config.built_at);
    if raise_clock(floor)? {
        log::line("the clock was behind what is known: it was set to the time floor");
    }
    Ok(())
}

pub fn now_unix_seconds() -> i64 {
    edged_sys::device::wall_seconds()
}

/// The agent tells the time floor each hour, and never beyond the end of the trust root.
const UNTOLD_MAX_SECS: i64 = 2 * 3_600;

/// The time at the end, for the next boot. The clock may follow a time server that lies, and nobody has signed what it says:
/// it is believed no further than the agent can have left out.
fn last_time(now: i64, told: i64) -> i64 {
    now.min(told.saturating_add(UNTOLD_MAX_SECS))
}

/// Remembers the time when the device goes down, if the agent has told one before.
pub fn keep_last_time(data: &Path) {
    let Some(told) = kept_time(&floor_file(data)) else { return };
    if let Err(error) = keep_time(&end_file(data), last_time(now_unix_seconds(), told)) {
        log::line(&format!("the time at the end: {error}"));
    }
}

fn kept_time(file: &Path) -> Option<i64> {
    let kept = fs::metadata(file).and_then(|meta| meta.modified()).ok()?;
    i64::try_from(kept.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs()).ok()
}

/// Remembers the time for the next boot and lifts the clock to it.
pub fn keep_time_floor(data: &Path, unix_seconds: i64) {
    let kept = keep_time(&floor_file(data), unix_seconds);
    if let Err(error) = kept.and_then(|()| raise_clock(unix_seconds).map(drop)) {
        log::line(&format!("the time floor: {error}"));
    }
}

fn keep_time(file: &Path, unix_seconds: i64) -> io::Result<()> {
    let since = Duration::from_secs(u64::try_from(unix_seconds).unwrap_or(0));
    let file = fs::File::options().create(true).append(true).open(file)?;
    file.set_modified(std::time::UNIX_EPOCH + since)?;
    file.sync_all()
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
        // The disk's driver may be a module; the floor lies on the disk.
        before("modules", "data disk");
        before("data disk", "clock");
        // mkfs and e2fsck run in the keeper's group, not in the root's.
        before("cgroups", "data disk");
    }

    #[test]
    fn at_the_end_the_clock_is_believed_no_further_than_the_agent_can_have_left_out() {
        let data = tempfile::tempdir().unwrap();
        let kept = || [floor_file(data.path()), end_file(data.path())].map(|file| kept_time(&file));
        keep_last_time(data.path());
        assert_eq!(kept(), [None, None], "nobody has told one");
        keep_time_floor(data.path(), 1_000_000);
        // The clock of this machine is decades ahead. However often the device goes down in order, it goes no further.
        for _ in 0..3 {
            keep_last_time(data.path());
            assert_eq!(kept(), [Some(1_000_000), Some(1_000_000 + UNTOLD_MAX_SECS)]);
        }
        assert_eq!(last_time(1_003_600, 1_000_000), 1_003_600);
    }

    #[test]
    fn a_watchdog_is_petted_well_within_its_time() {
        assert_eq!(petting_ms(60), 5_000);
        assert_eq!(petting_ms(3), 1_000);
        assert_eq!(petting_ms(0), 333);
    }
}
