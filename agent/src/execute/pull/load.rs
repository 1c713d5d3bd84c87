//! Images that an operator brings: an OCI layout, or what `docker save` wrote. They are verified, unpacked and synced like
//! those of a registry, and wait under their digest until a signed manifest names it. Which signatures an image must have
//! depends on its name, which nobody knows before: what its signers said is kept with it, and judged when it is named.

use std::path::Path;

use edged_model::id::Digest;
use edged_model::reason::{Code, Reason};

use serde::{Deserialize, Serialize};

use super::{
    Described, Naming, OneImage, Order, Progress, PullContext, PullFailure, ReadyImage, claims, is_whole, remember,
};
use crate::config::DeviceNodes;
use crate::registry::layout::Layout;
use crate::registry::{Reference, Source};
use crate::store::inline_chain;
use crate::verify::cosign::{self, Claim};
use crate::verify::image_policy::Demand;

/// One image that is on the disk now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// Under which it is on record.
    pub names: Vec<String>,
    pub image: ReadyImage,
}

/// What of a layout is wanted, and under which name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// One image of the layout, by its name in it or by its digest; else all.
    pub only: Option<String>,
    /// `registry/repository:tag`, for a manifest that names a tag.
    pub tag: Option<String>,
}

/// Loads the images of the layout or archive at `path`.
pub fn load(
    ctx: &PullContext,
    path: &Path,
    wish: &Wish,
    progress: &dyn Fn(Progress),
) -> Result<Vec<Loaded>, PullFailure> {
    let layout = Layout::open(path)?;
    let is_docker_archive = layout.is_docker_archive();
    let documents = match &wish.only {
        Some(one) => vec![layout.manifest(one)?],
        None => layout.images()?,
    };
    let shown = path.display();
    if documents.is_empty() {
        let text = format!("{shown}: there is no image in it");
        return Err(PullFailure::permanent(Reason::new(Code::ImageNotFound, text)));
    }
    let tag = wish.tag.as_deref().map(|tag| checked_tag(ctx, tag, documents.len())).transpose()?;
    let source = Source::Layout(Box::new(layout));
    let mut all = Vec::new();
    for document in documents {
        let digest = document.digest.to_string();
        let label = format!("{shown}@{digest}");
        let (image, naming) = tag.as_deref().map_or((label.as_str(), Naming::Later), |tag| (tag, Naming::Tag));
        let one = OneImage { ctx, source: &source, wanted: &digest, naming, image };
        let described = one.describe().map_err(|failure| explained(failure, is_docker_archive))?;
        let promise = ctx.weigh_alone(image, &one.needs(&described))?;
        let ready = one.fetch(&described, &promise, &Order::default(), progress)?;
        let device_nodes = ctx.device_nodes(image);
        let mut names = keep(ctx, &source, device_nodes, &described)?;
        if let Some(tag) = &tag {
            remember(ctx, tag, true, device_nodes, ready.clone())?;
            names.push(tag.clone());
        }
        all.push(Loaded { names, image: ready });
    }
    Ok(all)
}

/// What is kept of an image that nobody has named yet.
#[derive(Serialize, Deserialize)]
struct Brought {
    ready: ReadyImage,
    /// Under which its layers were unpacked.
    #[serde(default)]
    device_nodes: DeviceNodes,
    /// Documents that may be named or signed: an index and the manifest, or the manifest alone.
    documents: Vec<Digest>,
    claims: Vec<KeptClaim>,
}

/// [`Claim`], as it is kept.
#[derive(Serialize, Deserialize)]
enum KeptClaim {
    SimpleSigning { payload: Vec<u8>, signature: String },
    Bundle { json: Vec<u8> },
}

impl From<Claim> for KeptClaim {
    fn from(claim: Claim) -> Self {
        match claim {
            Claim::SimpleSigning { payload, signature } => Self::SimpleSigning { payload, signature },
            Claim::Bundle { json } => Self::Bundle { json },
        }
    }
}

impl From<KeptClaim> for Claim {
    fn from(claim: KeptClaim) -> Self {
        match claim {
            KeptClaim::SimpleSigning { payload, signature } => Self::SimpleSigning { payload, signature },
            KeptClaim::Bundle { json } => Self::Bundle { json },
        }
    }
}

/// Signatures of an image and what they sign take a few kilobytes; what is larger is not kept, and then not believed.
const BROUGHT_MAX_BYTES: usize = 4 << 20;

/// Records the image under each digest it can be named by, and gives those.
fn keep(
    ctx: &PullContext,
    source: &Source,
    device_nodes: DeviceNodes,
    described: &Described,
) -> Result<Vec<String>, PullFailure> {
    let disk = |why: String| PullFailure::passing(Code::DiskFull, format!("{}: {why}", described.top.digest));
    let mut documents = vec![described.top.digest];
    let mut claims = claims::collect(source, described.top.digest)?;
    if described.document.digest != described.top.digest {
        // A manifest may name the index, or the image for this machine.
        documents.push(described.document.digest);
        claims.extend(claims::collect(source, described.document.digest)?);
    }
    let claims = claims.into_iter().map(KeptClaim::from).collect();
    ctx.content.put_document(&described.top.bytes).map_err(|error| disk(inline_chain(&error)))?;
    let brought = Brought { ready: described.ready.clone(), device_nodes, documents: documents.clone(), claims };
    let bytes = serde_cbor::to_vec(&brought).map_err(|error| disk(error.to_string()))?;
    if bytes.len() > BROUGHT_MAX_BYTES {
        let text = format!("{}: its signatures take {} bytes", described.top.digest, bytes.len());
        return Err(PullFailure::permanent(Reason::new(Code::ImageUnusable, text)));
    }
    let names: Vec<String> = documents.iter().map(ToString::to_string).collect();
    for name in &names {
        ctx.content.put_record(name, &bytes).map_err(|error| disk(inline_chain(&error)))?;
    }
    Ok(names)
}

/// A tag means what a signature says, never what a stick says: only signed images may have one.
fn checked_tag(ctx: &PullContext, tag: &str, images: usize) -> Result<String, PullFailure> {
    let bad = |code, text: String, next: &str| Err(PullFailure::permanent(Reason::new(code, text).next(next)));
    if images != 1 {
        let text = format!("{images} images cannot all be called {tag}");
        return bad(Code::ImageUnusable, text, "choose one with --only NAME");
    }
    if ctx.demand(tag) == Demand::Digest {
        let text = format!("{tag} is a tag, and this device takes it unsigned by digest only");
        return bad(Code::ImageUnsigned, text, "leave --tag away and name the digest in the manifest");
    }
    let reference = Reference::parse(tag).map_err(PullFailure::permanent)?;
    if reference.tag.is_none() || reference.digest.is_some() {
        return bad(Code::InvalidManifest, format!("{tag} is no tag"), "write it as `host[:port]/repository:tag`");
    }
    Ok(reference.to_string())
}

fn explained(mut failure: PullFailure, is_docker_archive: bool) -> PullFailure {
    if is_docker_archive && matches!(failure.reason.code, Code::ImageUnsigned | Code::ImageWrongKey) {
        let next = "such an archive has no signatures: bring an OCI layout with them (`cosign save`), or take images by \
                    the digest in the signed manifest (`images.policy = \"digest\"`)";
        failure.reason = failure.reason.next(next);
    }
    failure
}

/// The image that `image` names by its digest, if somebody brought it and it may run under this name; from then on it is
/// on record under it.
pub fn taken(ctx: &PullContext, image: &str, digest: Digest) -> Result<Option<ReadyImage>, PullFailure> {
    let brought =
        ctx.content.record(&digest.to_string()).and_then(|bytes| serde_cbor::from_slice::<Brought>(&bytes).ok());
    let is_it = |brought: &Brought| brought.documents.contains(&digest) && is_whole(&ctx.content, &brought.ready);
    let Some(brought) = brought.filter(is_it) else { return Ok(None) };
    // Its registry may give it under the policy that this name has.
    if !ctx.takes_nodes(image, brought.device_nodes) {
        return Ok(None);
    }
    if let Demand::Signature(wanted) = ctx.demand(image) {
        let claims: Vec<Claim> = brought.claims.into_iter().map(Claim::from).collect();
        let is_signed = |digest: &Digest| {
            let document = ctx.content.document(*digest);
            document.is_some_and(|bytes| cosign::check(image, &bytes, &claims, &wanted).is_ok())
        };
        // What is not signed well enough may be so in its registry.
        if !brought.documents.iter().any(is_signed) {
            return Ok(None);
        }
    }
    remember(ctx, image, true, brought.device_nodes, brought.ready).map(Some)
}
