//! The trust root's rules for images, and cosign's signatures in all their forms, from a registry and from a layout.

use std::path::Path;

use edged::verify::image_policy;
use edged_model::id::Digest;
use edged_model::keys::SecretKey;
use edged_model::quantity::Timestamp;
use edged_model::reason::Code;
use edged_model::trust::{ImageRule, KeyId, Require, Role, RoleName, TrustRoot};

use super::broken_registry::plain_http;
use super::shelf::{Shelf, statement};
use super::support::faults::{Answer, FaultServer};
use super::support::registry::{Registry, sign_blob, signing_key};
use super::{Device, sample};

const P256: &str = "EC -pkeyopt ec_paramgen_curve:P-256";

/// A root over these keys (SPKI); the first is that of the `image` role.
fn root(keys: &[&Vec<u8>], images: Vec<ImageRule>) -> TrustRoot {
    let role = Role { keys: vec![id(keys[0])], threshold: 1 };
    TrustRoot {
        version: 1,
        expires: Timestamp(i64::MAX),
        keys: keys.iter().map(|spki| (id(spki), hex::encode(spki))).collect(),
        roles: [(RoleName::Image, role)].into(),
        images,
    }
}

fn id(spki: &[u8]) -> KeyId {
    Digest::of(spki)
}

fn rule(prefix: String, require: Require) -> ImageRule {
    ImageRule { prefix, ..ImageRule::new(require) }
}

#[test]
fn each_repository_has_its_own_keys_and_the_signed_rules_come_before_the_devices_own_policy() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let (layout, _) = sample(dir.path());
    let (ours, theirs) = (signing_key(dir.path(), "ours", "ed25519"), signing_key(dir.path(), "theirs", P256));
    let host = registry.host();
    let from = format!("oci:{}:v1", layout.display());
    let mut digests = Vec::new();
    for (repository, key) in [("base/os", Some(&theirs)), ("team/app", Some(&ours)), ("cache/tool", None)] {
        let digest = registry.push(&from, &format!("{repository}:v1"), &[]);
        if let Some((private, _)) = key {
            registry.sign(&format!("{repository}@{digest}"), private, true);
        }
        digests.push(format!("{host}/{repository}@{digest}"));
    }
    let [os, app, tool] = digests.as_slice() else { panic!() };
    let theirs_alone = ImageRule { keys: vec![id(&theirs.1)], ..rule(format!("{host}/base"), Require::Signature) };
    let rules = vec![theirs_alone.clone(), rule(format!("{host}/cache"), Require::Digest)];
    let device = |rules: Vec<ImageRule>| {
        let mut device = Device::new([(registry.host(), registry.config())]);
        device.ctx.keys = vec![ours.1.clone()];
        device.ctx.rules = image_policy::rules(&root(&[&ours.1, &theirs.1], rules));
        device
    };
    let code = |device: &Device, image: &str| device.pull(image).map(drop).map_err(|failure| failure.reason.code);

    let by_rules = device(rules.clone());
    for image in [os, app, tool] {
        assert_eq!(code(&by_rules, image), Ok(()), "{image}");
    }
    let by_tag = by_rules.pull(&format!("{host}/cache/tool:v1")).unwrap_err().reason;
    assert!(by_tag.code == Code::ImageUnsigned && by_tag.text.contains("by digest only"), "{by_tag}");

    // Without rules each image is the image role's alone.
    let plain = device(Vec::new());
    assert_eq!(code(&plain, os), Err(Code::ImageWrongKey));
    assert_eq!(code(&plain, tool), Err(Code::ImageUnsigned));
    // Our own key is not good enough where others are named.
    let app_is_theirs = ImageRule { prefix: format!("{host}/team/app"), ..theirs_alone };
    assert_eq!(code(&device(vec![app_is_theirs]), app), Err(Code::ImageWrongKey));
    // A device that is content with digests is not, where the signed rules want more.
    let all_signed = device(vec![rule(String::new(), Require::Signature)]).trusting_digests();
    assert_eq!(code(&all_signed, tool), Err(Code::ImageUnsigned));
    assert_eq!(code(&device(Vec::new()).trusting_digests(), tool), Ok(()));
}

#[test]
fn what_cosign_signs_along_with_the_digest_is_checked_where_a_rule_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let (layout, _) = sample(dir.path());
    let (key, public) = signing_key(dir.path(), "image", "ed25519");
    for (repository, bundle) in [("tag", false), ("bundle", true)] {
        let digest = registry.push(&format!("oci:{}:v1", layout.display()), &format!("{repository}:v1"), &[]);
        let options = ["-a", "team=pumps", "--sign-container-identity", "registry.example/pumps"];
        registry.sign_with(&format!("{repository}@{digest}"), &key, bundle, &options);
        let pull = |wanted: ImageRule| {
            let mut device = Device::new([(registry.host(), registry.config())]);
            device.ctx.rules = image_policy::rules(&root(&[&public], vec![wanted]));
            let pulled = device.pull(&format!("{}/{repository}@{digest}", registry.host()));
            pulled.map(drop).map_err(|failure| failure.reason)
        };
        let all = || rule(String::new(), Require::Signature);
        let team = |name: &str| ImageRule { annotations: [("team".to_owned(), name.to_owned())].into(), ..all() };
        let named = |name: &str| ImageRule { identity: Some(name.to_owned()), ..all() };
        pull(team("pumps")).unwrap();
        let other = pull(team("valves")).unwrap_err();
        assert_eq!(other.code, Code::ImageWrongIdentity);
        assert!(other.text.contains("does not say `team=valves`"), "{other}");
        let stranger = pull(named("registry.example/other")).unwrap_err();
        assert_eq!(stranger.code, Code::ImageWrongIdentity, "{stranger}");
        // Bundles of this cosign name no image, only its digest: what is asked for and not signed is not there.
        let same = pull(named("registry.example/pumps")).map_err(|why| why.code);
        assert_eq!(same, if bundle { Err(Code::ImageWrongIdentity) } else { Ok(()) }, "{repository}");
    }
}

/// cosign's own bundles name no image; other signers' do.
#[test]
fn a_statement_that_names_the_image_meets_a_rule_that_wants_that_name() {
    let key = SecretKey::from_seed(&[3; 32]);
    let public = key.public().to_spki().unwrap();
    let pull = |signed: Option<&str>, wanted: &str| {
        let (mut shelf, digest) = Shelf::with_sample();
        shelf.hang_bundle(digest, statement(digest, signed, &key));
        let server = FaultServer::start(move |request| shelf.answer(request));
        let mut device = Device::new([(server.host.clone(), plain_http())]);
        let named = ImageRule { identity: Some(wanted.to_owned()), ..rule(String::new(), Require::Signature) };
        device.ctx.rules = image_policy::rules(&root(&[&public], vec![named]));
        device.pull(&format!("{}/app@{digest}", server.host)).map(drop).map_err(|failure| failure.reason)
    };
    pull(Some("registry.example/pumps"), "registry.example/pumps").unwrap();
    for (signed, said) in [(Some("registry.example/other"), "`registry.example/other`"), (None, "no name")] {
        let reason = pull(signed, "registry.example/pumps").unwrap_err();
        assert_eq!(reason.code, Code::ImageWrongIdentity, "{reason}");
        assert!(reason.text.contains(&format!("the signature is for {said}, and must be for")), "{reason}");
    }
}

/// Adds a manifest with this bundle to a layout, as `oras attach` and `skopeo copy` would.
fn attach(layout: &Path, bundle: &Path) {
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        serde_json::json!({"digest": digest, "size": bytes.len()})
    };
    let typed = |mut descriptor: serde_json::Value, kind: &str| {
        descriptor["mediaType"] = kind.into();
        descriptor
    };
    let kind = "application/vnd.dev.sigstore.bundle.v0.3+json";
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": kind,
        "config": typed(put(b"{}"), "application/vnd.oci.empty.v1+json"),
        "layers": [typed(put(&std::fs::read(bundle).unwrap()), kind)],
    });
    let listed = typed(put(manifest.to_string().as_bytes()), "application/vnd.oci.image.manifest.v1+json");
    let path = layout.join("index.json");
    let mut index: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    index["manifests"].as_array_mut().unwrap().push(listed);
    std::fs::write(path, index.to_string()).unwrap();
}

#[test]
fn a_bundle_with_a_signature_of_the_manifest_itself_counts_with_both_kinds_of_key() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, digest) = sample(dir.path());
    let manifest = layout.join("blobs/sha256").join(digest.hex());
    let image = format!("oci:{}:v1", layout.display());
    for (name, algorithm) in [("first", "ed25519"), ("second", P256)] {
        let (key, public) = signing_key(dir.path(), name, algorithm);
        let mut device = Device::new([]);
        device.ctx.keys = vec![public];
        let before = device.pull(&image).unwrap_err().reason.code;
        assert!(matches!(before, Code::ImageUnsigned | Code::ImageWrongKey), "{before:?}");
        let bundle = dir.path().join(format!("{name}.bundle"));
        // Of another file it is worth nothing.
        sign_blob(&dir.path().join("lower/etc/motd"), &key, &bundle);
        attach(&layout, &bundle);
        assert_eq!(device.pull(&image).unwrap_err().reason.code, Code::ImageWrongKey);
        sign_blob(&manifest, &key, &bundle);
        attach(&layout, &bundle);
        assert_eq!(device.pull(&image).unwrap().digest, digest, "{name}");
    }
}

/// A registry that has the referrers API, which docker-registry has not: what is in a layout, over HTTP.
fn with_referrers(layout: &Path) -> FaultServer {
    let layout = layout.to_owned();
    FaultServer::start(move |request| {
        const INDEX: &str = "application/vnd.oci.image.index.v1+json";
        if request.path.contains("/referrers/") {
            let bytes = std::fs::read(layout.join("index.json")).unwrap();
            let mut index: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            index["mediaType"] = INDEX.into();
            index["manifests"].as_array_mut().unwrap().remove(0);
            return Answer::new(200, index.to_string()).header("Content-Type", INDEX);
        }
        let blob = request.path.rsplit_once("sha256:").map(|(_, hex)| layout.join("blobs/sha256").join(hex));
        let Some(bytes) = blob.and_then(|path| std::fs::read(path).ok()) else { return Answer::new(404, "") };
        let kind = if request.path.contains("/manifests/") { "manifest.v1+json" } else { "blob" };
        Answer::new(200, bytes).header("Content-Type", format!("application/vnd.oci.image.{kind}"))
    })
}

#[test]
fn a_bundle_is_found_by_the_referrers_api() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, digest) = sample(dir.path());
    let (key, public) = signing_key(dir.path(), "image", P256);
    let registry = with_referrers(&layout);
    let image = format!("{}/app@{digest}", registry.host);
    let plain = edged::config::Registry { insecure_http: true, ..Default::default() };
    let mut device = Device::new([(registry.host.clone(), plain)]);
    device.ctx.keys = vec![public];
    assert_eq!(device.pull(&image).unwrap_err().reason.code, Code::ImageUnsigned);
    let bundle = dir.path().join("bundle");
    sign_blob(&layout.join("blobs/sha256").join(digest.hex()), &key, &bundle);
    attach(&layout, &bundle);
    assert_eq!(device.pull(&image).unwrap().digest, digest);
    let by_tag = format!("/manifests/sha256-{}", digest.hex());
    let asked = |what: &dyn Fn(&str) -> bool| registry.requests().iter().any(|request| what(&request.path));
    assert!(asked(&|path| path.contains("/referrers/")) && !asked(&|path| path.ends_with(&by_tag)));
}

#[test]
fn layouts_that_cosign_and_skopeo_make_from_a_registry_are_verified_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start();
    let (layout, _) = sample(dir.path());
    let (key, public) = signing_key(dir.path(), "image", "ed25519");
    let stranger = signing_key(dir.path(), "stranger", P256).1;
    let pull = |image: &str, key: &Vec<u8>| {
        let mut device = Device::new([]);
        device.ctx.keys = vec![key.clone()];
        device.pull(image).map(|ready| ready.digest).map_err(|failure| failure.reason.code)
    };
    for (repository, bundle) in [("tag", false), ("bundle", true)] {
        let digest = registry.push(&format!("oci:{}:v1", layout.display()), &format!("{repository}:v1"), &[]);
        let pushed = Digest::parse(&digest).unwrap();
        registry.sign(&format!("{repository}@{digest}"), &key, bundle);
        let stick = dir.path().join(format!("{repository}-stick"));
        if bundle {
            // The list of referrers comes along as it is under its tag.
            registry.fetch(&format!("{repository}@{digest}"), &format!("{}:v1", stick.display()));
            let list = digest.replace(':', "-");
            registry.fetch(&format!("{repository}:{list}"), &format!("{}:{list}", stick.display()));
        } else {
            registry.save(&format!("{repository}@{digest}"), &stick);
        }
        let image = format!("oci:{}@{digest}", stick.display());
        assert_eq!(pull(&image, &public), Ok(pushed), "{repository}");
        assert_eq!(pull(&image, &stranger), Err(Code::ImageWrongKey), "{repository}");
    }
}
