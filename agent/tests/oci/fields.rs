//! Field by field of the runtime-spec: what the configuration says is what the container has.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use crate::rig::{Bundle, is_cgroup_v2};

fn add_namespace(bundle: &mut Bundle, namespace: serde_json::Value) {
    bundle.config["linux"]["namespaces"].as_array_mut().unwrap().push(namespace);
}

fn drop_namespace(bundle: &mut Bundle, kind: &str) {
    bundle.config["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != kind);
}

fn add_mount(bundle: &mut Bundle, mount: serde_json::Value) {
    bundle.config["mounts"].as_array_mut().unwrap().push(mount);
}

fn add_capability(bundle: &mut Bundle, name: &str) {
    for set in ["bounding", "permitted", "effective"] {
        bundle.config["process"]["capabilities"][set].as_array_mut().unwrap().push(name.into());
    }
}

#[test]
fn user_groups_umask_and_limits() {
    let mut bundle = Bundle::new("id; umask; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; pwd; echo $A");
    let process = &mut bundle.config["process"];
    process["user"] = json!({ "uid": 5, "gid": 6, "umask": 0o027, "additionalGids": [7, 8] });
    process["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }]);
    process["oomScoreAdj"] = 500.into();
    process["cwd"] = "/tmp".into();
    process["env"] = json!(["PATH=/bin", "A=b=c"]);
    assert_eq!(bundle.run().good(), "uid=5 gid=6 groups=7,8\n0027\n100\n200\n500\n/tmp\nb=c\n");
}

#[test]
fn five_sets_of_capabilities_and_no_new_privileges() {
    let mut bundle = Bundle::new("grep -E 'Cap|NoNewPrivs' /proc/self/status");
    bundle.config["process"]["user"] = json!({ "uid": 5, "gid": 5 });
    bundle.config["process"]["noNewPrivileges"] = true.into();
    let all = json!(["CAP_KILL", "CAP_CHOWN", "CAP_SYS_TIME"]);
    bundle.config["process"]["capabilities"] = json!({
        "bounding": all, "permitted": all, "inheritable": ["CAP_KILL"], "effective": ["CAP_KILL"], "ambient": ["CAP_KILL"],
    });
    let text = bundle.run().good();
    let set = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
    };
    let (kill, three) = (1 << 5, 1 << 5 | 1 | 1 << 25);
    assert_eq!(set("CapBnd"), three);
    // exec(2) gives one who is not root what is ambient.
    assert_eq!([set("CapInh"), set("CapPrm"), set("CapEff"), set("CapAmb")], [kill; 4]);
    assert!(text.contains("NoNewPrivs:\t1"));
}

#[test]
fn an_unknown_capability_is_a_warning() {
    let mut bundle = Bundle::new("true");
    bundle.config["process"]["capabilities"]["bounding"] = json!(["CAP_KILL", "CAP_FLY"]);
    let seen = bundle.run();
    assert!(seen.code == Some(0) && seen.err.contains("CAP_FLY"), "{seen:?}");
}

#[test]
fn scheduler_io_priority_and_personality() {
    let mut bundle = Bundle::new("uname -m; cut -d' ' -f 19 /proc/self/stat; cut -d' ' -f 41 /proc/self/stat");
    bundle.config["process"]["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 7 });
    bundle.config["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_IDLE", "priority": 0 });
    bundle.config["linux"]["personality"] = json!({ "domain": "LINUX32" });
    let machine = if cfg!(target_arch = "x86_64") { "i686" } else { "armv8l" };
    assert_eq!(bundle.run().good(), format!("{machine}\n7\n3\n"));
}

#[test]
fn names_of_the_host_are_the_containers() {
    let mut bundle = Bundle::new("hostname; cat /proc/sys/kernel/domainname");
    bundle.config["hostname"] = "inner".into();
    bundle.config["domainname"] = "example.org".into();
    assert_eq!(bundle.run().good(), "inner\nexample.org\n");
}

#[test]
fn namespaces_are_new_or_joined_by_path() {
    let host = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().to_string_lossy().into_owned();
    let other = Bundle::new("echo up; while :; do sleep 0.05; done");
    other.create().good();
    other.start();
    let pid = other.state()["pid"].clone();
    let of = |kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap().to_string_lossy().into_owned();

    let mut bundle =
        Bundle::new("for n in net ipc uts pid cgroup; do readlink /proc/self/ns/$n; done; ls /proc | grep -c '^[0-9]'");
    for kind in ["network", "ipc", "pid", "uts"] {
        drop_namespace(&mut bundle, kind);
    }
    bundle.config.as_object_mut().unwrap().remove("hostname");
    for (kind, file) in [("network", "net"), ("ipc", "ipc"), ("pid", "pid")] {
        add_namespace(&mut bundle, json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") }));
    }
    let text = bundle.run().good();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..4], [of("net"), of("ipc"), host("uts"), of("pid")]);
    assert_ne!(lines[4], host("cgroup"));
    assert!(lines[5].parse::<u32>().unwrap() >= 2, "the other's processes are seen: {text}");

    let mut missing = Bundle::new("true");
    drop_namespace(&mut missing, "network");
    add_namespace(&mut missing, json!({ "type": "network", "path": "/nowhere" }));
    assert!(missing.create().bad().contains("/nowhere"));
}

#[test]
fn the_time_namespace_has_its_own_clocks() {
    if fs::metadata("/proc/self/ns/time").is_err() {
        let mut bundle = Bundle::new("true");
        add_namespace(&mut bundle, json!({ "type": "time" }));
        assert!(bundle.create().bad().contains("CONFIG_TIME_NS"));
        return;
    }
    let mut bundle = Bundle::new("cat /proc/uptime; readlink /proc/self/ns/time");
    add_namespace(&mut bundle, json!({ "type": "time" }));
    bundle.config["linux"]["timeOffsets"] = json!({ "boottime": { "secs": 1_000_000, "nanosecs": 0 } });
    let text = bundle.run().good();
    let uptime: f64 = text.split(' ').next().unwrap().parse().unwrap();
    assert!(uptime > 1_000_000.0, "{text}");
}

#[test]
fn a_user_namespace_maps_ids() {
    let mut bundle = Bundle::new(
        "id -u; id -g; cat /proc/self/uid_map; touch /data/made; stat -c %u /data/made; cat /proc/self/setgroups",
    );
    add_namespace(&mut bundle, json!({ "type": "user" }));
    let map = json!([{ "containerID": 0, "hostID": 200_000, "size": 1000 }]);
    bundle.config["linux"]["uidMappings"] = map.clone();
    bundle.config["linux"]["gidMappings"] = map;
    std::os::unix::fs::chown(bundle.rootfs().join("data"), Some(200_000), Some(200_000)).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(bundle.dir.path(), open).unwrap();
    let text = bundle.run().good();
    let words: Vec<_> = text.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "0", "200000", "1000", "0", "allow"]);
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(bundle.rootfs().join("data/made")).unwrap().uid(), 200_000);
}

#[test]
fn a_user_namespace_can_be_joined() {
    let mut first = Bundle::new("echo up; while :; do sleep 0.05; done");
    let map = json!([{ "containerID": 0, "hostID": 200_000, "size": 1000 }]);
    add_namespace(&mut first, json!({ "type": "user" }));
    first.config["linux"]["uidMappings"] = map.clone();
    first.config["linux"]["gidMappings"] = map;
    let open: fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(first.dir.path(), open.clone()).unwrap();
    first.create().good();
    first.start();
    first.wait_for_out("up");
    let pid = first.state()["pid"].clone();
    assert_eq!(
        first.call(&["exec", &first.id, "cat", "/proc/self/uid_map"]).good().split_whitespace().nth(1),
        Some("200000")
    );

    let mut second = Bundle::new("readlink /proc/self/ns/user; id -u; readlink /proc/self/ns/pid");
    add_namespace(&mut second, json!({ "type": "user", "path": format!("/proc/{pid}/ns/user") }));
    fs::set_permissions(second.dir.path(), open).unwrap();
    let text = second.run().good();
    let user = fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    let own = fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..2], [user.to_str().unwrap(), "0"]);
    assert_ne!(lines[2], own.to_str().unwrap(), "its pid namespace is new");
}

#[test]
fn words_that_change_nothing_are_taken() {
    let mut bundle = Bundle::new("grep ' /mem ' /proc/self/mounts | cut -d' ' -f 4");
    let plain = json!({ "destination": "/mem", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"] });
    add_mount(&mut bundle, plain);
    let without = bundle.run().good();
    let mount = bundle.config["mounts"].as_array_mut().unwrap().last_mut().unwrap();
    mount["options"] =
        json!(["size=1m", "iversion", "noiversion", "silent", "loud", "acl", "defaults", "async", "nomand"]);
    assert_eq!(bundle.run().good(), without);
    assert!(without.contains("size=1024k"), "{without}");
}

#[test]
fn mounts_have_the_options_they_were_given() {
    let mut bundle =
        Bundle::new("grep -E ' /(mem|host|deep|deep/below|file) ' /proc/self/mounts | cut -d' ' -f 2,4 | sort");
    let host = bundle.dir.path().join("host");
    let below = bundle.dir.path().join("deep/below");
    fs::create_dir_all(&host).unwrap();
    fs::create_dir_all(&below).unwrap();
    let one = bundle.dir.path().join("one");
    fs::write(&one, "1").unwrap();
    add_mount(
        &mut bundle,
        json!({ "destination": "/mem", "type": "tmpfs", "source": "tmpfs",
        "options": ["nosuid", "noexec", "size=1m", "mode=700", "noatime"] }),
    );
    add_mount(&mut bundle, json!({ "destination": "/host", "source": host, "options": ["bind", "ro", "nodev"] }));
    add_mount(&mut bundle, json!({ "destination": "/file", "source": one, "options": ["bind"] }));
    add_mount(
        &mut bundle,
        json!({ "destination": "/deep", "source": below.parent(), "options": ["rbind", "rro", "rnosuid"] }),
    );
    let text = bundle.run().good();
    let options = |target: &str| {
        let line =
            text.lines().find(|line| line.starts_with(&format!("{target} "))).unwrap_or_else(|| panic!("{text}"));
        line.split_once(' ').unwrap().1.split(',').map(str::to_owned).collect::<Vec<_>>()
    };
    for word in ["nosuid", "noexec", "noatime", "size=1024k", "mode=700"] {
        assert!(options("/mem").contains(&word.to_owned()), "{word} in {text}");
    }
    assert!(options("/host").contains(&"ro".to_owned()) && options("/host").contains(&"nodev".to_owned()), "{text}");
    assert!(options("/file").contains(&"rw".to_owned()), "{text}");
    assert!(options("/deep").contains(&"nosuid".to_owned()), "{text}");
}

#[test]
fn attributes_reach_what_is_mounted_below_when_they_are_recursive() {
    for (word, writable) in [("ro", true), ("rro", false)] {
        let mut bundle = Bundle::new("touch /deep/below/x && echo written");
        let below = bundle.dir.path().join("deep/below");
        fs::create_dir_all(&below).unwrap();
        let bind = format!("mount --bind {0} {0} && exec \"$@\"", below.display());
        add_mount(&mut bundle, json!({ "destination": "/deep", "source": below.parent(), "options": ["rbind", word] }));
        bundle.save();
        let run = bundle.command(&["run", "--bundle", bundle.dir.path().to_str().unwrap(), &bundle.id]);
        let mut command = std::process::Command::new("unshare");
        command.args(["--mount", "sh", "-c", &bind, "sh"]).arg(run.get_program()).args(run.get_args());
        let output = command.output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).contains("written"), writable, "{word}: {output:?}");
    }
}

#[test]
fn tmpcopyup_fills_the_new_file_system() {
    let mut bundle = Bundle::new("cat /data/a/file; touch /data/new; readlink /data/link");
    fs::create_dir_all(bundle.rootfs().join("data/a")).unwrap();
    fs::write(bundle.rootfs().join("data/a/file"), "text\n").unwrap();
    std::os::unix::fs::symlink("/nowhere", bundle.rootfs().join("data/link")).unwrap();
    add_mount(
        &mut bundle,
        json!({ "destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"] }),
    );
    assert_eq!(bundle.run().good(), "text\n/nowhere\n");
    assert!(!bundle.rootfs().join("data/new").exists(), "the root below was left alone");
}

#[test]
fn an_idmapped_mount_shows_other_owners() {
    let mut bundle = Bundle::new("stat -c %u /mapped/file");
    let host = bundle.dir.path().join("host");
    fs::create_dir_all(&host).unwrap();
    fs::write(host.join("file"), "").unwrap();
    std::os::unix::fs::chown(host.join("file"), Some(3), Some(3)).unwrap();
    let map = json!([{ "containerID": 0, "hostID": 1000, "size": 100 }]);
    add_mount(
        &mut bundle,
        json!({ "destination": "/mapped", "source": host, "options": ["bind", "idmap"],
        "uidMappings": map, "gidMappings": map }),
    );
    assert_eq!(bundle.run().good(), "1003\n");
}

#[test]
fn propagation_is_private_unless_asked() {
    let mut bundle = Bundle::new("grep -E ' (/|/p|/s) ' /proc/self/mountinfo | cut -d' ' -f 5,7");
    for (target, options) in [("/p", json!(["bind"])), ("/s", json!(["bind", "shared"]))] {
        let host = bundle.dir.path().join("host");
        fs::create_dir_all(&host).unwrap();
        add_mount(&mut bundle, json!({ "destination": target, "source": host, "options": options }));
    }
    let text = bundle.run().good();
    assert!(text.contains("/s shared:"), "{text}");
    assert!(!text.contains("/p shared:") && !text.contains("/ shared:"), "{text}");
    bundle.config["linux"]["rootfsPropagation"] = "shared".into();
    let text = bundle.run().good();
    assert!(text.contains("/ shared:"), "{text}");
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&bundle.id), "nothing came to the host");
}

#[test]
fn devices_are_made_and_no_others_can_be_used() {
    let script = "stat -c '%a %t %T' /dev/null /dev/mine; echo x > /dev/mine && echo ok; test -p /dev/fifo && echo fifo; \
                  mknod /dev/disk b 7 0 && head -c 1 /dev/disk || echo denied";
    let mut bundle = Bundle::new(script);
    add_capability(&mut bundle, "CAP_MKNOD");
    bundle.config["linux"]["devices"] = json!([
        { "path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 0, "gid": 0 },
        { "path": "/dev/fifo", "type": "p", "major": 0, "minor": 0 },
    ]);
    let text = bundle.run().good();
    assert_eq!(text, "666 1 3\n640 1 3\nok\nfifo\ndenied\n");
}

#[test]
fn the_limits_are_the_groups() {
    let mut bundle = Bundle::new("sleep 100");
    bundle.config["linux"]["resources"] = json!({
        "memory": { "limit": 40_960_000, "swap": 40_960_000, "reservation": 20_480_000 },
        "cpu": { "shares": 512, "quota": 30_000, "period": 100_000, "cpus": "0" },
        "pids": { "limit": 17 },
    });
    bundle.create().good();
    let read = |controller: &str, file: &str| {
        let path = bundle.cgroup(controller).join(file);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim().to_owned()
    };
    assert_eq!(read("pids", "pids.max"), "17");
    assert_eq!(read("cpuset", "cpuset.cpus"), "0");
    if is_cgroup_v2() {
        assert_eq!(read("memory", "memory.max"), "40960000");
        assert_eq!(read("memory", "memory.swap.max"), "0");
        assert_eq!(read("cpu", "cpu.max"), "30000 100000");
    } else {
        assert_eq!(read("memory", "memory.limit_in_bytes"), "40960000");
        assert_eq!(read("memory", "memory.soft_limit_in_bytes"), "20480000");
        assert_eq!((read("cpu", "cpu.cfs_quota_us"), read("cpu", "cpu.shares")), ("30000".into(), "512".into()));
    }
    assert_eq!(read("pids", "cgroup.procs"), bundle.state()["pid"].to_string());
}

/// What a start does on another processor takes a process of its own, which is not to be had here.
#[test]
fn a_container_that_may_have_one_process_starts() {
    for with_network in [true, false] {
        let mut bundle = Bundle::new("echo here");
        bundle.config["linux"]["resources"] = json!({ "pids": { "limit": 1 } });
        if !with_network {
            drop_namespace(&mut bundle, "network");
        }
        assert_eq!(bundle.run().good(), "here\n", "{with_network}");
    }
}

#[test]
fn a_memory_wall_holds() {
    let mut bundle = Bundle::new("dd if=/dev/zero of=/dev/null bs=200M count=1; echo $?");
    bundle.config["linux"]["resources"] = json!({ "memory": { "limit": 20_000_000, "swap": 20_000_000 } });
    let seen = bundle.run();
    assert!(seen.out.trim().starts_with("137") || seen.code == Some(137), "{seen:?}");
}

#[test]
fn what_the_cgroups_of_this_host_cannot_do_is_named() {
    let mut bundle = Bundle::new("true");
    bundle.config["linux"]["resources"] = if is_cgroup_v2() {
        json!({ "memory": { "swappiness": 10 } })
    } else {
        json!({ "unified": { "memory.high": "1000000" } })
    };
    assert!(bundle.create().bad().contains("linux.resources."));
    bundle.config["linux"]["resources"] = json!({});
    bundle.config["linux"]["cgroupsPath"] = "system.slice:edged:x".into();
    assert!(bundle.create().bad().contains("systemd"));
    bundle.config["linux"]["cgroupsPath"] = "/edged-tests/../../x".into();
    assert!(bundle.create().bad().contains("leads up"));
}

#[test]
fn a_filter_of_system_calls_holds() {
    let script =
        "mkdir /tmp/a; echo $?; hostname x 2>&1; ln -s a /tmp/b && echo linked; grep Seccomp: /proc/self/status";
    let mut bundle = Bundle::new(script);
    add_capability(&mut bundle, "CAP_SYS_ADMIN");
    bundle.config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [
            { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28 },
            { "names": ["sethostname"], "action": "SCMP_ACT_ERRNO" },
        ],
    });
    for no_new_privileges in [true, false] {
        bundle.config["process"]["noNewPrivileges"] = no_new_privileges.into();
        let seen = bundle.run();
        assert!(seen.err.contains("No space left"), "{seen:?}");
        assert!(seen.out.contains("Operation not permitted") && seen.out.contains("linked"), "{seen:?}");
        assert!(seen.out.contains("Seccomp:\t2"), "{seen:?}");
        let _ = fs::remove_file(bundle.rootfs().join("tmp/b"));
    }
}

/// Somebody outside hears of a call and lets it wait until he has decided; one who is gone has the kernel say ENOSYS.
#[test]
fn a_listener_decides_what_the_filter_leaves_to_it() {
    for no_new_privileges in [true, false] {
        let mut bundle = Bundle::new("mkdir /tmp/a 2>&1; echo ended; while :; do sleep 0.05; done");
        let path = bundle.dir.path().join("listener");
        let listener = UnixListener::bind(&path).unwrap();
        bundle.config["process"]["noNewPrivileges"] = no_new_privileges.into();
        bundle.config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
            "listenerPath": path,
            "listenerMetadata": "what it was told",
            "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY" }],
        });
        let told = || {
            let (socket, _) = listener.accept().unwrap();
            let mut words = vec![0; 16 * 1024];
            let (count, mut fds) = edged_sys::fdpass::recv(socket.as_fd(), &mut words).unwrap();
            let words: serde_json::Value = serde_json::from_slice(&words[..count]).unwrap();
            assert_eq!((&words["fds"], &words["metadata"]), (&json!(["seccompFd"]), &json!("what it was told")));
            assert_eq!(words["state"]["id"], json!(bundle.id));
            (words["pid"].clone(), fds.pop().unwrap(), words["state"]["status"].clone())
        };
        let wait_for_a_call = |notify: &OwnedFd| {
            let mut polled = [PollFd::new(notify, PollFlags::IN)];
            let patience = Timespec { tv_sec: 30, tv_nsec: 0 };
            assert_eq!(poll(&mut polled, Some(&patience)).unwrap(), 1, "no call was announced");
        };
        bundle.create().good();
        bundle.start();
        let (pid, notify, status) = told();
        assert_eq!((pid, status), (bundle.state()["pid"].clone(), json!("creating")));
        wait_for_a_call(&notify);
        assert_eq!(bundle.out(), "");
        drop(notify);
        bundle.wait_for_out("ended");
        assert!(bundle.out().contains("Function not implemented"), "{}", bundle.out());

        std::thread::scope(|scope| {
            let exec = scope.spawn(|| bundle.call(&["exec", &bundle.id, "mkdir", "/tmp/b"]));
            let (pid, notify, status) = told();
            assert_eq!(status, json!("running"));
            assert_ne!(pid, bundle.state()["pid"]);
            wait_for_a_call(&notify);
            drop(notify);
            assert!(exec.join().unwrap().bad().contains("Function not implemented"));
        });
    }
}

#[test]
fn a_listener_that_nobody_can_reach_is_told() {
    let mut bundle = Bundle::new("true");
    let seccomp = |path: Option<&str>, call: &str| {
        json!({ "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": path,
            "syscalls": [{ "names": [call], "action": "SCMP_ACT_NOTIFY" }] })
    };
    for (path, call, word) in [
        (Some("/nobody/listens"), "mkdir", "/nobody/listens"),
        (Some("/x"), "sendmsg", "sendmsg"),
        (None, "mkdir", "listenerPath"),
    ] {
        bundle.config["linux"]["seccomp"] = seccomp(path, call);
        let text = bundle.run().bad();
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn exec_runs_on_the_processors_it_is_given() {
    let mut bundle = Bundle::new("echo up; while :; do sleep 0.05; done");
    bundle.create().good();
    bundle.start();
    bundle.wait_for_out("up");
    let mut process = bundle.config["process"].take();
    process["args"] = json!(["sh", "-c", "grep Cpus_allowed_list /proc/self/status"]);
    let allowed = fs::read_to_string("/proc/self/status").unwrap();
    let allowed = allowed.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    let last = allowed.rsplit(['-', ',']).next().unwrap();
    let file = bundle.dir.path().join("process.json");
    let mut exec = |affinity: serde_json::Value| {
        process["execCPUAffinity"] = affinity;
        fs::write(&file, process.to_string()).unwrap();
        bundle.call(&["exec", "--process", file.to_str().unwrap(), &bundle.id])
    };
    for one in [json!({ "initial": last }), json!({ "final": last }), json!({ "initial": allowed, "final": last })] {
        assert_eq!(exec(one).good(), format!("Cpus_allowed_list:\t{last}\n"));
    }
    assert_eq!(exec(json!({})).good(), format!("Cpus_allowed_list:\t{allowed}\n"));
    assert!(exec(json!({ "final": "3-1" })).bad().contains("execCPUAffinity"));
}

#[test]
fn paths_are_masked_or_read_only() {
    let script = "cat /proc/keys | wc -c; ls /sys/firmware | wc -l; echo 1 > /proc/sys/net/ipv4/ip_forward || echo ro; \
                  cat /secret/file | wc -c; touch /frozen/x || echo ro";
    let mut bundle = Bundle::new(script);
    for dir in ["secret", "frozen"] {
        fs::create_dir(bundle.rootfs().join(dir)).unwrap();
    }
    fs::write(bundle.rootfs().join("secret/file"), "hidden").unwrap();
    bundle.config["linux"]["maskedPaths"] = json!(["/proc/keys", "/sys/firmware", "/secret/file", "/not/there"]);
    bundle.config["linux"]["readonlyPaths"] = json!(["/proc/sys", "/frozen", "/not/there"]);
    assert_eq!(bundle.run().good(), "0\n0\nro\n0\nro\n");
}

#[test]
fn kernel_parameters_of_a_namespace_are_set() {
    let mut bundle = Bundle::new("cat /proc/sys/net/core/somaxconn /proc/sys/kernel/shm_rmid_forced");
    bundle.config["linux"]["sysctl"] = json!({ "net.core.somaxconn": "77", "kernel.shm_rmid_forced": "1" });
    assert_eq!(bundle.run().good(), "77\n1\n");
    bundle.config["linux"]["sysctl"] = json!({ "kernel.panic": "1" });
    assert!(bundle.create().bad().contains("kernel.panic"));
}

/// Engines leave it to the runtime, as runc and crun do it.
#[test]
fn a_new_network_namespace_has_its_loopback_up() {
    let script = "busybox ip addr show dev lo | grep -c -e LOOPBACK,UP -e 127.0.0.1/8";
    let mut bundle = Bundle::new(script);
    assert_eq!(bundle.run().good(), "2\n");
    let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 1000 }]);
    add_namespace(&mut bundle, json!({ "type": "user" }));
    bundle.config["linux"]["uidMappings"] = map.clone();
    bundle.config["linux"]["gidMappings"] = map;
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(bundle.dir.path(), open).unwrap();
    assert_eq!(bundle.run().good(), "2\n");
}

#[test]
fn a_read_only_root_is_read_only() {
    let mut bundle = Bundle::new("touch /x || echo ro; touch /dev/shm/x && echo rw");
    bundle.config["root"]["readonly"] = true.into();
    assert_eq!(bundle.run().good(), "ro\nrw\n");
}

#[test]
fn hooks_run_at_their_points_in_their_namespaces_with_the_state() {
    let mut bundle = Bundle::new("echo program >> /data/log; readlink /proc/self/ns/mnt >> /data/log");
    let log = bundle.rootfs().join("data/log");
    let host = |point: &str| {
        let script = format!(
            "state=$(cat); echo {point} $(echo $state | sed 's/.*\"status\":\"\\([a-z]*\\)\".*/\\1/') $A \
             $(test $(readlink /proc/self/ns/mnt) = {} && echo host || echo inside) >> {}",
            fs::read_link("/proc/self/ns/mnt").unwrap().display(),
            log.display()
        );
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=b", "PATH=/usr/bin:/bin"], "timeout": 20 }])
    };
    let inside = json!([{ "path": "/bin/sh", "env": ["PATH=/bin"],
        "args": ["sh", "-c", "read state; case $state in *\\\"id\\\"*) echo startContainer inside >> /data/log;; esac"] }]);
    bundle.config["hooks"] = json!({
        "prestart": host("prestart"), "createRuntime": host("createRuntime"), "createContainer": host("createContainer"),
        "startContainer": inside, "poststart": host("poststart"), "poststop": host("poststop"),
    });
    let read = || fs::read_to_string(&log).unwrap_or_default();
    bundle.create().good();
    let created = "prestart creating b host\ncreateRuntime creating b host\ncreateContainer created b inside\n";
    assert_eq!(read(), created);
    bundle.start();
    bundle.wait_for_status("stopped");
    let text = read();
    assert!(text.contains("startContainer inside\nprogram\n"), "{text}");
    assert!(text.contains("poststart running b host"), "{text}");
    bundle.call(&["delete", &bundle.id]).good();
    assert!(read().ends_with("poststop stopped b host\n"), "{}", read());
}

#[test]
fn a_hook_that_fails_or_takes_too_long_stops_create() {
    for (script, timeout, word) in [("exit 3", 20, "failed"), ("exec sleep 100", 1, "did not end")] {
        let mut bundle = Bundle::new("true");
        let hook = json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "timeout": timeout }]);
        bundle.config["hooks"] = json!({ "createRuntime": hook });
        let text = bundle.create().bad();
        assert!(text.contains(word) && text.contains("/bin/sh"), "{text}");
        assert!(bundle.call(&["state", &bundle.id]).bad().contains("does not exist"));
        assert!(!bundle.cgroup("memory").exists());
    }
}

#[test]
fn annotations_are_in_the_state() {
    let mut bundle = Bundle::new("sleep 100");
    bundle.config["annotations"] = json!({ "org.example.key": "value" });
    bundle.create().good();
    assert_eq!(bundle.state()["annotations"]["org.example.key"], "value");
}

/// Where there is such a module, the label decides, and there is none of this name (`tests/qemu/tests/runtime` has real ones).
#[test]
fn labels_of_modules_that_are_not_here_are_refused() {
    let selinux = filesystems().iter().any(|name| name == "selinuxfs");
    let apparmor =
        fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y'));
    for (object, field, is_on, option) in [
        ("process", "apparmorProfile", apparmor, "CONFIG_SECURITY_APPARMOR"),
        ("process", "selinuxLabel", selinux, "CONFIG_SECURITY_SELINUX"),
        ("linux", "mountLabel", selinux, "CONFIG_SECURITY_SELINUX"),
    ] {
        let mut bundle = Bundle::new("true");
        bundle.config[object][field] = "no-such-label".into();
        let text = bundle.run().bad();
        assert!(is_on || text.contains(&format!("{object}.{field}")) && text.contains(option), "{text}");
        assert!(!bundle.cgroup("memory").exists());
    }
    // The same of one more program.
    let bundle = Bundle::new("echo up; while :; do sleep 0.05; done");
    bundle.create().good();
    bundle.start();
    for (flag, is_on, option) in [
        ("--apparmor=no-such-label", apparmor, "CONFIG_SECURITY_APPARMOR"),
        ("--process-label=no-such-label", selinux, "CONFIG_SECURITY_SELINUX"),
    ] {
        let text = bundle.call(&["exec", flag, &bundle.id, "true"]).bad();
        assert!(is_on || text.contains(option), "{text}");
    }
}

/// proc_filesystems(5): with the modules that are loaded now.
fn filesystems() -> Vec<String> {
    let list = fs::read_to_string("/proc/filesystems").unwrap();
    list.lines().filter_map(|line| line.split_whitespace().last()).map(str::to_owned).collect()
}

#[test]
fn a_file_system_that_the_kernel_does_not_have_is_named() {
    for (fstype, option) in
        [("mqueue", "CONFIG_POSIX_MQUEUE"), ("nfs", "CONFIG_NFS_FS"), ("9p", "CONFIG_9P_FS"), ("nonsense", "")]
    {
        let mut bundle = Bundle::new("true");
        let mounts = bundle.config["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["type"] != "mqueue");
        mounts.push(json!({ "destination": "/data", "type": fstype, "source": fstype }));
        let seen = bundle.run();
        // Asking for it may have loaded a module.
        if filesystems().iter().any(|name| name == fstype) {
            assert!(fstype != "mqueue" || seen.code == Some(0), "{seen:?}");
            continue;
        }
        let text = seen.bad();
        let told = text.contains(&format!("{fstype} at /data")) && text.contains("does not have this file system");
        assert!(told && text.contains(option), "{text}");
    }
}

#[test]
fn a_limit_below_what_is_in_use_is_refused_where_that_is_asked_for() {
    let mut bundle =
        Bundle::new("dd if=/dev/zero of=/dev/shm/held bs=1M count=16 2> /dev/null; echo up; exec sleep 100");
    if !is_cgroup_v2() {
        bundle.config["linux"]["resources"]["memory"] = json!({ "useHierarchy": true });
    }
    bundle.create().good();
    bundle.start();
    bundle.wait_for_out("up");
    let file = bundle.dir.path().join("resources.json");
    let update = |limit: u64| {
        let memory = json!({ "memory": { "limit": limit, "checkBeforeUpdate": true } });
        fs::write(&file, memory.to_string()).unwrap();
        bundle.call(&["update", "--resources", file.to_str().unwrap(), &bundle.id])
    };
    let text = update(8 << 20).bad();
    assert!(text.contains("memory in use is") && text.contains("8388608"), "{text}");
    update(64 << 20).good();
    assert_eq!(bundle.state()["status"], "running");
}

/// A real disk's number, in whichever hierarchy this host has; what its kernel lacks is named by its option.
#[test]
fn limits_of_disks_and_other_devices_are_the_groups() {
    let disks = fs::read_to_string("/proc/partitions").unwrap();
    let disk: Vec<i64> =
        disks.lines().nth(2).unwrap().split_whitespace().take(2).map(|number| number.parse().unwrap()).collect();
    let number = format!("{}:{}", disk[0], disk[1]);
    let limit = json!([{ "major": disk[0], "minor": disk[1], "rate": 1_048_576 }]);
    let mut bundle = Bundle::new("sleep 100");
    bundle.config["linux"]["resources"] =
        json!({ "blockIO": { "throttleReadBpsDevice": limit, "throttleWriteIOPSDevice": limit } });
    bundle.create().good();
    let read = |controller: &str, file: &str| fs::read_to_string(bundle.cgroup(controller).join(file)).unwrap();
    if is_cgroup_v2() {
        assert_eq!(read("io", "io.max").trim(), format!("{number} rbps=1048576 wbps=max riops=max wiops=1048576"));
    } else {
        for file in ["blkio.throttle.read_bps_device", "blkio.throttle.write_iops_device"] {
            assert_eq!(read("blkio", file).trim(), format!("{number} 1048576"));
        }
    }
    let v1_lacks =
        |controller: &str| !is_cgroup_v2() && !std::path::Path::new("/sys/fs/cgroup").join(controller).exists();
    let no_disk = json!([{ "major": 250, "minor": 99, "rate": 1 }]);
    for (resources, option) in [
        (json!({ "blockIO": { "throttleReadBpsDevice": no_disk } }), "no device `250:99`"),
        (json!({ "hugepageLimits": [{ "pageSize": "3MB", "limit": 0 }] }), "CONFIG_CGROUP_HUGETLB"),
        (
            json!({ "rdma": { "no-such-device": { "hcaHandles": 3 } } }),
            if v1_lacks("rdma") { "CONFIG_CGROUP_RDMA" } else { "" },
        ),
        (
            json!({ "network": { "classID": 1_048_577 } }),
            if v1_lacks("net_cls") { "CONFIG_CGROUP_NET_CLASSID" } else { "network" },
        ),
    ] {
        let mut bundle = Bundle::new("true");
        bundle.config["linux"]["resources"] = resources;
        let text = bundle.run().bad();
        assert!(text.contains(option), "{option}: {text}");
    }
}

#[test]
fn a_weight_goes_to_the_schedulers_that_know_weights() {
    let mut bundle = Bundle::new("sleep 100");
    bundle.config["linux"]["resources"] = json!({ "blockIO": { "weight": 500 } });
    let seen = bundle.create();
    let files = ["blkio.weight", "blkio.bfq.weight", "io.bfq.weight", "io.weight"];
    let weights: Vec<_> = files
        .iter()
        .filter_map(|file| fs::read_to_string(bundle.cgroup(file.split_once('.').unwrap().0).join(file)).ok())
        .collect();
    if seen.code == Some(0) {
        assert!(weights.iter().any(|text| text.contains("500") || text.contains("4950")), "{weights:?}");
    } else {
        assert!(weights.is_empty() && seen.err.contains("CONFIG_BFQ_GROUP_IOSCHED"), "{seen:?}");
    }
}

#[test]
fn features_are_those_of_the_program_and_not_of_the_host() {
    let bundle = Bundle::new("true");
    let features: serde_json::Value = serde_json::from_str(&bundle.call(&["features"]).good()).unwrap();
    for name in ["seccomp", "apparmor", "selinux"] {
        assert_eq!(features["linux"][name]["enabled"], true, "{name}");
    }
    assert_eq!(features["linux"]["intelRdt"]["enabled"], false);
    assert_eq!(features["potentiallyUnsafeConfigAnnotations"], json!([]));
}

/// cgroup v2's way, on the part of a hybrid hierarchy that is v2 too: the kernel takes the program and obeys it.
#[test]
fn a_bpf_program_keeps_devices_away() {
    use edged_sys::device_filter::{DeviceRule, attach};
    let top = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(std::path::Path::new);
    let top = top.into_iter().find(|path| path.join("cgroup.procs").exists()).expect("a cgroup v2 mount on this host");
    let group = top.join(format!("edged-devices-{}", std::process::id()));
    fs::create_dir(&group).unwrap();
    let all = DeviceRule { allow: false, kind: None, major: None, minor: None, read: true, write: true, mknod: true };
    let null = DeviceRule { allow: true, kind: Some('c'), major: Some(1), minor: Some(3), ..all };
    let read_zero = DeviceRule { write: false, minor: Some(5), ..null };
    let directory = fs::File::open(&group).unwrap();
    let look = || {
        let script = format!(
            "echo 0 > {}/cgroup.procs; head -c 1 /dev/full >/dev/null 2>&1 && echo full; : > /dev/null && echo null; \
             head -c 1 /dev/zero > /dev/null && echo read; (: > /dev/zero) 2>/dev/null && echo write; true",
            group.display()
        );
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(look(), "full\nnull\nread\nwrite\n", "before there are rules");
    attach(directory.as_fd(), &[all, null, read_zero]).unwrap();
    let seen = look();
    // The next rules replace them.
    attach(directory.as_fd(), &[all, null]).unwrap();
    let later = look();
    crate::rig::until("the group is empty", || fs::remove_dir(&group).ok());
    assert_eq!((seen.as_str(), later.as_str()), ("null\nread\n", "null\n"));
}
