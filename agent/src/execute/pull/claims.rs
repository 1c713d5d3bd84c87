//! Fetches what claims to be a signature of an image, one after the other; `verify::cosign` judges it.

use std::ops::ControlFlow;

use edged_model::id::Digest;
use edged_model::reason::Reason;
use oci_spec::image::{Descriptor, ImageManifest};

use crate::registry::artifacts::{Artifacts, Fit, Listed};
use crate::registry::{Document, RegistryError, Source};
use crate::verify::cosign::{self, Claim, Count, Wanted};

/// Payloads and bundles that are looked at, of all artifacts together.
const CLAIMS_MAX: usize = 64;

/// Whether enough of the wanted keys have signed the document. One claim at a time is held, and nothing is fetched that
/// comes behind the last one needed.
pub fn check(
    source: &Source,
    image: &str,
    document: &Document,
    wanted: &Wanted,
) -> Result<Result<(), Reason>, RegistryError> {
    let mut count = Count::new(&document.bytes, wanted);
    let left_out = each(source, document.digest, &mut |claim| {
        count.add(&claim);
        if count.is_enough() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(count.verdict(image).map_err(|mut reason| {
        if let Some(why) = left_out {
            reason.text.push_str(&format!("; not all was looked at: {why}"));
        }
        reason
    }))
}

/// All of them, as far as the bounds of [`Artifacts`] go.
pub fn collect(source: &Source, digest: Digest) -> Result<Vec<Claim>, RegistryError> {
    let mut claims = Vec::new();
    let left_out = each(source, digest, &mut |claim| {
        claims.push(claim);
        ControlFlow::Continue(())
    })?;
    if let Some(why) = left_out {
        tracing::warn!("of the signatures of {digest} not all are kept: {why}");
    }
    Ok(claims)
}

/// Shows every claim until there are enough; gives what was not looked at.
fn each(
    source: &Source,
    digest: Digest,
    look: &mut dyn FnMut(Claim) -> ControlFlow<()>,
) -> Result<Option<String>, RegistryError> {
    let mut artifacts = Artifacts::new(source, digest, fit);
    let mut claims = 0;
    while let Some(document) = artifacts.next_manifest()? {
        // What is no manifest is no signature either; other artifacts may hang on the image too.
        let Ok(manifest) = serde_json::from_slice::<ImageManifest>(&document.bytes) else { continue };
        for layer in manifest.layers() {
            let Some(kind) = kind(layer) else { continue };
            if claims == CLAIMS_MAX {
                artifacts.leave_out(|| format!("more than {CLAIMS_MAX} signatures hang on it"));
                return Ok(artifacts.left_out().map(str::to_owned));
            }
            claims += 1;
            let Some(claim) = claim(&mut artifacts, layer, kind)? else { continue };
            if look(claim).is_break() {
                return Ok(None);
            }
        }
    }
    Ok(artifacts.left_out().map(str::to_owned))
}

fn fit(listed: &Listed) -> Fit {
    let predicate_type = listed.annotations.as_ref().and_then(|all| all.predicate_type.as_deref());
    match cosign::may_sign(listed.artifact_type.as_deref(), predicate_type) {
        Some(true) => Fit::Yes,
        Some(false) => Fit::No,
        None => Fit::Perhaps,
    }
}

/// How a layer holds a signature.
enum Kind {
    Payload { signature: String },
    Bundle,
}

fn kind(layer: &Descriptor) -> Option<Kind> {
    let media_type = layer.media_type().to_string();
    let annotation = layer.annotations().as_ref().and_then(|all| all.get(cosign::SIGNATURE_ANNOTATION));
    match annotation {
        Some(signature) if media_type == cosign::SIMPLE_SIGNING => Some(Kind::Payload { signature: signature.clone() }),
        _ => media_type.starts_with(cosign::BUNDLE).then_some(Kind::Bundle),
    }
}

fn claim(artifacts: &mut Artifacts<'_>, layer: &Descriptor, kind: Kind) -> Result<Option<Claim>, RegistryError> {
    let Ok(digest) = Digest::parse(layer.digest().as_ref()) else { return Ok(None) };
    let Some(bytes) = artifacts.blob(digest, layer.size())? else { return Ok(None) };
    Ok(Some(match kind {
        Kind::Payload { signature } => Claim::SimpleSigning { payload: bytes, signature },
        Kind::Bundle => Claim::Bundle { json: bytes },
    }))
}
