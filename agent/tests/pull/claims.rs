//! What hangs on an image and claims to be its signature: how much of it a registry can have a device look at, and what is
//! found all the same.

use std::sync::Arc;

use edged::registry::traffic::{Clock, Limits, Traffic};
use edged_model::id::Digest;
use edged_model::keys::SecretKey;
use edged_model::reason::{Code, Reason};
use serde_json::json;

use super::Device;
use super::broken_registry::plain_http;
use super::shelf::{BUNDLE, INDEX, Shelf};
use super::support::faults::{Answer, FaultServer, Request};

/// What all that hangs on an image may take together, with a little for what was begun.
const BOUND: usize = (4 << 20) + (256 << 10);

fn key() -> SecretKey {
    SecretKey::from_seed(&[7; 32])
}

/// A device that wants the key's signature. More than the bound would be more than its budget of the day.
fn wanting_the_key(server: &FaultServer) -> Device {
    let mut device = Device::new([(server.host.clone(), plain_http())]);
    device.ctx.keys = vec![key().public().to_spki().unwrap()];
    let limits = Limits { bytes_per_day: Some(BOUND as u64), ..Limits::default() };
    let clock = Clock { boot_ms: || 0, unix_secs: || 0 };
    device.ctx.traffic = Arc::new(Traffic::new(limits, clock, device.ctx.data.join("traffic")));
    device
}

/// Pulls from a registry that has this on its shelves, and answers so.
fn pull_with(
    shelf: &Shelf,
    digest: Digest,
    behaviour: impl Fn(&Request, Answer) -> Answer + Send + Sync + 'static,
) -> (FaultServer, Result<(), Reason>) {
    let has = shelf.clone();
    let server = FaultServer::start(move |request| behaviour(request, has.answer(request)));
    let pulled = wanting_the_key(&server).pull(&format!("{}/app@{digest}", server.host));
    (server, pulled.map(drop).map_err(|failure| failure.reason))
}

fn pull(shelf: &Shelf, digest: Digest) -> (FaultServer, Result<(), Reason>) {
    pull_with(shelf, digest, |_, answer| answer)
}

/// Hangs manifests with four layers each, every one a bundle of so many bytes that signs nothing.
fn flood(shelf: &mut Shelf, digest: Digest, artifacts: usize, bytes: usize, said_bytes: usize) {
    for artifact in 0..artifacts {
        let layers: Vec<_> = (0..4)
            .map(|layer| {
                let mut layer = shelf.put(BUNDLE, format!("{{\"{artifact}.{layer}\":0}}{}", " ".repeat(bytes)));
                layer["size"] = said_bytes.into();
                layer
            })
            .collect();
        let artifact = shelf.artifact(BUNDLE, &layers);
        shelf.hang(digest, artifact);
    }
}

/// Bytes that the device asked for of what hangs on the image.
fn asked_for(server: &FaultServer, shelf: &Shelf, digest: Digest) -> usize {
    let of_image = String::from_utf8_lossy(shelf.bytes(digest)).into_owned();
    let hangs_on_it = |request: &Request| match request.path.rsplit_once('/') {
        Some((_, name)) => name != digest.to_string() && !of_image.contains(name),
        None => false,
    };
    let requests = server.requests();
    requests.iter().filter(|request| hangs_on_it(request)).map(|request| shelf.answer(request).body.len()).sum()
}

#[test]
fn a_flood_of_large_claims_is_not_taken_in() {
    for bytes in [20 << 10, 200 << 10, 3 << 20] {
        let (mut shelf, digest) = Shelf::with_sample();
        flood(&mut shelf, digest, 32, bytes, bytes);
        let (server, pulled) = pull(&shelf, digest);
        let asked_for = asked_for(&server, &shelf, digest);
        assert!(asked_for <= BOUND, "{bytes}: {asked_for} bytes were asked for");
        let reason = pulled.unwrap_err();
        assert!(matches!(reason.code, Code::ImageUnsigned | Code::Malformed), "{bytes}: {reason}");
        assert!(reason.text.contains("; not all was looked at: "), "{bytes}: {reason}");
    }
}

#[test]
fn claims_that_are_larger_than_their_manifest_says_are_not_taken_in_either() {
    for is_announced in [true, false] {
        let (mut shelf, digest) = Shelf::with_sample();
        flood(&mut shelf, digest, 32, 1 << 20, 10_000);
        let (_, pulled) = pull_with(&shelf, digest, move |request, answer| {
            let chunk_bytes = (!is_announced && request.path.contains("/blobs/")).then_some(4096);
            Answer { chunk_bytes, ..answer }
        });
        let reason = pulled.unwrap_err();
        assert_eq!(reason.code, Code::ImageUnsigned, "{reason}");
        assert!(reason.text.contains("is larger than 262144 bytes"), "{reason}");
    }
}

#[test]
fn a_good_signature_that_comes_first_is_not_hidden_by_what_comes_behind_it() {
    let (mut shelf, digest) = Shelf::with_sample();
    shelf.sign(digest, &key());
    flood(&mut shelf, digest, 30, 100 << 10, 100 << 10);
    let (server, pulled) = pull(&shelf, digest);
    pulled.unwrap();
    let asked_for = asked_for(&server, &shelf, digest);
    assert!(asked_for < 64 << 10, "{asked_for} bytes were asked for");
}

#[test]
fn a_good_signature_behind_some_that_are_too_large_is_found() {
    let (mut shelf, digest) = Shelf::with_sample();
    flood(&mut shelf, digest, 5, 3 << 20, 3 << 20);
    flood(&mut shelf, digest, 1, 1 << 20, 10_000);
    shelf.sign(digest, &key());
    pull(&shelf, digest).1.unwrap();
}

/// Hangs bills of materials on it.
fn describe(shelf: &mut Shelf, digest: Digest, how_many: usize) {
    for number in 0..how_many {
        let bill = shelf.put("application/spdx+json", format!("{{\"bill\":{number}}}"));
        let artifact = shelf.artifact("application/spdx+json", &[bill]);
        shelf.hang(digest, artifact);
    }
}

/// More than are looked at, of which the list does not say what they are.
fn describe_untyped(shelf: &mut Shelf, digest: Digest) {
    for number in 0..40 {
        let layer = shelf.put("application/spdx+json", number.to_string());
        let mut artifact = shelf.artifact("application/spdx+json", &[layer]);
        artifact.as_object_mut().unwrap().remove("artifactType");
        shelf.hang(digest, artifact);
    }
}

#[test]
fn bills_of_materials_before_a_signature_do_not_hide_it() {
    let (mut shelf, digest) = Shelf::with_sample();
    describe(&mut shelf, digest, 40);
    // Signed statements about the image, which are no signatures of it.
    for number in 0..40 {
        let layer = shelf.put(BUNDLE, format!("{{\"{number}\":0}}"));
        let mut artifact = shelf.artifact(BUNDLE, &[layer]);
        artifact["annotations"] = json!({"dev.sigstore.bundle.predicateType": "https://slsa.dev/provenance/v1"});
        shelf.hang(digest, artifact);
    }
    describe_untyped(&mut shelf, digest);
    shelf.sign(digest, &key());
    let (server, pulled) = pull(&shelf, digest);
    pulled.unwrap();
    let manifests = server.requests().iter().filter(|request| request.path.contains("/manifests/sha256:")).count();
    assert_eq!(manifests, 2, "of the image and of the signature");
}

#[test]
fn a_signature_whose_list_does_not_say_what_it_is_is_found() {
    for said in [None, Some(""), Some("application/vnd.oci.empty.v1+json")] {
        let (mut shelf, digest) = Shelf::with_sample();
        describe(&mut shelf, digest, 40);
        shelf.sign(digest, &key());
        shelf.change_last(digest, |artifact| match said {
            Some(said) => artifact["artifactType"] = said.into(),
            None => drop(artifact.as_object_mut().unwrap().remove("artifactType")),
        });
        pull(&shelf, digest).1.unwrap();
    }
}

#[test]
fn a_list_in_parts_is_read_to_its_end() {
    let (mut shelf, digest) = Shelf::with_sample();
    describe(&mut shelf, digest, 12);
    shelf.sign(digest, &key());
    shelf.page = 5;
    let (server, pulled) = pull(&shelf, digest);
    pulled.unwrap();
    let lists: Vec<_> = server.requests().into_iter().filter(|request| request.path.contains("/referrers/")).collect();
    assert_eq!(lists.len(), 3);
    assert!(lists[2].path.ends_with("?from=10"), "{lists:?}");
}

#[test]
fn what_a_later_part_says_to_be_a_signature_comes_before_what_may_be_one_in_the_first() {
    let (mut shelf, digest) = Shelf::with_sample();
    describe_untyped(&mut shelf, digest);
    shelf.sign(digest, &key());
    shelf.page = 35;
    pull(&shelf, digest).1.unwrap();
}

#[test]
fn a_part_that_fails_hides_no_signature_of_those_before_it() {
    let (mut shelf, digest) = Shelf::with_sample();
    shelf.sign(digest, &key());
    shelf.change_last(digest, |artifact| drop(artifact.as_object_mut().unwrap().remove("artifactType")));
    describe(&mut shelf, digest, 12);
    shelf.page = 5;
    let fails = |request: &Request, answer| match request.path.contains("?from=5") {
        true => Answer::new(200, "<html>Please log in</html>").header("Content-Type", INDEX),
        false => answer,
    };
    pull_with(&shelf, digest, fails).1.unwrap();
    let (mut unsigned, digest) = Shelf::with_sample();
    describe(&mut unsigned, digest, 12);
    unsigned.page = 5;
    let reason = pull_with(&unsigned, digest, fails).1.unwrap_err();
    assert!(reason.code == Code::RegistryUnavailable && reason.text.contains("cannot be read"), "{reason}");
}

#[test]
fn a_list_that_cannot_be_read_is_asked_for_again_and_a_part_that_is_gone_is_told() {
    let (mut shelf, digest) = Shelf::with_sample();
    describe(&mut shelf, digest, 12);
    let (_, pulled) = pull_with(&shelf, digest, |request, mut answer| {
        if request.path.contains("/referrers/") {
            answer.body = b"<html>Please log in</html>".to_vec();
        }
        answer
    });
    let reason = pulled.unwrap_err();
    assert!(reason.code == Code::RegistryUnavailable && reason.text.contains("cannot be read"), "{reason}");

    shelf.page = 5;
    let (_, pulled) = pull_with(&shelf, digest, |request, answer| match request.path.contains("?from=5") {
        true => Answer::new(404, ""),
        false => answer,
    });
    let reason = pulled.unwrap_err();
    assert!(reason.code == Code::ImageUnsigned && reason.text.contains("ends in the middle"), "{reason}");
}

#[test]
fn a_list_without_end_is_left_in_time() {
    let (mut shelf, digest) = Shelf::with_sample();
    describe(&mut shelf, digest, 100);
    shelf.page = 1;
    let (server, pulled) = pull(&shelf, digest);
    let reason = pulled.unwrap_err();
    assert!(reason.code == Code::ImageUnsigned && reason.text.contains("longer than 16 pages"), "{reason}");
    let lists = server.requests().iter().filter(|request| request.path.contains("/referrers/")).count();
    assert_eq!(lists, 16);

    // And so is one whose parts are large.
    let (mut shelf, digest) = Shelf::with_sample();
    describe(&mut shelf, digest, 1);
    let (server, pulled) = pull_with(&shelf, digest, |request, mut answer| {
        if request.path.contains("/referrers/") {
            answer.body.extend(vec![b' '; 3 << 20]);
            let next = format!("<{}>; rel=\"next\"", request.path);
            answer.header("Link", next)
        } else {
            answer
        }
    });
    let reason = pulled.unwrap_err();
    assert!(reason.code == Code::ImageUnsigned && reason.text.contains("larger than"), "{reason}");
    let lists = server.requests().iter().filter(|request| request.path.contains("/referrers/")).count();
    assert_eq!(lists, 2);
}

#[test]
fn a_list_that_goes_on_at_another_host_is_not_followed_there() {
    let (mut shelf, digest) = Shelf::with_sample();
    shelf.sign(digest, &key());
    let has = shelf.clone();
    let elsewhere = FaultServer::start(move |request| has.answer(request));
    let (bare, host) = (Shelf::with_sample().0, elsewhere.host.clone());
    let (_, pulled) = pull_with(&bare, digest, move |request, answer| match request.path.contains("/referrers/") {
        true => answer.header("Link", format!("<http://{host}{}>; rel=\"next\"", request.path)),
        false => answer,
    });
    let reason = pulled.unwrap_err();
    assert_eq!(reason.code, Code::ImageUnsigned, "{reason}");
    assert!(reason.text.contains(&format!("goes on at http://{}", elsewhere.host)), "{reason}");
    assert!(elsewhere.requests().is_empty());
}
