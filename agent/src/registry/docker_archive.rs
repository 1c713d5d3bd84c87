//! What `docker save` and `skopeo copy … docker-archive:` write (docker image/spec v1.2, "Combined Image JSON"): a
//! `manifest.json` that names configurations and layers, but no image manifest, so no digest that anybody signed. The
//! manifest made here of the same archive is always the same, byte for byte: its digest can stand in a device's manifest.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use edged_model::id::Digest;
use edged_model::reason::Code;
use oci_spec::image::{ImageConfiguration, ImageIndex};
use serde::Deserialize;
use serde_json::json;

use super::bundle::Bundle;
use super::{DOCUMENT_MAX_BYTES, RegistryError};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Images in one archive.
const IMAGES_MAX: usize = 64;

#[derive(Debug)]
pub struct DockerImages {
    pub index: ImageIndex,
    /// Manifests and configurations.
    pub documents: BTreeMap<Digest, Vec<u8>>,
    /// The archive's names of the layers, by diff id: they lie there uncompressed.
    pub layers: BTreeMap<Digest, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl DockerImages {
    pub fn read(path: &Path, bundle: &Bundle) -> Result<Self, RegistryError> {
        let unusable = |why: String| {
            let text = format!("{}: {why}", path.display());
            RegistryError::new(Code::ImageUnusable, text, true)
        };
        let read = |name: &str| {
            let part = bundle.file(name).ok_or_else(|| unusable(format!("it has no {name}")))?;
            let mut bytes = Vec::new();
            part.take(DOCUMENT_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| unusable(error.to_string()))?;
            if bytes.len() as u64 > DOCUMENT_MAX_BYTES {
                return Err(unusable(format!("{name} is larger than {DOCUMENT_MAX_BYTES} bytes")));
            }
            Ok(bytes)
        };
        if !bundle.has("manifest.json") {
            return Err(unusable("it has neither an index.json nor a manifest.json: it is no image".to_owned()));
        }
        let saved: Vec<Saved> = serde_json::from_slice(&read("manifest.json")?)
            .map_err(|error| unusable(format!("its manifest.json cannot be read: {error}")))?;
        if saved.is_empty() || saved.len() > IMAGES_MAX {
            return Err(unusable(format!("{} images; 1 to {IMAGES_MAX} are possible", saved.len())));
        }
        let (mut documents, mut layers, mut manifests) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        for image in saved {
            let config = read(&image.config)?;
            let configuration: ImageConfiguration = serde_json::from_slice(&config)
                .map_err(|error| unusable(format!("{} cannot be read: {error}", image.config)))?;
            let diff_ids = configuration.rootfs().diff_ids();
            if diff_ids.len() != image.layers.len() {
                return Err(unusable(format!("{} layers, but {} diff ids", image.layers.len(), diff_ids.len())));
            }
            let digest = Digest::of(&config);
            let mut described = Vec::new();
            for (diff_id, name) in diff_ids.iter().zip(image.layers) {
                let diff_id = Digest::parse(diff_id).map_err(|error| unusable(error.to_string()))?;
                let size = bundle.size(&name).ok_or_else(|| unusable(format!("it has no {name}")))?;
                described.push(descriptor("application/vnd.oci.image.layer.v1.tar", diff_id, size));
                layers.insert(diff_id, name);
            }
            // Written by hand: its bytes must never change, whatever the library does with the order of keys.
            let manifest = format!(
                r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{},"layers":[{}]}}"#,
                descriptor("application/vnd.oci.image.config.v1+json", digest, config.len() as u64),
                described.join(",")
            );
            documents.insert(digest, config);
            let digest = Digest::of(manifest.as_bytes());
            let mut entry = json!({ "mediaType": MANIFEST, "digest": digest, "size": manifest.len() });
            if let Some(tag) = image.repo_tags.into_iter().flatten().next() {
                entry["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
            }
            manifests.push(entry);
            documents.insert(digest, manifest.into_bytes());
        }
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        let index = serde_json::from_value(index).map_err(|error| unusable(error.to_string()))?;
        Ok(Self { index, documents, layers })
    }
}

fn descriptor(media_type: &str, digest: Digest, size: u64) -> String {
    format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":{size}}}"#)
}
