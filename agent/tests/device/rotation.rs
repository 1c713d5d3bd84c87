//! Whom a device trusts changes: by the old keys' word and the new keys' own, and never back.

use std::path::{Path, PathBuf};
use std::process::Command;

use edged_qemu::process;

use crate::rig::{Factory, head, until};

/// The next trust root: signed by the old root's key and the new one's.
fn rotate(factory: &Factory, from: &Path, old_root: &Path, keys: [&Path; 2], name: &str) -> PathBuf {
    let to = factory.path(name);
    let [root, manifest] = keys;
    let mut command = factory.keys.edgectl();
    command.args(["trust", "rotate", "--from"]).arg(from).arg("--old-root-key").arg(old_root);
    command.arg("--root-key").arg(root).arg("--manifest-key").arg(manifest.with_extension("pub"));
    command.arg("--image-key").arg(factory.keys.public("image")).arg("-o").arg(&to);
    process::run(&mut command).unwrap();
    to
}

fn key(factory: &Factory, name: &str) -> PathBuf {
    let path = factory.path(name);
    process::run(factory.keys.edgectl().args(["key", "generate", "--out"]).arg(&path)).unwrap();
    path
}

fn sleeper(sequence: u32, image: &str) -> String {
    format!(
        "{}workloads:\n  app:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    \
         resources: {{ memory: 8Mi, cpu: 100m }}\n",
        head(sequence)
    )
}

#[test]
fn a_newer_root_takes_over_for_good_and_the_old_manifest_key_is_refused_by_name() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    device.take(&factory.sign("first", &sleeper(1, &image)));
    device.wait_for_generation(1, "good");
    let pid = device.pid("app");

    let (root_2, ops_2) = (key(&factory, "root2.key"), key(&factory, "ops2.key"));
    let first = factory.keys.trust_root();
    let second = rotate(&factory, &first, &factory.keys.private("root"), [&root_2, &ops_2], "trust2.cose");
    // A stranger's root, of a higher version: signed by nobody the device knows.
    let stranger = key(&factory, "stranger.key");
    let forged = rotate(&factory, &second, &stranger, [&stranger, &stranger], "forged.cose");
    let why = device.refuse(&forged);
    assert!(why.contains("root role"), "{why}");

    let said = device.push(&second);
    assert!(String::from_utf8_lossy(&said.stdout).contains("trust root version 2 is in force"), "{said:?}");
    // Pushed again it changes nothing, and an old one does not come back.
    assert!(device.push(&second).status.success());
    let why = device.refuse(&first);
    assert!(why.contains("version 1") && why.contains('2'), "{why}");

    // The old manifest key is worth nothing now; the new one is.
    let why = device.refuse(&factory.sign("old-key", &sleeper(2, &image)));
    assert!(why.contains("sign"), "{why}");
    let signed = factory.sign_with("new-key", &sleeper(3, &image), &ops_2);
    device.take(&signed);
    device.wait_for_generation(3, "good");
    assert_eq!(device.pid("app"), pid, "none of this touched what runs");

    // It holds for the next agent, and after a start with the factory's old root beside.
    device.kill_agent();
    until("another agent", || device.edgectl(&["status"]).status.success().then_some(()));
    let why = device.refuse(&factory.sign("old-key-again", &sleeper(4, &image)));
    assert!(why.contains("sign"), "{why}");

    // The third version comes with a newer firmware: the file beside the configuration.
    let root_3 = key(&factory, "root3.key");
    let third = rotate(&factory, &second, &root_2, [&root_3, &ops_2], "trust3.cose");
    device.switch_off();
    std::fs::copy(&third, &first).unwrap();
    let device = factory.device("");
    let fourth = rotate(&factory, &third, &root_3, [&root_3, &ops_2], "trust4.cose");
    let output: std::process::Output = device.command().arg("apply").arg(&fourth).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("trust root version 4"), "{said}{output:?}");
    let inspect = Command::new(env!("CARGO_BIN_EXE_edgectl")).args(["trust", "inspect"]).arg(&fourth).output().unwrap();
    assert!(String::from_utf8_lossy(&inspect.stdout).contains("version 4"), "{inspect:?}");
}
