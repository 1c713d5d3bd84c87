use super::*;

pub fn place() -> LaunchPlace {
    LaunchPlace {
        key: "web".to_owned(),
        note: String::new(),
        rootfs: Rootfs::Directory { path: "/r".to_owned(), read_only: false },
        cgroup: CgroupEntry::Inherit,
        netns_fd: Some(0),
        seccomp: Vec::new(),
        cgroups: CgroupView::Namespace,
    }
}

/// The template with one change, as a launch.
fn launch(change: impl FnOnce(&mut serde_json::Value)) -> Result<Translated, SpecError> {
    let mut document = serde_json::from_slice(&crate::query::template()).unwrap();
    change(&mut document);
    let (spec, warnings) = crate::bundle::parse(document.to_string().as_bytes()).unwrap();
    assert!(warnings.is_empty());
    translate(&spec, LaunchPlace { netns_fd: None, ..place() })
}

fn refusal(change: impl FnOnce(&mut serde_json::Value)) -> String {
    launch(change).unwrap_err().to_string()
}

#[test]
fn the_template_is_well_walled() {
    let launch = launch(|_| {}).unwrap().launch;
    let flags = CloneFlags::from_bits_retain(i32::try_from(launch.namespaces).unwrap());
    assert!(flags.contains(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET));
    assert!(launch.no_new_privs && launch.masked_paths.iter().any(|path| path == "/proc/kcore"));
    assert_eq!(launch.capabilities.bounding, caps::mask(caps::DEFAULT).unwrap());
    assert_eq!(launch.capabilities.inheritable, 0);
    let sys = launch.mounts.iter().find(|step| step.target == "/sys").unwrap();
    assert_eq!(sys.flags & 1, 1, "MS_RDONLY");
    let dev = launch.mounts.iter().find(|step| step.target == "/dev").unwrap();
    assert_eq!(dev.data, "mode=755,size=64k");
    assert!(matches!(launch.stdio, Stdio::Terminal { .. }));
}

#[test]
fn a_network_namespace_by_descriptor_is_not_made() {
    let (spec, _) = crate::bundle::parse(&crate::query::template()).unwrap();
    let launch = launch_spec(&spec, place()).unwrap();
    assert_eq!(launch.namespaces & bits(CloneFlags::CLONE_NEWNET), 0);
}

#[test]
fn namespaces_are_made_or_joined() {
    let translated = launch(|document| {
        document["hostname"] = serde_json::Value::Null;
        document["linux"]["namespaces"] = serde_json::json!([
            { "type": "mount" }, { "type": "time" }, { "type": "ipc", "path": "/proc/1/ns/ipc" }
        ]);
        document["linux"]["timeOffsets"] = serde_json::json!({ "boottime": { "secs": 5, "nanosecs": 6 } });
    })
    .unwrap();
    assert_eq!(translated.launch.namespaces, bits(CloneFlags::CLONE_NEWNS) | NEW_TIME);
    assert_eq!(translated.joins, [(bits(CloneFlags::CLONE_NEWIPC), PathBuf::from("/proc/1/ns/ipc"))]);
    assert_eq!(translated.time_offsets, [("boottime".to_owned(), 5, 6)]);
    let twice = serde_json::json!([{ "type": "mount" }, { "type": "mount" }]);
    assert!(refusal(|document| document["linux"]["namespaces"] = twice).contains("twice"));
    let none = serde_json::json!([]);
    assert!(refusal(|document| document["linux"]["namespaces"] = none).contains("mount namespace"));
    let user = serde_json::json!([{ "type": "mount" }, { "type": "uts" }, { "type": "user" }]);
    assert!(refusal(|document| document["linux"]["namespaces"] = user).contains("uidMappings"));
}

#[test]
fn mount_options_are_understood_word_by_word() {
    let mount = serde_json::json!([{
        "destination": "/data", "source": "/host", "type": "none",
        "options": ["rbind", "ro", "noexec", "suid", "rnodev", "rrw", "rslave", "noatime"],
    }]);
    let step = launch(|document| document["mounts"] = mount).unwrap().launch.mounts.remove(0);
    assert!(step.bind && step.recursive);
    assert_eq!((step.flags, step.clear), (1 | 8 | 1024, 2));
    assert_eq!((step.flags_below, step.clear_below), (4, 1));
    assert_eq!(step.propagation, 1 << 19);
    let tmpfs = serde_json::json!([{ "destination": "/t", "type": "tmpfs", "source": "tmpfs",
        "options": ["tmpcopyup", "size=1m", "defaults", "sync"] }]);
    let step = launch(|document| document["mounts"] = tmpfs).unwrap().launch.mounts.remove(0);
    assert!(step.copy_up && !step.bind);
    assert_eq!(step.data, "size=1m,sync");
}

#[test]
fn idmaps_are_the_mounts_own_or_the_containers() {
    let map = serde_json::json!([{ "containerID": 0, "hostID": 1000, "size": 10 }]);
    let mount = serde_json::json!([{ "destination": "/d", "source": "/h", "options": ["bind", "ridmap"],
        "uidMappings": map, "gidMappings": map }]);
    let translated = launch(|document| document["mounts"] = mount).unwrap();
    let [(0, idmap)] = translated.idmaps.as_slice() else { panic!("{:?}", translated.idmaps) };
    assert_eq!((idmap.uid_map[0].outside, idmap.recursive), (1000, true));
    let without = serde_json::json!([{ "destination": "/d", "source": "/h", "options": ["bind", "idmap"] }]);
    assert!(refusal(|document| document["mounts"] = without).contains("uidMappings"));
}

#[test]
fn cgroups_are_shown_as_the_host_has_them() {
    let mount: oci_spec::runtime::Mount = serde_json::from_str(
        r#"{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid"]}"#,
    )
    .unwrap();
    let steps = |view| mounts::steps(&mount, &view).unwrap().into_iter().map(|one| one.step).collect::<Vec<_>>();
    assert_eq!(steps(CgroupView::Namespace)[0].fstype, "cgroup2");
    let hierarchies = vec![("memory".to_owned(), PathBuf::from("/sys/fs/cgroup/memory/x"))];
    let [tmpfs, bind, seal] = &steps(CgroupView::Hierarchies(hierarchies))[..] else { panic!("three steps") };
    assert!(tmpfs.fstype == "tmpfs" && tmpfs.flags & 1 == 0, "nothing could be made in a read-only one");
    assert_eq!((bind.target.as_str(), bind.bind), ("/sys/fs/cgroup/memory", true));
    assert!(seal.remount && seal.flags & 1 == 1);
}

#[test]
fn a_label_is_for_what_is_new() {
    let label = "system_u:object_r:container_file_t:s0:c1,c2";
    let launch = launch(|document| {
        document["linux"]["mountLabel"] = label.into();
        let bind = serde_json::json!({ "destination": "/d", "source": "/h", "options": ["bind"] });
        document["mounts"].as_array_mut().unwrap().push(bind);
    });
    let launch = launch.unwrap().launch;
    assert_eq!(launch.mount_label.as_deref(), Some(label));
    let labelled: Vec<_> =
        launch.mounts.iter().filter(|step| step.label.is_some()).map(|step| step.fstype.as_str()).collect();
    assert_eq!(labelled, ["tmpfs", "devpts", "tmpfs", "mqueue"], "not proc, sysfs, cgroup, nor what is bound");
}

#[test]
fn what_is_not_done_is_named() {
    for (pointer, value, word) in [
        ("intelRdt", serde_json::json!({ "closID": "x" }), "linux.intelRdt"),
        ("memoryPolicy", serde_json::json!({ "mode": "MPOL_BIND" }), "linux.memoryPolicy"),
        ("rootfsPropagation", serde_json::json!("sideways"), "linux.rootfsPropagation"),
        ("sysctl", serde_json::json!({ "vm.swappiness": "1" }), "linux.sysctl"),
        ("personality", serde_json::json!({ "domain": "LINUX", "flags": ["X"] }), "linux.personality"),
    ] {
        let text = refusal(|document| document["linux"][pointer] = value);
        assert!(text.contains(word), "{text}");
    }
    assert!(refusal(|document| document["ociVersion"] = "2.0.0".into()).contains("ociVersion"));
    for field in ["hostname", "domainname"] {
        let text = refusal(|document| {
            document["hostname"] = serde_json::Value::Null;
            document[field] = "other".into();
            document["linux"]["namespaces"] = serde_json::json!([{ "type": "mount" }]);
        });
        assert!(text.contains(field) && text.contains("UTS"), "{text}");
    }
    assert!(refusal(|document| document["process"]["cwd"] = "here".into()).contains("process.cwd"));
    let prestart = serde_json::json!({ "prestart": [{ "path": "hook" }] });
    assert!(
        refusal(|document| document["hooks"] = serde_json::json!({ "createContainer": prestart["prestart"] }))
            .contains("hooks.path")
    );
}

#[test]
fn a_kernel_parameter_needs_a_namespace_of_its_own() {
    let sysctl = serde_json::json!({ "net.core.somaxconn": "9", "kernel.shmmax": "1" });
    let launch_of = |network: bool| {
        launch(|document| {
            document["linux"]["sysctl"] = sysctl.clone();
            if !network {
                document["linux"]["namespaces"] =
                    serde_json::json!([{ "type": "mount" }, { "type": "ipc" }, { "type": "uts" }]);
            }
        })
    };
    assert_eq!(launch_of(true).unwrap().launch.sysctls[0].0, "kernel.shmmax");
    assert!(launch_of(false).unwrap_err().to_string().contains("net.core.somaxconn"));
}

#[test]
fn the_process_as_the_kernel_counts_it() {
    let launch = launch(|document| {
        let process = &mut document["process"];
        process["scheduler"] = serde_json::json!({ "policy": "SCHED_FIFO", "priority": 5 });
        process["ioPriority"] = serde_json::json!({ "class": "IOPRIO_CLASS_IDLE", "priority": 3 });
        process["user"] = serde_json::json!({ "uid": 1, "gid": 2, "umask": 63, "additionalGids": [7] });
        process["consoleSize"] = serde_json::json!({ "height": 24, "width": 80 });
        process["oomScoreAdj"] = 100.into();
        document["linux"]["personality"] = serde_json::json!({ "domain": "LINUX32" });
        document["domainname"] = "local".into();
    })
    .unwrap()
    .launch;
    let scheduler = launch.scheduler.unwrap();
    assert_eq!((scheduler.policy, scheduler.priority), (1, 5));
    assert_eq!((launch.io_priority, launch.personality), (Some(3 << 13 | 3), Some(8)));
    assert_eq!((launch.uid, launch.gid, launch.umask, launch.oom_score_adj), (1, 2, Some(63), Some(100)));
    assert_eq!(launch.stdio, Stdio::Terminal { rows: 24, columns: 80 });
    assert_eq!(launch.domainname.as_deref(), Some("local"));
}
