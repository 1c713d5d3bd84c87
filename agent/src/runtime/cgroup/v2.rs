//! cgroup v2 (Documentation/admin-guide/cgroup-v2.rst): plain files, read back after writing.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use edged_model::api::Throttled;
use rustix::fs::{Mode, OFlags};

use super::{CPU_PERIOD_US, CgroupError, IoLimits, Limits, Usage, read_keyed, read_number};

pub const LIMIT_FILES: [&str; 7] =
    ["memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", "cpu.weight", "pids.max", "io.max"];

pub fn write(dir: &Path, file: &str, text: &str) -> Result<(), CgroupError> {
    let path = dir.join(file);
    fs::write(&path, text).map_err(|source| CgroupError::File { path, source })
}

/// Makes the directory of all workloads and hands the controllers down to it, from the top.
pub fn prepare(workloads: &Path) -> Result<(), CgroupError> {
    fs::create_dir_all(workloads).map_err(|source| CgroupError::File { path: workloads.to_owned(), source })?;
    let mut dirs: Vec<_> = workloads.ancestors().take_while(|dir| dir.join("cgroup.controllers").exists()).collect();
    dirs.reverse();
    for dir in dirs {
        let path = dir.join("cgroup.controllers");
        let available = fs::read_to_string(&path).map_err(|source| CgroupError::File { path, source })?;
        for controller in ["memory", "cpu", "pids"] {
            if !available.split_whitespace().any(|name| name == controller) {
                let hint = "the kernel or the parent cgroup does not hand it down";
                return Err(CgroupError::NoController { controller, hint });
            }
        }
        let enable = ["memory", "cpu", "pids", "io"]
            .iter()
            .filter(|wanted| available.split_whitespace().any(|name| name == **wanted))
            .map(|name| format!("+{name}"))
            .collect::<Vec<_>>()
            .join(" ");
        write(dir, "cgroup.subtree_control", &enable)?;
    }
    Ok(())
}

/// `cpu.idle` (since Linux 5.15): what is left. An idle group takes no weight, so that comes in between.
pub fn share_time(workloads: &Path, are_equals: bool) -> Result<(), CgroupError> {
    let has_idle = workloads.join("cpu.idle").exists();
    if has_idle {
        write(workloads, "cpu.idle", "0")?;
    }
    // That of keeper and agent (the keeper's `boot.rs`), or the kernel's choice.
    write(workloads, "cpu.weight", if are_equals { "10000" } else { "100" })?;
    if has_idle && !are_equals { write(workloads, "cpu.idle", "1") } else { Ok(()) }
}

pub fn create(dir: &Path, limits: &Limits) -> Result<(), CgroupError> {
    match fs::create_dir(dir) {
        // A new one has no limit of time.
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => lift_cpu_limit(dir)?,
        Err(error) => return Err(CgroupError::File { path: dir.to_owned(), source: error }),
    }
    set(dir, limits)
}

pub fn limit_cpu(dir: &Path, cpu_milli: u64) -> Result<(), CgroupError> {
    write(dir, "cpu.max", &cpu_max(cpu_milli))
}

pub fn weigh(dir: &Path, cpu_milli: u64) -> Result<(), CgroupError> {
    write(dir, "cpu.weight", &cpu_weight(cpu_milli).to_string())
}

pub fn lift_cpu_limit(dir: &Path) -> Result<(), CgroupError> {
    write(dir, "cpu.max", "max")
}

/// `memory.high` takes back what it can and kills nobody (cgroup-v2.rst); `memory.max` would kill.
pub fn resize(dir: &Path, limits: &Limits) -> Result<(), CgroupError> {
    let limit_bytes = limits.memory_bytes;
    let in_use = || read_number(dir, "memory.current").unwrap_or(0);
    let set = || set(dir, limits).and_then(|()| limit_cpu(dir, limits.cpu_milli));
    if in_use() <= limit_bytes {
        return set();
    }
    write(dir, "memory.high", &limit_bytes.to_string())?;
    let result = match in_use() {
        in_use_bytes if in_use_bytes > limit_bytes => Err(CgroupError::MemoryInUse { in_use_bytes, limit_bytes }),
        _ => set(),
    };
    write(dir, "memory.high", "max").and(result)
}

fn set(dir: &Path, limits: &Limits) -> Result<(), CgroupError> {
    for (file, text) in files(limits) {
        write(dir, file, &text)?;
    }
    // A kernel without swap has no such file, and then nothing to forbid.
    if dir.join("memory.swap.max").exists() {
        write(dir, "memory.swap.max", "0")?;
    }
    // What it was given before and is not any more has to be taken away by name.
    let had = fs::read_to_string(dir.join("io.max")).unwrap_or_default();
    for line in had.lines() {
        let disk = line.split(' ').next().unwrap_or_default();
        write(dir, "io.max", &format!("{disk} rbps=max wbps=max riops=max wiops=max"))?;
    }
    if let Some(text) = io_max(&limits.io) {
        write(dir, "io.max", &text)?;
    }
    check(dir, "memory.max", &(limits.memory_bytes / PAGE_BYTES * PAGE_BYTES).to_string())?;
    check(dir, "pids.max", &limits.pids.to_string())
}

/// Both product architectures run with 4 KiB pages; with larger ones the kernel rounds down further and says so.
const PAGE_BYTES: u64 = 4096;

fn cpu_max(cpu_milli: u64) -> String {
    format!("{} {CPU_PERIOD_US}", (cpu_milli * CPU_PERIOD_US / 1000).max(1000))
}

/// Those that hold from the beginning: all but `cpu.max`.
fn files(limits: &Limits) -> [(&'static str, String); 4] {
    [
        ("memory.max", limits.memory_bytes.to_string()),
        ("memory.oom.group", "1".to_owned()),
        ("cpu.weight", cpu_weight(limits.cpu_milli).to_string()),
        ("pids.max", limits.pids.to_string()),
    ]
}

/// Who may have twice as much comes to its turn twice as soon. A whole core has the kernel's own choice, 100.
fn cpu_weight(cpu_milli: u64) -> u64 {
    (cpu_milli / 10).clamp(1, 10_000)
}

fn io_max(io: &IoLimits) -> Option<String> {
    let (major, minor) = io.disk?;
    let pairs = [("rbps", io.read_bytes), ("wbps", io.write_bytes), ("riops", io.read_ops), ("wiops", io.write_ops)];
    let set: Vec<_> = pairs.iter().filter_map(|(key, value)| value.map(|value| format!("{key}={value}"))).collect();
    (!set.is_empty()).then(|| format!("{major}:{minor} {}", set.join(" ")))
}

fn check(dir: &Path, file: &str, wanted: &str) -> Result<(), CgroupError> {
    let path = dir.join(file);
    let found = fs::read_to_string(&path).map_err(|source| CgroupError::File { path, source })?;
    if found.trim() == wanted {
        return Ok(());
    }
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let (file, found, wanted) = (file.to_owned(), found.trim().to_owned(), wanted.to_owned());
    Err(CgroupError::NotTaken { name, file, found, wanted })
}

pub fn directory(dir: &Path) -> Result<OwnedFd, CgroupError> {
    rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| CgroupError::File { path: dir.to_owned(), source: errno.into() })
}

pub fn usage(dir: &Path) -> Usage {
    Usage {
        memory_bytes: read_number(dir, "memory.current").unwrap_or(0),
        memory_peak_bytes: read_number(dir, "memory.peak"),
        cpu_us: read_keyed(dir, "cpu.stat", "usage_usec").unwrap_or(0),
        pids: read_number(dir, "pids.current").unwrap_or(0),
        oom_kills: read_keyed(dir, "memory.events", "oom_kill").unwrap_or(0),
    }
}

pub fn throttled(dir: &Path) -> Option<Throttled> {
    super::throttled(dir, "throttled_usec", 1_000)
}

/// `memory.peak` can be reset by writing to it since Linux 6.12, for readers of the same descriptor only: of no use to
/// us. The group of a workload that is started afresh is removed and made anew instead.
pub fn reset_peak(_dir: &Path) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_in_the_kernels_spelling() {
        let io = IoLimits { disk: Some((254, 0)), write_bytes: Some(1 << 20), ..IoLimits::default() };
        let limits = Limits { memory_bytes: 64 << 20, cpu_milli: 250, pids: 32, io };
        let files = files(&limits);
        assert_eq!(files[0], ("memory.max", "67108864".to_owned()));
        assert_eq!(cpu_max(limits.cpu_milli), "25000 100000");
        assert_eq!(files[2], ("cpu.weight", "25".to_owned()));
        assert_eq!([1, 1000, 1_000_000].map(cpu_weight), [1, 100, 10_000]);
        assert_eq!(io_max(&io).as_deref(), Some("254:0 wbps=1048576"));
        assert_eq!(io_max(&IoLimits::default()), None);
    }

    /// On a host whose hierarchy is hybrid too: `cgroup.freeze` is there with every v2 mount.
    #[test]
    fn what_is_frozen_stands_still_until_it_is_let_go() {
        use super::super::Cgroup;
        let top = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new);
        let top = top.into_iter().find(|path| path.join("cgroup.procs").exists());
        let Some(top) = top.filter(|_| rustix::process::geteuid().is_root()) else { return };
        let path = top.join(format!("edged-freeze-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let group = Cgroup::V2(path.clone());
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        write(&path, "cgroup.procs", &child.id().to_string()).unwrap();
        let events = || fs::read_to_string(path.join("cgroup.events")).unwrap();
        let settles = |word: &str| (0..100_000).any(|_| events().contains(word));
        assert!(!group.is_frozen());
        group.freeze(true).unwrap();
        assert!(group.is_frozen() && settles("frozen 1"));
        group.freeze(false).unwrap();
        assert!(!group.is_frozen() && settles("frozen 0"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!((0..100_000).any(|_| group.remove().is_ok() && !path.exists()));
    }
}
