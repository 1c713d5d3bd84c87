//! Debian's docker-registry, skopeo and cosign.

use std::cell::RefCell;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use edged::config::ImagePolicy;
use edged::execute::pull::{self, Progress};
use edged_model::reason::Code;

use super::support::registry::{Registry, signing_key};
use super::support::run;
use super::{Device, sample};

#[test]
fn a_signed_image_is_pulled_once_and_then_ready_without_a_network() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let (layout, built) = sample(dir.path());
    let digest = registry.push(&format!("oci:{}:v1", layout.display()), "team/app:v1", &[]);
    assert_eq!(digest, built.to_string(), "what skopeo pushes is what was built");
    let (key, public) = signing_key(dir.path(), "image", "ed25519");
    registry.sign(&format!("team/app@{digest}"), &key, false);

    // A copy: the registry takes its own along when it goes.
    let ca = dir.path().join("ca.crt");
    std::fs::copy(registry.ca(), &ca).unwrap();
    let config = edged::config::Registry { ca: Some(ca), ..registry.config() };
    let mut device = Device::new([(registry.host(), config)]);
    device.ctx.keys = vec![public];
    let image = format!("{}/team/app@{digest}", registry.host());
    let seen = RefCell::new(Vec::new());
    let ready = pull::pull(&device.ctx, &image, &|progress: Progress| seen.borrow_mut().push(progress)).unwrap();

    assert_eq!(ready.entrypoint, ["/bin/app"]);
    assert_eq!(ready.cmd, ["--serve"]);
    assert_eq!((ready.workdir.as_deref(), ready.user.as_deref()), (Some("/data"), Some("12:34")));
    assert_eq!(ready.stop_signal.as_deref(), Some("SIGINT"));
    assert_eq!(std::fs::read_to_string(device.layer(&ready, 0).join("etc/motd")).unwrap(), "hello\n");
    let noise = device.layer(&ready, 1).join("data/noise");
    assert_eq!(std::fs::read(&noise).unwrap(), std::fs::read(dir.path().join("upper/data/noise")).unwrap());
    let seen = seen.into_inner();
    assert!(seen.len() > 2 && seen.windows(2).all(|pair| pair[0].done <= pair[1].done), "{seen:?}");
    assert_eq!(seen.last().unwrap().done, seen.last().unwrap().total);

    drop(registry);
    assert_eq!(device.pull(&image).unwrap(), ready, "the registry is gone");
    assert_eq!(pull::ready(&device.ctx, &image).unwrap(), ready);
    std::fs::remove_dir_all(device.layer(&ready, 0)).unwrap();
    assert_eq!(pull::ready(&device.ctx, &image), None, "a layer is gone");
    assert_eq!(device.pull(&image).unwrap_err().reason.code, Code::RegistryUnavailable);
}

#[test]
fn signatures_of_both_formats_and_both_kinds_of_key_are_believed_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let (layout, _) = sample(dir.path());
    let ed25519 = signing_key(dir.path(), "first", "ed25519");
    let p256 = signing_key(dir.path(), "second", "EC -pkeyopt ec_paramgen_curve:P-256");
    for (repository, bundle) in [("tag", false), ("bundle", true)] {
        let digest = registry.push(&format!("oci:{}:v1", layout.display()), &format!("{repository}:v1"), &[]);
        let image = format!("{}/{repository}:v1", registry.host());
        let pull = |keys: &[&Vec<u8>], threshold| {
            let mut device = Device::new([(registry.host(), registry.config())]);
            device.ctx.keys = keys.iter().map(|key| (*key).clone()).collect();
            device.ctx.threshold = threshold;
            let pulled = device.pull(&image).map_err(|failure| failure.reason);
            assert!(pulled.is_ok() || device.has_nothing_half_done());
            pulled
        };
        assert_eq!(pull(&[&ed25519.1], 1).unwrap_err().code, Code::ImageUnsigned, "{repository}");
        registry.sign(&format!("{repository}@{digest}"), &ed25519.0, bundle);
        pull(&[&ed25519.1], 1).unwrap();
        let wrong = pull(&[&p256.1], 1).unwrap_err();
        assert_eq!(wrong.code, Code::ImageWrongKey, "{wrong}");
        assert!(wrong.text.contains(&image), "{wrong}");
        assert_eq!(pull(&[&ed25519.1, &p256.1], 2).unwrap_err().code, Code::ThresholdNotMet);
        registry.sign(&format!("{repository}@{digest}"), &p256.0, bundle);
        pull(&[&ed25519.1, &p256.1], 2).unwrap();
        pull(&[&p256.1], 1).unwrap();
    }
}

#[test]
fn a_wrong_password_no_password_and_a_changed_blob_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let (layout, _) = sample(dir.path());
    let digest = registry.push(&format!("oci:{}:v1", layout.display()), "app:v1", &[]);
    let image = format!("{}/app@{digest}", registry.host());
    let refused = |change: &dyn Fn(&mut edged::config::Registry)| {
        let mut config = registry.config();
        change(&mut config);
        let device = Device::new([(registry.host(), config)]).trusting_digests();
        let reason = device.pull(&image).unwrap_err().reason;
        assert!(device.has_nothing_half_done());
        reason
    };
    let wrong = refused(&|config| config.password = Some("guess".to_owned()));
    assert_eq!(wrong.code, Code::ImageUnauthorized);
    assert!(wrong.text.contains("user name or password") && wrong.next.contains("agent.toml"), "{wrong}");
    assert_eq!(refused(&|config| config.username = None).code, Code::ImageUnauthorized);
    let stranger = refused(&|config| config.ca = None);
    assert_eq!(stranger.code, Code::RegistryUnavailable);
    assert!(stranger.text.to_lowercase().contains("certificate"), "{stranger}");

    // One byte in the middle of the large layer.
    let manifest = std::fs::read(layout.join("blobs/sha256").join(&digest["sha256:".len()..])).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let layer = manifest["layers"][1]["digest"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
    let mut bytes = std::fs::read(registry.blob_file(&layer)).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(registry.blob_file(&layer), bytes).unwrap();
    let changed = refused(&|_| {});
    assert_eq!(changed.code, Code::DigestMismatch);
    assert!(changed.text.contains(&layer[..12]), "{changed}");
}

#[test]
fn other_makers_images_and_forms_unpack_too() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let root = dir.path().join("root");
    let layout = dir.path().join("umoci");
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::write(root.join("bin/tool"), "#!/bin/sh\n").unwrap();
    let umoci = |arguments: &[&str]| run(Command::new("umoci").args(arguments));
    umoci(&["init", "--layout", layout.to_str().unwrap()]);
    let tagged = format!("{}:v1", layout.display());
    umoci(&["new", "--image", &tagged]);
    umoci(&["insert", "--image", &tagged, root.join("bin").to_str().unwrap(), "/bin"]);
    umoci(&["insert", "--image", &tagged, "--whiteout", "/bin/tool"]);
    let from = format!("oci:{tagged}");
    for options in [
        &["--format", "v2s2"][..],
        &["--format", "oci"],
        &["--format", "oci", "--dest-compress-format", "zstd", "--dest-compress"],
    ] {
        let digest = registry.push(&from, "forms:v1", options);
        let device = Device::new([(registry.host(), registry.config())]).trusting_digests();
        let ready = device
            .pull(&format!("{}/forms@{digest}", registry.host()))
            .unwrap_or_else(|failure| panic!("{options:?}: {}", failure.reason));
        assert!(device.layer(&ready, 0).join("bin/tool").is_file());
        let whiteout = std::fs::symlink_metadata(device.layer(&ready, 1).join("bin/tool")).unwrap();
        assert_eq!((whiteout.rdev(), whiteout.mode() & 0o170_000), (0, 0o020_000), "{options:?}");
    }
}

#[test]
fn mirrors_are_asked_first_and_passed_over_when_they_fail() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, mirror) = (Registry::start(), Registry::start());
    let (layout, digest) = sample(dir.path());
    let from = format!("oci:{}:v1", layout.display());
    mirror.push(&from, "app:v1", &[]);
    let image = format!("{}/app@{digest}", registry.host());
    let mut config = registry.config();
    config.mirrors = vec!["127.0.0.1:1".to_owned(), mirror.host()];
    let registries = [(registry.host(), config), (mirror.host(), mirror.config())];
    let devices = || Device::new(registries.clone()).trusting_digests();
    devices().pull(&image).expect("only the mirror has it");
    drop(mirror);
    assert_eq!(devices().pull(&image).unwrap_err().reason.code, Code::ImageNotFound, "what the registry itself says");
    registry.push(&from, "app:v1", &[]);
    devices().pull(&image).expect("the mirror is gone, the registry has it");
}

#[test]
fn a_layout_on_a_stick_is_verified_the_same_way() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, digest) = sample(dir.path());
    let mut device = Device::new([]).trusting_digests();
    let named = format!("oci:{}:v1@{digest}", layout.display());
    let ready = device.pull(&named).unwrap();
    assert_eq!((ready.digest, ready.layers.len()), (digest, 2));
    assert_eq!(device.pull(&format!("oci:{}:v1", layout.display())).unwrap_err().reason.code, Code::ImageUnsigned);
    assert_eq!(device.pull("oci:/nowhere:v1").unwrap_err().reason.code, Code::ImageNotFound);
    device.ctx.images.policy = ImagePolicy::Signature;
    let unsigned = device.pull(&named).unwrap_err();
    assert_eq!(unsigned.reason.code, Code::ImageUnsigned, "what was taken without signatures is not ready any more");
    assert_eq!(pull::ready(&device.ctx, &named), None);
}
