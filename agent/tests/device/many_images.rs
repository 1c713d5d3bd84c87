//! Updates of many images, and images that nobody wants any more.

use std::fmt::Write;
use std::fs;

use edged_qemu::process;
use serde_json::Value;

use crate::disk::noise;
use crate::rig::{Device, Factory, head, sleeper, until};

/// More than an agent has threads for what blocks (16).
const MANY: u32 = 20;

const UNSIGNED: &str = "[images]\npolicy = \"digest\"\n";

/// Images with a layer of their own over a common one, unsigned.
fn publish_many(factory: &Factory) -> Vec<String> {
    let busybox = factory.busybox();
    let publish = |number: u32| {
        let (own, layout) = (factory.path(&format!("own-{number}")), factory.path(&format!("app-{number}.layout")));
        fs::create_dir_all(&own).unwrap();
        fs::write(own.join("number"), number.to_string()).unwrap();
        let mut build = factory.keys.edgectl();
        process::run(build.args(["image", "build", "-o"]).arg(&layout).arg(&busybox).arg(&own)).unwrap();
        let name = format!("app-{number}");
        let digest = factory.registry.push(&layout, &name, "latest").unwrap();
        format!("{}/{name}@{digest}", factory.registry.seen_from_host())
    };
    (0..MANY).map(publish).collect()
}

#[test]
fn an_update_may_have_more_images_than_the_agent_has_threads() {
    let factory = Factory::start();
    let images = publish_many(&factory);
    let device = factory.device(UNSIGNED);
    let mut manifest = format!("{}workloads:\n", head(1));
    for (number, image) in images.iter().enumerate() {
        let run = "command: [/bin/sleep, \"10000\"]";
        let resources = "resources: { memory: 4Mi, cpu: 20m }";
        writeln!(manifest, "  app-{number}:\n    image: {image}\n    {run}\n    {resources}").unwrap();
    }
    device.take(&factory.sign("many", &manifest));
    device.wait_for_generation(1, "good");
    // They came together: the common layer once, and one of each.
    let used: Value = serde_json::from_str(&device.ask(&["df", "-o", "json"])).unwrap();
    let layers = used["parts"].as_array().unwrap().iter().find(|part| part["what"] == "layers").unwrap();
    assert_eq!(layers["count"], MANY + 1, "{used}");
}

/// What `edgectl images` says of the one that is called so.
fn state(device: &Device, name: &str) -> Value {
    let images: Value = serde_json::from_str(&device.ask(&["images", "-o", "json"])).unwrap();
    let mut images = images.as_array().unwrap().iter();
    images.find(|image| image["names"].to_string().contains(name)).map_or(Value::Null, |one| one["state"].clone())
}

#[test]
fn what_a_newer_generation_does_not_need_is_not_fetched_to_its_end() {
    let factory = Factory::start();
    let (large, small) = (noise(&factory, "large", 6), noise(&factory, "small", 1));
    // The large one takes some seconds.
    let device = factory.device("[images]\nrate-max = \"1Mi\"\n");
    device.take(&factory.sign("large", &sleeper(1, &large)));
    until("some of the large one", || {
        state(&device, "large")["pulling"]["done"].as_str().filter(|done| *done != "0").map(drop)
    });
    device.take(&factory.sign("small", &sleeper(2, &small)));
    let after = until("the large one to be given up", || {
        Some(state(&device, "large")).filter(|state| state["pulling"].is_null())
    });
    assert!(after.is_null(), "{after}");
    device.wait_for_generation(2, "good");
    assert!(state(&device, "large").is_null());
    // It is wanted again, and comes.
    device.take(&factory.sign("again", &sleeper(3, &large)));
    device.wait_for_generation(3, "good");
}
