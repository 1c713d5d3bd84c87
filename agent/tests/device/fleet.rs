//! The fleet: the device makes itself known, fetches what was left for it, reports, and keeps its reports while nobody
//! takes them.

use edged_qemu::fleet::Fleet;
use serde_json::Value;

use crate::rig::{DEVICE, Factory, head, until};

fn device_at(fleet: &Fleet) -> Value {
    serde_json::from_str(&fleet.tool(&["device", DEVICE]).unwrap_or_default()).unwrap_or_default()
}

#[test]
fn a_device_enrols_fetches_reports_and_keeps_its_reports_while_the_fleet_is_gone() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let mut fleet = factory.fleet();
    let config = format!(
        "[fleet]\nurl = \"{}\"\nca = \"{}\"\nenroll-token = \"{}\"\npoll-wait = \"5s\"\npoll-interval = \"1s\"\n\
         report-interval = \"2s\"\n",
        fleet.url_seen_from_host(),
        factory.authority.cert().display(),
        fleet.enroll_token().unwrap()
    );
    let device = factory.device(&config);
    until("the device at the fleet", || (device_at(&fleet)["device"] == DEVICE).then_some(()));

    let yaml = format!(
        "{}workloads:\n  steady:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    \
         resources: {{ memory: 8Mi, cpu: 100m }}\n",
        head(1)
    );
    let signed = factory.sign("first", &yaml);
    let mut push = factory.keys.edgectl();
    push.args(["push", "--to", &fleet.url_seen_from_host(), "--device", DEVICE, "--ca"]);
    push.arg(factory.authority.cert()).env("EDGED_TOKEN", fleet.operator_token().unwrap()).arg(&signed);
    edged_qemu::process::run(&mut push).unwrap();
    device.wait_for_generation(1, "good");
    let pid = device.pid("steady");
    let report = until("a report of the running workload", || {
        let seen = device_at(&fleet);
        (seen["report"]["workloads"]["steady"]["phase"] == "running").then_some(seen)
    });
    assert_eq!(report["report"]["generation"]["sequence"], 1, "{report:#}");
    assert!(report["report"]["workloads"]["steady"]["memory"].is_array(), "usage against quota: {report:#}");

    // The fleet goes away; what happens meanwhile waits.
    let number = report["report"]["number"].as_u64().unwrap();
    fleet.stop();
    device.ask(&["restart", "steady"]);
    device.workload_that("steady", "with another pid", |w| w["phase"] == "running" && w["pid"] != pid);
    until("reports in the outbox", || (device.status()["fleet"]["waitingReports"].as_u64()? >= 2).then_some(()));
    let problem =
        until("the reason in the status", || device.status()["fleet"]["problem"]["text"].as_str().map(str::to_owned));
    assert!(problem.contains("127.0.0.1"), "{problem}");
    fleet.start_again().unwrap();
    until("an empty outbox", || (device.status()["fleet"]["waitingReports"] == 0).then_some(()));
    let after = device_at(&fleet);
    assert!(after["report"]["number"].as_u64().unwrap() > number, "{after:#}");
    assert_eq!(after["report"]["dropped"], 0);
    assert!(device_is_listed(&fleet), "edgefleet devices shows it");
}

fn device_is_listed(fleet: &Fleet) -> bool {
    fleet.tool(&["devices"]).unwrap().lines().any(|line| line.contains(DEVICE) && line.contains("good"))
}
