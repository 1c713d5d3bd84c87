//! Generations by an operator's hand: list, compare, go back, try again.

use serde_json::Value;

use crate::rig::{Device, Factory, head};

fn manifest(sequence: u32, image: &str, command: &str, update: &str) -> String {
    let head = head(sequence).replace("update: { probation: 2s }", &format!("update: {{ probation: 1s{update} }}"));
    format!(
        "{head}workloads:\n  \
         changes:\n    image: {image}\n    command: [/bin/sh, -c, '{command}']\n    \
         restart: {{ attempts: 1, backoff: 100ms }}\n    resources: {{ memory: 8Mi, cpu: 100m }}\n  \
         stays:\n    image: {image}\n    command: [/bin/sleep, \"100000\"]\n    resources: {{ memory: 8Mi, cpu: 100m }}\n"
    )
}

fn generation(device: &Device, sequence: u64) -> Value {
    let all: Value = serde_json::from_str(&device.ask(&["generations", "-o", "json"])).unwrap();
    all.as_array().unwrap().iter().find(|one| one["sequence"] == sequence).cloned().unwrap_or_default()
}

fn refused(device: &Device, words: &[&str]) -> String {
    let output = device.edgectl(words);
    assert_eq!(output.status.code(), Some(1), "{words:?}: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn an_operator_compares_goes_back_and_tries_again() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    device.take(&factory.sign("first", &manifest(1, &image, "sleep 100001", "")));
    device.wait_for_generation(1, "good");
    let stays = device.pid("stays");
    device.take(&factory.sign("second", &manifest(2, &image, "sleep 100002", "")));
    device.wait_for_generation(2, "good");

    let diff = device.ask(&["diff", "1", "2"]);
    assert!(diff.contains("workloads.changes.command") && diff.contains("sleep 100002"), "{diff}");
    assert!(!diff.contains("stays"), "{diff}");
    device.ask(&["rollback"]);
    device.wait_for_generation(1, "good");
    assert_eq!(device.pid("stays"), stays, "what is the same in both was not touched");
    assert_eq!((&generation(&device, 1)["role"], &generation(&device, 2)["role"]), (&"active".into(), &Value::Null));
    assert!(refused(&device, &["rollback", "1"]).contains("is the active one"));
    assert!(refused(&device, &["rollback", "77"]).contains("not stored"));
    assert!(refused(&device, &["diff", "1", "77"]).contains("not stored"));
    device.ask(&["rollback", "2"]);
    device.wait_for_generation(2, "good");

    // The third ends at once and comes back; it is remembered, also by the next agent, and tried when asked.
    let third = factory.sign("third", &manifest(3, &image, "exit 3", ", deadline: 20s"));
    device.take(&third);
    let rolled_back = || {
        crate::rig::until("generation 3 to be rolled back", || {
            (generation(&device, 3)["state"] == "rolledBack").then(|| generation(&device, 3))
        })
    };
    let third_info = rolled_back();
    assert_eq!(third_info["refused"], true, "{third_info:#}");
    device.wait_for_generation(2, "good");
    assert!(device.refuse(&third).contains("edgectl retry 3"));
    device.kill_agent();
    crate::rig::until("another agent", || device.edgectl(&["version"]).status.success().then_some(()));
    assert!(device.refuse(&third).contains("edgectl retry 3"));
    assert!(refused(&device, &["rollback", "3"]).contains("failed here before"));
    assert!(refused(&device, &["retry", "1"]).contains("did not fail"));
    let table = device.ask(&["generations"]);
    assert!(table.contains("edgectl retry 3") && table.lines().all(|line| line.chars().count() <= 80), "{table}");
    device.ask(&["retry"]);
    crate::rig::until("generation 3 to be tried", || {
        device.events().iter().any(|text| text.contains("generation 3 is wanted again")).then_some(())
    });
    crate::rig::until("generation 3 to be active", || {
        device.events().iter().filter(|text| text.as_str() == "generation 3 takes over").nth(1).map(drop)
    });
    rolled_back();
    device.wait_for_generation(2, "good");
    assert_eq!(device.pid("stays"), stays);
}

#[test]
fn manifests_that_come_one_upon_another_are_all_taken() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    let signed: Vec<_> = (1..=6)
        .map(|sequence| factory.sign(&format!("n{sequence}"), &manifest(sequence, &image, "sleep 100001", "")))
        .collect();
    // Each is acknowledged in the middle of the changes that the one before has set off.
    for file in &signed {
        device.take(file);
    }
    device.wait_for_generation(6, "good");
}
