//! The same bundle with other runtimes: what the container sees must be the same. This also tests the tests: a check
//! that no peer passes is a wrong check.

use std::collections::BTreeSet;

use serde_json::json;

use crate::rig::{Bundle, Runtime, need};

/// Everything that a program can observe of the fields below, as lines.
const LOOK: &str = "id; hostname; pwd; umask; env | sort | grep -vE '^(SHLVL|HOME|PWD|OLDPWD)='; \
    grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; \
    sed 's/  */ /g' /proc/self/limits; cat /proc/self/oom_score_adj; \
    for f in null zero full random urandom tty; do stat -c '%n %a %t %T' /dev/$f; done; \
    for l in fd stdin stdout stderr ptmx; do echo $l $(readlink /dev/$l); done; \
    grep -vE ' (/proc|/sys)/.* ' /proc/self/mounts | cut -d' ' -f 2,3,4 | sed 's/,inode64//; s/,relatime//; s/,nr_inodes=1//' \
        | grep -vE '^/ ' | sort; \
    cat /proc/keys | wc -c; ls /sys/firmware | wc -l; touch /proc/sys/x 2>&1; echo 1 2>&1 > /proc/sysrq-trigger; \
    cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null; \
    for n in net ipc uts pid mnt cgroup; do test -e /proc/self/ns/$n && echo has $n; done; \
    busybox ip addr show dev lo; cat /proc/sys/net/core/somaxconn; ls /proc/self/fd | wc -l; mkdir /tmp/denied 2>&1; exit 3";

fn observe(runtime: Runtime) -> BTreeSet<String> {
    let mut bundle = Bundle::of(runtime, LOOK);
    let config = &mut bundle.config;
    config["process"]["user"] = json!({ "uid": 5, "gid": 6, "additionalGids": [7], "umask": 0o027 });
    config["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }]);
    config["process"]["oomScoreAdj"] = 300.into();
    config["process"]["cwd"] = "/tmp".into();
    config["linux"]["resources"]["pids"] = json!({ "limit": 23 });
    config["linux"]["sysctl"] = json!({ "net.core.somaxconn": "55" });
    config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28 }],
    });
    let seen = bundle.run();
    assert_eq!(seen.code, Some(3), "{runtime:?}: {seen:#?}");
    seen.out.lines().map(str::to_owned).collect()
}

#[track_caller]
fn same_as(peer: Runtime) {
    let (ours, theirs) = (observe(Runtime::Edged), observe(peer));
    let only = |a: &BTreeSet<String>, b: &BTreeSet<String>| a.difference(b).cloned().collect::<Vec<_>>();
    let (more, less) = (only(&ours, &theirs), only(&theirs, &ours));
    assert!(more.is_empty() && less.is_empty(), "only edged: {more:#?}\nonly {peer:?}: {less:#?}");
}

#[test]
fn the_container_is_the_one_that_runc_makes() {
    need("runc", "runc");
    same_as(Runtime::Runc);
}

#[test]
fn the_container_is_the_one_that_crun_makes() {
    need("crun", "crun");
    same_as(Runtime::Crun);
}

/// The commands too: one story for all three.
#[test]
fn the_life_of_a_container_is_the_same_everywhere() {
    for runtime in [Runtime::Edged, Runtime::Runc, Runtime::Crun] {
        let bundle = Bundle::of(runtime, "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done");
        bundle.create().good();
        assert_eq!(bundle.state()["status"], "created", "{runtime:?}");
        bundle.start();
        bundle.wait_for_out("up");
        assert_eq!(bundle.state()["status"], "running", "{runtime:?}");
        assert_eq!(bundle.call(&["exec", &bundle.id, "sh", "-c", "exit 4"]).code, Some(4), "{runtime:?}");
        bundle.call(&["delete", &bundle.id]).bad();
        bundle.call(&["kill", &bundle.id, "TERM"]).good();
        bundle.wait_for_status("stopped");
        bundle.call(&["delete", &bundle.id]).good();
        bundle.call(&["state", &bundle.id]).bad();
    }
}
