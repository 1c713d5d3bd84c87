//! One image at one source: its documents, whether they may be believed, and what they say that it is made of.

use edged_model::id::Digest;
use edged_model::reason::{Code, Reason};
use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest};
use serde::Deserialize;

use super::layers::{self, Layer};
use super::room::{Need, Promise};
use super::{Order, Progress, PullContext, PullFailure, ReadyImage, claims, depth, ground, size};
use crate::content::chain_id;
use crate::content::layer::Compression;
use crate::crash_point;
use crate::registry::platform::{self, architecture};
use crate::registry::{Document, Source};
use crate::verify::cosign::Wanted;
use crate::verify::image_policy::Demand;

/// Whoever may set a tag can write an index, which is read before any signature is. A thousand platforms fit.
const INDEX_MAX_BYTES: usize = 512 << 10;

/// An image by its documents, which were believed.
pub(super) struct Described {
    /// What was asked for (an index, or the manifest itself), and the manifest.
    pub top: Document,
    pub document: Document,
    config: Vec<u8>,
    /// Lowest first.
    layers: Vec<Layer>,
    pub ready: ReadyImage,
}

/// How the image is called, which decides what must hold for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Naming {
    Digest,
    Tag,
    /// Nobody has named it yet: what may ever be asked of it is enough for now.
    Later,
}

pub(super) struct OneImage<'p> {
    pub ctx: &'p PullContext,
    pub source: &'p Source,
    pub wanted: &'p str,
    pub naming: Naming,
    pub image: &'p str,
}

impl OneImage<'_> {
    pub fn describe(&self) -> Result<Described, PullFailure> {
        let top = self.source.manifest(self.wanted)?;
        let document = self.for_this_platform(&top)?;
        self.check_signature(&top, &document)?;
        let manifest: ImageManifest = self.parse("manifest", &document.bytes)?;
        if let Some(kind) = artifact_type(&manifest) {
            return Err(self.unusable(&format!("not an image but an artifact of type {kind}")));
        }
        let config_digest = self.digest(manifest.config())?;
        let config = match self.ctx.content.document(config_digest) {
            Some(bytes) => bytes,
            None => self.source.small_blob(config_digest)?.bytes,
        };
        let configuration: ImageConfiguration = self.parse("configuration", &config)?;
        let (is, wants) = (configuration.architecture().to_string(), architecture());
        if is != wants {
            return Err(self.unusable(&format!("made for {is}, this machine is {wants}")));
        }
        let layers = self.layers(&manifest, &configuration)?;
        let chains = layers.iter().map(|layer| layer.chain).collect();
        let ready = ready_image(document.digest, chains, &configuration);
        Ok(Described { top, document, config, layers, ready })
    }

    /// Of the layers that are not there.
    pub fn needs(&self, described: &Described) -> Vec<(Digest, Need)> {
        let missing = described.layers.iter().filter(|layer| !self.ctx.content.has_layer(layer.chain));
        size::needs(self.source, missing, self.ctx.disk())
    }

    pub fn fetch(
        &self,
        described: &Described,
        promise: &Promise,
        order: &Order,
        progress: &dyn Fn(Progress),
    ) -> Result<ReadyImage, PullFailure> {
        let Described { document, config, layers, ready, .. } = described;
        layers::fetch(self, layers, promise, order, progress)?;
        for bytes in [&document.bytes, config] {
            self.ctx.content.put_document(bytes).map_err(|error| self.disk(&error))?;
        }
        crash_point::pass("documents-written");
        Ok(ready.clone())
    }

    /// Of an index, the manifest for this machine.
    fn for_this_platform(&self, top: &Document) -> Result<Document, PullFailure> {
        /// Told by what it has, not by the type that the sender gives it.
        #[derive(Deserialize)]
        struct Shape {
            manifests: Option<serde::de::IgnoredAny>,
        }
        let shape: Shape = self.parse("manifest", &top.bytes)?;
        if shape.manifests.is_none() {
            return Ok(top.clone());
        }
        let size = top.bytes.len();
        if size > INDEX_MAX_BYTES {
            return Err(self.unusable(&format!("its index has {size} bytes, and {INDEX_MAX_BYTES} are possible here")));
        }
        let index: ImageIndex = self.parse("index", &top.bytes)?;
        let Some(descriptor) = platform::choose(&index, &platform::this()) else {
            return Err(self.unusable(&format!(
                "nothing for linux/{}, only {}",
                architecture(),
                platform::list(&index)
            )));
        };
        Ok(self.source.manifest(descriptor.digest().as_ref())?)
    }

    /// By policy: signatures on the image (or on the index it came from), or the digest in the signed manifest.
    fn check_signature(&self, top: &Document, document: &Document) -> Result<(), PullFailure> {
        if self.naming == Naming::Later {
            return self.check_for_any_name(top, document);
        }
        let wanted = match self.ctx.demand(self.image) {
            Demand::Signature(wanted) => wanted,
            Demand::Digest if self.naming == Naming::Digest => return Ok(()),
            Demand::Digest => {
                let text =
                    format!("{} is named by a tag, and this device takes it unsigned by digest only", self.image);
                return Err(PullFailure::permanent(
                    Reason::new(Code::ImageUnsigned, text).next("name it by its digest"),
                ));
            }
        };
        self.signed_at_all(top, document, &wanted)
    }

    /// Whether there is any name that this image may run under.
    fn check_for_any_name(&self, top: &Document, document: &Document) -> Result<(), PullFailure> {
        let mut verdict = Ok(());
        let rules = self.ctx.rules.iter().map(|rule| rule.demand.clone());
        for demand in rules.chain([self.ctx.demand("")]) {
            verdict = match demand {
                Demand::Digest => return Ok(()),
                Demand::Signature(wanted) => self.signed_at_all(top, document, &wanted),
            };
            if verdict.is_ok() {
                break;
            }
        }
        verdict
    }

    fn signed_at_all(&self, top: &Document, document: &Document, wanted: &Wanted) -> Result<(), PullFailure> {
        // What a signed index names is signed as well.
        let Err(on_top) = self.signed(top, wanted)? else { return Ok(()) };
        if top.digest == document.digest {
            return Err(PullFailure::permanent(on_top));
        }
        let Err(below) = self.signed(document, wanted)? else { return Ok(()) };
        // What hangs on the index says more than that nothing hangs on the manifest.
        Err(PullFailure::permanent(if below.code == Code::ImageUnsigned { on_top } else { below }))
    }

    fn signed(&self, document: &Document, wanted: &Wanted) -> Result<Result<(), Reason>, PullFailure> {
        Ok(claims::check(self.source, self.image, document, wanted)?)
    }

    fn layers(&self, manifest: &ImageManifest, configuration: &ImageConfiguration) -> Result<Vec<Layer>, PullFailure> {
        let (descriptors, diff_ids) = (manifest.layers(), configuration.rootfs().diff_ids());
        if descriptors.len() != diff_ids.len() {
            return Err(self.unusable(&format!("{} layers, but {} diff ids", descriptors.len(), diff_ids.len())));
        }
        let layers_max = self.layers_max(descriptors.len());
        if descriptors.is_empty() || descriptors.len() > layers_max {
            return Err(self.unusable(&format!("{} layers; 1 to {layers_max} are possible here", descriptors.len())));
        }
        let mut below = ground(self.ctx.device_nodes(self.image));
        let layer = |(descriptor, diff_id): (&Descriptor, &String)| {
            let media_type = descriptor.media_type().to_string();
            let compression = Compression::of_media_type(&media_type)
                .ok_or_else(|| self.unusable(&format!("a layer of the unknown type {media_type}")))?;
            let diff_id = Digest::parse(diff_id).map_err(|error| self.unusable(&error.to_string()))?;
            let chain = chain_id(below, diff_id);
            below = Some(chain);
            Ok(Layer { digest: self.digest(descriptor)?, diff_id, chain, size: descriptor.size(), compression })
        };
        descriptors.iter().zip(diff_ids).map(layer).collect()
    }

    /// The kernel is asked only about an image that does not fit into one mount(2).
    fn layers_max(&self, wanted: usize) -> usize {
        let name_bytes = self.ctx.content.layer(Digest::of(b"")).as_os_str().len();
        let in_one_page = depth::layers_max(name_bytes, false);
        if wanted <= in_one_page {
            return in_one_page;
        }
        let (layers, content) = (self.ctx.data.join("layers"), self.ctx.data.join("content"));
        depth::layers_max(name_bytes, depth::takes_one_by_one(&layers, &content))
    }

    fn unusable(&self, why: &str) -> PullFailure {
        PullFailure::permanent(Reason::new(Code::ImageUnusable, format!("{}: {why}", self.image)))
    }

    fn disk(&self, error: &crate::content::ContentError) -> PullFailure {
        PullFailure::passing(Code::DiskFull, format!("{}: {}", self.image, crate::store::inline_chain(error)))
    }

    fn digest(&self, descriptor: &Descriptor) -> Result<Digest, PullFailure> {
        Digest::parse(descriptor.digest().as_ref()).map_err(|error| self.unusable(&error.to_string()))
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, what: &str, bytes: &[u8]) -> Result<T, PullFailure> {
        serde_json::from_slice(bytes).map_err(|error| self.unusable(&format!("its {what} cannot be read: {error}")))
    }
}

/// Of what type a manifest is that is no image's (image-spec manifest.md, "Guidelines for Artifact Usage"): what it says
/// itself, else the type of its configuration.
fn artifact_type(manifest: &ImageManifest) -> Option<String> {
    const OF_IMAGES: [&str; 2] =
        ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
    let own = manifest.artifact_type().as_ref().map(ToString::to_string).filter(|own| !own.is_empty());
    own.or_else(|| {
        let config = manifest.config().media_type().to_string();
        (!OF_IMAGES.contains(&config.as_str())).then_some(config)
    })
}

fn ready_image(digest: Digest, layers: Vec<Digest>, configuration: &ImageConfiguration) -> ReadyImage {
    let run = configuration.config().clone().unwrap_or_default();
    let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    ReadyImage {
        digest,
        layers,
        entrypoint: run.entrypoint().clone().unwrap_or_default(),
        cmd: run.cmd().clone().unwrap_or_default(),
        env: run.env().clone().unwrap_or_default(),
        workdir: text(run.working_dir()),
        user: text(run.user()),
        stop_signal: text(run.stop_signal()),
    }
}
