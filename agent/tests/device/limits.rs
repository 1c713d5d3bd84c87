//! A generation that changes only limits changes those of the run that is there.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::rig::{Device, Factory, head, until};

/// One limit as the kernel has it, in either version of cgroups.
fn wall(device: &Device, name: &str, files: [&str; 2]) -> String {
    let inspected: Value = serde_json::from_str(&device.ask(&["inspect", name, "-o", "json"])).unwrap();
    let walls = &inspected["limits"];
    let found = files.iter().find_map(|file| walls[file].as_str());
    found.unwrap_or_else(|| panic!("{files:?} of {inspected}")).to_owned()
}

const MEMORY: [&str; 2] = ["memory.max", "memory.limit_in_bytes"];
const CPU: [&str; 2] = ["cpu.max", "cpu.cfs_quota_us"];
const PIDS: [&str; 2] = ["pids.max", "pids.max"];
const WEIGHT: [&str; 2] = ["cpu.weight", "cpu.shares"];

/// In whichever hierarchy the group of this workload has its limit.
fn lift_cpu_limit(device: &Device, name: &str) {
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", device.pid(name))).unwrap();
    let mut files = groups.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        match controllers {
            "" => Some((format!("/sys/fs/cgroup{path}/cpu.max"), "max")),
            all if all.split(',').any(|one| one == "cpu") => {
                Some((format!("/sys/fs/cgroup/cpu{path}/cpu.cfs_quota_us"), "-1"))
            }
            _ => None,
        }
    });
    let (file, text) = files.find(|(file, _)| Path::new(file).exists()).expect("a limit of time");
    fs::write(file, text).unwrap();
}

#[test]
fn other_limits_are_given_to_the_run_that_is_there() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    let yaml = |sequence, walls: &str, env: &str| {
        format!(
            "{}workloads:\n  web:\n    image: {image}\n    command: [/bin/sh, -c, 'echo x >> /starts; exec sleep 10000']\n    \
             resources: {{ {walls} }}\n    env: {{ A: \"{env}\" }}\n    \
             health: {{ probe: {{ exec: {{ command: [test, -e, /starts] }} }}, interval: 200ms }}\n",
            head(sequence)
        )
    };
    device.take(&factory.sign("first", &yaml(1, "memory: 16Mi, cpu: 200m, pids: 20", "1")));
    device.wait_for_generation(1, "good");
    let pid = device.pid("web");
    for (sequence, limits, expected) in [
        (2, "memory: 32Mi, cpu: 300m, pids: 30", ["33554432", "30000", "30"]),
        (3, "memory: 8Mi, cpu: 100m, pids: 10", ["8388608", "10000", "10"]),
    ] {
        device.take(&factory.sign("next", &yaml(sequence, limits, "1")));
        device.wait_for_generation(u64::from(sequence), "good");
        assert_eq!(device.pid("web"), pid, "{:?}", device.events());
        let found = [wall(&device, "web", MEMORY), wall(&device, "web", CPU), wall(&device, "web", PIDS)];
        assert!(found[1].split(' ').next() == Some(expected[1]), "{found:?}");
        assert_eq!([&found[0], &found[2]], [expected[0], expected[2]]);
    }
    let told = device.events().join("\n");
    assert!(told.contains("web runs on with other limits: memory 32Mi, cpu 300m, 30 processes"), "{told}");

    // The next agent knows what it runs as: it neither restarts it nor changes its limits again. That of time may be missing:
    // it is set when the program runs, and the agent may have ended just before.
    lift_cpu_limit(&device, "web");
    assert!(["max 100000", "-1"].contains(&wall(&device, "web", CPU).as_str()));
    device.kill_agent();
    device.workload_that("web", "healthy again", |web| web["health"] == "healthy");
    assert!(wall(&device, "web", CPU).starts_with("10000"));
    assert!(device.events().join("\n").contains("takes over 1 running"), "{:?}", device.events());
    assert_eq!(device.pid("web"), pid);
    assert_eq!(device.events().join("\n").matches("runs on with other limits").count(), 2, "{:?}", device.events());

    // What is more than limits is a restart.
    device.take(&factory.sign("other", &yaml(4, "memory: 8Mi, cpu: 100m, pids: 10", "2")));
    device.wait_for_generation(4, "good");
    assert_ne!(device.pid("web"), pid);
    assert!(wall(&device, "web", CPU).starts_with("10000"));
}

#[test]
fn who_waits_for_its_share_of_time_is_told_so() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    let workload = |name: &str, script: &str| {
        format!(
            "  {name}:\n    image: {image}\n    command: [/bin/sh, -c, '{script}']\n    \
             resources: {{ memory: 8Mi, cpu: 50m }}\n"
        )
    };
    let (busy, idle) = (workload("busy", "while :; do :; done"), workload("idle", "exec sleep 10000"));
    device.take(&factory.sign("first", &format!("{}workloads:\n{busy}{idle}", head(1))));
    device.wait_for_generation(1, "good");
    let throttled = |name: &str| -> Value {
        let inspected: Value = serde_json::from_str(&device.ask(&["inspect", name, "-o", "json"])).unwrap();
        inspected["throttled"].clone()
    };
    let found = until("ten periods of waiting", || {
        Some(throttled("busy")).filter(|found| found["throttledPeriods"].as_u64() >= Some(10))
    });
    assert!(found["periods"].as_u64() >= found["throttledPeriods"].as_u64(), "{found}");
    // Half of what is not its share, at least.
    assert!(found["throttledMs"].as_u64() >= Some(10 * 95 / 2), "{found}");
    assert!(device.ask(&["inspect", "busy"]).contains("periods of 100 ms"));
    let rest = throttled("idle");
    assert!(rest["throttledPeriods"].as_u64() < found["throttledPeriods"].as_u64(), "{rest}");
    // Who uses its limit up comes behind those who do not.
    let weight = |name: &str| wall(&device, name, WEIGHT).parse::<u64>().unwrap();
    let first = weight("idle");
    until("another weight", || (weight("busy") < first).then_some(()));
    assert_eq!(weight("idle"), first);
}

#[test]
fn memory_that_is_in_use_is_not_taken_away() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    let fill = "test -e /filled || { dd if=/dev/zero of=/a/x bs=1M count=7; dd if=/dev/zero of=/b/x bs=1M count=7; }; \
                echo yes > /filled; echo ready; exec sleep 10000";
    let yaml = |sequence, memory: &str| {
        format!(
            "{}workloads:\n  web:\n    image: {image}\n    command: [/bin/sh, -c, '{fill}']\n    \
             resources: {{ memory: {memory}, cpu: 500m }}\n    \
             mounts: [{{ source: {{ tmpfs: {{ size: 8Mi }} }}, target: /a }}, {{ source: {{ tmpfs: {{ size: 8Mi }} }}, target: /b }}]\n",
            head(sequence)
        )
    };
    device.take(&factory.sign("first", &yaml(1, "32Mi")));
    device.running("web");
    until("its memory in use", || device.ask(&["logs", "web"]).contains("ready").then_some(()));
    device.wait_for_generation(1, "good");
    let pid = device.pid("web");
    device.take(&factory.sign("less", &yaml(2, "10Mi")));
    device.wait_for_generation(2, "good");
    assert_ne!(device.pid("web"), pid, "{:?}", device.events());
    assert_eq!(wall(&device, "web", MEMORY), "10485760");
    let told = device.events().join("\n");
    assert!(
        told.contains("web must be restarted for its new limits:") && told.contains("more than the new limit of 10Mi"),
        "{told}"
    );
    // It was stopped and not killed for its memory, and its writable files are still there.
    assert_eq!(device.workload("web")["oomKills"].as_u64().unwrap_or(0), 0);
    let kept = device.edgectl(&["exec", "web", "cat", "/filled"]);
    assert_eq!(String::from_utf8_lossy(&kept.stdout).trim(), "yes", "{kept:?}");
}
