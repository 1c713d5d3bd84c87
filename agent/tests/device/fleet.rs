//! The fleet: the device makes itself known, fetches what was left for it, reports, and keeps its reports while nobody
//! takes them.

use edged_model::quantity::Bytes;
use edged_qemu::fleet::Fleet;
use serde_json::Value;

use crate::disk::noise;
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

#[test]
fn what_is_fetched_for_the_first_generation_and_what_cannot_be_had_is_told_to_operator_and_fleet() {
    let factory = Factory::start();
    let large = noise(&factory, "large", 8);
    let fleet = factory.fleet();
    let config = format!(
        "[fleet]\nurl = \"{}\"\nca = \"{}\"\nenroll-token = \"{}\"\nreport-interval = \"1s\"\n\
         [images]\nrate-max = \"1Mi\"\n",
        fleet.url_seen_from_host(),
        factory.authority.cert().display(),
        fleet.enroll_token().unwrap()
    );
    let device = factory.device(&config);
    // Nobody listens there.
    let missing = format!("127.0.0.1:{}/gone@sha256:{}", edged_qemu::process::free_port().unwrap(), "0".repeat(64));
    let workload = |name: &str, image: &str| {
        format!(
            "  {name}:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    \
             resources: {{ memory: 8Mi, cpu: 100m }}\n"
        )
    };
    let both = format!("{}workloads:\n{}{}", head(1), workload("app", &large), workload("gone", &missing));
    device.take(&factory.sign("both", &both));

    // Megabytes of a layer, at a mebibyte a second: seen twice, further on the second time.
    let pulls = |seen: &Value| seen["pulls"].as_array().cloned().unwrap_or_default();
    let done = |seen: &Value| {
        let large = pulls(seen).into_iter().find(|pull| pull["image"] == *large)?;
        Some(large["done"].as_str()?.parse::<Bytes>().unwrap().0)
    };
    let told = |seen: &Value| done(seen).filter(|done| *done > 0);
    let first = until("progress at the fleet", || told(&device_at(&fleet)["report"]));
    let status = device.status();
    assert!(status["generation"].is_null(), "nothing runs yet: {status:#}");
    assert!(done(&status) >= Some(first), "{status:#}");
    until("more of it at the fleet", || done(&device_at(&fleet)["report"]).filter(|more| *more > first));
    let shown = String::from_utf8(device.edgectl(&["status"]).stdout).unwrap();
    assert!(shown.contains("  pulling     ") && shown.contains("/large@"), "{shown}");

    let failed = until("the failure at the fleet", || {
        let all = pulls(&device_at(&fleet)["report"]);
        all.into_iter().find(|pull| pull["image"] == *missing && pull["retryAt"].is_string())
    });
    assert_eq!((&failed["generation"], &failed["why"]["code"]), (&1.into(), &"registryUnavailable".into()), "{failed}");
    assert!(failed["failures"].as_u64().unwrap() >= 1, "{failed}");
    assert!(fleet.tool(&["devices"]).unwrap().contains("  pulling 127.0.0.1:"));

    device.take(&factory.sign("one", &format!("{}workloads:\n{}", head(2), workload("app", &large))));
    device.wait_for_generation(2, "good");
    assert_eq!(pulls(&device.status()), Vec::<Value>::new());
    until("a report without pulls", || {
        let report = device_at(&fleet)["report"].clone();
        (report["generation"]["state"] == "good" && pulls(&report).is_empty()).then_some(())
    });
}

fn device_is_listed(fleet: &Fleet) -> bool {
    fleet.tool(&["devices"]).unwrap().lines().any(|line| line.contains(DEVICE) && line.contains("good"))
}
