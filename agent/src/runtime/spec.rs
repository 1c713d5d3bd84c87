//! Specification to launch: pure. What this runtime does not do is a typed error that names the field, never a silent
//! skip.

use edged_model::keeper::{CapabilitySets, CgroupEntry, DeviceNode, LaunchSpec, MountStep, Rootfs, Stdio};
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use oci_spec::runtime::{
    Capability, LinuxDevice, LinuxDeviceType, LinuxNamespaceType, Mount, PosixRlimit, PosixRlimitType, Process, Spec,
};

use super::caps;

/// A field that cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("{field} is missing")]
    Missing { field: &'static str },
    #[error("{field}: `{value}` is not supported")]
    Unsupported { field: &'static str, value: String },
}

/// What the specification does not know: where things are, and under what name it runs.
#[derive(Debug, Clone)]
pub struct LaunchPlace {
    pub key: String,
    pub note: String,
    pub rootfs: Rootfs,
    pub cgroup: CgroupEntry,
    /// Index of the network namespace's descriptor; `None` keeps the host's.
    pub netns_fd: Option<u32>,
    /// The compiled filter; empty: none.
    pub seccomp: Vec<u8>,
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

pub fn launch_spec(spec: &Spec, place: LaunchPlace) -> Result<LaunchSpec, SpecError> {
    let process = spec.process().as_ref().ok_or(SpecError::Missing { field: "process" })?;
    let linux = spec.linux().as_ref().ok_or(SpecError::Missing { field: "linux" })?;
    let mut namespaces = CloneFlags::empty();
    for namespace in linux.namespaces().iter().flatten() {
        if namespace.path().is_some() {
            let value = format!("{:?} by path", namespace.typ());
            return Err(SpecError::Unsupported { field: "linux.namespaces", value });
        }
        namespaces |= namespace_flag(namespace.typ())?;
    }
    // The network namespace is made beforehand and entered by descriptor; without one the host's is kept.
    namespaces.remove(CloneFlags::CLONE_NEWNET);
    let mut devices: Vec<_> =
        DEFAULT_DEVICES.iter().map(|(path, major, minor)| default_device(path, *major, *minor)).collect();
    devices.extend(linux.devices().iter().flatten().map(device).collect::<Result<Vec<_>, _>>()?);
    let user = process.user();
    Ok(LaunchSpec {
        key: place.key,
        note: place.note,
        join: None,
        namespaces: u64::from(namespaces.bits() as u32),
        netns_fd: place.netns_fd,
        cgroup: place.cgroup,
        hostname: spec.hostname().clone(),
        argv: process.args().clone().ok_or(SpecError::Missing { field: "process.args" })?,
        env: process.env().clone().unwrap_or_default(),
        cwd: process.cwd().to_string_lossy().into_owned(),
        uid: user.uid(),
        gid: user.gid(),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask(),
        rootfs: Some(place.rootfs),
        mounts: spec.mounts().iter().flatten().map(mount_step).collect::<Result<_, _>>()?,
        device_nodes: devices,
        symlinks: DEFAULT_LINKS.iter().map(|(link, target)| ((*link).to_owned(), (*target).to_owned())).collect(),
        masked_paths: linux.masked_paths().clone().unwrap_or_default(),
        readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        sysctls: linux.sysctl().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect(),
        rlimits: process.rlimits().iter().flatten().map(rlimit).collect(),
        oom_score_adj: process.oom_score_adj(),
        capabilities: capabilities(process)?,
        no_new_privs: process.no_new_privileges().unwrap_or(false),
        seccomp: place.seccomp,
        stdio: Stdio::Pipes,
    })
}

fn namespace_flag(typ: LinuxNamespaceType) -> Result<CloneFlags, SpecError> {
    Ok(match typ {
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        other @ (LinuxNamespaceType::User | LinuxNamespaceType::Time) => {
            return Err(SpecError::Unsupported { field: "linux.namespaces", value: format!("{other:?}") });
        }
    })
}

fn default_device(path: &str, major: u32, minor: u32) -> DeviceNode {
    DeviceNode { path: path.to_owned(), kind: 'c', major, minor, mode: 0o666, uid: 0, gid: 0 }
}

fn device(device: &LinuxDevice) -> Result<DeviceNode, SpecError> {
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => 'c',
        LinuxDeviceType::B => 'b',
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

/// Option words of mount(8) that are flags: set, or cleared.
const FLAG_WORDS: [(&str, MsFlags, bool); 20] = [
    ("ro", MsFlags::MS_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("nodev", MsFlags::MS_NODEV, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("norelatime", MsFlags::MS_RELATIME, false),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("nostrictatime", MsFlags::MS_STRICTATIME, false),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("async", MsFlags::MS_SYNCHRONOUS, false),
    ("bind", MsFlags::MS_BIND, true),
    ("rbind", MsFlags::MS_BIND, true),
];

const PROPAGATION_WORDS: [(&str, MsFlags); 4] = [
    ("private", MsFlags::MS_PRIVATE),
    ("slave", MsFlags::MS_SLAVE),
    ("shared", MsFlags::MS_SHARED),
    ("unbindable", MsFlags::MS_UNBINDABLE),
];

fn mount_step(mount: &Mount) -> Result<MountStep, SpecError> {
    let mut flags = MsFlags::empty();
    let mut propagation = MsFlags::empty();
    let mut recursive = false;
    let mut data = Vec::new();
    for option in mount.options().iter().flatten().map(String::as_str) {
        if let Some((_, flag, set)) = FLAG_WORDS.iter().find(|(word, ..)| *word == option) {
            flags.set(*flag, *set);
            recursive |= option == "rbind";
        } else if let Some((_, kind)) = PROPAGATION_WORDS
            .iter()
            .find(|(word, _)| option.strip_prefix('r').unwrap_or(option) == *word || option == *word)
        {
            propagation |= *kind;
            recursive |= option.starts_with('r');
        } else if let "idmap" | "ridmap" | "tmpcopyup" | "rro" | "rnosuid" | "rnodev" | "rnoexec" = option {
            return Err(SpecError::Unsupported { field: "mounts.options", value: option.to_owned() });
        } else if option != "defaults" {
            data.push(option);
        }
    }
    let fstype = mount.typ().clone().unwrap_or_default();
    let bind = flags.contains(MsFlags::MS_BIND) || fstype == "bind";
    flags.remove(MsFlags::MS_BIND);
    let source = mount.source().as_ref().map(|source| source.to_string_lossy().into_owned()).unwrap_or_default();
    if bind && source.is_empty() {
        return Err(SpecError::Missing { field: "mounts.source" });
    }
    Ok(MountStep {
        source,
        target: mount.destination().to_string_lossy().into_owned(),
        // A kernel may lack POSIX message queues; few programs need them.
        optional: fstype == "mqueue",
        fstype,
        flags: ms_bits(flags),
        data: data.join(","),
        bind,
        recursive,
        propagation: ms_bits(propagation),
    })
}

#[expect(clippy::useless_conversion, reason = "c_ulong is 32 bits on armv7")]
fn ms_bits(flags: MsFlags) -> u64 {
    u64::from(flags.bits())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::defaults::{ContainerInputs, bind, spec};

    fn place() -> LaunchPlace {
        LaunchPlace {
            key: "web".to_owned(),
            note: String::new(),
            rootfs: Rootfs::Directory { path: "/r".to_owned(), read_only: false },
            cgroup: CgroupEntry::Inherit,
            netns_fd: Some(0),
            seccomp: Vec::new(),
        }
    }

    fn inputs() -> ContainerInputs {
        ContainerInputs {
            argv: vec!["sh".to_owned()],
            cwd: "/".to_owned(),
            cgroup_v2: true,
            ..ContainerInputs::default()
        }
    }

    #[test]
    fn the_default_workload_is_well_walled() {
        let launch = launch_spec(&spec(&inputs()).unwrap(), place()).unwrap();
        let flags = CloneFlags::from_bits_retain(i32::try_from(launch.namespaces).unwrap());
        assert!(flags.contains(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC));
        assert!(!flags.contains(CloneFlags::CLONE_NEWNET), "entered by descriptor");
        assert!(launch.no_new_privs && launch.masked_paths.iter().any(|path| path == "/proc/kcore"));
        assert_eq!(launch.capabilities.bounding, caps::mask(caps::DEFAULT).unwrap());
        assert_eq!(launch.capabilities.inheritable, 0);
        let sys = launch.mounts.iter().find(|step| step.target == "/sys").unwrap();
        assert_eq!(sys.flags & ms_bits(MsFlags::MS_RDONLY), ms_bits(MsFlags::MS_RDONLY));
        let dev = launch.mounts.iter().find(|step| step.target == "/dev").unwrap();
        assert_eq!(dev.data, "mode=755,size=64k");
    }

    #[test]
    fn a_read_only_bind_is_both() {
        let mounts = vec![bind("/host".into(), "/inside", true).unwrap()];
        let launch = launch_spec(&spec(&ContainerInputs { mounts, ..inputs() }).unwrap(), place()).unwrap();
        let step = launch.mounts.last().unwrap();
        assert!(step.bind && step.recursive && step.flags & ms_bits(MsFlags::MS_RDONLY) != 0);
    }

    #[test]
    fn dropping_all_leaves_what_was_added() {
        let inputs = ContainerInputs {
            capabilities_drop: vec!["ALL".to_owned()],
            capabilities_add: vec!["CAP_NET_RAW".to_owned()],
            ..inputs()
        };
        let launch = launch_spec(&spec(&inputs).unwrap(), place()).unwrap();
        assert_eq!(launch.capabilities.effective, caps::bit("NET_RAW").unwrap());
    }

    #[test]
    fn what_is_not_done_is_named() {
        let mut mount = bind("/a".into(), "/b", false).unwrap();
        mount.set_options(Some(vec!["rbind".to_owned(), "idmap".to_owned()]));
        let spec = spec(&ContainerInputs { mounts: vec![mount], ..inputs() }).unwrap();
        let error = launch_spec(&spec, place()).unwrap_err();
        assert_eq!(error.to_string(), "mounts.options: `idmap` is not supported");
    }
}
