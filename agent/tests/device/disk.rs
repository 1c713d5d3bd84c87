//! The disk of a device that is updated again and again: what no generation needs goes, what one can go back to stays.

use std::fs;
use std::path::PathBuf;

use edged_model::quantity::Bytes;
use edged_qemu::wait;
use serde_json::Value;

use crate::rig::{Device, Factory, PATIENCE, head, sleeper, until};
use crate::tmpfs;

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

fn layers(device: &Device) -> (u64, u64) {
    let used: Value = serde_json::from_str(&device.ask(&["df", "-o", "json"])).unwrap();
    let parts = used["parts"].as_array().unwrap();
    let layers = parts.iter().find(|part| part["what"] == "layers").unwrap();
    let reclaimable = layers["reclaimable"].as_str().unwrap().to_owned();
    (layers["count"].as_u64().unwrap(), u64::from(reclaimable != "0"))
}

/// However it was wrapped.
fn in_one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
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

    let would = in_one_line(&device.ask(&["prune", "--dry-run"]));
    let (goes, stays) = would.split_once("What stays:").expect(&would);
    assert!(goes.contains("would be given back") && goes.contains("app-0"), "{would}");
    assert!(goes.contains("no generation needs it since 20") && goes.contains("when generation 1 was"), "{would}");
    assert!(!goes.contains("app-2") && stays.contains("app-2"), "what runs stays: {would}");
    assert!(stays.contains("needed by app of generation 3 (active)"), "{would}");
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

#[test]
fn df_counts_every_file_of_the_data_directory_and_says_what_keeps_each_thing_there() {
    let factory = Factory::start();
    let images = images(&factory);
    let device = factory.device("");
    for (sequence, image) in (1..).zip(&images[..2]) {
        device.take(&factory.sign("next", &sleeper(sequence, image)));
        device.wait_for_generation(u64::from(sequence), "good");
    }
    fs::create_dir(device.data().join("stranger")).unwrap();
    fs::write(device.data().join("stranger/file"), vec![1; 300_000]).unwrap();
    let counted_by_du = || -> u64 {
        let mut du = std::process::Command::new("du");
        let said = edged_qemu::process::read(du.args(["-sx", "--block-size=1"]).arg(device.data())).unwrap();
        said.split_whitespace().next().unwrap().parse().unwrap()
    };
    // A device writes now and then: what is counted in a moment of rest has to agree.
    let mut last = String::new();
    let found = wait::until("the same sum", PATIENCE, || {
        let before = counted_by_du();
        let used: Value = serde_json::from_str(&device.ask(&["df", "-o", "json"])).unwrap();
        let sizes = used["parts"].as_array().unwrap().iter().map(|part| part["size"].as_str().unwrap());
        let sum: u64 = sizes.map(|size| size.parse::<Bytes>().unwrap().0).sum();
        last = format!("{before} by du, {sum} by df: {used:#}");
        Ok((sum == before && counted_by_du() == before).then_some(used))
    });
    let used = found.unwrap_or_else(|error| panic!("{error:#}: {last}"));
    assert_eq!(used["unknown"][0]["path"], "stranger", "{used:#}");

    let said = in_one_line(&device.ask(&["df", "--verbose"]));
    assert!(said.contains("not edged's: stranger ("), "{said}");
    assert!(said.contains("needed by app of generation 2 (active)"), "{said}");
    assert!(said.contains("(images.keep-unused): no generation needs it since 20"), "{said}");
    assert!(!device.ask(&["df"]).contains("needed by"), "that is for who asks for more");
}

/// The images of which there are layers, by what becomes of them.
fn fates(device: &Device) -> std::collections::BTreeMap<String, String> {
    let used: Value = serde_json::from_str(&device.ask(&["df", "-o", "json"])).unwrap();
    let layers = used["items"].as_array().unwrap().iter().filter(|item| item["kind"] == "layer");
    let named = layers.filter_map(|layer| {
        let name = layer["image"].as_str()?.split(['/', '@']).nth(1)?.to_owned();
        Some((name, layer["fate"].as_object()?.keys().next()?.clone()))
    });
    named.collect()
}

#[test]
fn over_its_budget_a_device_lets_the_oldest_image_go_and_no_other() {
    let factory = Factory::start();
    let images = images(&factory);
    // Two and a half of the three layers beside what they have in common.
    let budget = fs::metadata("/bin/busybox").unwrap().len() + (5 << 19);
    let device = factory.device(&format!("[images]\nbudget = \"{budget}\"\n"));
    for (sequence, image) in (1..).zip(&images) {
        device.take(&factory.sign("next", &sleeper(sequence, image)));
        device.wait_for_generation(u64::from(sequence), "good");
        let all = fates(&device);
        assert!(sequence == 3 || all.len() == sequence as usize, "within the budget nothing goes: {all:?}");
    }
    until("the collection", || device.events().iter().any(|text| text.contains("no generation needs")).then_some(()));
    let left = fates(&device);
    let expected = [("app-1", "young"), ("app-2", "needed")].map(|(name, fate)| (name.to_owned(), fate.to_owned()));
    assert_eq!(left, expected.into(), "{}", device.ask(&["df", "-v"]));
    assert!(device.ask(&["df"]).contains(" of images, of a budget of "), "{}", device.ask(&["df"]));
    device.running("app");
}

#[test]
fn a_pull_that_finds_no_room_costs_the_oldest_image_and_no_other() {
    let factory = Factory::start();
    let disk = small_disk(&factory, "size=200m");
    let device = factory.device("");
    for (sequence, name) in (1..).zip(["first", "second", "third"]) {
        let image = noise(&factory, name, 8);
        device.take(&factory.sign(name, &sleeper(sequence, &image)));
        device.wait_for_generation(u64::from(sequence), "good");
    }
    // Two of the six mebibytes that the next one needs beside the reserve.
    let next = noise(&factory, "fourth", 6);
    let in_use = nix::sys::statvfs::statvfs(&disk).unwrap();
    let used = (in_use.blocks() - in_use.blocks_free()) * in_use.fragment_size();
    tmpfs::resize(&disk, &format!("size={}", used + (66 << 20)));
    device.take(&factory.sign("fourth", &sleeper(4, &next)));
    device.wait_for_generation(4, "good");
    let left = fates(&device);
    assert!(!left.contains_key("first") && left.contains_key("second"), "{left:?}: {:?}", device.events());
}

#[test]
fn on_a_disk_below_its_reserve_as_many_images_go_as_an_update_needs() {
    let factory = Factory::start();
    let disk = small_disk(&factory, "size=200m");
    let device = factory.device("");
    for (sequence, name) in (1..).zip(["first", "second", "third", "fourth"]) {
        let image = noise(&factory, name, 8);
        device.take(&factory.sign(name, &sleeper(sequence, &image)));
        device.wait_for_generation(u64::from(sequence), "good");
    }
    // Six mebibytes are missing of the reserve, and six more of what the next one needs: one image is not enough.
    let next = noise(&factory, "fifth", 6);
    let in_use = nix::sys::statvfs::statvfs(&disk).unwrap();
    let used = (in_use.blocks() - in_use.blocks_free()) * in_use.fragment_size();
    tmpfs::resize(&disk, &format!("size={}", used + (58 << 20)));
    device.take(&factory.sign("fifth", &sleeper(5, &next)));
    device.wait_for_generation(5, "good");
    let left = fates(&device);
    assert!(!left.contains_key("first") && !left.contains_key("second"), "{left:?}: {:?}", device.events());
    assert!(left.contains_key("third") && left.contains_key("fourth"), "{left:?}");
}

/// A data disk for this test's device alone.
fn small_disk(factory: &Factory, options: &str) -> PathBuf {
    let root = factory.path("device");
    fs::create_dir_all(&root).unwrap();
    tmpfs::own_mounts();
    tmpfs::mount_at(&root, options);
    root
}

/// An image with so much that does not compress.
pub fn noise(factory: &Factory, name: &str, mebibytes: usize) -> String {
    let own = factory.path(name);
    fs::create_dir_all(own.join("data")).unwrap();
    let mut state = name.bytes().map(u64::from).sum::<u64>();
    let bytes = (0..mebibytes << 20).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    });
    fs::write(own.join("data/noise"), bytes.collect::<Vec<u8>>()).unwrap();
    factory.publish_over_busybox(name, &own)
}

#[test]
fn an_update_that_cannot_fit_is_refused_as_a_whole_with_the_numbers_and_one_that_just_fits_is_taken() {
    let factory = Factory::start();
    // A data disk of 92 MiB for this device alone, 64 of them in reserve.
    small_disk(&factory, "size=92m");
    let [first, second] = ["first", "second"].map(|name| noise(&factory, name, 16));
    let busybox = factory.publish_busybox();
    let device = factory.device("");
    device.take(&factory.sign("one", &sleeper(1, &busybox)));
    device.wait_for_generation(1, "good");
    let (pid, before) = (device.pid("app"), layers(&device).0);

    // Each of the two would fit alone.
    let other = "  other:\n    image: IMAGE\n    command: [/bin/sleep, \"10000\"]\n    \
                 resources: { memory: 8Mi, cpu: 100m }\n";
    let both = format!("{}{}", sleeper(2, &first), other.replace("IMAGE", &second));
    device.take(&factory.sign("two", &both));
    let refused = until("the refusal", || {
        let generations: Value = serde_json::from_str(&device.ask(&["generations", "-o", "json"])).unwrap();
        let found = generations.as_array()?.iter().find(|generation| generation["sequence"] == 2)?.clone();
        (found["state"] == "rejected").then_some(found)
    });
    let why = refused["reason"]["text"].as_str().unwrap();
    assert!(why.contains("2 images") && why.contains("/first@") && why.contains("/second@"), "{refused}");
    assert!(why.contains(" need about 3") && why.contains(" are free, 64Mi are in reserve"), "{refused}");
    assert_eq!(refused["reason"]["code"], "diskDoesNotFit", "{refused}");
    assert_eq!((device.pid("app"), layers(&device).0), (pid, before), "nothing was fetched, nothing was stopped");

    device.take(&factory.sign("three", &sleeper(3, &first)));
    device.wait_for_generation(3, "good");
}

#[test]
fn a_copy_of_layers_that_cannot_fit_is_refused_before_anything_is_switched() {
    let factory = Factory::start();
    let root = small_disk(&factory, "size=98m");
    let image = noise(&factory, "noise", 8);
    // 34 MiB beside the reserve: the image, and one copy of it.
    let device = factory.device("[runtime]\nidmapped-layers = false\n");
    device.take(&factory.sign("one", &sleeper(1, &image)));
    device.wait_for_generation(1, "good");
    let copies = || fs::read_dir(root.join("layers/copies")).unwrap().count();
    let (pid, layers_before) = (device.pid("app"), layers(&device).0);
    assert_eq!(copies(), 1);

    // Nothing is to be fetched for it.
    let other = |name: &str| {
        format!(
            "  {name}:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    \
             resources: {{ memory: 8Mi, cpu: 100m }}\n"
        )
    };
    let all = format!("{}{}{}", sleeper(2, &image), other("second"), other("third"));
    device.take(&factory.sign("two", &all));
    let refused = until("the refusal", || {
        let generations: Value = serde_json::from_str(&device.ask(&["generations", "-o", "json"])).unwrap();
        let found = generations.as_array()?.iter().find(|generation| generation["sequence"] == 2)?.clone();
        (found["state"] == "rejected").then_some(found)
    });
    assert_eq!(refused["reason"]["code"], "diskDoesNotFit", "{refused}");
    let why = refused["reason"]["text"].as_str().unwrap();
    for word in ["layer copies", "second, third", "needs about", "are free, 64Mi are in reserve"] {
        assert!(why.contains(word), "{word}: {why}");
    }
    assert_eq!((device.pid("app"), layers(&device).0, copies()), (pid, layers_before, 1), "nothing was touched");

    // One more does fit, and is there before the switch.
    let one_more = format!("{}{}", sleeper(3, &image), other("second"));
    device.take(&factory.sign("three", &one_more));
    device.wait_for_generation(3, "good");
    assert_eq!((device.pid("app"), copies()), (pid, 2));
}

#[test]
fn copies_of_a_candidate_that_find_no_room_are_tried_again_whatever_became_of_the_one_before() {
    let factory = Factory::start();
    small_disk(&factory, "size=98m");
    let image = noise(&factory, "noise", 8);
    let device = factory.device("[runtime]\nidmapped-layers = false\n");
    device.take(&factory.sign("one", &sleeper(1, &image)));
    device.wait_for_generation(1, "good");
    let [second, third] = [(2, "two"), (3, "three")].map(|(sequence, name)| {
        let other = |name: &str| {
            format!(
                "  {name}:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    \
                 resources: {{ memory: 8Mi, cpu: 100m }}\n"
            )
        };
        factory.sign(name, &format!("{}{}{}", sleeper(sequence, &image), other("second"), other("third")))
    });
    // By whom it was said that a generation does not fit: first by who made the copies, last by who gave them up.
    let refused = |generation: u64| -> Vec<String> {
        let lines = device.ask(&["events", "--tail", "200", "-o", "json"]);
        let events = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let those =
            events.filter(|event| event["generation"] == generation && event["why"]["code"] == "diskDoesNotFit");
        those.filter_map(|event| Some(event["by"].as_str()?.to_owned())).collect()
    };
    device.take(&second);
    until("the first refusal", || (!refused(2).is_empty()).then_some(()));
    // All the room there is to be had: the next refusal would be the last.
    until("the collection", || device.edgectl(&["prune"]).status.success().then_some(()));
    device.take(&third);
    until("the last refusal", || refused(3).contains(&"planner".to_owned()).then_some(()));
    assert_eq!(refused(3)[0], "agent", "the first refusal of a candidate is not its last: {:?}", refused(3));
}

#[test]
fn on_a_full_disk_what_cannot_start_says_why_and_starts_once_there_is_room() {
    let factory = Factory::start();
    let disk = small_disk(&factory, "size=98m");
    let image = factory.publish_busybox();
    let device = factory.device("");
    let both = format!(
        "{}workloads:\n  first:\n    image: {image}\n    \
         command: [/bin/sh, -c, \"echo > /data/wait; while [ -e /data/wait ]; do sleep 0.1; done\"]\n    \
         restart: {{ policy: on-failure }}\n    resources: {{ memory: 8Mi, cpu: 100m }}\n  second:\n    \
         image: {image}\n    command: [/bin/sleep, \"10000\"]\n    dependsOn: {{ first: completed }}\n    \
         resources: {{ memory: 8Mi, cpu: 100m }}\n",
        head(1)
    );
    device.take(&factory.sign("one", &both));
    until("the first one at work", || {
        device.edgectl(&["exec", "first", "test", "-e", "/data/wait"]).status.success().then_some(())
    });
    let in_use = nix::sys::statvfs::statvfs(&disk).unwrap();
    let inodes = in_use.files() - in_use.files_free();
    tmpfs::resize(&disk, &format!("nr_inodes={inodes}"));
    device.ask(&["exec", "first", "/bin/busybox", "rm", "/data/wait"]);
    device.workload_that("second", "without room", |second| {
        second["why"]["text"].as_str().is_some_and(|text| text.contains("No space left on device"))
    });
    let said = device.ask(&["inspect", "second"]);
    assert!(said.contains("cannot prepare") && !said.contains("errno 0"), "{said}");
    tmpfs::resize(&disk, "nr_inodes=100000");
    device.running("second");
}
