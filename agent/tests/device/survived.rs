//! What a device has been through is counted, and the counts outlive what they count.

use std::fs;

use serde_json::Value;

use crate::rig::{Device, Factory, head, until};

fn manifest(sequence: u32, image: &str, command: &str) -> String {
    let head = head(sequence).replace("update: { probation: 2s }", "update: { probation: 300ms }");
    format!(
        "{head}workloads:\n  steady:\n    image: {image}\n    command: [/bin/sh, -c, '{command}']\n    \
         restart: {{ attempts: 1, backoff: 100ms }}\n    resources: {{ memory: 8Mi, cpu: 500m }}\n"
    )
}

/// `None` while there is no agent to ask.
fn counted(device: &Device, which: &str) -> Option<u64> {
    let status: Value = serde_json::from_slice(&device.edgectl(&["status", "-o", "json"]).stdout).ok()?;
    status["survived"][which].as_u64()
}

fn counts(device: &Device, which: &str, at_least: u64) -> u64 {
    until(&format!("{at_least} {which}"), || counted(device, which).filter(|count| *count >= at_least))
}

#[test]
fn what_was_survived_is_counted_also_over_the_loss_of_the_store() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    device.take(&factory.sign("first", &manifest(1, &image, "exec sleep 100000")));
    device.wait_for_generation(1, "good");
    let fresh = device.status()["survived"].clone();
    assert!(fresh.as_object().unwrap().values().all(|count| *count == 0), "{fresh:#}");
    assert!(!device.ask(&["status"]).contains("survived"), "nothing happened, nothing is said");

    device.kill_agent();
    counts(&device, "agentRestarts", 1);
    // A generation that fails, and comes back; the pull of one whose registry is not there is tried again.
    device.take(&factory.sign("second", &manifest(2, &image, "exit 3")));
    counts(&device, "generationsRolledBack", 1);
    device.wait_for_generation(1, "good");
    let nowhere = format!("127.0.0.1:1/busybox@{}", image.rsplit_once('@').unwrap().1);
    device.take(&factory.sign("third", &manifest(3, &nowhere, "exec sleep 1")));
    counts(&device, "pullRetries", 2);
    // Whatever floods its log loses lines, and it is said whose.
    device.take(&factory.sign("fourth", &manifest(4, &image, "exec /bin/busybox yes a line of a log")));
    device.wait_for_generation(4, "good");
    until("dropped lines", || device.workload("steady")["logLinesDropped"].as_u64().filter(|lines| *lines > 0));
    let lines = counts(&device, "logLinesDropped", 1);
    let shown = device.ask(&["ps"]);
    assert!(shown.contains("lines of its log were dropped"), "{shown}");

    // What the next durable write takes along is there for the next agent, and for the one that finds the store damaged.
    device.take(&factory.sign("fifth", &manifest(5, &image, "exec sleep 100001")));
    device.wait_for_generation(5, "good");
    device.kill_agent();
    counts(&device, "agentRestarts", 2);
    assert!(counts(&device, "logLinesDropped", 1) >= lines);
    device.take(&factory.sign("sixth", &manifest(6, &image, "exec sleep 100002")));
    device.wait_for_generation(6, "good");
    let pid = device.pid("steady");
    let db = fs::File::options().write(true).open(device.path("state/db")).unwrap();
    db.set_len(100).unwrap();
    device.kill_agent();
    counts(&device, "storeRebuilt", 1);
    for (which, at_least) in [("agentRestarts", 2), ("generationsRolledBack", 1), ("pullRetries", 2)] {
        assert!(counted(&device, which).unwrap() >= at_least, "{which}: {:#}", device.status()["survived"]);
    }
    assert_eq!(device.pid("steady"), pid);
    let shown = device.ask(&["status"]);
    assert!(shown.contains("1 rebuilt store") && shown.lines().all(|line| line.chars().count() <= 80), "{shown}");
}
