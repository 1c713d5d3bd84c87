//! Bytes that nobody reads and that are not what they were: found by the scrub, without a boot and without being asked.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};

use serde_json::Value;

use crate::disk::noise;
use crate::faults::{Answer, FaultServer};
use crate::images::find;
use crate::rig::{Device, Factory, head, rot, until};

const OFTEN: &str = "[images]\nscrub = \"1s\"\nscrub-rate = \"64Mi\"\n";

/// An image over busybox with a file of its own.
fn with_tool(factory: &Factory) -> String {
    let own = factory.path("own");
    fs::create_dir_all(own.join("opt")).unwrap();
    fs::write(own.join("opt/tool"), vec![7; 100_000]).unwrap();
    factory.publish_over_busybox("app", &own)
}

fn workload(name: &str, image: &str, command: &str, more: &str) -> String {
    format!(
        "  {name}:\n    image: {image}\n    command: {command}\n    {more}\n    resources: {{ memory: 8Mi, cpu: 100m }}\n"
    )
}

const FOR_EVER: &str = "[/bin/sleep, \"10000\"]";

fn is_whole(file: &Path) -> bool {
    fs::read(file).is_ok_and(|bytes| bytes == vec![7; 100_000])
}

fn scrub(device: &Device) -> Value {
    device.status()["scrub"].clone()
}

#[test]
fn what_rots_in_a_layer_that_nobody_reads_is_found_and_mended() {
    let factory = Factory::start();
    let (image, busybox) = (with_tool(&factory), factory.publish_busybox());
    let device = factory.device(OFTEN);
    // The job is done: nothing runs on its layer, nothing will read it, and nobody would start it again.
    let manifest = format!(
        "{}workloads:\n{}{}",
        head(1),
        workload("app", &busybox, FOR_EVER, "args: []"),
        workload("job", &image, "[/bin/true]", "restart: { policy: never }")
    );
    device.take(&factory.sign("one", &manifest));
    device.wait_for_generation(1, "good");
    let last = until("a pass", || Some(scrub(&device)["last"].clone()).filter(|last| last["layers"] == 2));
    assert_eq!((&last["damaged"], &last["unchecked"]), (&0.into(), &0.into()), "{last}");
    let told = device.events().into_iter().find(|text| text.contains("a scrub of 2 layers took")).expect("an event");
    assert!(told.contains("0 damaged"), "{told}");
    let said = device.ask(&["df"]);
    assert!(said.contains("last scrub: 2 layers by ") && said.contains("read, none damaged"), "{said}");

    let (pid, tool) = (device.pid("app"), find(&device, "opt/tool"));
    rot(&tool);
    let damage = until("the damage", || device.events().into_iter().find(|text| text.contains("is damaged")));
    assert!(damage.contains("./opt/tool has another content") && damage.contains("fetched again"), "{damage}");
    until("the layer again", || is_whole(&tool).then_some(()));
    assert_eq!(device.pid("app"), pid, "nothing else was touched");
    until("a pass that finds nothing", || (scrub(&device)["last"]["damaged"] == 0).then_some(()));
    assert_eq!(device.status()["survived"]["layersDamaged"], 1);
}

#[test]
fn what_something_runs_on_is_told_once_and_mended_when_that_is_restarted() {
    let factory = Factory::start();
    let image = with_tool(&factory);
    let device = factory.device(OFTEN);
    let manifest = format!("{}workloads:\n{}", head(1), workload("app", &image, FOR_EVER, "args: []"));
    device.take(&factory.sign("one", &manifest));
    device.wait_for_generation(1, "good");
    let (pid, tool) = (device.pid("app"), find(&device, "opt/tool"));
    rot(&tool);
    let left =
        |device: &Device| device.events().into_iter().filter(|text| text.contains("when nothing runs on it")).count();
    until("the damage", || (left(&device) == 1).then_some(()));
    // Two more passes see it, and have nothing new to tell.
    let began = scrub(&device)["last"]["began"].clone();
    let next = until("another pass", || Some(scrub(&device)["last"]["began"].clone()).filter(|now| *now != began));
    until("one more", || (scrub(&device)["last"]["began"] != next).then_some(()));
    assert_eq!((left(&device), device.pid("app")), (1, pid), "{:?}", device.events());
    assert!(!is_whole(&tool));

    device.ask(&["restart", "app"]);
    until("the layer again", || is_whole(&tool).then_some(()));
    device.workload_that("app", "running anew", |app| app["phase"] == "running" && app["pid"] != pid);
}

#[test]
fn it_stands_still_while_an_image_is_fetched_and_goes_on_afterwards() {
    let factory = Factory::start();
    // Whoever asks this registry waits for the test's word.
    let word = Arc::new((Mutex::new(false), Condvar::new()));
    let theirs = Arc::clone(&word);
    let registry = FaultServer::start(move |_| {
        let said = theirs.0.lock().unwrap();
        drop(theirs.1.wait_while(said, |said| !*said).unwrap());
        Answer::new(404, "")
    });
    let image = noise(&factory, "large", 24);
    let config = format!(
        "[images]\nscrub = \"1s\"\nscrub-rate = \"1Mi\"\n[registry.\"{}\"]\ninsecure-http = true\n",
        registry.host
    );
    let device = factory.device(&config);
    let manifest = |sequence, more: &str| {
        format!("{}workloads:\n{}{more}", head(sequence), workload("app", &image, FOR_EVER, "args: []"))
    };
    device.take(&factory.sign("one", &manifest(1, "")));
    device.wait_for_generation(1, "good");
    until("a pass under way", || {
        (scrub(&device)["now"]["read"] != "0").then_some(()).filter(|()| !scrub(&device)["now"].is_null())
    });

    let stuck = format!("{}/app@sha256:{}", registry.host, "0".repeat(64));
    device.take(&factory.sign("two", &manifest(2, &workload("other", &stuck, FOR_EVER, "args: []"))));
    until("the pull", || (!registry.requests().is_empty()).then_some(()));
    until("the pause", || (scrub(&device)["paused"] == "pull").then_some(()));
    let said = device.ask(&["df"]);
    assert!(said.contains("it stands still: an image is fetched"), "{said}");
    // The piece that was on its way has come; from then on nothing does, though sixteen could.
    let up = |device: &Device| device.status()["uptimeSecs"].as_u64().unwrap();
    let began = up(&device);
    until("a second", || (up(&device) > began).then_some(()));
    let before = scrub(&device)["now"]["read"].clone();
    until("two more", || (up(&device) > began + 2).then_some(()));
    assert_eq!(scrub(&device)["now"]["read"], before);

    *word.0.lock().unwrap() = true;
    word.1.notify_all();
    until("it goes on", || {
        let now = scrub(&device)["now"].clone();
        (now.is_null() || now["read"] != before).then_some(())
    });
}
