//! Which manifests are images, and which of several images is taken.

use edged_model::id::Digest;
use edged_model::reason::Code;
use serde_json::Value;

use super::Device;
use super::broken_registry::plain_http;
use super::shelf::{EMPTY, Shelf};
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
