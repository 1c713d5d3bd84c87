//! Which hierarchies there are and where our part of them is. Pure, over the text of `/proc/self/mountinfo`
//! (proc_pid_mountinfo(5)) and `/proc/self/cgroup` (cgroups(7)).

use std::path::{Path, PathBuf};

use super::CgroupError;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    V2 {
        workloads: PathBuf,
    },
    /// For memory, cpu and pids: the name of the controller and our directory in its hierarchy.
    V1 {
        controllers: Vec<(&'static str, PathBuf)>,
    },
}

const NEEDED: [&str; 3] = ["memory", "cpu", "pids"];

/// One cgroup mount.
struct Mount<'t> {
    /// The cgroup that is the mount's root.
    root: &'t str,
    point: &'t str,
    is_v2: bool,
    options: &'t str,
}

fn mounts(mountinfo: &str) -> impl Iterator<Item = Mount<'_>> {
    mountinfo.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut fields = left.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let mut fields = right.split(' ');
        let fstype = fields.next()?;
        let options = fields.nth(1)?;
        (fstype == "cgroup" || fstype == "cgroup2").then_some(Mount {
            root,
            point,
            is_v2: fstype == "cgroup2",
            options,
        })
    })
}

/// Our own cgroup in the v1 hierarchy of `controller`, or in v2 for the empty name.
fn own<'t>(cgroup: &'t str, controller: &str) -> Option<&'t str> {
    cgroup.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        controllers.split(',').any(|name| name == controller).then_some(path)
    })
}

/// The directory of cgroup `path` under a mount whose root is cgroup `root`.
fn under(mount: &Mount<'_>, path: &str) -> PathBuf {
    let relative = path.strip_prefix(mount.root.trim_end_matches('/')).unwrap_or(path);
    Path::new(mount.point).join(relative.trim_start_matches('/'))
}

pub fn layout(mountinfo: &str, cgroup: &str, instance: Option<&str>) -> Result<Layout, CgroupError> {
    let all: Vec<_> = mounts(mountinfo).collect();
    let group = instance.map_or_else(|| "edged".to_owned(), |instance| format!("edged-{instance}"));
    let v1 = |controller: &'static str| {
        let has = |mount: &&Mount<'_>| !mount.is_v2 && mount.options.split(',').any(|option| option == controller);
        let mount = all.iter().find(has)?;
        Some((controller, under(mount, own(cgroup, controller)?).join(&group)))
    };
    let found: Vec<_> = NEEDED.iter().filter_map(|controller| v1(controller)).collect();
    if let (true, Some(mount)) = (found.is_empty(), all.iter().find(|mount| mount.is_v2)) {
        // On a device our group is at the top; under another init it is beside the one we were started in.
        let base = match instance {
            None => PathBuf::from(mount.point),
            Some(_) => {
                let mine = under(mount, own(cgroup, "").unwrap_or("/"));
                mine.parent().filter(|parent| parent.starts_with(mount.point)).map_or(mine.clone(), Path::to_owned)
            }
        };
        return Ok(Layout::V2 { workloads: base.join(group).join("workloads") });
    }
    if all.is_empty() {
        return Err(CgroupError::NotMounted);
    }
    match NEEDED.iter().find(|controller| !found.iter().any(|(name, _)| name == *controller)) {
        Some(controller) => {
            Err(CgroupError::NoController { controller, hint: "it is in no mounted cgroup v1 hierarchy" })
        }
        None => Ok(Layout::V1 { controllers: found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "30 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n";
    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
        32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
        35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
        39 31 0:36 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn a_device_has_the_fixed_place() {
        let layout = layout(V2, "0::/edged/agent\n", None).unwrap();
        assert_eq!(layout, Layout::V2 { workloads: "/sys/fs/cgroup/edged/workloads".into() });
    }

    #[test]
    fn a_v2_host_keeps_agents_apart_beside_their_service() {
        let layout = layout(V2, "0::/system.slice/edged.service\n", Some("a1")).unwrap();
        assert_eq!(layout, Layout::V2 { workloads: "/sys/fs/cgroup/system.slice/edged-a1/workloads".into() });
    }

    #[test]
    fn a_hybrid_host_is_used_through_v1_in_our_own_subtree() {
        let own = "4:memory:/session\n1:cpu,cpuacct:/\n8:pids:/\n0::/\n";
        let Layout::V1 { controllers } = layout(HYBRID, own, Some("t")).unwrap() else { panic!("v1") };
        assert_eq!(controllers[0], ("memory", "/sys/fs/cgroup/memory/session/edged-t".into()));
        assert_eq!(controllers[1], ("cpu", "/sys/fs/cgroup/cpu,cpuacct/edged-t".into()));
    }

    #[test]
    fn a_missing_controller_is_named() {
        let without = HYBRID.lines().filter(|line| !line.contains("pids")).collect::<Vec<_>>().join("\n");
        let error = layout(&without, "4:memory:/\n1:cpu,cpuacct:/\n", Some("t")).unwrap_err();
        assert!(error.to_string().contains("`pids`"), "{error}");
        assert!(matches!(layout("", "", None), Err(CgroupError::NotMounted)));
    }
}
