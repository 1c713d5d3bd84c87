//! A registry in memory that has the referrers API, with whatever a test puts on its shelves.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use edged_model::id::Digest;
use edged_model::keys::SecretKey;
use serde_json::{Value, json};

use super::support::faults::{Answer, Request};

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const EMPTY: &str = "application/vnd.oci.empty.v1+json";
pub const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

#[derive(Clone, Default)]
pub struct Shelf {
    /// Media type and bytes.
    blobs: BTreeMap<Digest, (String, Vec<u8>)>,
    tags: BTreeMap<String, Digest>,
    referrers: BTreeMap<Digest, Vec<Value>>,
    /// Referrers that one answer lists; 0: all.
    pub page: usize,
}

impl Shelf {
    /// With the sample image.
    pub fn with_sample() -> (Self, Digest) {
        let dir = tempfile::tempdir().unwrap();
        let (layout, digest) = super::sample(dir.path());
        (Self::of(&layout), digest)
    }

    /// With all that is in a layout.
    fn of(layout: &Path) -> Self {
        let mut shelf = Self::default();
        for file in std::fs::read_dir(layout.join("blobs/sha256")).unwrap() {
            shelf.put(MANIFEST, std::fs::read(file.unwrap().path()).unwrap());
        }
        shelf
    }

    /// Its descriptor.
    pub fn put(&mut self, media_type: &str, bytes: impl Into<Vec<u8>>) -> Value {
        let bytes = bytes.into();
        let (digest, size) = (Digest::of(&bytes), bytes.len());
        self.blobs.insert(digest, (media_type.to_owned(), bytes));
        json!({"mediaType": media_type, "digest": digest, "size": size})
    }

    pub fn tag(&mut self, tag: &str, digest: Digest) {
        self.tags.insert(tag.to_owned(), digest);
    }

    pub fn bytes(&self, digest: Digest) -> &[u8] {
        &self.blobs[&digest].1
    }

    /// A manifest of these layers as artifacts have one.
    pub fn artifact(&mut self, artifact_type: &str, layers: &[Value]) -> Value {
        let config = self.put(EMPTY, "{}");
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": artifact_type, "config": config, "layers": layers,
        });
        let mut descriptor = self.put(MANIFEST, manifest.to_string());
        descriptor["artifactType"] = artifact_type.into();
        descriptor
    }

    /// Lists it among the referrers of an image.
    pub fn hang(&mut self, on: Digest, descriptor: Value) {
        self.referrers.entry(on).or_default().push(descriptor);
    }

    /// Changes what the list says of what was hung there last.
    pub fn change_last(&mut self, on: Digest, change: impl FnOnce(&mut Value)) {
        change(self.referrers.get_mut(&on).unwrap().last_mut().unwrap());
    }

    /// Hangs a bundle with a signature of the document itself on it.
    pub fn sign(&mut self, document: Digest, key: &SecretKey) {
        let bundle = signature(self.bytes(document), key);
        self.hang_bundle(document, bundle);
    }

    pub fn hang_bundle(&mut self, on: Digest, bundle: String) {
        let layer = self.put(BUNDLE, bundle);
        let artifact = self.artifact(BUNDLE, &[layer]);
        self.hang(on, artifact);
    }

    pub fn answer(&self, request: &Request) -> Answer {
        let Some((_, rest)) = request.path.split_once("/app/") else { return Answer::new(404, "") };
        if let Some(of) = rest.strip_prefix("referrers/") {
            return self.list(of);
        }
        let name = rest.trim_start_matches("manifests/").trim_start_matches("blobs/");
        let digest = self.tags.get(name).copied().or_else(|| Digest::parse(name).ok());
        match digest.and_then(|digest| self.blobs.get(&digest)) {
            Some((media_type, bytes)) => Answer::new(200, bytes.clone()).header("Content-Type", media_type.clone()),
            None => Answer::new(404, ""),
        }
    }

    /// `sha256:…` or `sha256:…?from=5`
    fn list(&self, of: &str) -> Answer {
        let (digest, from) = of.split_once("?from=").unwrap_or((of, "0"));
        let from: usize = from.parse().unwrap();
        let all = self.referrers.get(&Digest::parse(digest).unwrap()).cloned().unwrap_or_default();
        let to = if self.page == 0 { all.len() } else { all.len().min(from + self.page) };
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": all[from..to]});
        let answer = Answer::new(200, index.to_string()).header("Content-Type", INDEX);
        match to < all.len() {
            true => answer.header("Link", format!("</v2/app/referrers/{digest}?from={to}>; rel=\"next\"")),
            false => answer,
        }
    }
}

/// `cosign sign-blob`
pub fn signature(document: &[u8], key: &SecretKey) -> String {
    json!({"mediaType": BUNDLE, "messageSignature": {"signature": STANDARD.encode(key.sign(document))}}).to_string()
}

/// `cosign sign`: a bundle with a statement that the image was signed, by this name if it has one.
pub fn statement(digest: Digest, name: Option<&str>, key: &SecretKey) -> String {
    const KIND: &str = "application/vnd.in-toto+json";
    let mut subject = json!({"digest": {"sha256": digest.hex()}});
    if let Some(name) = name {
        subject["name"] = name.into();
    }
    let statement = json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [subject],
        "predicateType": "https://sigstore.dev/cosign/sign/v1",
    });
    let payload = statement.to_string();
    // DSSE's PAE.
    let signed = format!("DSSEv1 {} {KIND} {} {payload}", KIND.len(), payload.len());
    let envelope = json!({
        "payload": STANDARD.encode(&payload),
        "payloadType": KIND,
        "signatures": [{"sig": STANDARD.encode(key.sign(signed.as_bytes()))}],
    });
    json!({"mediaType": BUNDLE, "dsseEnvelope": envelope}).to_string()
}
