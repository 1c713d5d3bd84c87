//! Whom a device trusts changes: by the old keys' word and the new keys' own, and never back.

use std::path::{Path, PathBuf};
use std::process::Command;

use edged_qemu::fleet::Fleet;
use edged_qemu::process;

use crate::rig::{DEVICE, Device, Factory, sleeper, until};

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

/// A device whose first generation is good, and the pid of its workload.
fn device_that_runs(factory: &Factory, image: &str) -> (Device, i32) {
    let device = factory.device("");
    device.take(&factory.sign("first", &sleeper(1, image)));
    device.wait_for_generation(1, "good");
    let pid = device.pid("app");
    (device, pid)
}

#[test]
fn a_newer_root_takes_over_for_good_and_the_old_manifest_key_is_refused_by_name() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let (device, pid) = device_that_runs(&factory, &image);

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

/// `edgectl trust rotate` that only needs the one root key, with a life of its own.
fn renew(factory: &Factory, from: &Path, expires: &str, name: &str) -> PathBuf {
    let to = factory.path(name);
    let mut command = factory.keys.edgectl();
    command.args(["trust", "rotate", "--expires", expires, "--key"]).arg(factory.keys.private("root"));
    process::run(command.arg("--from").arg(from).arg("-o").arg(&to)).unwrap();
    to
}

fn leave_at(fleet: &Fleet, factory: &Factory, more: &[&str], file: &Path) -> String {
    let mut push = factory.keys.edgectl();
    push.args(["push", "--to", &fleet.url_seen_from_host(), "--ca"]).arg(factory.authority.cert()).args(more);
    process::read(push.env("EDGED_TOKEN", fleet.operator_token().unwrap()).arg(file)).unwrap()
}

fn root_version(device: &Device) -> u64 {
    let status: serde_json::Value =
        serde_json::from_slice(&device.edgectl(&["status", "-o", "json"]).stdout).unwrap_or_default();
    status["trust"]["root"].as_u64().unwrap_or_default()
}

#[test]
fn a_device_that_missed_several_roots_catches_up_from_the_fleet_in_one_go() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let fleet = factory.fleet();
    let config = format!(
        "[fleet]\nurl = \"{}\"\nca = \"{}\"\npoll-wait = \"30s\"\n",
        fleet.url_seen_from_host(),
        factory.authority.cert().display(),
    );
    // The second has expired by the time anybody hears of it: it only leads to the third.
    let first = factory.keys.trust_root();
    let second = renew(&factory, &first, "1s", "trust2.cose");
    let ops_3 = key(&factory, "ops3.key");
    let third = factory.path("trust3.cose");
    let mut next = factory.keys.edgectl();
    next.args(["trust", "rotate", "--key"]).arg(factory.keys.private("root")).arg("--from").arg(&second);
    next.arg("--manifest-key").arg(ops_3.with_extension("pub")).arg("-o").arg(&third);
    process::run(&mut next).unwrap();
    until("the end of the second", || {
        let alone =
            factory.keys.edgectl().args(["trust", "verify", "--from"]).arg(&first).arg(&second).output().unwrap();
        (!alone.status.success()).then_some(())
    });
    let said = leave_at(&fleet, &factory, &[], &second);
    assert!(
        said.contains("trust root version 2 is there for devices") && said.contains("warning: it expired"),
        "{said}"
    );
    leave_at(&fleet, &factory, &[], &third);
    leave_at(&fleet, &factory, &["--device", DEVICE], &factory.sign_with("new", &sleeper(1, &image), &ops_3));

    // Its manifest is signed by a key that only the third knows.
    let device = factory.device(&config);
    device.wait_for_generation(1, "good");
    assert_eq!(root_version(&device), 3);
    let refused = device.events().iter().filter(|text| text.contains("no manifest key")).count();
    assert_eq!(refused, 0, "the root was asked for before the manifest was judged: {:?}", device.events());

    // A device that waits hears of the next one at once; a stranger's changes nothing, now or at the next start.
    let fourth = renew(&factory, &third, "10years", "trust4.cose");
    leave_at(&fleet, &factory, &[], &fourth);
    until("the fourth", || (root_version(&device) == 4).then_some(()));
    let stranger = key(&factory, "stranger.key");
    let forged = rotate(&factory, &fourth, &stranger, [&stranger, &stranger], "forged.cose");
    leave_at(&fleet, &factory, &[], &forged);
    until("a word on the stranger's", || {
        device.events().iter().any(|text| text.contains("version 4's root role")).then_some(())
    });
    assert_eq!(root_version(&device), 4);
}

/// A folder and nginx: whatever serves files can be the fleet.
#[test]
fn a_web_server_with_files_is_enough() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let (site, port) = (factory.path("site"), process::free_port().unwrap());
    let first = factory.keys.trust_root();
    let second = renew(&factory, &first, "10years", "trust2.cose");
    let third = renew(&factory, &second, "10years", "trust3.cose");
    let own = site.join("v1/devices").join(DEVICE);
    for dir in [site.join("v1/trust"), own.clone()] {
        std::fs::create_dir_all(dir).unwrap();
    }
    std::fs::copy(&second, site.join("v1/trust/2")).unwrap();
    std::fs::copy(&third, site.join("v1/trust/3")).unwrap();
    std::fs::copy(factory.sign("first", &sleeper(1, &image)), own.join("manifest")).unwrap();
    let pair = factory.authority.issue("files").unwrap();
    let conf = factory.path("nginx.conf");
    std::fs::write(
        &conf,
        format!(
            "daemon off; master_process off; pid {0}/nginx.pid; error_log stderr; user root; events {{}}\n\
             http {{ access_log off; client_body_temp_path {0}; proxy_temp_path {0}; fastcgi_temp_path {0};\n\
             uwsgi_temp_path {0}; scgi_temp_path {0};\n\
             server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {1}; ssl_certificate_key {2};\n\
             root {3}; default_type application/cose; }} }}\n",
            factory.path("").display(),
            pair.cert.display(),
            pair.key.display(),
            site.display()
        ),
    )
    .unwrap();
    let mut nginx =
        process::Service::start("nginx", Command::new("nginx").arg("-c").arg(&conf), &factory.path("nginx.log"))
            .expect("nginx-light is installed");
    nginx.wait_for_port(port, edged_qemu::wait::LONG).unwrap();
    let device = factory.device(&format!(
        "[fleet]\nurl = \"https://127.0.0.1:{port}\"\nca = \"{}\"\npoll-interval = \"1s\"\n",
        factory.authority.cert().display()
    ));
    until("the third root", || (root_version(&device) == 3).then_some(()));
    device.wait_for_generation(1, "good");
}

#[test]
fn a_root_without_a_stolen_image_key_lets_no_new_image_of_it_in_and_what_is_on_the_disk_goes_on() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let (device, pid) = device_that_runs(&factory, &image);

    let (first, second, images_2) =
        (factory.keys.trust_root(), factory.path("trust2.cose"), key(&factory, "images2.key"));
    let mut next = factory.keys.edgectl();
    next.args(["trust", "rotate", "--key"]).arg(factory.keys.private("root")).arg("--from").arg(&first);
    next.arg("--image-key").arg(images_2.with_extension("pub")).arg("-o").arg(&second);
    process::run(&mut next).unwrap();
    device.take(&second);

    // The key signs another image, and whoever signs manifests is led to name it.
    let own = factory.path("own");
    std::fs::create_dir(&own).unwrap();
    std::fs::write(own.join("another"), "image").unwrap();
    let another = factory.publish_over_busybox("another", &own);
    device.take(&factory.sign("second", &sleeper(2, &another)));
    until("the refusal", || {
        let status = device.status();
        let why = [&status["candidate"]["reason"], &status["refused"]["why"]];
        why.iter().any(|why| why["code"] == "imageWrongKey").then_some(())
    });
    assert_eq!(device.pid("app"), pid, "what was pulled under it is not asked again");
    let (repository, digest) = another.rsplit_once('/').unwrap().1.split_once('@').unwrap();
    factory.registry.sign(repository, digest, &images_2, edged_qemu::registry::SignatureForm::Bundle).unwrap();
    device.take(&factory.sign("third", &sleeper(3, &another)));
    device.wait_for_generation(3, "good");

    // By hand: an image of the stolen key that is on the disk is believed until it is gone from there.
    device.take(&factory.sign("fourth", &sleeper(4, &image)));
    device.wait_for_generation(4, "good");
    device.ask(&["reset", "--workloads", "--yes"]);
    device.take(&factory.sign("fifth", &sleeper(5, &image)));
    until("the refusal of what was believed", || {
        let (events, no_key) = (device.events(), "no signature is by an image key of the trust root");
        events.iter().any(|text| text.contains("/busybox@") && text.contains(no_key)).then_some(())
    });
}
