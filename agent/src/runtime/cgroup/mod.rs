//! Walls around workloads. cgroup v2 is the product; v1 and hybrid hosts get the same quotas through cgroups-rs, so that
//! edged runs on a developer's machine.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use edged_model::api::Throttled;
use edged_model::keeper::CgroupEntry;
use edged_model::quantity::Bytes;

mod detect;
mod v1;
mod v2;

pub use detect::Layout;

/// Hard limits of one workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub memory_bytes: u64,
    /// Thousandths of one core.
    pub cpu_milli: u64,
    pub pids: u64,
    pub io: IoLimits,
}

/// `io.max` of one disk (cgroup-v2.rst, "IO Interface Files"); `None`: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IoLimits {
    /// Major and minor number of the disk.
    pub disk: Option<(u32, u32)>,
    pub read_bytes: Option<u64>,
    pub write_bytes: Option<u64>,
    pub read_ops: Option<u64>,
    pub write_ops: Option<u64>,
}

/// The period over which CPU time is counted, in microseconds (the kernel's default).
pub const CPU_PERIOD_US: u64 = 100_000;

/// What the kernel counts for one workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub memory_bytes: u64,
    pub memory_peak_bytes: Option<u64>,
    /// CPU time used since the group was made.
    pub cpu_us: u64,
    pub pids: u64,
    /// Processes killed by the OOM killer because of this group's limit, since the group was made.
    pub oom_kills: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("workloads are frozen by cgroup v2 alone, and this host has v1")]
    NoFreezer,
    #[error("no cgroup file system is mounted")]
    NotMounted,
    #[error("the `{controller}` controller is missing: no workload starts without it ({hint})")]
    NoController { controller: &'static str, hint: &'static str },
    #[error("cgroup file {path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cgroup v1, {what}")]
    V1 {
        what: String,
        #[source]
        source: cgroups_rs::error::Error,
    },
    #[error("{} of memory are in use, more than the new limit of {}", Bytes(*.in_use_bytes).human(), Bytes(*.limit_bytes).human())]
    MemoryInUse { in_use_bytes: u64, limit_bytes: u64 },
    #[error("the limits of `{name}` were not taken: {file} is `{found}`, not `{wanted}`")]
    NotTaken { name: String, file: String, found: String, wanted: String },
}

/// Where this agent's workloads live, in either version.
#[derive(Debug, Clone)]
pub struct CgroupRoot {
    layout: Layout,
}

impl CgroupRoot {
    /// Finds out what this machine has. `instance` keeps several agents on one host apart; a device has the design's
    /// fixed place (`/edged/workloads`).
    pub fn detect(instance: Option<&str>) -> Result<Self, CgroupError> {
        let read = |path: &str| {
            std::fs::read_to_string(path).map_err(|source| CgroupError::File { path: path.into(), source })
        };
        let layout = detect::layout(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?, instance)?;
        if let Layout::V2 { workloads } = &layout {
            v2::prepare(workloads)?;
        }
        Ok(Self { layout })
    }

    pub fn is_v2(&self) -> bool {
        matches!(self.layout, Layout::V2 { .. })
    }

    /// The wall around all workloads together (v2 only; a host's own limits are its own business).
    pub fn limit_all(&self, memory_bytes: u64) -> Result<(), CgroupError> {
        match &self.layout {
            Layout::V2 { workloads } => v2::write(workloads, "memory.max", &memory_bytes.to_string()),
            Layout::V1 { .. } => Ok(()),
        }
    }

    /// Whether all workloads together have as much of the processors' time as the supervisor, or what it leaves (v2 only).
    pub fn share_time(&self, are_equals: bool) -> Result<(), CgroupError> {
        match &self.layout {
            Layout::V2 { workloads } => v2::share_time(workloads, are_equals),
            Layout::V1 { .. } => Ok(()),
        }
    }

    /// Makes the group of a workload with its limits, or gives an existing one these limits; all but that of time, which
    /// begins with the program ([`Cgroup::limit_cpu`]). What makes a container is no work of the workload's: in a twentieth of
    /// a core it takes longer than a period, and stands still for the rest of the next one.
    pub fn create(&self, name: &str, limits: &Limits) -> Result<Cgroup, CgroupError> {
        let cgroup = self.open(name);
        match &cgroup {
            Cgroup::V2(path) => v2::create(path, limits)?,
            Cgroup::V1(group) => group.create(name, limits)?,
        }
        Ok(cgroup)
    }

    /// The group of a workload, whether it is there or not.
    pub fn open(&self, name: &str) -> Cgroup {
        match &self.layout {
            Layout::V2 { workloads } => Cgroup::V2(workloads.join(name)),
            Layout::V1 { controllers } => Cgroup::V1(v1::Group::new(controllers, name)),
        }
    }
}

/// One workload's group.
#[derive(Debug, Clone)]
pub enum Cgroup {
    V2(PathBuf),
    V1(v1::Group),
}

impl Cgroup {
    /// How a child gets in: the launch's entry and the descriptors it names, the first of which has index `first`.
    pub fn entry(&self, first: u32) -> Result<(CgroupEntry, Vec<OwnedFd>), CgroupError> {
        match self {
            Self::V2(path) => Ok((CgroupEntry::V2 { dir_fd: first }, vec![v2::directory(path)?])),
            Self::V1(group) => {
                let files = group.procs()?;
                let procs_fds = (first..).take(files.len()).collect();
                Ok((CgroupEntry::V1 { procs_fds }, files))
            }
        }
    }

    pub fn usage(&self) -> Usage {
        match self {
            Self::V2(path) => v2::usage(path),
            Self::V1(group) => group.usage(),
        }
    }

    pub fn throttled(&self) -> Option<Throttled> {
        match self {
            Self::V2(path) => v2::throttled(path),
            Self::V1(group) => group.throttled(),
        }
    }

    /// Other limits for whoever is in it. Memory that can be taken back is; where more is in use than the new limit allows,
    /// nothing is changed, and nobody is killed for it.
    pub fn resize(&self, limits: &Limits) -> Result<(), CgroupError> {
        match self {
            Self::V2(path) => v2::resize(path, limits),
            Self::V1(group) => group.resize(limits),
        }
    }

    /// Begins to count the peak anew. Where the kernel cannot, the peak is that of all runs.
    pub fn reset_peak(&self) {
        match self {
            Self::V2(path) => v2::reset_peak(path),
            Self::V1(group) => group.reset_peak(),
        }
    }

    /// The limits as the kernel has them now, file by file.
    pub fn limits(&self) -> Vec<(String, String)> {
        match self {
            Self::V2(path) => v2::LIMIT_FILES.iter().filter_map(|file| read_pair(path, file)).collect(),
            Self::V1(group) => group.limits(),
        }
    }

    pub fn path(&self) -> &Path {
        match self {
            Self::V2(path) => path,
            Self::V1(group) => group.memory_path(),
        }
    }

    /// Stops everything in it where it is, or lets it go on (`cgroup.freeze`).
    pub fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        match self {
            Self::V2(path) => v2::write(path, "cgroup.freeze", if frozen { "1" } else { "0" }),
            Self::V1(_) => Err(CgroupError::NoFreezer),
        }
    }

    pub fn is_frozen(&self) -> bool {
        match self {
            Self::V2(path) => read_pair(path, "cgroup.freeze").is_some_and(|(_, text)| text == "1"),
            Self::V1(_) => false,
        }
    }

    /// From now on it has this much time.
    pub fn limit_cpu(&self, cpu_milli: u64) -> Result<(), CgroupError> {
        match self {
            Self::V2(path) => v2::limit_cpu(path, cpu_milli),
            Self::V1(group) => group.limit_cpu(cpu_milli),
        }
    }

    /// How soon it comes to its turn among the others, as if it had this limit.
    pub fn weigh(&self, cpu_milli: u64) -> Result<(), CgroupError> {
        match self {
            Self::V2(path) => v2::weigh(path, cpu_milli),
            Self::V1(group) => group.weigh(cpu_milli),
        }
    }

    /// No limit of time any more, for whoever is killed next: a group that has used up its share stands still until the
    /// next period, and the dead in it too, hundreds of them one after the other. Its next start sets the limit again.
    pub fn lift_cpu_limit(&self) -> Result<(), CgroupError> {
        match self {
            Self::V2(path) => v2::lift_cpu_limit(path),
            Self::V1(group) => group.lift_cpu_limit(),
        }
    }

    /// SIGKILL for everything in it.
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        match self {
            Self::V2(path) => v2::write(path, "cgroup.kill", "1"),
            Self::V1(group) => group.kill_all(),
        }
    }

    /// Takes the group away. Not there, or not empty yet (the kernel says EBUSY; asked again later), is no error.
    pub fn remove(&self) -> Result<(), CgroupError> {
        match self {
            Self::V2(path) => remove_directory(path),
            Self::V1(group) => group.paths().iter().try_for_each(|path| remove_directory(path)),
        }
    }
}

fn remove_directory(path: &Path) -> Result<(), CgroupError> {
    match std::fs::remove_dir(path) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ResourceBusy) => {
            Err(CgroupError::File { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

fn read_pair(dir: &Path, file: &str) -> Option<(String, String)> {
    let text = std::fs::read_to_string(dir.join(file)).ok()?;
    Some((file.to_owned(), text.trim().to_owned()))
}

/// `nr_periods`, `nr_throttled` of a `cpu.stat` of either version, and the time it was throttled, whose unit differs.
fn throttled(dir: &Path, time: &str, times_in_ms: u64) -> Option<Throttled> {
    let stat = std::fs::read_to_string(dir.join("cpu.stat")).ok()?;
    Some(Throttled {
        periods: keyed(&stat, "nr_periods")?,
        throttled_periods: keyed(&stat, "nr_throttled")?,
        throttled_ms: keyed(&stat, time)? / times_in_ms,
    })
}

/// The number after `key ` in a flat keyed file.
fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

fn read_number(dir: &Path, file: &str) -> Option<u64> {
    std::fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()
}

fn read_keyed(dir: &Path, file: &str, key: &str) -> Option<u64> {
    keyed(&std::fs::read_to_string(dir.join(file)).ok()?, key)
}
