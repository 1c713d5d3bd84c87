//! Fetches, verifies and unpacks an image. Blocking. What is on disk already is not fetched again; what is not whole and
//! verified is not visible.

use std::path::PathBuf;
use std::time::Duration;

use edged_model::id::Digest;
use edged_model::quantity::Bytes;
use edged_model::reason::{Code, Reason};
use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest};
use serde::{Deserialize, Serialize};

use crate::config::{ImagePolicy, Images, Registry};
use crate::content::layer::{Compression, Expected, LayerError, unpack_stream};
use crate::content::unpack::{Bounds, UnpackError};
use crate::content::{Content, chain_id};
use crate::registry::{Client, Document, Reference, RegistryError};
use crate::verify::cosign::{self, Claim};

/// An image that can be run. What the store remembers of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyImage {
    /// Of the image manifest.
    pub digest: Digest,
    /// Lowest first, by chain id.
    pub layers: Vec<Digest>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub workdir: Option<String>,
    pub user: Option<String>,
    pub stop_signal: Option<String>,
}

/// Why an image could not be had, and whether trying again can help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullFailure {
    pub reason: Reason,
    pub permanent: bool,
    pub retry_after: Option<Duration>,
}

impl PullFailure {
    fn permanent(reason: Reason) -> Self {
        Self { reason, permanent: true, retry_after: None }
    }

    fn passing(code: Code, text: String) -> Self {
        Self { reason: Reason::new(code, text), permanent: false, retry_after: None }
    }
}

impl From<RegistryError> for PullFailure {
    fn from(error: RegistryError) -> Self {
        // What a registry refuses today it may give tomorrow (a tag pushed late, a password put right): only what was
        // signed wrongly stays wrong.
        let permanent = error.permanent && error.reason.code == Code::DigestMismatch;
        Self { reason: error.reason, permanent, retry_after: error.retry_after }
    }
}

/// What a pull needs to know.
#[derive(Debug, Clone)]
pub struct PullContext {
    pub content: Content,
    pub registries: std::collections::BTreeMap<String, Registry>,
    pub images: Images,
    /// The trust root's image keys (SPKI DER) and how many must have signed.
    pub keys: Vec<Vec<u8>>,
    pub threshold: usize,
    pub data: PathBuf,
    pub disk_reserve: Bytes,
}

/// Fetched of all there is to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub done: Bytes,
    pub total: Bytes,
}

/// Whether everything of `image` is on disk.
pub fn is_whole(content: &Content, image: &ReadyImage) -> bool {
    image.layers.iter().all(|chain| content.has_layer(*chain))
}

pub fn pull(ctx: &PullContext, image: &str, progress: &dyn Fn(Progress)) -> Result<ReadyImage, PullFailure> {
    let reference = Reference::parse(image).map_err(PullFailure::permanent)?;
    let hosts = mirrors_first(ctx, &reference.registry);
    let mut last = None;
    for host in hosts {
        let config = ctx.registries.get(&host).cloned().unwrap_or_default();
        let pulled = Client::new(&host, &config)
            .map_err(PullFailure::from)
            .and_then(|client| OneImage { ctx, client, reference: &reference, image }.pull(progress));
        match pulled {
            Err(failure) if !failure.permanent => last = Some(failure),
            done => return done,
        }
    }
    Err(last.unwrap_or_else(|| PullFailure::passing(Code::RegistryUnavailable, format!("{image}: no registry to ask"))))
}

/// The mirrors of a registry, in order, then the registry.
fn mirrors_first(ctx: &PullContext, registry: &str) -> Vec<String> {
    let mirrors = ctx.registries.get(registry).map(|config| config.mirrors.clone()).unwrap_or_default();
    mirrors.into_iter().chain([registry.to_owned()]).collect()
}

struct OneImage<'p> {
    ctx: &'p PullContext,
    client: Client,
    reference: &'p Reference,
    image: &'p str,
}

impl OneImage<'_> {
    fn pull(&self, progress: &dyn Fn(Progress)) -> Result<ReadyImage, PullFailure> {
        let top = self.client.manifest(&self.reference.repository, &self.reference.wanted())?;
        let document = self.for_this_platform(&top)?;
        self.check_signature(&top, &document)?;
        let manifest: ImageManifest = self.parse("manifest", &document.bytes)?;
        if !is_image(&manifest) {
            let text = format!("{} is not an image but an artifact of type {}", self.image, manifest.config().media_type());
            return Err(PullFailure::permanent(Reason::new(Code::ImageUnusable, text)));
        }
        let config_digest = self.digest(manifest.config())?;
        let config = match self.ctx.content.document(config_digest) {
            Some(bytes) => bytes,
            None => self.client.small_blob(&self.reference.repository, config_digest)?.bytes,
        };
        let configuration: ImageConfiguration = self.parse("configuration", &config)?;
        let diff_ids = configuration.rootfs().diff_ids();
        if diff_ids.len() != manifest.layers().len() {
            let text = format!("{}: {} layers, but {} diff ids", self.image, manifest.layers().len(), diff_ids.len());
            return Err(PullFailure::permanent(Reason::new(Code::ImageUnusable, text)));
        }
        let diff_ids = diff_ids.iter().map(|text| {
            Digest::parse(text).map_err(|error| PullFailure::permanent(Reason::new(Code::ImageUnusable, error.to_string())))
        });
        let diff_ids = diff_ids.collect::<Result<Vec<_>, _>>()?;
        let layers = self.layers(&manifest, &diff_ids, progress)?;
        for bytes in [&document.bytes, &config] {
            self.ctx.content.put_document(bytes).map_err(|error| self.disk(&error))?;
        }
        Ok(ready(document.digest, layers, &configuration))
    }

    /// Of an index, the manifest for this machine.
    fn for_this_platform(&self, top: &Document) -> Result<Document, PullFailure> {
        let is_index = top.media_type.contains("image.index") || top.media_type.contains("manifest.list");
        if !is_index {
            return Ok(Document { bytes: top.bytes.clone(), digest: top.digest, media_type: top.media_type.clone() });
        }
        let index: ImageIndex = self.parse("index", &top.bytes)?;
        let wanted = architecture();
        let fits = |descriptor: &&Descriptor| {
            let platform = descriptor.platform().as_ref();
            platform.is_some_and(|platform| platform.os().to_string() == "linux" && platform.architecture().to_string() == wanted)
        };
        let Some(descriptor) = index.manifests().iter().find(fits) else {
            let text = format!("{} has nothing for linux/{wanted}", self.image);
            return Err(PullFailure::permanent(Reason::new(Code::ImageUnusable, text)));
        };
        Ok(self.client.manifest(&self.reference.repository, &descriptor.digest().to_string())?)
    }

    /// By policy: signatures on the image (or on the index it came from), or the digest in the signed manifest.
    fn check_signature(&self, top: &Document, document: &Document) -> Result<(), PullFailure> {
        if self.ctx.images.policy == ImagePolicy::Digest {
            if self.reference.digest.is_some() {
                return Ok(());
            }
            let text = format!("{} is named by a tag, and this device takes unsigned images by digest only", self.image);
            return Err(PullFailure::permanent(Reason::new(Code::ImageUnsigned, text).next("name it by its digest")));
        }
        let mut result = Err(Reason::new(Code::ImageUnsigned, String::new()));
        for digest in [top.digest, document.digest] {
            let claims = self.claims(digest)?;
            result = cosign::check(self.image, digest, &claims, &self.ctx.keys, self.ctx.threshold);
            if result.is_ok() || top.digest == document.digest {
                break;
            }
        }
        result.map_err(PullFailure::permanent)
    }

    /// Everything in the registry that claims to be a signature of `digest`.
    fn claims(&self, digest: Digest) -> Result<Vec<Claim>, PullFailure> {
        let repository = &self.reference.repository;
        let mut claims = Vec::new();
        match self.client.manifest(repository, &format!("sha256-{}.sig", digest.hex())) {
            Ok(document) => {
                let manifest: ImageManifest = self.parse("signature manifest", &document.bytes)?;
                for layer in manifest.layers() {
                    let annotation = layer.annotations().as_ref().and_then(|a| a.get(cosign::SIGNATURE_ANNOTATION));
                    if let (Some(signature), cosign::SIMPLE_SIGNING) = (annotation, layer.media_type().to_string().as_str()) {
                        let payload = self.client.small_blob(repository, self.digest(layer)?)?.bytes;
                        claims.push(Claim::SimpleSigning { payload, signature: signature.clone() });
                    }
                }
            }
            Err(error) if error.reason.code == Code::ImageNotFound => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(document) = self.client.referrers(repository, digest)? {
            let index: ImageIndex = self.parse("referrers", &document.bytes)?;
            for descriptor in index.manifests() {
                claims.extend(self.bundles(descriptor)?);
            }
        }
        Ok(claims)
    }

    fn bundles(&self, descriptor: &Descriptor) -> Result<Vec<Claim>, PullFailure> {
        let repository = &self.reference.repository;
        let document = self.client.manifest(repository, &descriptor.digest().to_string())?;
        let manifest: ImageManifest = self.parse("bundle manifest", &document.bytes)?;
        let is_bundle = |layer: &&Descriptor| layer.media_type().to_string().starts_with(cosign::BUNDLE);
        let bundles = manifest.layers().iter().filter(is_bundle).map(|layer| {
            Ok(Claim::Bundle { json: self.client.small_blob(repository, self.digest(layer)?)?.bytes })
        });
        bundles.collect()
    }

    fn layers(
        &self,
        manifest: &ImageManifest,
        diff_ids: &[Digest],
        progress: &dyn Fn(Progress),
    ) -> Result<Vec<Digest>, PullFailure> {
        let chains: Vec<Digest> = diff_ids
            .iter()
            .scan(None, |below, diff| {
                let chain = chain_id(*below, *diff);
                *below = Some(chain);
                Some(chain)
            })
            .collect();
        let missing = |index: &usize| !self.ctx.content.has_layer(chains[*index]);
        let to_fetch: Vec<usize> = (0..chains.len()).filter(missing).collect();
        let total: u64 = to_fetch.iter().map(|index| manifest.layers()[*index].size()).sum();
        self.check_room(total)?;
        let mut done = 0;
        progress(Progress { done: Bytes(0), total: Bytes(total) });
        for index in to_fetch {
            let descriptor = &manifest.layers()[index];
            let below: Vec<_> = chains[..index].iter().map(|chain| self.ctx.content.layer(*chain)).collect();
            self.layer(descriptor, diff_ids[index], chains[index], &below)?;
            done += descriptor.size();
            progress(Progress { done: Bytes(done), total: Bytes(total) });
        }
        Ok(chains)
    }

    /// What gzip and zstd make of programs is about a third; what is downloaded is not kept.
    const UNPACKED_PER_COMPRESSED: u64 = 3;

    fn check_room(&self, compressed: u64) -> Result<(), PullFailure> {
        if compressed == 0 {
            return Ok(());
        }
        let needed = compressed.saturating_mul(Self::UNPACKED_PER_COMPRESSED);
        let reserve = self.ctx.disk_reserve.0;
        let free = rustix::fs::statvfs(&self.ctx.data).map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        if needed.saturating_add(reserve) <= free {
            return Ok(());
        }
        let text = format!(
            "{} needs about {}, {} are free, {} are in reserve",
            self.image,
            Bytes(needed).human(),
            Bytes(free).human(),
            Bytes(reserve).human()
        );
        let reason = Reason::new(Code::DiskDoesNotFit, text).next("free some room or use a smaller image");
        Err(PullFailure { reason, permanent: false, retry_after: None })
    }

    fn layer(
        &self,
        descriptor: &Descriptor,
        diff_id: Digest,
        chain: Digest,
        below: &[PathBuf],
    ) -> Result<(), PullFailure> {
        let media_type = descriptor.media_type().to_string();
        let Some(compression) = Compression::of_media_type(&media_type) else {
            let text = format!("{}: a layer of the unknown type {media_type}", self.image);
            return Err(PullFailure::permanent(Reason::new(Code::ImageUnusable, text)));
        };
        let digest = self.digest(descriptor)?;
        let lock = self.ctx.content.layer_lock(chain);
        let _alone = lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if self.ctx.content.has_layer(chain) {
            return Ok(());
        }
        let staged = self.ctx.content.stage(chain).map_err(|error| self.disk(&error))?;
        let mut reader = self.client.blob(&self.reference.repository, digest, descriptor.size());
        let expected = Expected { digest, diff_id, compression };
        let images = &self.ctx.images;
        let bounds = Bounds { bytes_max: images.layer_max.0, entries_max: images.layer_entries_max };
        match unpack_stream(&mut reader, &expected, &staged, below, bounds) {
            Ok(()) => self.ctx.content.publish(&staged, chain).map(drop).map_err(|error| self.disk(&error)),
            Err(error) => {
                // Taken away at the next start if not now.
                let _ = std::fs::remove_dir_all(&staged);
                Err(reader.error.take().map_or_else(|| self.refused(digest, &error), Into::into))
            }
        }
    }

    fn refused(&self, digest: Digest, error: &LayerError) -> PullFailure {
        let text = format!("{}: layer {}: {}", self.image, digest.short(), crate::store::inline_chain(error));
        let is_full = |source: &std::io::Error| source.raw_os_error() == Some(rustix::io::Errno::NOSPC.raw_os_error());
        match error {
            LayerError::Unpack(UnpackError::Write { source, .. }) if is_full(source) => {
                PullFailure::passing(Code::DiskFull, text)
            }
            LayerError::WrongDigest { .. } | LayerError::WrongDiffId { .. } => {
                PullFailure::permanent(Reason::new(Code::DigestMismatch, text))
            }
            LayerError::Read(_) => PullFailure::passing(Code::RegistryUnavailable, text),
            LayerError::Unpack(_) | LayerError::Decompress(_) => {
                PullFailure::permanent(Reason::new(Code::LayerRefused, text))
            }
        }
    }

    fn disk(&self, error: &crate::content::ContentError) -> PullFailure {
        PullFailure::passing(Code::DiskFull, format!("{}: {}", self.image, crate::store::inline_chain(error)))
    }

    fn digest(&self, descriptor: &Descriptor) -> Result<Digest, PullFailure> {
        Digest::parse(&descriptor.digest().to_string())
            .map_err(|error| PullFailure::permanent(Reason::new(Code::ImageUnusable, format!("{}: {error}", self.image))))
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, what: &str, bytes: &[u8]) -> Result<T, PullFailure> {
        serde_json::from_slice(bytes).map_err(|error| {
            let text = format!("{}: its {what} cannot be read: {error}", self.image);
            PullFailure::permanent(Reason::new(Code::ImageUnusable, text))
        })
    }
}

fn is_image(manifest: &ImageManifest) -> bool {
    let config = manifest.config().media_type().to_string();
    config.contains("image.config") || config.contains("container.image")
}

/// This machine in the words of GOARCH (image-spec, image-index.md).
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

fn ready(digest: Digest, layers: Vec<Digest>, configuration: &ImageConfiguration) -> ReadyImage {
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
