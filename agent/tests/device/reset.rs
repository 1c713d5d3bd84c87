//! An operator resets the workloads: what manifests have brought goes. Whom the device trusts and how far it has come stays,
//! so that nobody brings back by a reset what was refused before.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use edged_qemu::process;

use crate::rig::{Device, Factory, head, until};
use crate::tmpfs;

fn manifest(sequence: u32, image: &str) -> String {
    let walls = "resources: { memory: 8Mi, cpu: 100m }";
    format!(
        "{}volumes: {{ data: {{}} }}\nworkloads:\n  \
         app:\n    image: {image}\n    command: [/bin/sleep, \"100000\"]\n    {walls}\n    networkMode: bridge\n  \
         writes:\n    image: {image}\n    command: [/bin/sh, -c, 'echo {sequence} >> /data/runs; echo told; exec sleep 100000']\n    \
         {walls}\n    mounts: [{{ source: {{ volume: data }}, target: /data }}]\n",
        head(sequence)
    )
}

fn names(device: &Device, dir: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(device.path(dir)).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Nothing that manifests have brought, but for volumes.
fn assert_empty(device: &Device) {
    for dir in ["workloads", "log", "content/blobs", "content/images", "content/tables", "run/netns"] {
        assert_eq!(names(device, dir), BTreeSet::new(), "{dir}");
    }
    assert!(names(device, "layers").iter().all(|name| name == "ingest"), "{:?}", names(device, "layers"));
    assert_eq!(device.children(), [device.agent_pid()], "nobody runs");
    let status = device.status();
    assert!(status["generation"].is_null() && status["candidate"].is_null(), "{status:#}");
    assert_eq!(status["workloads"].as_array().map(Vec::len), Some(0), "{status:#}");
    assert_eq!(device.ask(&["generations", "-o", "json"]).trim(), "[]");
    let kept = names(device, "keep");
    assert!(!kept.iter().any(|name| name.starts_with("manifest-")), "{kept:?}");
}

fn next_root(factory: &Factory) -> PathBuf {
    let to = factory.path("trust2.cose");
    let mut rotate = factory.keys.edgectl();
    rotate.args(["trust", "rotate", "--key"]).arg(factory.keys.private("root")).arg("--from");
    process::run(rotate.arg(factory.keys.trust_root()).arg("-o").arg(&to)).unwrap();
    to
}

#[test]
fn a_reset_takes_all_workloads_and_images_and_an_old_manifest_or_root_is_refused_after_it_as_before() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    let second = next_root(&factory);
    device.take(&second);
    let [fourth, fifth] = [4, 5].map(|n| factory.sign(&format!("m{n}"), &manifest(n, &image)));
    device.take(&fourth);
    device.wait_for_generation(4, "good");
    device.take(&fifth);
    device.wait_for_generation(5, "good");
    let pid = device.pid("app");
    let runs = || fs::read_to_string(device.path("volumes/data/runs")).unwrap();
    until("both to have written", || (runs() == "4\n5\n").then_some(()));
    let (key, floor) = (fs::read(device.path("keep/device.key")).unwrap(), device.kept_floor());

    // Not by a slip of the hand.
    for words in
        [&["reset"][..], &["reset", "--yes"], &["reset", "--workloads"], &["reset", "--workloads", "--volumes"]]
    {
        assert_eq!(device.edgectl(words).status.code(), Some(2), "{words:?}");
    }
    assert_eq!(device.pid("app"), pid);

    let said = device.ask(&["reset", "--workloads", "--yes"]);
    assert!(said.contains("the workloads and ") && said.contains("images are gone, volumes stay"), "{said}");
    assert_empty(&device);
    assert_eq!(runs(), "4\n5\n");
    let told = device.events();
    let asked = "all workloads and their images go, as operator uid=0 asked; sequences up to 5 stay used";
    assert!(told.iter().any(|text| text == asked), "{told:#?}");

    // Nothing that was over has come back.
    let refuse_what_is_old = |device: &Device| {
        let changed = factory.sign("m5-other", &manifest(5, &image).replace("8Mi", "9Mi"));
        for (what, file) in [("lower", &fourth), ("the very one", &fifth), ("the same number", &changed)] {
            let why = device.refuse(file);
            assert!(why.contains("is not above 5, the highest seen"), "{what}: {why}");
        }
        let why = device.refuse(&factory.keys.trust_root());
        assert!(why.contains("version 1 is not above 2"), "{why}");
        assert_eq!(device.status()["trust"]["root"], 2);
        assert_eq!((fs::read(device.path("keep/device.key")).unwrap(), device.kept_floor()), (key.clone(), floor));
    };
    refuse_what_is_old(&device);
    assert_eq!(device.edgectl(&["rollback"]).status.code(), Some(1), "there is nothing to go back to");
    device.switch_off();
    let device = factory.device("");
    refuse_what_is_old(&device);
    assert_empty(&device);

    // A newer one comes and runs, on the volume that stayed.
    device.take(&factory.sign("m6", &manifest(6, &image)));
    device.wait_for_generation(6, "good");
    assert_eq!(fs::read_to_string(device.path("volumes/data/runs")).unwrap(), "4\n5\n6\n");
    let said = device.ask(&["reset", "--workloads", "--volumes", "--yes"]);
    assert!(said.contains("with 1 volume"), "{said}");
    assert_empty(&device);
    assert_eq!(names(&device, "volumes"), BTreeSet::new());
    device.take(&factory.sign("m7", &manifest(7, &image)));
    device.wait_for_generation(7, "good");
    assert_eq!(fs::read_to_string(device.path("volumes/data/runs")).unwrap(), "7\n");
}

/// Somebody protects a file, or a directory, from being removed.
fn protect(path: &Path) {
    process::run(Command::new("chattr").arg("+i").arg(path)).unwrap();
}

#[test]
fn a_reset_takes_what_is_protected_and_ends_although_something_cannot_be_taken_and_names_it() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    tmpfs::own_mounts();
    let device = factory.device("");
    device.take(&factory.sign("m1", &manifest(1, &image)));
    device.wait_for_generation(1, "good");
    until("the volume to be written", || device.path("volumes/data/runs").exists().then_some(()));
    let specification = names(&device, "workloads/app").into_iter().next().unwrap();
    let upper = device.path("workloads/app").join(specification).join("upper/protected");
    fs::write(&upper, "").unwrap();
    protect(&upper);
    protect(&device.path("volumes/data/runs"));
    // In a volume, beside an upper directory and beside what it runs with: all are in the way until they are unmounted, and
    // another's.
    let mounted = ["volumes/held/mounted", "workloads/writes/mounted", "run/workloads/writes/mounted"];
    let mounted = mounted.map(|dir| device.path(dir));
    for dir in &mounted {
        fs::create_dir_all(dir).unwrap();
        tmpfs::mount_at(dir, "size=64k");
        fs::write(dir.join("another's"), "").unwrap();
    }

    let early = factory.sign("early", &manifest(2, &image));
    let output = device.edgectl(&["reset", "--workloads", "--volumes", "--yes"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("the reset of the workloads is not over: "), "{said}");
    assert!(said.contains("volumes/held cannot be taken away") && said.contains("it is tried again"), "{said}");
    let refused = &device.status()["refused"];
    assert_eq!(refused["what"], "reset", "{refused:#}");
    let why = device.refuse(&early);
    assert!(why.contains("the workloads are being reset"), "{why}");
    let end =
        until("the reset to end", || device.events().into_iter().find(|text| text.contains("but some is left: ")));
    for part in ["with 1 volume; but", "volumes/held cannot", "/workloads/writes cannot", "run/workloads/writes cannot"]
    {
        assert!(end.contains(part), "{part}: {end}");
    }
    assert!(mounted.iter().all(|dir| dir.join("another's").exists()));
    let told = device.events();
    assert_eq!(told.iter().filter(|text| text.contains("is not over")).count(), 1, "once: {told:#?}");
    assert_eq!(device.status()["refused"]["why"]["text"], end);
    assert_eq!(names(&device, "volumes"), ["held".to_owned()].into());
    assert_eq!(names(&device, "workloads"), ["writes".to_owned()].into());

    // The device is not locked out, and once nothing is in the way all goes.
    device.take(&factory.sign("m2", &manifest(2, &image).replace("writes:", "again:")));
    device.wait_for_generation(2, "good");
    for dir in &mounted {
        rustix::mount::unmount(dir, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
    device.ask(&["reset", "--workloads", "--volumes", "--yes"]);
    assert_empty(&device);
    assert_eq!(names(&device, "volumes"), BTreeSet::new());
    assert!(device.status()["refused"].is_null(), "{:#}", device.status());
}
