//! Images whose layers are written byte by byte: what no builder makes.

use std::collections::BTreeMap;
use std::path::Path;

use edged::registry::platform::architecture;
use edged_model::id::Digest;

use super::support::faults::{Answer, FaultServer};

const MEDIA: &str = "application/vnd.oci.image";

/// A layer as it travels, and what its configuration says that it is.
pub struct Blob {
    pub bytes: Vec<u8>,
    pub diff_id: Digest,
    /// What follows `tar` in its media type.
    pub packing: &'static str,
}

/// All documents of an image, by digest, and the one of its manifest.
pub struct Made {
    pub documents: BTreeMap<Digest, Vec<u8>>,
    pub digest: Digest,
    manifest_bytes: usize,
}

impl Made {
    pub fn of(layers: Vec<Blob>) -> Self {
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        let config = serde_json::json!({
            "architecture": architecture(), "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        })
        .to_string();
        let described = |kind: String, bytes: &[u8]| {
            let digest = Digest::of(bytes).to_string();
            serde_json::json!({ "mediaType": format!("{MEDIA}.{kind}"), "size": bytes.len(), "digest": digest })
        };
        let list: Vec<_> =
            layers.iter().map(|layer| described(format!("layer.v1.tar{}", layer.packing), &layer.bytes)).collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": format!("{MEDIA}.manifest.v1+json"),
            "config": described("config.v1+json".to_owned(), config.as_bytes()), "layers": list,
        })
        .to_string();
        let all = [config.into_bytes(), manifest.clone().into_bytes()].into_iter();
        let all = all.chain(layers.into_iter().map(|layer| layer.bytes));
        Self {
            documents: all.map(|bytes| (Digest::of(&bytes), bytes)).collect(),
            digest: Digest::of(manifest.as_bytes()),
            manifest_bytes: manifest.len(),
        }
    }

    /// Writes a layout of it; gives the image's name.
    pub fn layout(&self, to: &Path) -> String {
        let blobs = to.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        for (digest, bytes) in &self.documents {
            std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        }
        std::fs::write(to.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let (digest, size) = (self.digest.to_string(), self.manifest_bytes);
        let manifest = serde_json::json!(
            { "mediaType": format!("{MEDIA}.manifest.v1+json"), "size": size, "digest": digest }
        );
        let index = serde_json::json!({ "schemaVersion": 2, "manifests": [manifest] });
        std::fs::write(to.join("index.json"), index.to_string()).unwrap();
        format!("oci:{}@{digest}", to.display())
    }

    /// A registry that has it, and the image's name there.
    pub fn serve(self) -> (FaultServer, String) {
        let Self { documents, digest, .. } = self;
        let server = FaultServer::start(move |request| {
            let found = documents.iter().find(|(digest, _)| request.path.ends_with(&digest.to_string()));
            found.map_or_else(|| Answer::new(404, ""), |(_, bytes)| Answer::new(200, bytes.clone()))
        });
        let name = format!("{}/app@{digest}", server.host);
        (server, name)
    }
}
