//! Which manifests are images, and which of several images is taken.

use edged::registry::platform::architecture;
use edged_model::id::Digest;
use edged_model::keys::SecretKey;
use edged_model::reason::{Code, Reason};
use serde_json::{Value, json};

use super::Device;
use super::broken_registry::plain_http;
use super::shelf::{EMPTY, INDEX, MANIFEST, Shelf, signature, statement};
use super::support::faults::FaultServer;

const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// A device that takes digests, and a registry with this on its shelves.
fn device_at(shelf: &Shelf) -> (Device, FaultServer) {
    let has = shelf.clone();
    let server = FaultServer::start(move |request| has.answer(request));
    (Device::new([(server.host.clone(), plain_http())]).trusting_digests(), server)
}

fn digest(descriptor: &Value) -> Digest {
    Digest::parse(descriptor["digest"].as_str().unwrap()).unwrap()
}

/// The sample image with another type of configuration, and with this as its own.
fn typed(config: &str, artifact_type: Option<&str>) -> (Shelf, Digest) {
    let (mut shelf, sample) = Shelf::with_sample();
    let mut manifest: Value = serde_json::from_slice(shelf.bytes(sample)).unwrap();
    manifest["config"]["mediaType"] = config.into();
    if let Some(artifact_type) = artifact_type {
        manifest["artifactType"] = artifact_type.into();
    }
    let media_type = manifest["mediaType"].as_str().unwrap().to_owned();
    let changed = digest(&shelf.put(&media_type, manifest.to_string()));
    (shelf, changed)
}

#[test]
fn an_artifact_is_refused_by_its_type() {
    let helm = "application/vnd.cncf.helm.config.v1+json";
    let model = "application/vnd.example.model.v1";
    let cases = [
        (helm, None, helm),
        (EMPTY, Some(model), model),
        (EMPTY, None, EMPTY),
        (OCI_CONFIG, Some(model), model),
        (DOCKER_CONFIG, Some(model), model),
        ("application/vnd.docker.plugin.v1+json", None, "application/vnd.docker.plugin.v1+json"),
        // Only nearly an image.
        ("application/vnd.example.image.config.v1+json", None, "application/vnd.example.image.config.v1+json"),
        ("application/vnd.oci.image.config.v2+json", None, "application/vnd.oci.image.config.v2+json"),
        ("application/vnd.example.container.image", None, "application/vnd.example.container.image"),
    ];
    for (config, artifact_type, named) in cases {
        let (shelf, digest) = typed(config, artifact_type);
        let (device, server) = device_at(&shelf);
        let failure = device.pull(&format!("{}/app@{digest}", server.host)).expect_err(named);
        assert_eq!(failure.reason.code, Code::ImageUnusable, "{}", failure.reason);
        let text = format!("not an image but an artifact of type {named}");
        assert!(failure.permanent && failure.reason.text.ends_with(&text), "{}", failure.reason);
        assert!(server.requests().iter().all(|request| !request.path.contains("/blobs/")), "nothing of it is fetched");
    }
    for (config, artifact_type) in [(OCI_CONFIG, None), (OCI_CONFIG, Some("")), (DOCKER_CONFIG, None)] {
        let (shelf, digest) = typed(config, artifact_type);
        let (device, server) = device_at(&shelf);
        device.pull(&format!("{}/app@{digest}", server.host)).unwrap();
    }
}

/// Media types of an index, of the manifests in it, of their configurations and of their layers.
struct Form {
    index: &'static str,
    manifest: &'static str,
    config: &'static str,
    layer: &'static str,
}

const FORMS: [Form; 2] = [
    Form { index: INDEX, manifest: MANIFEST, config: OCI_CONFIG, layer: "application/vnd.oci.image.layer.v1.tar+gzip" },
    Form {
        index: "application/vnd.docker.distribution.manifest.list.v2+json",
        manifest: "application/vnd.docker.distribution.manifest.v2+json",
        config: DOCKER_CONFIG,
        layer: "application/vnd.docker.image.rootfs.diff.tar.gzip",
    },
];

/// The sample image for this machine and three others, and the statement about one of them that build tools add.
struct ManyPlatforms {
    shelf: Shelf,
    index: Digest,
    /// This machine's.
    manifest: Digest,
    another: Digest,
}

impl ManyPlatforms {
    fn new(form: &Form) -> Self {
        let (mut shelf, sample) = Shelf::with_sample();
        let mut manifest: Value = serde_json::from_slice(shelf.bytes(sample)).unwrap();
        manifest["mediaType"] = form.manifest.into();
        manifest["config"]["mediaType"] = form.config.into();
        for layer in manifest["layers"].as_array_mut().unwrap() {
            layer["mediaType"] = form.layer.into();
        }
        let mut listed = Vec::new();
        let mut list = |mut descriptor: Value, os: &str, architecture: &str| {
            descriptor["platform"] = json!({"os": os, "architecture": architecture});
            listed.push(descriptor.clone());
            digest(&descriptor)
        };
        let ours = manifest.to_string();
        manifest["annotations"] = json!({"for": "another machine"});
        let others = shelf.put(form.manifest, manifest.to_string());
        list(shelf.put(form.manifest, "{\"statement\":1}"), "unknown", "unknown");
        list(others.clone(), "windows", architecture());
        let another = list(others, "linux", "s390x");
        let manifest = list(shelf.put(form.manifest, ours), "linux", architecture());
        list(json!({"mediaType": form.manifest, "digest": Digest::of(b"not there"), "size": 9}), "linux", "mips64le");
        let index = json!({"schemaVersion": 2, "mediaType": form.index, "manifests": listed});
        let index = digest(&shelf.put(form.index, index.to_string()));
        shelf.tag("v1", index);
        Self { shelf, index, manifest, another }
    }

    /// By tag, on a device that wants the key's signature.
    fn pull_signed(&self, key: &SecretKey) -> Result<Digest, Reason> {
        let (mut device, server) = device_at(&self.shelf);
        device.ctx.images.policy = edged::config::ImagePolicy::Signature;
        device.ctx.keys = vec![key.public().to_spki().unwrap()];
        let pulled = device.pull(&format!("{}/app:v1", server.host));
        pulled.map(|ready| ready.digest).map_err(|failure| failure.reason)
    }
}

#[test]
fn of_several_platforms_this_machines_is_pulled_by_digest_and_by_tag() {
    let key = SecretKey::from_seed(&[1; 32]);
    for form in &FORMS {
        let mut image = ManyPlatforms::new(form);
        let (device, server) = device_at(&image.shelf);
        let ready = device.pull(&format!("{}/app@{}", server.host, image.index)).unwrap();
        assert_eq!((ready.digest, ready.layers.len()), (image.manifest, 2), "{}", form.index);
        assert!(device.layer(&ready, 0).join("etc/motd").is_file());
        let asked_for = |digest: Digest| server.requests().iter().any(|it| it.path.ends_with(&digest.to_string()));
        assert!(asked_for(image.manifest) && !asked_for(image.another), "{}", form.index);

        image.shelf.sign(image.index, &key);
        assert_eq!(image.pull_signed(&key), Ok(image.manifest), "{}", form.index);
    }
}

#[test]
fn a_signature_of_the_index_counts_for_what_is_under_it_and_none_of_another() {
    let key = SecretKey::from_seed(&[1; 32]);
    let pull = |sign: &dyn Fn(&mut ManyPlatforms)| {
        let mut image = ManyPlatforms::new(&FORMS[0]);
        sign(&mut image);
        let pulled = image.pull_signed(&key).map_err(|reason| reason.code);
        assert!(pulled.is_err() || pulled == Ok(image.manifest));
        pulled.map(drop)
    };
    assert_eq!(pull(&|_| ()), Err(Code::ImageUnsigned));
    assert_eq!(pull(&|image| image.shelf.sign(image.index, &key)), Ok(()));
    assert_eq!(pull(&|image| image.shelf.hang_bundle(image.index, statement(image.index, None, &key))), Ok(()));
    assert_eq!(pull(&|image| image.shelf.sign(image.manifest, &key)), Ok(()), "and so does one of itself");
    let stranger = SecretKey::from_seed(&[2; 32]);
    assert_eq!(pull(&|image| image.shelf.sign(image.index, &stranger)), Err(Code::ImageWrongKey), "not `unsigned`");
    // Another platform's manifest.
    assert_eq!(pull(&|image| image.shelf.sign(image.another, &key)), Err(Code::ImageUnsigned));
    // Another index: by what is signed, or by what the signed statement says.
    let other = b"{\"schemaVersion\":2,\"manifests\":[]}";
    let of_other = |image: &mut ManyPlatforms| image.shelf.hang_bundle(image.index, signature(other, &key));
    assert!(pull(&of_other).is_err());
    let says_other = statement(Digest::of(other), None, &key);
    let of_other = |image: &mut ManyPlatforms| image.shelf.hang_bundle(image.index, says_other.clone());
    assert!(pull(&of_other).is_err());
}

#[test]
fn an_index_that_is_larger_than_any_is_not_read() {
    let mut image = ManyPlatforms::new(&FORMS[0]);
    let mut index: Value = serde_json::from_slice(image.shelf.bytes(image.index)).unwrap();
    index["annotations"] = (0..60_000).map(|number| (format!("{number:x}"), Value::from(""))).collect();
    let index = digest(&image.shelf.put(INDEX, index.to_string()));
    let (device, server) = device_at(&image.shelf);
    let reason = device.pull(&format!("{}/app@{index}", server.host)).unwrap_err().reason;
    assert!(reason.code == Code::ImageUnusable && reason.text.contains("its index has 5"), "{reason}");
    assert_eq!(server.requests().len(), 1, "{:?}", server.requests());
}

#[test]
fn an_index_without_an_image_for_this_machine_says_what_it_has() {
    let mut image = ManyPlatforms::new(&FORMS[0]);
    let mut index: Value = serde_json::from_slice(image.shelf.bytes(image.index)).unwrap();
    index["manifests"].as_array_mut().unwrap().remove(3);
    let index = digest(&image.shelf.put(INDEX, index.to_string()));
    let (device, server) = device_at(&image.shelf);
    let reason = device.pull(&format!("{}/app@{index}", server.host)).unwrap_err().reason;
    assert_eq!(reason.code, Code::ImageUnusable);
    assert!(reason.text.contains(&format!("nothing for linux/{}", architecture())), "{reason}");
    assert!(reason.text.contains("linux/s390x"), "{reason}");
}
