//! Images that are brought on a stick, as the real tools write them.

use std::path::{Path, PathBuf};
use std::process::Command;

use edged::config::Registry as RegistryConfig;
use edged::execute::pull::load::{self, Loaded, Wish};
use edged::execute::pull::{PullFailure, ReadyImage};
use edged_model::reason::Code;

use crate::support::registry::{Registry, signing_key};
use crate::support::run;
use crate::{Device, sample};

impl Device {
    fn load(&self, path: &Path, wish: &Wish) -> Result<Vec<Loaded>, PullFailure> {
        load::load(&self.ctx, path, wish, &|_| {})
    }

    fn load_one(&self, path: &Path) -> ReadyImage {
        let mut all = self.load(path, &Wish::default()).unwrap();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0).image
    }
}

fn skopeo(from: &str, to: &str) {
    run(Command::new("skopeo").args(["--insecure-policy", "copy", "--quiet", from, to]));
}

/// A layout as a tar archive.
fn packed(layout: &Path, to: &Path) -> PathBuf {
    run(Command::new("tar").arg("-cf").arg(to).arg("-C").arg(layout).arg("."));
    to.to_owned()
}

#[test]
fn a_layout_its_archive_and_what_docker_saves_are_the_same_files_and_wait_for_a_manifest_to_name_them() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, digest) = sample(dir.path());
    let from = format!("oci:{}:v1", layout.display());
    let (oci, docker) = (dir.path().join("oci.tar"), dir.path().join("docker.tar"));
    skopeo(&from, &format!("oci-archive:{}:v1", oci.display()));
    skopeo(&from, &format!("docker-archive:{}:team/app:v1", docker.display()));
    let by_hand = packed(&layout, &dir.path().join("by-hand.tar"));

    let chains: Vec<_> = [&layout, &oci, &by_hand, &docker]
        .into_iter()
        .map(|path| {
            let device = Device::new([]).trusting_digests();
            let ready = device.load_one(path);
            assert_eq!(std::fs::read_to_string(device.layer(&ready, 0).join("etc/motd")).unwrap(), "hello\n");
            assert_eq!(ready.entrypoint, ["/bin/app"]);
            // No network at all: the digest in a manifest is enough, whatever registry it is said to come from.
            let named = format!("nowhere.invalid/team/app@{}", ready.digest);
            assert_eq!(device.pull(&named).unwrap(), ready, "{}", path.display());
            let other = format!("nowhere.invalid/team/app@{}", edged_model::id::Digest::of(b"other"));
            assert_eq!(device.pull(&other).unwrap_err().reason.code, Code::RegistryUnavailable);
            if path == &layout || path == &by_hand {
                assert_eq!(ready.digest, digest);
            }
            ready.layers
        })
        .collect();
    assert!(chains.windows(2).all(|pair| pair[0] == pair[1]), "the same layers, by the same names: {chains:?}");
    let device = Device::new([]).trusting_digests();
    assert_eq!(device.load_one(&docker).digest, Device::new([]).trusting_digests().load_one(&docker).digest);
}

#[test]
fn a_device_that_wants_signatures_wants_them_from_a_stick_too() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let (layout, _) = sample(dir.path());
    let digest = registry.push(&format!("oci:{}:v1", layout.display()), "team/app:v1", &[]);
    let (key, public) = signing_key(dir.path(), "image", "ed25519");
    registry.sign(&format!("team/app@{digest}"), &key, false);
    // `cosign save` takes the image with its signatures.
    let saved = dir.path().join("saved");
    let image = format!("{}/team/app@{digest}", registry.host());
    registry.save(&format!("team/app@{digest}"), &saved);
    let docker = dir.path().join("docker.tar");
    skopeo(&format!("oci:{}:v1", layout.display()), &format!("docker-archive:{}:team/app:v1", docker.display()));
    let host = registry.host();
    drop(registry);

    let mut device = Device::new([(host.clone(), RegistryConfig { insecure_http: true, ..RegistryConfig::default() })]);
    device.ctx.keys = vec![public];
    for unsigned in [&layout, &docker] {
        let failure = device.load(unsigned, &Wish::default()).unwrap_err();
        assert_eq!(failure.reason.code, Code::ImageUnsigned, "{failure:?}");
        assert!(device.has_nothing_half_done());
    }
    for path in [saved.clone(), packed(&saved, &dir.path().join("saved.tar"))] {
        assert_eq!(device.load_one(&path).digest.to_string(), digest);
    }
    assert!(device.pull(&image).is_ok(), "its registry is gone");

    // A tag: only because somebody said so when he brought it, and only while nobody knows better.
    let tag = format!("{host}/team/app:v1");
    assert_eq!(device.pull(&tag).unwrap_err().reason.code, Code::RegistryUnavailable);
    device.load(&saved, &Wish { only: None, tag: Some(tag.clone()) }).unwrap();
    assert_eq!(device.pull(&tag).unwrap().digest.to_string(), digest);

    // Another key: what was taken is not believed by another device.
    let (_, stranger) = signing_key(dir.path(), "other", "ed25519");
    let mut other = Device::new([]);
    other.ctx.keys = vec![stranger];
    let failure = other.load(&saved, &Wish::default()).unwrap_err();
    assert!(matches!(failure.reason.code, Code::ImageUnsigned | Code::ImageWrongKey), "{failure:?}");
}

#[test]
fn what_is_broken_on_the_stick_is_refused_by_name_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, _) = sample(dir.path());
    let docker = dir.path().join("docker.tar");
    skopeo(&format!("oci:{}:v1", layout.display()), &format!("docker-archive:{}", docker.display()));
    let device = Device::new([]).trusting_digests();
    let refused = |path: &Path| {
        let failure = device.load(path, &Wish::default()).unwrap_err();
        assert!(device.has_nothing_half_done(), "{failure:?}");
        failure.reason
    };
    assert_eq!(refused(&dir.path().join("nothing")).code, Code::ImageNotFound);
    let text = dir.path().join("text");
    std::fs::write(&text, "no archive at all, but longer than a block of one\n".repeat(30)).unwrap();
    assert_eq!(refused(&text).code, Code::ImageUnusable);
    run(Command::new("gzip").arg("-k").arg(&docker));
    assert!(refused(&docker.with_extension("tar.gz")).text.contains("gzip -d"));
    // Cut off, everywhere in steps: never taken, never half there.
    let whole = std::fs::read(&docker).unwrap();
    let cut = dir.path().join("cut.tar");
    for end in (0..whole.len() - 12_000).step_by(whole.len() / 23) {
        std::fs::write(&cut, &whole[..end]).unwrap();
        refused(&cut);
    }
    // One byte of a layer is another.
    let mut flipped = whole.clone();
    let at = whole.windows(6).position(|bytes| bytes == b"hello\n").unwrap();
    flipped[at] = b'j';
    std::fs::write(&cut, flipped).unwrap();
    assert_eq!(refused(&cut).code, Code::DigestMismatch);
    assert_eq!(device.load_one(&docker).entrypoint, ["/bin/app"]);
}
