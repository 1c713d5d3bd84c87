//! Specification to launch: pure. What this runtime does not do is a typed error that names the field, never a silent
//! skip.

use std::path::PathBuf;

use edged_model::keeper::{CapabilitySets, CgroupEntry, DeviceNode, IdMapping, LaunchSpec, MountStep, Rootfs, Stdio};
use nix::sched::CloneFlags;
use oci_spec::runtime::{
    Capability, Linux, LinuxDevice, LinuxDeviceType, LinuxIdMapping, LinuxNamespaceType, PosixRlimit, PosixRlimitType,
    Process, Spec,
};

use crate::caps;
use crate::mounts::{self, CgroupView};
use crate::{life, sysctl};

/// A field that cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("{field} is missing")]
    Missing { field: &'static str },
    #[error("{field}: `{value}` is not supported")]
    Unsupported { field: &'static str, value: String },
    #[error("{field}: `{value}` is not what the specification allows there")]
    Invalid { field: &'static str, value: String },
}

/// What the specification does not know: where things are, and under what name it runs.
#[derive(Debug, Clone)]
pub struct LaunchPlace {
    pub key: String,
    pub note: String,
    pub rootfs: Rootfs,
    pub cgroup: CgroupEntry,
    /// Index of the network namespace's descriptor; without one the specification decides.
    pub netns_fd: Option<u32>,
    /// The compiled filter; empty: none.
    pub seccomp: Vec<u8>,
    /// What a mount of type `cgroup` shows.
    pub cgroups: CgroupView,
}

/// A launch, and what must be opened or made before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Translated {
    pub launch: LaunchSpec,
    /// Namespaces to enter: CLONE_NEW* and path.
    pub joins: Vec<(u64, PathBuf)>,
    /// Mounts (by their place in `launch.mounts`) that are idmapped.
    pub idmaps: Vec<(usize, Idmap)>,
    /// `monotonic` or `boottime`, seconds, nanoseconds.
    pub time_offsets: Vec<(String, i64, u32)>,
}

/// Maps of an idmapped mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idmap {
    pub uid_map: Vec<IdMapping>,
    pub gid_map: Vec<IdMapping>,
    pub recursive: bool,
}

/// Device nodes every container has (config-linux.md, "Default Devices").
const DEFAULT_DEVICES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Links every container has (config-linux.md, "Dev symbolic links").
const DEFAULT_LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// For a caller that opens nothing: what would need it is refused.
pub fn launch_spec(spec: &Spec, place: LaunchPlace) -> Result<LaunchSpec, SpecError> {
    let translated = translate(spec, place)?;
    let unsupported = |field, value: String| Err(SpecError::Unsupported { field, value });
    if let Some((_, path)) = translated.joins.first() {
        return unsupported("linux.namespaces", path.display().to_string());
    }
    if !translated.idmaps.is_empty() {
        return unsupported("mounts.options", "idmap".to_owned());
    }
    if let Some((clock, ..)) = translated.time_offsets.first() {
        return unsupported("linux.timeOffsets", clock.clone());
    }
    Ok(translated.launch)
}

pub fn translate(spec: &Spec, place: LaunchPlace) -> Result<Translated, SpecError> {
    let process = spec.process().as_ref().ok_or(SpecError::Missing { field: "process" })?;
    let linux = spec.linux().as_ref().ok_or(SpecError::Missing { field: "linux" })?;
    refuse(spec, linux)?;
    let (namespaces, joins) = namespaces(linux, place.netns_fd.is_some())?;
    let all = joins.iter().fold(namespaces, |all, (flag, _)| all | flag);
    for (field, name) in [("hostname", spec.hostname()), ("domainname", spec.domainname())] {
        // It would be the host's.
        if name.is_some() && all & bits(CloneFlags::CLONE_NEWUTS) == 0 {
            return Err(SpecError::Invalid { field, value: "without a UTS namespace".to_owned() });
        }
    }
    let mut launch = launch_process(process)?;
    let (uid_map, gid_map) = id_maps(linux, namespaces)?;
    launch.mount_label = linux.mount_label().clone().filter(|label| !label.is_empty());
    let mut idmaps = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        for mut step in mounts::steps(mount, &place.cgroups)? {
            if mounts::takes_label(&step.step) {
                step.step.label.clone_from(&launch.mount_label);
            }
            if let Some(recursive) = step.idmap {
                idmaps.push((launch.mounts.len(), idmap(mount, (&uid_map, &gid_map), recursive)?));
            }
            launch.mounts.push(step.step);
        }
    }
    let brings_dev = |step: &MountStep| step.bind && step.target.trim_end_matches('/') == "/dev";
    if !launch.mounts.iter().any(brings_dev) {
        let defaults = DEFAULT_DEVICES.iter().map(|(path, major, minor)| default_device(path, *major, *minor));
        launch.device_nodes = defaults.collect();
        launch.symlinks = DEFAULT_LINKS.iter().map(|(link, to)| ((*link).to_owned(), (*to).to_owned())).collect();
        for node in linux.devices().iter().flatten() {
            let node = device(node)?;
            launch.device_nodes.retain(|known| known.path != node.path);
            launch.device_nodes.push(node);
        }
    }
    launch.key = place.key;
    launch.note = place.note;
    launch.namespaces = namespaces;
    launch.netns_fd = place.netns_fd;
    launch.uid_map = uid_map;
    launch.gid_map = gid_map;
    launch.cgroup = place.cgroup;
    launch.hostname.clone_from(spec.hostname());
    launch.domainname.clone_from(spec.domainname());
    launch.rootfs = Some(place.rootfs);
    launch.root_propagation = mounts::root_propagation(linux.rootfs_propagation().as_deref())?;
    launch.masked_paths = linux.masked_paths().clone().unwrap_or_default();
    launch.readonly_paths = linux.readonly_paths().clone().unwrap_or_default();
    launch.sysctls = sysctl::checked(linux, all)?;
    launch.seccomp = place.seccomp;
    launch.seccomp_flags = linux.seccomp().as_ref().map_or(0, crate::seccomp::flags);
    launch.personality = life::personality(linux)?;
    launch.create_container_hooks = life::hooks(spec, |hooks| hooks.create_container())?;
    launch.start_container_hooks = life::hooks(spec, |hooks| hooks.start_container())?;
    Ok(Translated { time_offsets: time_offsets(linux, namespaces)?, launch, joins, idmaps })
}

/// What belongs to the process alone: of a container, and of `exec`.
pub fn launch_process(process: &Process) -> Result<LaunchSpec, SpecError> {
    let user = process.user();
    let args = process.args().clone().filter(|args| !args.is_empty());
    let cwd = process.cwd().to_string_lossy().into_owned();
    if !cwd.starts_with('/') {
        return Err(SpecError::Invalid { field: "process.cwd", value: cwd });
    }
    let size = process.console_size().as_ref().map_or((0, 0), |size| (size.height(), size.width()));
    let cells = |count: u64| u16::try_from(count).unwrap_or(u16::MAX);
    let stdio = if process.terminal().unwrap_or(false) {
        Stdio::Terminal { rows: cells(size.0), columns: cells(size.1) }
    } else {
        Stdio::Pipes
    };
    Ok(LaunchSpec {
        argv: args.ok_or(SpecError::Missing { field: "process.args" })?,
        env: process.env().clone().unwrap_or_default(),
        cwd,
        uid: user.uid(),
        gid: user.gid(),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask(),
        rlimits: process.rlimits().iter().flatten().map(rlimit).collect(),
        oom_score_adj: process.oom_score_adj(),
        capabilities: capabilities(process)?,
        no_new_privs: process.no_new_privileges().unwrap_or(false),
        scheduler: process.scheduler().as_ref().map(life::scheduler).transpose()?,
        io_priority: process.io_priority().as_ref().map(life::io_priority).transpose()?,
        label: life::label(process)?,
        stdio,
        ..LaunchSpec::default()
    })
}

/// Fields that this runtime knows and does not do.
fn refuse(spec: &Spec, linux: &Linux) -> Result<(), SpecError> {
    let unsupported = |field, value: &str| Err(SpecError::Unsupported { field, value: value.to_owned() });
    if spec.vm().is_some() {
        return unsupported("vm", "a virtual machine");
    }
    if linux.intel_rdt().is_some() {
        return unsupported("linux.intelRdt", "cache and memory bandwidth allocation (CONFIG_X86_CPU_RESCTRL)");
    }
    if linux.memory_policy().is_some() {
        return unsupported("linux.memoryPolicy", "NUMA memory policy");
    }
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return unsupported("linux.netDevices", "moving network devices");
    }
    match spec.version().split_once('.') {
        Some(("1", _)) => Ok(()),
        _ => Err(SpecError::Invalid { field: "ociVersion", value: spec.version().clone() }),
    }
}

type Namespaces = (u64, Vec<(u64, PathBuf)>);

/// New ones as flags, others by path. With a network namespace by descriptor none is made.
fn namespaces(linux: &Linux, has_network: bool) -> Result<Namespaces, SpecError> {
    let (mut new, mut joins) = (0, Vec::new());
    for namespace in linux.namespaces().iter().flatten() {
        let flag = namespace_flag(namespace.typ());
        let known = joins.iter().any(|(other, _)| *other == flag);
        if new & flag != 0 || known {
            return Err(SpecError::Invalid {
                field: "linux.namespaces",
                value: format!("{:?} twice", namespace.typ()),
            });
        }
        match namespace.path() {
            Some(path) if !path.as_os_str().is_empty() => joins.push((flag, path.clone())),
            _ => new |= flag,
        }
    }
    if has_network {
        new &= !bits(CloneFlags::CLONE_NEWNET);
    }
    if new & bits(CloneFlags::CLONE_NEWNS) == 0 {
        let value = "no new mount namespace".to_owned();
        return Err(SpecError::Unsupported { field: "linux.namespaces", value });
    }
    Ok((new, joins))
}

pub(crate) fn bits(flags: CloneFlags) -> u64 {
    u64::from(flags.bits() as u32)
}

/// linux/sched.h; the crate does not know it yet.
pub(crate) const NEW_TIME: u64 = 0x80;

fn namespace_flag(typ: LinuxNamespaceType) -> u64 {
    match typ {
        LinuxNamespaceType::Pid => bits(CloneFlags::CLONE_NEWPID),
        LinuxNamespaceType::Mount => bits(CloneFlags::CLONE_NEWNS),
        LinuxNamespaceType::Network => bits(CloneFlags::CLONE_NEWNET),
        LinuxNamespaceType::Uts => bits(CloneFlags::CLONE_NEWUTS),
        LinuxNamespaceType::Ipc => bits(CloneFlags::CLONE_NEWIPC),
        LinuxNamespaceType::Cgroup => bits(CloneFlags::CLONE_NEWCGROUP),
        LinuxNamespaceType::User => bits(CloneFlags::CLONE_NEWUSER),
        LinuxNamespaceType::Time => NEW_TIME,
    }
}

fn id_map(maps: &Option<Vec<LinuxIdMapping>>) -> Vec<IdMapping> {
    let one =
        |map: &LinuxIdMapping| IdMapping { inside: map.container_id(), outside: map.host_id(), count: map.size() };
    maps.iter().flatten().map(one).collect()
}

/// Maps of the container's own user namespace; a new one without maps would be of no use to anybody.
fn id_maps(linux: &Linux, new: u64) -> Result<(Vec<IdMapping>, Vec<IdMapping>), SpecError> {
    let maps = (id_map(linux.uid_mappings()), id_map(linux.gid_mappings()));
    if new & bits(CloneFlags::CLONE_NEWUSER) != 0 && (maps.0.is_empty() || maps.1.is_empty()) {
        return Err(SpecError::Missing { field: "linux.uidMappings and linux.gidMappings" });
    }
    Ok(maps)
}

fn idmap(
    mount: &oci_spec::runtime::Mount,
    container: (&Vec<IdMapping>, &Vec<IdMapping>),
    recursive: bool,
) -> Result<Idmap, SpecError> {
    let own = (id_map(mount.uid_mappings()), id_map(mount.gid_mappings()));
    let (uid_map, gid_map) = match (own.0.is_empty(), own.1.is_empty()) {
        (false, false) => own,
        // Without maps of its own, those of the container's user namespace (config.md, `idmap`).
        (true, true) => (container.0.clone(), container.1.clone()),
        _ => return Err(SpecError::Missing { field: "mounts.uidMappings and mounts.gidMappings" }),
    };
    if uid_map.is_empty() {
        return Err(SpecError::Missing { field: "mounts.uidMappings" });
    }
    Ok(Idmap { uid_map, gid_map, recursive })
}

fn time_offsets(linux: &Linux, new: u64) -> Result<Vec<(String, i64, u32)>, SpecError> {
    let Some(offsets) = linux.time_offsets() else { return Ok(Vec::new()) };
    if !offsets.is_empty() && new & NEW_TIME == 0 {
        let value = "without a new time namespace".to_owned();
        return Err(SpecError::Invalid { field: "linux.timeOffsets", value });
    }
    let one = |(clock, offset): (&String, &oci_spec::runtime::LinuxTimeOffset)| match clock.as_str() {
        "monotonic" | "boottime" => Ok((clock.clone(), offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0))),
        _ => Err(SpecError::Invalid { field: "linux.timeOffsets", value: clock.clone() }),
    };
    offsets.iter().map(one).collect()
}

fn default_device(path: &str, major: u32, minor: u32) -> DeviceNode {
    DeviceNode { path: path.to_owned(), kind: 'c', major, minor, mode: 0o666, uid: 0, gid: 0 }
}

fn device(device: &LinuxDevice) -> Result<DeviceNode, SpecError> {
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => 'c',
        LinuxDeviceType::B => 'b',
        LinuxDeviceType::P => 'p',
        other => return Err(SpecError::Unsupported { field: "linux.devices.type", value: format!("{other:?}") }),
    };
    let number =
        |n: i64| u32::try_from(n).map_err(|_| SpecError::Unsupported { field: "linux.devices", value: n.to_string() });
    Ok(DeviceNode {
        path: device.path().to_string_lossy().into_owned(),
        kind,
        major: number(device.major())?,
        minor: number(device.minor())?,
        mode: device.file_mode().unwrap_or(0o666),
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

fn rlimit(limit: &PosixRlimit) -> (u32, u64, u64) {
    // The numbers of getrlimit(2), the same on every architecture edged runs on.
    let number = match limit.typ() {
        PosixRlimitType::RlimitCpu => 0,
        PosixRlimitType::RlimitFsize => 1,
        PosixRlimitType::RlimitData => 2,
        PosixRlimitType::RlimitStack => 3,
        PosixRlimitType::RlimitCore => 4,
        PosixRlimitType::RlimitRss => 5,
        PosixRlimitType::RlimitNproc => 6,
        PosixRlimitType::RlimitNofile => 7,
        PosixRlimitType::RlimitMemlock => 8,
        PosixRlimitType::RlimitAs => 9,
        PosixRlimitType::RlimitLocks => 10,
        PosixRlimitType::RlimitSigpending => 11,
        PosixRlimitType::RlimitMsgqueue => 12,
        PosixRlimitType::RlimitNice => 13,
        PosixRlimitType::RlimitRtprio => 14,
        PosixRlimitType::RlimitRttime => 15,
    };
    (number, limit.soft(), limit.hard())
}

fn capabilities(process: &Process) -> Result<CapabilitySets, SpecError> {
    let Some(sets) = process.capabilities() else { return Ok(CapabilitySets::default()) };
    let mask = |set: &Option<std::collections::HashSet<Capability>>| {
        let names: Vec<_> = set.iter().flatten().map(ToString::to_string).collect();
        caps::mask(names.iter().map(String::as_str))
            .map_err(|value| SpecError::Unsupported { field: "process.capabilities", value })
    };
    Ok(CapabilitySets {
        bounding: mask(sets.bounding())?,
        effective: mask(sets.effective())?,
        permitted: mask(sets.permitted())?,
        inheritable: mask(sets.inheritable())?,
        ambient: mask(sets.ambient())?,
    })
}

#[cfg(test)]
pub(crate) mod tests;
