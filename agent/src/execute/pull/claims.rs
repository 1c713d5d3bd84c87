//! Collects what claims to be a signature of an image; `verify::cosign` judges it.

use edged_model::id::Digest;
use edged_model::reason::Code;
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};

use crate::registry::source::ARTIFACTS_MAX;
use crate::registry::{Document, RegistryError, Source};
use crate::verify::cosign::{self, Claim};

/// Payloads and bundles that are looked at, of all artifacts together.
const CLAIMS_MAX: usize = 64;

pub fn collect(source: &Source, digest: Digest) -> Result<Vec<Claim>, RegistryError> {
    let mut claims = Vec::new();
    for document in source.artifacts(digest)? {
        // In a layout the list of referrers may lie where elsewhere only its entries are.
        let inside = if document.digest == digest { Vec::new() } else { listed(source, &document)? };
        for document in std::iter::once(document).chain(inside) {
            // What is no manifest is no signature either; other artifacts may hang on the image too.
            let Ok(manifest) = serde_json::from_slice::<ImageManifest>(&document.bytes) else { continue };
            for layer in manifest.layers() {
                if claims.len() == CLAIMS_MAX {
                    return Ok(claims);
                }
                claims.extend(claim(source, layer)?);
            }
        }
    }
    Ok(claims)
}

/// What an index lists, as far as it is there.
fn listed(source: &Source, document: &Document) -> Result<Vec<Document>, RegistryError> {
    let Ok(index) = serde_json::from_slice::<ImageIndex>(&document.bytes) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for descriptor in index.manifests().iter().take(ARTIFACTS_MAX) {
        match source.manifest(descriptor.digest().as_ref()) {
            Ok(document) => found.push(document),
            Err(error) if error.reason.code == Code::ImageNotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn claim(source: &Source, layer: &Descriptor) -> Result<Option<Claim>, RegistryError> {
    let Ok(digest) = Digest::parse(layer.digest().as_ref()) else { return Ok(None) };
    let media_type = layer.media_type().to_string();
    let annotation = layer.annotations().as_ref().and_then(|all| all.get(cosign::SIGNATURE_ANNOTATION));
    Ok(match annotation {
        Some(signature) if media_type == cosign::SIMPLE_SIGNING => {
            Some(Claim::SimpleSigning { payload: source.small_blob(digest)?.bytes, signature: signature.clone() })
        }
        _ if media_type.starts_with(cosign::BUNDLE) => Some(Claim::Bundle { json: source.small_blob(digest)?.bytes }),
        _ => None,
    })
}
