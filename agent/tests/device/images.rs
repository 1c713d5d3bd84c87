//! Images on a device: brought on a stick, listed, checked, and repaired layer by layer after the power was cut.

use std::fs;
use std::path::PathBuf;

use edged_qemu::process;
use serde_json::Value;

use crate::disk::noise;
use crate::rig::{Device, Factory, head, rot, until};

fn sleeper(sequence: u32, image: &str) -> String {
    format!(
        "{}workloads:\n  app:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    \
         mounts: [{{ source: {{ volume: data }}, target: /data }}]\n    resources: {{ memory: 8Mi, cpu: 100m }}\nvolumes: {{ data: {{}} }}\n",
        head(sequence)
    )
}

pub fn json(device: &Device, words: &[&str]) -> Value {
    serde_json::from_str(&device.ask(&[words, &["-o", "json"]].concat())).unwrap()
}

/// A file that only one layer of the device has.
pub fn find(device: &Device, name: &str) -> PathBuf {
    let layers = fs::read_dir(device.data().join("layers")).unwrap();
    layers.map(|layer| layer.unwrap().path().join(name)).find(|path| path.exists()).expect(name)
}

#[test]
fn an_image_from_a_stick_runs_without_its_registry_and_is_listed_with_who_uses_it() {
    let factory = Factory::start();
    factory.push_busybox();
    let stick = factory.path("stick.tar");
    let layout = factory.path("busybox.layout");
    process::run(std::process::Command::new("tar").arg("-cf").arg(&stick).arg("-C").arg(&layout).arg(".")).unwrap();
    let device = factory.device("[images]\npolicy = \"digest\"\n");
    assert!(device.ask(&["images"]).starts_with("none"));
    let said = device.ask(&["image", "load", &stick.display().to_string()]);
    let digest = said.lines().map(str::trim).find(|line| line.starts_with("sha256:")).expect(&said).to_owned();
    assert!(device.ask(&["images"]).contains("nobody"), "{}", device.ask(&["images"]));

    device.take(&factory.sign("one", &sleeper(1, &format!("nowhere.invalid/busybox@{digest}"))));
    device.wait_for_generation(1, "good");
    let images = json(&device, &["images"]);
    assert_eq!(images[0]["workloads"], serde_json::json!(["app"]), "{images}");
    assert_eq!(images[0]["generations"], serde_json::json!([1]), "{images}");
    assert!(device.ask(&["images"]).contains("app [1]"), "{}", device.ask(&["images"]));
    let volumes = json(&device, &["volumes"]);
    assert_eq!((&volumes[0]["name"], &volumes[0]["workloads"][0]), (&"data".into(), &"app".into()), "{volumes}");
    assert!(device.ask(&["image", "check"]).contains("are as they were unpacked"));

    let refused = device.edgectl(&["image", "load", "/nowhere/stick.tar"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("/nowhere/stick.tar"), "{refused:?}");
}

/// An image of busybox and `opt/tool` above it.
fn publish_with_a_tool(factory: &Factory) -> String {
    let own = factory.path("own");
    fs::create_dir_all(own.join("opt")).unwrap();
    fs::write(own.join("opt/tool"), vec![7; 100_000]).unwrap();
    factory.publish_over_busybox("app", &own)
}

#[test]
fn after_a_power_cut_the_one_damaged_layer_is_fetched_again_and_the_story_says_so() {
    let factory = Factory::start();
    let image = publish_with_a_tool(&factory);
    let device = factory.device("");
    device.take(&factory.sign("one", &sleeper(1, &image)));
    device.wait_for_generation(1, "good");
    let (tool, busybox) = (find(&device, "opt/tool"), find(&device, "bin/busybox"));
    let untouched = fs::metadata(&busybox).unwrap();
    let data = device.data().to_owned();
    device.switch_off();

    // In order: nothing is looked at, because this boot is the boot of before.
    let device = factory.device("");
    device.running("app");
    assert!(!device.events().iter().any(|text| text.contains("were checked")), "{:?}", device.events());
    device.switch_off();

    // As after a power cut, with one byte of one file another.
    fs::write(data.join("content/in-use"), "another boot").unwrap();
    rot(&tool);
    let device = factory.device("");
    let told = until("the check", || device.events().into_iter().find(|text| text.contains("were checked")));
    assert!(told.contains("2 layers") && told.contains("1 damaged"), "{told}");
    let damage = device.events().into_iter().find(|text| text.contains("is damaged")).expect("an event");
    assert!(damage.contains("./opt/tool has another content"), "{damage}");
    device.running("app");
    assert_eq!(fs::read(&tool).unwrap(), vec![7; 100_000], "fetched again");
    let now = fs::metadata(&busybox).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!((now.ino(), now.ctime()), (untouched.ino(), untouched.ctime()), "the other layer was left alone");

    // What is damaged under a running workload is seen when asked, and mended at the next start.
    fs::remove_file(find(&device, "opt/tool")).unwrap();
    let check = device.edgectl(&["image", "check"]);
    let text = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(check.status.code() == Some(1) && text.contains("./opt/tool is missing"), "{check:?}");
    device.switch_off();
    let device = factory.device("");
    device.running("app");
    assert_eq!(fs::read(find(&device, "opt/tool")).unwrap(), vec![7; 100_000]);
}

#[test]
fn a_workload_that_could_not_read_its_program_has_its_damaged_layer_fetched_again() {
    let factory = Factory::start();
    let image = publish_with_a_tool(&factory);
    let device = factory.device("");
    // As a shell tells of a program that the kernel ended by SIGBUS; on the host no file can be had to fail so.
    let script = "if [ -e /data/bad ]; then rm /data/bad; exit 135; fi; exec sleep 10000";
    let manifest = sleeper(1, &image).replace("[/bin/sleep, \"10000\"]", &format!("[/bin/sh, -c, '{script}']"));
    device.take(&factory.sign("one", &manifest));
    device.wait_for_generation(1, "good");
    let bad = device.data().join("volumes/data/bad");
    let looked = |device: &Device| device.events().into_iter().filter(|text| text.contains("could not read")).count();

    let tool = find(&device, "opt/tool");
    rot(&tool);
    fs::write(&bad, "").unwrap();
    device.ask(&["restart", "app"]);
    until("the check", || (looked(&device) == 1).then_some(()));
    let damage = device.events().into_iter().find(|text| text.contains("is damaged")).expect("an event");
    assert!(damage.contains("./opt/tool has another content") && damage.contains("fetched again"), "{damage}");
    until("the layer again", || (fs::read(&tool).ok()? == vec![7; 100_000]).then_some(()));
    device.running("app");

    // Whose fault it was is known now: it is not looked at each time.
    fs::write(&bad, "").unwrap();
    device.ask(&["restart", "app"]);
    until("another run", || (!bad.exists()).then_some(()));
    device.running("app");
    assert_eq!(looked(&device), 1, "{:?}", device.events());
}

#[test]
fn an_agent_that_is_killed_in_the_middle_of_a_slow_layer_costs_none_of_it() {
    let factory = Factory::start();
    let image = noise(&factory, "large", 6);
    let device = factory.device("[images]\nrate-max = \"1Mi\"\nkeep-partial-after = \"1s\"\n");
    device.take(&factory.sign("one", &sleeper(1, &image)));
    let kept = |device: &Device| {
        let partials = fs::read_dir(device.data().join("content/partial")).into_iter().flatten();
        partials.map(|partial| partial.unwrap().metadata().map_or(0, |meta| meta.len())).max().unwrap_or(0)
    };
    let before = until("half of the layer", || Some(kept(&device)).filter(|bytes| *bytes > 3 << 20));
    let agent = device.agent_pid();
    device.kill_agent();
    let more = until("another agent to go on", || Some(kept(&device)).filter(|bytes| *bytes != before));
    assert!(more > before, "{more} of {before} are left");
    assert_ne!(device.agent_pid(), agent);
    device.wait_for_generation(1, "good");
    assert_eq!(kept(&device), 0);
}
