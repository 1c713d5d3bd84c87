//! The container's control groups: made, limited, listed, frozen, killed, removed (cgroups(7),
//! Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/). Which files get which text is decided purely, in [`v2`] and
//! [`v1`]; here it is done.

pub mod devices;
pub mod stats;
pub mod v1;
pub mod v2;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use edged_model::keeper::CgroupEntry;
use oci_spec::runtime::LinuxResources;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::kernel::option_of_control_file;
use crate::mounts::CgroupView;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cannot write `{text}` to {path}")]
    Write {
        path: PathBuf,
        text: String,
        #[source]
        source: io::Error,
    },
    #[error("cgroup {path}")]
    Path {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("no cgroup hierarchy is mounted at {ROOT}")]
    NotMounted,
    #[error("linux.cgroupsPath `{path}` {why}")]
    BadPath { path: String, why: &'static str },
    #[error("linux.resources.{field}: {why}")]
    Unsupported { field: String, why: &'static str },
    #[error("the `{controller}` controller of cgroup v1 is not mounted on this host ({})", option_of_control_file(.controller))]
    NoController { controller: String },
    #[error("this kernel has no {file} for {} ({})", path.display(), option_of_control_file(.file))]
    NoFile { path: PathBuf, file: String },
    #[error("linux.resources.{field}: this host has no device `{device}`")]
    NoDevice { field: &'static str, device: String },
    #[error("memory in use is {used} bytes, more than the new limit of {limit}")]
    InUse { used: u64, limit: u64 },
    #[error("the device rules of {path}")]
    Devices {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("processes of {path} do not end")]
    Busy { path: PathBuf },
    #[error("{path} does not freeze")]
    NotFrozen { path: PathBuf },
}

const ROOT: &str = "/sys/fs/cgroup";

/// Processes that were told to die, or to freeze, do so within this, or never.
const PATIENCE: Duration = Duration::from_secs(10);

/// The groups of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Groups {
    V2 {
        path: PathBuf,
    },
    /// Hierarchy as mounted (`memory`, `cpu,cpuacct`) and the container's directory in it.
    V1 {
        hierarchies: Vec<(String, PathBuf)>,
    },
}

/// Hierarchies in which every container gets a group on v1: limits that may come later, what pause and `ps` need, the
/// list of devices. Others only where the specification asks.
const ALWAYS_V1: [&str; 5] = ["memory", "cpu", "pids", "devices", "freezer"];

fn is_v2(path: &str) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type as u64 == 0x6367_7270)
}

impl Groups {
    /// Where the groups of container `id` are, by `linux.cgroupsPath`; nothing is made.
    pub fn place(
        cgroups_path: Option<&str>,
        id: &str,
        resources: Option<&LinuxResources>,
    ) -> Result<Self, CgroupError> {
        let path =
            cgroups_path.filter(|path| !path.is_empty()).map_or_else(|| format!("edged-oci/{id}"), str::to_owned);
        let bad = |why| Err(CgroupError::BadPath { path: path.clone(), why });
        if path.contains(':') {
            return bad("is of the systemd kind (slice:prefix:name); start the engine with the cgroupfs manager");
        }
        if Path::new(&path).components().any(|part| part == std::path::Component::ParentDir) {
            return bad("leads up");
        }
        let relative = path.trim_matches('/');
        if relative.is_empty() {
            return bad("is the root of all cgroups");
        }
        if is_v2(ROOT) {
            return Ok(Self::V2 { path: Path::new(ROOT).join(relative) });
        }
        let text = small_file(Path::new("/proc/self/cgroup"))
            .map_err(|source| CgroupError::Path { path: "/proc/self/cgroup".into(), source })?;
        let wanted = v1::controllers(resources)?;
        let hierarchies = v1::hierarchies(&text, &wanted);
        let there: Vec<_> = hierarchies
            .into_iter()
            .filter(|name| Path::new(ROOT).join(name).join("cgroup.procs").exists())
            .map(|name| (name.clone(), Path::new(ROOT).join(name).join(relative)))
            .collect();
        let has = |controller: &str| there.iter().any(|(name, _)| name.split(',').any(|one| one == controller));
        if there.is_empty() {
            return Err(CgroupError::NotMounted);
        }
        match wanted.iter().find(|controller| !ALWAYS_V1.contains(controller) && !has(controller)) {
            Some(controller) => Err(CgroupError::NoController { controller: (*controller).to_owned() }),
            None => Ok(Self::V1 { hierarchies: there }),
        }
    }

    /// Makes the directories and writes the limits.
    pub fn create(&self, resources: Option<&LinuxResources>) -> Result<(), CgroupError> {
        match self {
            Self::V2 { path } => v2::make(path, resources)?,
            Self::V1 { hierarchies } => {
                for (name, path) in hierarchies {
                    make_directory(path)?;
                    if name.split(',').any(|one| one == "cpuset") {
                        v1::inherit_cpuset(path)?;
                    }
                }
            }
        }
        resources.map_or(Ok(()), |resources| self.set(resources, true))
    }

    /// Writes limits: all, or with `update` the changed ones only (device rules stay).
    pub fn set(&self, resources: &LinuxResources, with_devices: bool) -> Result<(), CgroupError> {
        if let Some(limit) = v2::checked_limit(resources) {
            let used = match self {
                Self::V2 { path } => read_number(path, "memory.current"),
                Self::V1 { hierarchies } => read_number(v1::directory(hierarchies, "memory")?, "memory.usage_in_bytes"),
            };
            if let Some(used) = used.filter(|used| *used > limit) {
                return Err(CgroupError::InUse { used, limit });
            }
        }
        match self {
            Self::V2 { path } => {
                for (file, text) in v2::settings(resources)? {
                    // A machine that has no swap needs no such limit, and its kernel may have no such file.
                    if file == "memory.swap.max" && !path.join(&file).exists() && !has_swap() {
                        continue;
                    }
                    write_limit(path, &file, &text)?;
                }
                for weight in v2::io_weights(resources) {
                    v2::weigh(path, &weight)?;
                }
            }
            Self::V1 { hierarchies } => {
                for setting in v1::settings(resources)? {
                    let path = v1::directory(hierarchies, setting.controller)?;
                    v1::apply(path, &setting)?;
                }
            }
        }
        if with_devices { self.set_devices(resources) } else { Ok(()) }
    }

    fn set_devices(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let rules = devices::rules(resources)?;
        if devices::allow_all(&rules) {
            return Ok(());
        }
        match self {
            Self::V2 { path } => {
                let failed = |source| CgroupError::Devices { path: path.clone(), source };
                let directory = open_directory(path)?;
                use std::os::fd::AsFd;
                edged_sys::device_filter::attach(directory.as_fd(), &rules).map_err(failed)
            }
            Self::V1 { hierarchies } => {
                let path = v1::directory(hierarchies, "devices")?;
                devices::v1_lines(&rules).iter().try_for_each(|(file, line)| write_one(path, file, line))
            }
        }
    }

    /// How a child gets in: the launch's entry and the descriptors it names, the first of which has index `first`.
    pub fn entry(&self, first: usize) -> Result<(CgroupEntry, Vec<OwnedFd>), CgroupError> {
        let index = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        match self {
            Self::V2 { path } => Ok((CgroupEntry::V2 { dir_fd: index(first) }, vec![open_directory(path)?])),
            Self::V1 { hierarchies } => {
                let files = hierarchies.iter().map(|(_, path)| open_procs(path)).collect::<Result<Vec<_>, _>>()?;
                let procs_fds = (first..first + files.len()).map(index).collect();
                Ok((CgroupEntry::V1 { procs_fds }, files))
            }
        }
    }

    /// What a mount of type `cgroup` shows the container.
    pub fn view(&self, has_namespace: bool) -> CgroupView {
        match self {
            Self::V2 { .. } if has_namespace => CgroupView::Namespace,
            Self::V2 { path } => CgroupView::Bind(path.clone()),
            Self::V1 { hierarchies } => CgroupView::Hierarchies(hierarchies.clone()),
        }
    }

    /// The directory that tells who is in: the freezer's on v1, where there is one.
    pub fn main(&self) -> &Path {
        match self {
            Self::V2 { path } => path,
            Self::V1 { hierarchies } => {
                let pids = hierarchies.iter().find(|(name, _)| name == "freezer" || name == "pids");
                pids.or(hierarchies.first()).map_or(Path::new("/nonexistent"), |(_, path)| path)
            }
        }
    }

    /// Everything inside, below too.
    pub fn pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        collect_pids(self.main(), &mut pids);
        pids
    }

    pub fn is_frozen(&self) -> bool {
        match self {
            Self::V2 { path } => read(path, "cgroup.freeze").is_some_and(|text| text.trim() == "1"),
            Self::V1 { hierarchies } => v1::directory(hierarchies, "freezer")
                .is_ok_and(|path| read(path, "freezer.state").is_some_and(|text| text.trim() != "THAWED")),
        }
    }

    /// Stops, or lets go on, everything inside; comes back when it has.
    pub fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        match self {
            Self::V2 { path } => {
                write_one(path, "cgroup.freeze", if frozen { "1" } else { "0" })?;
                let wanted = if frozen { "frozen 1" } else { "frozen 0" };
                let reached = || read(path, "cgroup.events").is_none_or(|text| text.lines().any(|line| line == wanted));
                wait_for(reached).ok_or_else(|| CgroupError::NotFrozen { path: path.clone() })
            }
            Self::V1 { hierarchies } => {
                let path = v1::directory(hierarchies, "freezer")?;
                let wanted = if frozen { "FROZEN" } else { "THAWED" };
                write_one(path, "freezer.state", wanted)?;
                let reached = || read(path, "freezer.state").is_none_or(|text| text.trim() == wanted);
                wait_for(reached).ok_or_else(|| CgroupError::NotFrozen { path: path.to_owned() })
            }
        }
    }

    /// SIGKILL for everything inside.
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        if let Self::V2 { path } = self {
            // Linux 5.14.
            match write_one(path, "cgroup.kill", "1") {
                Ok(()) => return Ok(()),
                Err(CgroupError::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        // A frozen process on v1 takes no signal.
        if matches!(self, Self::V1 { .. }) && self.is_frozen() {
            self.freeze(false)?;
        }
        for _ in 0..100 {
            let pids = self.pids();
            if pids.is_empty() {
                break;
            }
            for pid in pids.into_iter().filter_map(rustix::process::Pid::from_raw) {
                // Gone by now is what was wanted.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        Ok(())
    }

    /// Takes the directories away if nobody is inside. False: somebody is, or there are groups below.
    pub fn remove_if_empty(&self) -> bool {
        let paths: Vec<&Path> = match self {
            Self::V2 { path } => vec![path],
            Self::V1 { hierarchies } => hierarchies.iter().map(|(_, path)| path.as_path()).collect(),
        };
        paths.into_iter().all(|path| matches!(rustix::fs::rmdir(path), Ok(()) | Err(rustix::io::Errno::NOENT)))
    }

    /// Takes the directories away, waiting for what was killed to be gone.
    pub fn remove(&self) -> Result<(), CgroupError> {
        match self {
            Self::V2 { path } => remove_tree(path),
            Self::V1 { hierarchies } => hierarchies.iter().try_for_each(|(_, path)| remove_tree(path)),
        }
    }
}

fn collect_pids(path: &Path, pids: &mut Vec<i32>) {
    if let Some(text) = read(path, "cgroup.procs") {
        pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    }
    for child in directories(path) {
        collect_pids(&child, pids);
    }
}

fn directories(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
    let is_directory = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.flatten().filter(is_directory).map(|entry| entry.path()).collect()
}

fn remove_tree(path: &Path) -> Result<(), CgroupError> {
    let mut failure = None;
    let removed = wait_for(|| match rustix::fs::rmdir(path) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => true,
        // Processes on their way out, or groups that the container made.
        Err(rustix::io::Errno::BUSY) => {
            failure = directories(path).iter().find_map(|child| remove_tree(child).err());
            failure.is_some()
        }
        Err(errno) => {
            failure = Some(CgroupError::Path { path: path.to_owned(), source: errno.into() });
            true
        }
    });
    match (removed, failure) {
        (_, Some(failure)) => Err(failure),
        (Some(()), None) => Ok(()),
        (None, None) => Err(CgroupError::Busy { path: path.to_owned() }),
    }
}

/// Looks again and again, at once at first, until it is so.
pub(crate) fn wait_for(mut reached: impl FnMut() -> bool) -> Option<()> {
    let mut waited = Duration::ZERO;
    let mut pause = Duration::from_micros(100);
    loop {
        if reached() {
            return Some(());
        }
        if waited >= PATIENCE {
            return None;
        }
        let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: i64::from(pause.subsec_nanos()) as _ };
        let _ = rustix::event::poll(&mut [], Some(&timeout));
        waited += pause;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn make_directory(path: &Path) -> Result<(), CgroupError> {
    std::fs::create_dir_all(path).map_err(|source| CgroupError::Path { path: path.to_owned(), source })
}

fn open_directory(path: &Path) -> Result<OwnedFd, CgroupError> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| CgroupError::Path { path: path.to_owned(), source: errno.into() })
}

fn open_procs(path: &Path) -> Result<OwnedFd, CgroupError> {
    let path = path.join("cgroup.procs");
    let file = std::fs::File::options().write(true).open(&path);
    file.map(OwnedFd::from).map_err(|source| CgroupError::Path { path, source })
}

/// One write(2), as the kernel wants it.
pub(crate) fn write_one(path: &Path, file: &str, text: &str) -> Result<(), CgroupError> {
    let path = path.join(file);
    let written = std::fs::File::options()
        .write(true)
        .open(&path)
        .and_then(|file| rustix::io::write(&file, text.as_bytes()).map_err(io::Error::from));
    written.map(drop).map_err(|source| CgroupError::Write { path, text: text.to_owned(), source })
}

/// As [`write_one`]; what this kernel or this host does not have is told by its name.
pub(crate) fn write_limit(path: &Path, file: &str, text: &str) -> Result<(), CgroupError> {
    match write_one(path, file, text) {
        Err(CgroupError::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Err(CgroupError::NoFile { path: path.to_owned(), file: file.to_owned() })
        }
        Err(CgroupError::Write { source, .. }) if is_no_device(&source) && names_a_device(file) => {
            let device = text.split(' ').next().unwrap_or(text).to_owned();
            Err(CgroupError::NoDevice { field: if file == "rdma.max" { "rdma" } else { "blockIO" }, device })
        }
        result => result,
    }
}

fn is_no_device(error: &io::Error) -> bool {
    matches!(rustix::io::Errno::from_io_error(error), Some(rustix::io::Errno::NODEV | rustix::io::Errno::NXIO))
}

/// Whose lines begin with one.
fn names_a_device(file: &str) -> bool {
    file == "rdma.max" || file.starts_with("io.") || file.starts_with("blkio.")
}

/// proc_swaps(5): a header, then a line for each.
fn has_swap() -> bool {
    std::fs::read_to_string("/proc/swaps").is_ok_and(|text| text.lines().count() > 1)
}

pub(crate) fn read(path: &Path, file: &str) -> Option<String> {
    small_file(&path.join(file)).ok()
}

/// The kernel says 0 of the size of such files: read with what they need, instead of ever larger pieces.
fn small_file(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::with_capacity(4096);
    std::fs::File::open(path)?.take(u64::MAX).read_to_string(&mut text)?;
    Ok(text)
}

pub(crate) fn read_number(path: &Path, file: &str) -> Option<u64> {
    read(path, file)?.trim().parse().ok()
}
