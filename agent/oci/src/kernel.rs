//! What this kernel has, and under what name its configuration has what it lacks: whoever reads an error about that must
//! know what to build, or to put on the kernel's command line. It looks, and changes nothing.

use edged_model::keeper::{LaunchSpec, SecurityLabel};

use crate::spec::NEW_TIME;

/// Something a container asks for that this kernel does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{field}: no {what} in this kernel, or switched off ({option})")]
pub struct Lacks {
    pub field: &'static str,
    pub what: &'static str,
    pub option: &'static str,
}

/// Whether a file system that is never a module is there (proc_filesystems(5)).
pub fn has_filesystem(fstype: &str) -> bool {
    let list = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    list.lines().any(|line| line.split_whitespace().last() == Some(fstype))
}

/// The file system a workload's `/dev/mqueue` is.
pub const MQUEUE: &str = "mqueue";

/// The options of the file systems that configurations ask for.
const FILESYSTEMS: [(&str, &str); 20] = [
    (MQUEUE, "CONFIG_POSIX_MQUEUE"),
    ("proc", "CONFIG_PROC_FS"),
    ("sysfs", "CONFIG_SYSFS"),
    ("tmpfs", "CONFIG_TMPFS"),
    ("devpts", "CONFIG_UNIX98_PTYS"),
    ("devtmpfs", "CONFIG_DEVTMPFS"),
    ("cgroup", "CONFIG_CGROUPS"),
    ("cgroup2", "CONFIG_CGROUPS"),
    ("overlay", "CONFIG_OVERLAY_FS"),
    ("hugetlbfs", "CONFIG_HUGETLBFS"),
    ("securityfs", "CONFIG_SECURITYFS"),
    ("selinuxfs", "CONFIG_SECURITY_SELINUX"),
    ("debugfs", "CONFIG_DEBUG_FS"),
    ("tracefs", "CONFIG_TRACING"),
    ("configfs", "CONFIG_CONFIGFS_FS"),
    ("bpf", "CONFIG_BPF_SYSCALL"),
    ("fuse", "CONFIG_FUSE_FS"),
    ("nfs", "CONFIG_NFS_FS"),
    ("9p", "CONFIG_9P_FS"),
    ("binfmt_misc", "CONFIG_BINFMT_MISC"),
];

pub fn option_of_filesystem(fstype: &str) -> Option<&'static str> {
    FILESYSTEMS.iter().find(|(known, _)| *known == fstype).map(|(_, option)| *option)
}

/// The options of control files, the longest beginning first where one is the beginning of another.
const CONTROL_FILES: [(&str, &str); 24] = [
    ("memory.swap.", "CONFIG_SWAP"),
    ("memory.memsw.", "CONFIG_SWAP, and `swapaccount=1` on the kernel's command line before Linux 6.1"),
    ("memory.kmem.", "CONFIG_MEMCG_KMEM"),
    ("memory", "CONFIG_MEMCG"),
    ("cpu.max", "CONFIG_CFS_BANDWIDTH"),
    ("cpu.cfs_", "CONFIG_CFS_BANDWIDTH"),
    ("cpu.rt_", "CONFIG_RT_GROUP_SCHED"),
    ("cpuset", "CONFIG_CPUSETS"),
    ("cpuacct", "CONFIG_CGROUP_CPUACCT"),
    ("cpu", "CONFIG_FAIR_GROUP_SCHED"),
    ("pids", "CONFIG_CGROUP_PIDS"),
    ("io.max", "CONFIG_BLK_DEV_THROTTLING"),
    ("io.latency", "CONFIG_BLK_CGROUP_IOLATENCY"),
    ("io.", "CONFIG_BLK_CGROUP_IOCOST or CONFIG_BFQ_GROUP_IOSCHED"),
    ("blkio.throttle.", "CONFIG_BLK_DEV_THROTTLING"),
    ("blkio.leaf_weight", "the CFQ scheduler, which Linux 5.0 took away"),
    ("blkio", "CONFIG_BFQ_GROUP_IOSCHED"),
    ("hugetlb", "CONFIG_CGROUP_HUGETLB, and a processor that has pages of that size"),
    ("rdma", "CONFIG_CGROUP_RDMA"),
    ("misc", "CONFIG_CGROUP_MISC"),
    ("net_cls", "CONFIG_CGROUP_NET_CLASSID"),
    ("net_prio", "CONFIG_CGROUP_NET_PRIO"),
    ("devices", "CONFIG_CGROUP_DEVICE"),
    ("freezer", "CONFIG_CGROUP_FREEZER"),
];

/// Of a file (`pids.max`), or of a controller of cgroup v1 (`pids`).
pub fn option_of_control_file(file: &str) -> &'static str {
    let known = CONTROL_FILES.iter().find(|(beginning, _)| file.starts_with(beginning));
    known.map_or("an option of control groups", |(_, option)| *option)
}

/// What libapparmor asks as well (aa_is_enabled(2)).
fn apparmor_is_on() -> bool {
    std::fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y'))
}

/// What libselinux asks as well (is_selinux_enabled(3)): the file system is registered when the module is on.
fn selinux_is_on() -> bool {
    has_filesystem("selinuxfs")
}

/// Labels need the security module that knows them: told before anything is made.
pub fn check_labels(launch: &LaunchSpec) -> Result<(), Lacks> {
    let selinux =
        |field| Lacks { field, what: "SELinux", option: "CONFIG_SECURITY_SELINUX, and `lsm=` on its command line" };
    match &launch.label {
        Some(SecurityLabel::AppArmor(_)) if !apparmor_is_on() => {
            let (field, option) =
                ("process.apparmorProfile", "CONFIG_SECURITY_APPARMOR, and `lsm=` on its command line");
            return Err(Lacks { field, what: "AppArmor", option });
        }
        Some(SecurityLabel::SeLinux(_)) if !selinux_is_on() => return Err(selinux("process.selinuxLabel")),
        _ => {}
    }
    match launch.mount_label {
        Some(_) if !selinux_is_on() => Err(selinux("linux.mountLabel")),
        _ => Ok(()),
    }
}

/// What, its name in `/proc/self/ns`, its flag (linux/sched.h), its option.
const NAMESPACES: [(&str, &str, u64, &str); 7] = [
    ("UTS namespaces", "uts", 0x0400_0000, "CONFIG_UTS_NS"),
    ("IPC namespaces", "ipc", 0x0800_0000, "CONFIG_IPC_NS"),
    ("user namespaces", "user", 0x1000_0000, "CONFIG_USER_NS"),
    ("PID namespaces", "pid", 0x2000_0000, "CONFIG_PID_NS"),
    ("network namespaces", "net", 0x4000_0000, "CONFIG_NET_NS"),
    ("cgroup namespaces", "cgroup", 0x0200_0000, "CONFIG_CGROUPS"),
    ("time namespaces", "time", NEW_TIME, "CONFIG_TIME_NS"),
];

/// The first of these namespaces (CLONE_NEW*) that this kernel does not have: asked when they could not be made.
pub fn missing_namespace(namespaces: u64) -> Option<Lacks> {
    missing_of(namespaces, |name| std::path::Path::new("/proc/self/ns").join(name).exists())
}

fn missing_of(namespaces: u64, is_there: impl Fn(&str) -> bool) -> Option<Lacks> {
    let missing = NAMESPACES.iter().find(|(_, name, flag, _)| namespaces & flag != 0 && !is_there(name));
    missing.map(|(what, _, _, option)| Lacks { field: "linux.namespaces", what, option })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespace_that_is_missing_is_named() {
        assert_eq!(missing_namespace(u64::MAX), None, "the kernel that runs this has them all");
        let without_user = |name: &str| name != "user" && name != "time";
        let lacks = missing_of(0x1000_0000 | 0x0400_0000, without_user).unwrap();
        let text = "linux.namespaces: no user namespaces in this kernel, or switched off (CONFIG_USER_NS)";
        assert_eq!(lacks.to_string(), text);
        assert_eq!(missing_of(0x0400_0000, without_user), None, "nobody asked");
    }

    #[test]
    fn the_longest_beginning_is_the_one_that_counts() {
        for (position, (beginning, _)) in CONTROL_FILES.iter().enumerate() {
            let earlier = &CONTROL_FILES[..position];
            assert!(!earlier.iter().any(|(other, _)| beginning.starts_with(other)), "{beginning} is never reached");
        }
        assert_eq!(option_of_control_file("memory.max"), "CONFIG_MEMCG");
        assert_eq!(option_of_control_file("rdma.max"), "CONFIG_CGROUP_RDMA");
        assert!(option_of_control_file("io.bfq.weight").contains("BFQ"));
    }

    #[test]
    fn this_kernel_has_a_procfs() {
        assert!(has_filesystem("proc") && !has_filesystem("no-such-file-system"));
    }
}
