//! The disk of a device that is updated again and again: what no generation needs goes, what one can go back to stays.

use std::fs;

use serde_json::Value;

use crate::rig::{Device, Factory, head, until};

/// Three images with one layer each of its own, over a common one.
fn images(factory: &Factory) -> Vec<String> {
    (0..3)
        .map(|number| {
            let own = factory.path(&format!("own-{number}"));
            fs::create_dir_all(own.join("data")).unwrap();
            fs::write(own.join("data/blob"), vec![number; 1 << 20]).unwrap();
            factory.publish_over_busybox(&format!("app-{number}"), &own)
        })
        .collect()
}

fn sleeper(sequence: u32, image: &str) -> String {
    format!(
        "{}workloads:\n  app:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    \
         resources: {{ memory: 8Mi, cpu: 100m }}\n",
        head(sequence)
    )
}

fn layers(device: &Device) -> (u64, u64) {
    let used: Value = serde_json::from_str(&device.ask(&["df", "-o", "json"])).unwrap();
    let parts = used["parts"].as_array().unwrap();
    let layers = parts.iter().find(|part| part["what"] == "layers").unwrap();
    let reclaimable = layers["reclaimable"].as_str().unwrap().to_owned();
    (layers["count"].as_u64().unwrap(), u64::from(reclaimable != "0"))
}

#[test]
fn prune_takes_what_no_generation_needs_and_says_what_it_is() {
    let factory = Factory::start();
    let images = images(&factory);
    let device = factory.device("");
    for (sequence, image) in (1..).zip(&images) {
        device.take(&factory.sign("next", &sleeper(sequence, image)));
        device.wait_for_generation(u64::from(sequence), "good");
    }
    let (before, reclaimable) = layers(&device);
    assert_eq!((before, reclaimable), (4, 1), "{}", device.ask(&["df"]));
    let pid = device.pid("app");

    let would = device.ask(&["prune", "--dry-run"]);
    assert!(would.contains("would be given back") && would.contains("app-0"), "{would}");
    assert!(!would.contains("app-2"), "what runs stays: {would}");
    assert_eq!(layers(&device).0, before, "a dry run takes nothing");

    let did = device.ask(&["prune"]);
    assert!(did.contains("given back") && did.contains("app-0"), "{did}");
    assert!(layers(&device).0 < before && layers(&device).1 == 0, "{}", device.ask(&["df"]));
    assert_eq!(device.pid("app"), pid);
    // What is left is whole: it starts again, by another agent too.
    device.ask(&["restart", "app"]);
    device.workload_that("app", "running anew", |app| app["phase"] == "running" && app["pid"] != pid);
    device.kill_agent();
    until("another agent", || device.edgectl(&["status"]).status.success().then_some(()));
    assert!(device.ask(&["prune"]).contains("nothing to take away"));
    // An image that was pruned is fetched again when it is wanted again.
    device.take(&factory.sign("back", &sleeper(9, &images[0])));
    device.wait_for_generation(9, "good");
}

#[test]
fn what_is_old_goes_by_itself_once_a_generation_is_good() {
    let factory = Factory::start();
    let images = images(&factory);
    let device = factory.device("[images]\nkeep-unused = \"0s\"\n");
    for (sequence, image) in (1..).zip(&images) {
        device.take(&factory.sign("next", &sleeper(sequence, image)));
        device.wait_for_generation(u64::from(sequence), "good");
    }
    until("the collection", || device.events().iter().any(|text| text.contains("no generation needs")).then_some(()));
    assert!(layers(&device).0 < 4, "{}", device.ask(&["df"]));
    device.running("app");
}
