//! The specification a workload gets when nothing else is said: namespaces, mounts, masked paths, capabilities. Shapes
//! are those of the OCI runtime-spec (config.md, config-linux.md).

use std::path::PathBuf;

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDevice, LinuxNamespaceBuilder, LinuxNamespaceType, Mount,
    MountBuilder, PosixRlimitBuilder, PosixRlimitType, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};

use super::kernel;

/// What of a container is particular.
#[derive(Debug, Clone, Default)]
pub struct ContainerInputs {
    pub argv: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
    pub hostname: String,
    pub root_read_only: bool,
    /// Beyond [`super::caps::DEFAULT`], with or without `CAP_`.
    pub capabilities_add: Vec<String>,
    pub capabilities_drop: Vec<String>,
    /// After the default mounts, in order.
    pub mounts: Vec<Mount>,
    pub devices: Vec<LinuxDevice>,
    pub cgroup_v2: bool,
    /// Whether the kernel has POSIX message queues for it (mq_overview(7)).
    pub has_mqueue: bool,
    /// The most files that may be open (RLIMIT_NOFILE): no more than the supervisor itself may have.
    pub open_files_max: u64,
}

const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/interrupts",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn mount(destination: &str, fstype: &str, options: &[&str]) -> Result<Mount, OciSpecError> {
    MountBuilder::default()
        .destination(destination)
        .typ(fstype)
        .source(fstype)
        .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
        .build()
}

/// A bind mount of `source`.
pub fn bind(source: PathBuf, destination: &str, read_only: bool) -> Result<Mount, OciSpecError> {
    let mut options = ["rbind", "rnosuid", "rnodev"].map(str::to_owned).to_vec();
    if read_only {
        // And all that is mounted below.
        options.extend(["ro", "rro"].map(str::to_owned));
    }
    MountBuilder::default().destination(destination).typ("bind").source(source).options(options).build()
}

/// Memory of the given size.
pub fn tmpfs(destination: &str, size_bytes: u64, read_only: bool) -> Result<Mount, OciSpecError> {
    let size = format!("size={size_bytes}");
    let access = if read_only { "ro" } else { "rw" };
    mount(destination, "tmpfs", &["nosuid", "nodev", "mode=1777", &size, access])
}

fn default_mounts(inputs: &ContainerInputs) -> Result<Vec<Mount>, OciSpecError> {
    let mut mounts = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=64k"])?,
        mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"])?,
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=8m"])?,
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"])?,
    ];
    if inputs.has_mqueue {
        mounts.push(mount("/dev/mqueue", kernel::MQUEUE, &["nosuid", "noexec", "nodev"])?);
    }
    if inputs.cgroup_v2 {
        mounts.push(mount("/sys/fs/cgroup", "cgroup2", &["nosuid", "noexec", "nodev", "ro"])?);
    }
    Ok(mounts)
}

/// Default, and what was added, without what was dropped (`ALL` drops all).
fn capabilities(inputs: &ContainerInputs) -> Vec<String> {
    let plain = |name: &String| name.strip_prefix("CAP_").unwrap_or(name).to_owned();
    let dropped: Vec<_> = inputs.capabilities_drop.iter().map(plain).collect();
    let defaults = super::caps::DEFAULT.iter().map(|name| (*name).to_owned());
    let mut kept: Vec<_> =
        defaults.filter(|name| !dropped.contains(name) && !dropped.iter().any(|d| d == "ALL")).collect();
    kept.extend(inputs.capabilities_add.iter().map(plain));
    kept
}

/// The whole specification. It names no network namespace: that one is made beforehand and entered by descriptor, or
/// there is none.
pub fn spec(inputs: &ContainerInputs) -> Result<Spec, OciSpecError> {
    let names = capabilities(inputs);
    let set = names
        .iter()
        .map(|name| name.parse::<Capability>().map_err(|_| OciSpecError::Other(format!("no capability `{name}`"))))
        .collect::<Result<std::collections::HashSet<_>, _>>()?;
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .effective(set.clone())
        .permitted(set)
        .inheritable(std::collections::HashSet::new())
        .ambient(std::collections::HashSet::new())
        .build()?;
    let user = UserBuilder::default()
        .uid(inputs.uid)
        .gid(inputs.gid)
        .additional_gids(inputs.additional_gids.clone())
        .build()?;
    let nofile = PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitNofile)
        .soft(inputs.open_files_max.min(1024))
        .hard(inputs.open_files_max)
        .build()?;
    let process = ProcessBuilder::default()
        .terminal(false)
        .args(inputs.argv.clone())
        .env(inputs.env.clone())
        .cwd(&inputs.cwd)
        .user(user)
        .capabilities(capabilities)
        .no_new_privileges(true)
        .rlimits(vec![nofile])
        .build()?;
    let namespaces = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Cgroup,
    ];
    let namespaces = namespaces.iter().map(|typ| LinuxNamespaceBuilder::default().typ(*typ).build());
    let linux = LinuxBuilder::default()
        .namespaces(namespaces.collect::<Result<Vec<_>, _>>()?)
        .masked_paths(MASKED.map(str::to_owned).to_vec())
        .readonly_paths(READ_ONLY.map(str::to_owned).to_vec())
        .devices(inputs.devices.clone())
        .build()?;
    let mut mounts = default_mounts(inputs)?;
    mounts.extend(inputs.mounts.iter().cloned());
    SpecBuilder::default()
        .version("1.2.0")
        .hostname(inputs.hostname.clone())
        .root(RootBuilder::default().path("rootfs").readonly(inputs.root_read_only).build()?)
        .process(process)
        .mounts(mounts)
        .linux(linux)
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{caps, spec::LaunchPlace, spec::launch_spec};
    use edged_model::keeper::{CgroupEntry, LaunchSpec, Rootfs};
    use edged_oci::mounts::CgroupView;

    fn inputs() -> ContainerInputs {
        ContainerInputs {
            argv: vec!["sh".to_owned()],
            cwd: "/".to_owned(),
            cgroup_v2: true,
            ..ContainerInputs::default()
        }
    }

    fn launch(inputs: &ContainerInputs) -> LaunchSpec {
        let place = LaunchPlace {
            key: "web".to_owned(),
            note: String::new(),
            rootfs: Rootfs::Directory { path: "/r".to_owned(), read_only: false },
            cgroup: CgroupEntry::Inherit,
            netns_fd: None,
            seccomp: Vec::new(),
            cgroups: CgroupView::Namespace,
        };
        launch_spec(&spec(inputs).unwrap(), place).unwrap()
    }

    #[test]
    fn the_default_workload_is_well_walled() {
        use nix::sched::CloneFlags;
        let launch = launch(&inputs());
        let flags = CloneFlags::from_bits_retain(i32::try_from(launch.namespaces).unwrap());
        assert!(flags.contains(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC));
        assert!(!flags.contains(CloneFlags::CLONE_NEWNET), "entered by descriptor");
        assert!(launch.no_new_privs && launch.masked_paths.iter().any(|path| path == "/proc/kcore"));
        assert_eq!(launch.capabilities.bounding, caps::mask(caps::DEFAULT).unwrap());
    }

    #[test]
    fn message_queues_are_mounted_where_the_kernel_has_them() {
        let has = |has_mqueue| {
            let inputs = ContainerInputs { has_mqueue, ..inputs() };
            launch(&inputs).mounts.iter().any(|step| step.target == "/dev/mqueue")
        };
        assert!(has(true) && !has(false));
    }

    #[test]
    fn a_read_only_bind_is_so_all_the_way_down() {
        let mounts = vec![bind("/host".into(), "/inside", true).unwrap()];
        let launch = launch(&ContainerInputs { mounts, ..inputs() });
        let step = launch.mounts.last().unwrap();
        assert!(step.bind && step.recursive && step.flags & step.flags_below & 1 == 1);
    }

    #[test]
    fn dropping_all_leaves_what_was_added() {
        let inputs = ContainerInputs {
            capabilities_drop: vec!["ALL".to_owned()],
            capabilities_add: vec!["CAP_NET_RAW".to_owned()],
            ..inputs()
        };
        assert_eq!(launch(&inputs).capabilities.effective, caps::bit("NET_RAW").unwrap());
    }
}
