//! Everything a registry can do wrong, each a clear reason with the object named, and nothing half done.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use edged::config;
use edged_model::id::Digest;
use edged_model::reason::Code;

use super::support::faults::{Answer, FaultServer, Request};
use super::{Device, sample};

/// A registry that has the sample image, and answers as it should.
#[derive(Clone)]
pub struct Good {
    layout: PathBuf,
    pub digest: Digest,
    _dir: Arc<tempfile::TempDir>,
}

impl Good {
    pub fn new() -> Self {
        Self::of(sample)
    }

    /// Another image, as a layout.
    pub fn of(build: impl FnOnce(&Path) -> (PathBuf, Digest)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (layout, digest) = build(dir.path());
        Self { layout, digest, _dir: Arc::new(dir) }
    }

    pub fn answer(&self, request: &Request) -> Answer {
        let blob = request.path.rsplit_once("sha256:").map(|(_, hex)| self.layout.join("blobs/sha256").join(hex));
        let Some(bytes) = blob.and_then(|path| std::fs::read(path).ok()) else { return Answer::new(404, "") };
        if request.path.contains("/manifests/") {
            return Answer::new(200, bytes).header("Content-Type", "application/vnd.oci.image.manifest.v1+json");
        }
        match request.from() {
            None => Answer::new(200, bytes),
            Some(from) => {
                let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
                Answer::new(206, &bytes[from..]).header("Content-Range", range)
            }
        }
    }

    /// Of the layer of a MiB, packed.
    pub fn large_bytes(&self) -> usize {
        let blobs = std::fs::read_dir(self.layout.join("blobs/sha256")).unwrap();
        let sizes = blobs.map(|blob| usize::try_from(blob.unwrap().metadata().unwrap().len()).unwrap());
        sizes.max().unwrap()
    }

    /// The layer of a MiB.
    pub fn is_large_layer(&self, request: &Request) -> bool {
        request.path.contains("/blobs/") && self.answer(request).body.len() > 100_000 || {
            let range = Request { headers: [].into(), ..request.clone() };
            request.from().is_some() && self.answer(&range).body.len() > 100_000
        }
    }
}

pub fn plain_http() -> config::Registry {
    config::Registry { insecure_http: true, ..config::Registry::default() }
}

/// Pulls the sample from a server that behaves so.
fn pull_from(
    behaviour: impl Fn(&Good, &Request) -> Answer + Send + Sync + 'static,
) -> (Device, FaultServer, Result<(), edged::execute::pull::PullFailure>) {
    let good = Good::new();
    let image = format!("app@{}", good.digest);
    let server = FaultServer::start(move |request| behaviour(&good, request));
    let device = Device::new([(server.host.clone(), plain_http())]).trusting_digests();
    let result = device.pull(&format!("{}/{image}", server.host)).map(drop);
    assert!(result.is_ok() || device.has_nothing_half_done(), "something half done is left");
    (device, server, result)
}

#[test]
fn every_refusal_has_its_own_reason() {
    let cases = [
        (400, Code::RegistryRefused, false),
        (401, Code::ImageUnauthorized, false),
        (403, Code::ImageUnauthorized, false),
        (404, Code::ImageNotFound, false),
        (408, Code::RegistryUnavailable, true),
        (416, Code::RegistryRefused, false),
        (418, Code::RegistryRefused, false),
        (500, Code::RegistryUnavailable, true),
        (502, Code::RegistryUnavailable, true),
        (503, Code::RegistryUnavailable, true),
        (504, Code::RegistryUnavailable, true),
    ];
    for (status, code, is_tried_again) in cases {
        let (_, server, result) = pull_from(move |_, _| Answer::new(status, "sorry"));
        let failure = result.unwrap_err();
        assert_eq!(failure.reason.code, code, "{status}");
        assert!(
            failure.reason.text.contains(&server.host) && failure.reason.text.contains("/app/manifests/"),
            "{}",
            failure.reason
        );
        assert!(failure.reason.text.contains(&status.to_string()), "{}", failure.reason);
        assert_eq!(server.requests().len() > 1, is_tried_again, "{status}");
    }
}

#[test]
fn a_registry_that_wants_a_log_in_and_does_not_say_which_is_refused_as_that() {
    for challenge in [None, Some("Negotiate"), Some("Bearer service=\"no realm\"")] {
        let (_, server, result) = pull_from(move |_, _| match challenge {
            None => Answer::new(401, ""),
            Some(challenge) => Answer::new(401, "").header("WWW-Authenticate", challenge),
        });
        let reason = result.unwrap_err().reason;
        assert_eq!(reason.code, Code::ImageUnauthorized, "{reason}");
        assert!(reason.text.contains("401: it does not say how to log in"), "{reason}");
        assert_eq!(server.requests().len(), 1, "{challenge:?}");
    }
}

#[test]
fn a_registry_that_asks_for_patience_gets_it() {
    let (_, server, result) = pull_from(|_, _| Answer::new(429, "").header("Retry-After", "3600"));
    let failure = result.unwrap_err();
    assert_eq!(
        (failure.reason.code, failure.retry_after),
        (Code::RegistryUnavailable, Some(Duration::from_secs(3600)))
    );
    assert!(!failure.permanent && failure.reason.text.contains("3600"), "{}", failure.reason);
    assert_eq!(server.requests().len(), 1, "it was asked to wait, and is not asked again");
    let date = |answer: Answer| answer.header("Date", "Wed, 21 Oct 2015 07:27:00 GMT");
    let in_an_hour = "Wed, 21 Oct 2015 08:27:00 GMT";
    let (_, server, result) = pull_from(move |_, _| date(Answer::new(503, "").header("Retry-After", in_an_hour)));
    let failure = result.unwrap_err();
    assert_eq!(failure.retry_after, Some(Duration::from_secs(3600)), "by the registry's own clock");
    assert!(failure.reason.text.contains("in 3600 s") && server.requests().len() == 1, "{}", failure.reason);
    let (_, _, result) = pull_from(|good, request| match request.before {
        0 => Answer::new(429, "").header("Retry-After", "0"),
        1 => Answer::new(500, ""),
        2 => Answer { silent: true, ..Answer::default() },
        _ => good.answer(request),
    });
    result.unwrap();
}

#[test]
fn redirects_end_and_take_no_credentials_along() {
    let (_, server, result) =
        pull_from(|_, request| Answer::new(307, "").header("Location", format!("{}x", request.path)));
    let reason = result.unwrap_err().reason;
    assert!(reason.code == Code::RegistryRefused && reason.text.contains("redirected"), "{reason}");
    assert!(server.requests().len() < 10);

    let good = Good::new();
    let (image, storage_has) = (format!("app@{}", good.digest), good.clone());
    let storage = FaultServer::start(move |request| storage_has.answer(request));
    let elsewhere = storage.host.clone();
    let front = FaultServer::start(move |request| {
        if !request.headers.contains_key("authorization") {
            Answer::new(401, "").header("WWW-Authenticate", "Basic realm=\"r\"")
        } else if request.path.contains("/blobs/") {
            Answer::new(307, "").header("Location", format!("http://{elsewhere}{}", request.path))
        } else {
            good.answer(request)
        }
    });
    let config = config::Registry { username: Some("u".to_owned()), password: Some("p".to_owned()), ..plain_http() };
    let device = Device::new([(front.host.clone(), config)]).trusting_digests();
    device.pull(&format!("{}/{image}", front.host)).unwrap();
    assert!(!storage.requests().is_empty());
    assert!(storage.requests().iter().all(|request| !request.headers.contains_key("authorization")));
}

#[test]
fn a_token_service_is_asked_with_the_password_and_the_registry_with_the_token() {
    let good = Good::new();
    let image = format!("app@{}", good.digest);
    let tokens = FaultServer::start(|request| match request.headers.get("authorization").map(String::as_str) {
        Some("Basic dTpw") => Answer::new(200, r#"{"token":"t0ken"}"#),
        _ => Answer::new(401, ""),
    });
    let realm = format!("Bearer realm=\"http://{}/token\",service=\"reg\",scope=\"repository:app:pull\"", tokens.host);
    let registry = FaultServer::start(move |request| match request.headers.get("authorization").map(String::as_str) {
        Some("Bearer t0ken") => good.answer(request),
        _ => Answer::new(401, "").header("WWW-Authenticate", realm.clone()),
    });
    let config = config::Registry { username: Some("u".to_owned()), password: Some("p".to_owned()), ..plain_http() };
    let device = Device::new([(registry.host.clone(), config)]).trusting_digests();
    device.pull(&format!("{}/{image}", registry.host)).unwrap();
    assert!(tokens.requests()[0].path.contains("scope=repository%3Aapp%3Apull"), "{:?}", tokens.requests());
}

#[test]
fn a_layer_goes_on_where_the_link_broke() {
    // Each answer breaks off after another 300,000 bytes.
    let (_, server, result) = pull_from(|good, request| {
        let answer = good.answer(request);
        if good.is_large_layer(request) { Answer { cut: Some(300_000), ..answer } } else { answer }
    });
    result.unwrap();
    let from: Vec<_> = server.requests().iter().filter_map(Request::from).collect();
    assert_eq!(from, [300_000, 600_000, 900_000], "nothing was fetched twice");

    // A registry without ranges sends all of it again.
    let (_, _, result) = pull_from(|good, request| {
        let whole = Request { headers: [].into(), ..request.clone() };
        let answer = good.answer(&whole);
        let cut = (good.is_large_layer(&whole) && request.before < 2).then_some(300_000 + request.before * 200_000);
        Answer { cut, ..answer }
    });
    result.unwrap();
}

#[test]
fn a_link_that_breaks_at_any_byte_of_a_document_is_tried_again() {
    for cut in [0, 1, 17, 400] {
        let (_, _, result) = pull_from(move |good, request| {
            let answer = good.answer(request);
            if request.before == 0 && !good.is_large_layer(request) {
                Answer { cut: Some(cut), ..answer }
            } else {
                answer
            }
        });
        result.unwrap_or_else(|failure| panic!("cut at {cut}: {}", failure.reason));
    }
}

#[test]
fn a_layer_that_never_gets_further_is_given_up() {
    let (_, server, result) = pull_from(|good, request| {
        let answer = good.answer(request);
        if good.is_large_layer(request) { Answer { cut: Some(1), ..answer } } else { answer }
    });
    let failure = result.unwrap_err();
    assert_eq!(failure.reason.code, Code::RegistryUnavailable);
    assert!(failure.reason.text.contains("/app/blobs/sha256:"), "{}", failure.reason);
    assert!(!failure.permanent && server.requests().len() < 20);
}

#[test]
fn a_length_that_is_not_the_bodys_is_noticed() {
    let said = |bytes: fn(u64) -> u64, is_meant: fn(&Good, &Request) -> bool| {
        pull_from(move |good, request| {
            let answer = good.answer(request);
            let claimed_length = is_meant(good, request).then(|| bytes(answer.body.len() as u64));
            Answer { claimed_length, ..answer }
        })
    };
    let is_manifest = |_: &Good, request: &Request| request.path.contains("/manifests/");
    let is_layer = |good: &Good, request: &Request| good.is_large_layer(request);
    // Of a document that is said to be shorter, the beginning comes.
    let (_, server, result) = said(|bytes| bytes - 10, is_manifest);
    assert_eq!(result.unwrap_err().reason.code, Code::DigestMismatch);
    assert_eq!(server.requests().len(), 1);
    // One that is said to be longer never comes whole.
    let (_, server, result) = said(|bytes| bytes + 10, is_manifest);
    let failure = result.unwrap_err();
    assert!(!failure.permanent && failure.reason.code == Code::RegistryUnavailable, "{}", failure.reason);
    assert_eq!(server.requests().len(), 4, "it may come whole the next time");
    // A layer goes on behind what was said to be all of it, and what is said to follow it is nobody's concern.
    let (_, server, result) = said(|bytes| bytes.min(400_000), is_layer);
    result.unwrap();
    let from: Vec<_> = server.requests().iter().filter_map(Request::from).collect();
    assert_eq!(from, [400_000, 800_000]);
    said(|bytes| bytes + 10, is_layer).2.unwrap();
    // A layer that is said to be empty never gets further.
    let (_, _, result) = said(|_| 0, is_layer);
    let reason = result.unwrap_err().reason;
    assert!(reason.code == Code::RegistryUnavailable && reason.text.contains("ended after 0 of"), "{reason}");
}

#[test]
fn a_part_that_nobody_asked_for_is_not_taken_for_the_whole() {
    let part = |is_said: bool, of: fn(&Good, &Request) -> bool| {
        pull_from(move |good, request| {
            let answer = good.answer(request);
            if request.from().is_some() || !of(good, request) {
                return answer;
            }
            let half = Answer::new(206, &answer.body[..answer.body.len() / 2]);
            let range = format!("bytes 0-{}/{}", half.body.len() - 1, answer.body.len());
            if is_said { half.header("Content-Range", range) } else { half }
        })
    };
    let (_, _, result) = part(true, |_, request| request.path.contains("/manifests/"));
    assert_eq!(result.unwrap_err().reason.code, Code::DigestMismatch);
    // Half a layer from its beginning is half a layer.
    let (_, server, result) = part(true, Good::is_large_layer);
    result.unwrap();
    assert_eq!(server.requests().iter().filter_map(Request::from).count(), 1, "the other half");
    // A part that does not say which one it is could be any.
    let (_, _, result) = part(false, Good::is_large_layer);
    let reason = result.unwrap_err().reason;
    assert!(reason.code == Code::RegistryUnavailable && reason.text.contains("another range came"), "{reason}");
}

#[test]
fn a_layer_whose_rest_is_refused_is_not_whole() {
    for (status, code) in [(416, Code::RegistryRefused), (502, Code::RegistryUnavailable)] {
        let (_, _, result) = pull_from(move |good, request| {
            let is_large = good.is_large_layer(request);
            match request.from() {
                Some(_) if is_large => Answer::new(status, ""),
                _ => Answer { cut: is_large.then_some(300_000), ..good.answer(request) },
            }
        });
        let reason = result.unwrap_err().reason;
        assert!(reason.code == code && reason.text.contains(&format!("answers {status}")), "{reason}");
    }
}

#[test]
fn a_registry_that_speaks_in_small_pieces_is_understood() {
    let (_, _, result) = pull_from(|good, request| {
        let bytes = if good.is_large_layer(request) { 5_000 } else { 7 };
        Answer { drip: Some((bytes, Duration::from_millis(1))), ..good.answer(request) }
    });
    result.unwrap();
}

#[test]
fn of_two_mirrors_the_first_is_asked_first() {
    let good = Good::new();
    let pull = |first_has_it: bool| {
        let log: Arc<Mutex<Vec<&str>>> = Arc::default();
        let server = |name: &'static str, has_it: bool| {
            let (good, log) = (good.clone(), Arc::clone(&log));
            FaultServer::start(move |request| {
                log.lock().unwrap().push(name);
                if has_it { good.answer(request) } else { Answer::new(404, "") }
            })
        };
        let (first, second) = (server("first", first_has_it), server("second", true));
        let registry = server("registry", true);
        let mirrors = vec![first.host.clone(), second.host.clone()];
        let config = config::Registry { mirrors, ..plain_http() };
        let mirror = |server: &FaultServer| (server.host.clone(), plain_http());
        let device = Device::new([(registry.host.clone(), config), mirror(&first), mirror(&second)]).trusting_digests();
        device.pull(&format!("{}/app@{}", registry.host, good.digest)).unwrap();
        let mut asked = log.lock().unwrap().clone();
        asked.dedup();
        asked
    };
    assert_eq!(pull(true), ["first"]);
    assert_eq!(pull(false), ["first", "second"]);
}

#[test]
fn wrong_bytes_are_named_by_digest() {
    let wrong_manifest = |good: &Good, request: &Request| match good.answer(request) {
        answer if request.path.contains("/manifests/") => {
            Answer { body: [answer.body.as_slice(), b" "].concat(), ..answer }
        }
        answer => answer,
    };
    let (_, _, result) = pull_from(wrong_manifest);
    let failure = result.unwrap_err();
    assert!(failure.permanent && failure.reason.code == Code::DigestMismatch, "{}", failure.reason);

    let wrong_layer = |at: usize| {
        move |good: &Good, request: &Request| {
            let mut answer = good.answer(request);
            if good.is_large_layer(request) {
                answer.body[at] ^= 1;
            }
            answer
        }
    };
    for at in [0, 20, 500_000, 1_000_000] {
        let (_, _, result) = pull_from(wrong_layer(at));
        let reason = result.unwrap_err().reason;
        assert_eq!(reason.code, Code::DigestMismatch, "{at}: {reason}");
    }
}

#[test]
fn documents_without_end_are_not_read_to_it() {
    let (_, _, result) = pull_from(|_, _| Answer::new(200, vec![b' '; 5 << 20]));
    let reason = result.unwrap_err().reason;
    assert!(reason.code == Code::ImageUnusable && reason.text.contains("larger"), "{reason}");
    // A layer that is longer than the manifest says.
    let (_, _, result) = pull_from(|good, request| {
        let mut answer = good.answer(request);
        if good.is_large_layer(request) {
            answer.body.extend(vec![0; 4 << 20]);
        }
        answer
    });
    result.expect("what follows the announced size is not read");
}

#[test]
fn nobody_there_and_a_silent_one() {
    let device = Device::new([("127.0.0.1:1".to_owned(), plain_http())]).trusting_digests();
    let image = format!("127.0.0.1:1/app@{}", Digest::of(b"x"));
    let failure = device.pull(&image).unwrap_err();
    assert!(
        failure.reason.code == Code::RegistryUnavailable && failure.reason.text.contains("127.0.0.1:1"),
        "{}",
        failure.reason
    );
    let (_, _, result) = pull_from(|_, _| Answer { silent: true, ..Answer::default() });
    assert_eq!(result.unwrap_err().reason.code, Code::RegistryUnavailable);
}

#[test]
fn an_image_that_does_not_fit_is_refused_with_the_three_numbers() {
    let good = Good::new();
    let image = format!("app@{}", good.digest);
    let server = FaultServer::start(move |request| good.answer(request));
    let mut device = Device::new([(server.host.clone(), plain_http())]).trusting_digests();
    device.ctx.disk_reserve = edged_model::quantity::Bytes(u64::MAX);
    let reason = device.pull(&format!("{}/{image}", server.host)).unwrap_err().reason;
    assert_eq!(reason.code, Code::DiskDoesNotFit);
    assert!(
        reason.text.contains("needs about") && reason.text.contains("free") && reason.text.contains("reserve"),
        "{reason}"
    );
    assert!(device.has_nothing_half_done());
    let whole = server.requests().into_iter().filter(|request| request.from().is_none());
    assert_eq!(whole.count(), 2, "manifest and configuration, of layers only how large they are");
}

#[test]
fn two_images_that_share_layers_fetch_them_once() {
    let good = Good::new();
    let (digest, server_has) = (good.digest, good.clone());
    let server = FaultServer::start(move |request| server_has.answer(request));
    let device = Device::new([(server.host.clone(), plain_http())]).trusting_digests();
    std::thread::scope(|scope| {
        for name in ["one", "two", "three"] {
            let (device, server) = (&device, &server);
            scope.spawn(move || device.pull(&format!("{}/{name}@{digest}", server.host)).unwrap());
        }
    });
    let large = server.requests().into_iter().filter(|request| good.is_large_layer(request)).count();
    assert_eq!(large, 1);
}

#[test]
fn an_archive_that_leads_out_is_refused_by_the_name_of_its_entry() {
    // Digest and diff id are right: only the entries are not.
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o644);
    let name = b"../../escape";
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_cksum();
    let mut archive = tar::Builder::new(Vec::new());
    archive.append(&header, &b"x"[..]).unwrap();
    let layer = archive.into_inner().unwrap();
    let media = "application/vnd.oci.image";
    let config = format!(
        r#"{{"architecture":"{}","os":"linux","rootfs":{{"type":"layers","diff_ids":["{}"]}},"config":{{}}}}"#,
        edged::registry::platform::architecture(),
        Digest::of(&layer)
    );
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{media}.manifest.v1+json","config":{{"mediaType":"{media}.config.v1+json","size":{},"digest":"{}"}},"layers":[{{"mediaType":"{media}.layer.v1.tar","size":{},"digest":"{}"}}]}}"#,
        config.len(),
        Digest::of(config.as_bytes()),
        layer.len(),
        Digest::of(&layer)
    );
    let digest = Digest::of(manifest.as_bytes());
    let documents = [layer, config.into_bytes(), manifest.into_bytes()];
    let server = FaultServer::start(move |request| {
        let found = documents.iter().find(|bytes| request.path.ends_with(&Digest::of(bytes).to_string()));
        found.map_or_else(|| Answer::new(404, ""), |bytes| Answer::new(200, bytes.clone()))
    });
    let device = Device::new([(server.host.clone(), plain_http())]).trusting_digests();
    let failure = device.pull(&format!("{}/app@{digest}", server.host)).unwrap_err();
    assert!(failure.permanent && failure.reason.code == Code::LayerRefused, "{}", failure.reason);
    assert!(failure.reason.text.contains("`../../escape`"), "{}", failure.reason);
    assert!(device.has_nothing_half_done() && !device.ctx.data.join("escape").exists());
}
