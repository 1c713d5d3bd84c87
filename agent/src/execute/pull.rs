//! Fetches, verifies and unpacks an image, in two steps that block: a look at what it is and needs, and the fetching. Between
//! them the images of an update are weighed together. What is on disk already is not fetched again; what is not whole and
//! verified is not visible.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use edged_model::id::Digest;
use edged_model::quantity::Bytes;
use edged_model::reason::{Code, Reason};
use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::config::{DeviceNodes, ImagePolicy, Images, Registry};
use crate::content::layer::Compression;
use crate::content::{Content, chain_id};
use crate::crash_point;
use crate::registry::layout::{Layout, LayoutReference};
use crate::registry::platform::{self, architecture};
use crate::registry::traffic::Traffic;
use crate::registry::{Client, Document, Floor, Reference, RegistryError, Source};
use crate::verify::cosign::Wanted;
use crate::verify::image_policy::{self, Demand, Rule};
use layers::Layer;
use room::{Disk, Need, Promise, Promises, weigh_alone};
use slots::Slots;

mod claims;
mod depth;
mod layers;
/// Images that are brought on a stick.
pub mod load;
mod resume;
/// Whether there is room for an update.
pub mod room;
mod size;
/// How many layers are fetched at a time.
pub mod slots;

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

    pub fn passing(code: Code, text: String) -> Self {
        Self { reason: Reason::new(code, text), permanent: false, retry_after: None }
    }
}

impl From<RegistryError> for PullFailure {
    fn from(error: RegistryError) -> Self {
        // What a registry refuses today it may give tomorrow (a tag pushed late, a password put right): only what was
        // signed wrongly stays wrong.
        let permanent = error.permanent && matches!(error.reason.code, Code::DigestMismatch | Code::ImageUnusable);
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
    /// The trust root's own rules, which come before `images.policy`.
    pub rules: Vec<Rule>,
    pub data: PathBuf,
    pub disk_reserve: Bytes,
    pub promises: Arc<Promises>,
    pub slots: Arc<Slots>,
    pub traffic: Arc<Traffic>,
    /// Under which no certificate is judged.
    pub floor: Floor,
}

impl PullContext {
    /// What must hold for `image`: the trust root's rule for it, else the device's policy.
    fn demand(&self, image: &str) -> Demand {
        if let Some(rule) = image_policy::choose(&self.rules, image) {
            return rule.demand.clone();
        }
        match self.images.policy {
            ImagePolicy::Digest => Demand::Digest,
            ImagePolicy::Signature => {
                let (keys, threshold) = (self.keys.clone(), self.threshold);
                Demand::Signature(Wanted { keys, threshold, ..Wanted::default() })
            }
        }
    }

    fn disk(&self) -> Disk {
        Disk::of(&self.data, self.disk_reserve)
    }

    fn weigh_alone(&self, image: &str, needs: &[(Digest, Need)]) -> Result<Arc<Promise>, PullFailure> {
        weigh_alone(image, needs.iter().copied(), &self.promises, self.disk())
    }

    /// What becomes of device nodes in the layers of `image`.
    fn device_nodes(&self, image: &str) -> DeviceNodes {
        let by_prefix = self.images.device_nodes.iter().map(|(prefix, nodes)| (prefix.as_str(), *nodes));
        image_policy::longest(by_prefix, image).unwrap_or_default()
    }

    /// Whether what was unpacked `under` a policy may be had under this name. Where they were refused there are none.
    fn takes_nodes(&self, image: &str, under: DeviceNodes) -> bool {
        under == DeviceNodes::Refuse || under == self.device_nodes(image)
    }
}

/// What the lowest layer of an image stands on: the same layer with device nodes and without them is two.
pub(super) fn ground(nodes: DeviceNodes) -> Option<Digest> {
    match nodes {
        DeviceNodes::Refuse => None,
        DeviceNodes::Ignore => Some(Digest::of(b"device nodes: ignore")),
        DeviceNodes::Allow => Some(Digest::of(b"device nodes: allow")),
    }
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

/// What a name was pulled to, if all of it is still on the disk: asks no network. It was verified when it was pulled; what
/// was taken without signatures is not ready on a device that has come to want them.
pub fn ready(ctx: &PullContext, image: &str) -> Option<ReadyImage> {
    believed(ctx, image).map(|record| record.ready)
}

fn believed(ctx: &PullContext, image: &str) -> Option<Record> {
    let record: Record = serde_json::from_slice(&ctx.content.record(image)?).ok()?;
    let believed = record.signed || ctx.demand(image) == Demand::Digest;
    let believed = believed && ctx.takes_nodes(image, record.device_nodes);
    (record.image == image && believed && is_whole(&ctx.content, &record.ready)).then_some(record)
}

/// What is kept on disk of a name.
#[derive(Serialize, Deserialize)]
struct Record {
    image: String,
    /// Its signatures were checked.
    signed: bool,
    /// It came by hand, not by this name's registry.
    #[serde(default)]
    loaded: bool,
    #[serde(default)]
    device_nodes: DeviceNodes,
    ready: ReadyImage,
}

/// An image that was looked at: what it is, and what is missing of it.
pub struct Looked {
    name: Name,
    found: Found,
}

enum Found {
    Here(ReadyImage),
    Away(Box<Away>),
}

/// What is to be fetched, and where.
struct Away {
    source: Source,
    described: Described,
    needs: Vec<(Digest, Need)>,
    /// Who is asked when this source fails.
    others: VecDeque<Place>,
}

impl Looked {
    /// What fetching it takes on the disk, by layer; nothing where it is there.
    pub fn needs(&self) -> &[(Digest, Need)] {
        match &self.found {
            Found::Here(_) => &[],
            Found::Away(away) => &away.needs,
        }
    }
}

/// Looks for `image`: `registry/repository@sha256:…`, `registry/repository:tag`, or `oci:/path`. Mirrors are asked first;
/// whatever is wrong with what one has, the next is asked. Fetches documents and signatures, no layer.
pub fn look(ctx: &PullContext, image: &str) -> Result<Looked, PullFailure> {
    let (name, places) = Name::parse(ctx, image)?;
    // A digest never means anything else later; a tag may have moved.
    if let Some(digest) = name.digest {
        if let Some(ready) = ready(ctx, image) {
            return Ok(Looked { name, found: Found::Here(ready) });
        }
        if let Some(ready) = load::taken(ctx, image, digest)? {
            return Ok(Looked { name, found: Found::Here(ready) });
        }
    }
    let nobody = PullFailure::passing(Code::RegistryUnavailable, format!("{image}: no registry to ask"));
    let found = match Away::find(ctx, &name, places, nobody) {
        Ok(away) => Found::Away(Box::new(away)),
        Err(failure) => Found::Here(or_what_was_loaded(ctx, image, failure)?),
    };
    ctx.traffic.settle();
    Ok(Looked { name, found })
}

/// Fetches what was found missing; what that may take of the disk was promised. `progress` says how far it is.
pub fn fetch(
    ctx: &PullContext,
    looked: Looked,
    promise: Arc<Promise>,
    order: &Order,
    progress: &dyn Fn(Progress),
) -> Result<ReadyImage, PullFailure> {
    let Looked { name, found } = looked;
    let fetched = match found {
        Found::Here(ready) => return Ok(ready),
        Found::Away(away) => away.fetch_here_or_elsewhere(ctx, &name, promise, order, progress),
    };
    ctx.traffic.settle();
    fetched.or_else(|failure| or_what_was_loaded(ctx, &name.image, failure))
}

/// Both steps, for an image that belongs to no update.
pub fn pull(ctx: &PullContext, image: &str, progress: &dyn Fn(Progress)) -> Result<ReadyImage, PullFailure> {
    let looked = look(ctx, image)?;
    let promise = ctx.weigh_alone(image, looked.needs())?;
    fetch(ctx, looked, promise, &Order::default(), progress)
}

/// Somebody wants an image, for now.
#[derive(Debug, Default)]
pub struct Order {
    /// What runs lacks it: it does not wait for what may run later.
    pub is_urgent: bool,
    is_withdrawn: AtomicBool,
    told: Notify,
}

impl Order {
    pub fn new(is_urgent: bool) -> Self {
        Self { is_urgent, ..Self::default() }
    }

    /// Nobody wants it any more: it ends soon, in a failure.
    pub fn withdraw(&self, slots: &Slots) {
        self.is_withdrawn.store(true, Ordering::Relaxed);
        self.told.notify_waiters();
        slots.look_again();
    }

    /// Waits for something, as long as it is wanted.
    pub async fn wait<T>(&self, what: impl Future<Output = T>) -> Result<T, PullFailure> {
        let withdrawn = async {
            let told = self.told.notified();
            if !self.is_withdrawn() {
                told.await;
            }
        };
        tokio::select! {
            biased;
            () = withdrawn => Err(PullFailure::passing(Code::ImageUnusable, "nobody wants it any more".to_owned())),
            got = what => Ok(got),
        }
    }

    pub fn is_withdrawn(&self) -> bool {
        self.is_withdrawn.load(Ordering::Relaxed)
    }
}

impl Away {
    /// By the first of `places` that has it; `last` is the failure if there is none.
    fn find(
        ctx: &PullContext,
        name: &Name,
        mut places: VecDeque<Place>,
        mut last: PullFailure,
    ) -> Result<Self, PullFailure> {
        while let Some(place) = places.pop_front() {
            let found = place.open(ctx).and_then(|source| {
                let one = name.of(ctx, &source);
                let described = one.describe()?;
                let needs = one.needs(&described);
                Ok((source, described, needs))
            });
            match found {
                Ok((source, described, needs)) => return Ok(Self { source, described, needs, others: places }),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }

    fn fetch_here_or_elsewhere(
        self,
        ctx: &PullContext,
        name: &Name,
        promise: Arc<Promise>,
        order: &Order,
        progress: &dyn Fn(Progress),
    ) -> Result<ReadyImage, PullFailure> {
        let (mut away, mut promise) = (self, promise);
        loop {
            let failure = match away.fetch(ctx, name, promise, order, progress) {
                Ok(ready) => return Ok(ready),
                Err(failure) if order.is_withdrawn() => return Err(failure),
                Err(failure) => failure,
            };
            away = Self::find(ctx, name, away.others, failure)?;
            promise = ctx.weigh_alone(&name.image, &away.needs)?;
        }
    }

    fn fetch(
        &self,
        ctx: &PullContext,
        name: &Name,
        promise: Arc<Promise>,
        order: &Order,
        progress: &dyn Fn(Progress),
    ) -> Result<ReadyImage, PullFailure> {
        let image = &name.image;
        let ready = name.of(ctx, &self.source).fetch(&self.described, &promise, order, progress)?;
        // Last of all: what it speaks of is on the disk.
        remember(ctx, image, false, ctx.device_nodes(image), ready)
    }
}

/// Nobody can say where a tag is now; an operator has said where it was when he brought the image.
fn or_what_was_loaded(ctx: &PullContext, image: &str, failure: PullFailure) -> Result<ReadyImage, PullFailure> {
    match believed(ctx, image).filter(|record| record.loaded && failure.reason.code == Code::RegistryUnavailable) {
        Some(record) => Ok(record.ready),
        None => Err(failure),
    }
}

/// Keeps on the disk what a name has become.
fn remember(
    ctx: &PullContext,
    image: &str,
    loaded: bool,
    device_nodes: DeviceNodes,
    ready: ReadyImage,
) -> Result<ReadyImage, PullFailure> {
    let signed = ctx.demand(image) != Demand::Digest;
    let record = Record { image: image.to_owned(), signed, loaded, device_nodes, ready };
    let disk = |why: String| PullFailure::passing(Code::DiskFull, format!("{image}: {why}"));
    let bytes = serde_json::to_vec(&record).map_err(|error| disk(error.to_string()))?;
    ctx.content.put_record(image, &bytes).map_err(|error| disk(crate::store::inline_chain(&error)))?;
    crash_point::pass("image-recorded");
    Ok(record.ready)
}

/// Whoever may set a tag can write an index, which is read before any signature is. A thousand platforms fit.
const INDEX_MAX_BYTES: usize = 512 << 10;

/// What an image is called, and what a source is asked for.
struct Name {
    image: String,
    wanted: String,
    digest: Option<Digest>,
}

/// Who may have it.
enum Place {
    Layout(PathBuf),
    Registry { host: String, repository: String },
}

impl Name {
    /// And whom to ask: the mirrors of its registry, in order, then the registry.
    fn parse(ctx: &PullContext, image: &str) -> Result<(Self, VecDeque<Place>), PullFailure> {
        let name = |wanted, digest| Self { image: image.to_owned(), wanted, digest };
        if LayoutReference::is_one(image) {
            let reference = LayoutReference::parse(image).map_err(PullFailure::permanent)?;
            let name = name(reference.wanted(), reference.digest);
            return Ok((name, VecDeque::from([Place::Layout(reference.path)])));
        }
        let reference = Reference::parse(image).map_err(PullFailure::permanent)?;
        let mirrors = ctx.registries.get(&reference.registry).map(|config| config.mirrors.clone()).unwrap_or_default();
        let hosts = mirrors.into_iter().chain([reference.registry.clone()]);
        let places = hosts.map(|host| Place::Registry { host, repository: reference.repository.clone() });
        Ok((name(reference.wanted(), reference.digest), places.collect()))
    }

    fn of<'p>(&'p self, ctx: &'p PullContext, source: &'p Source) -> OneImage<'p> {
        let naming = if self.digest.is_some() { Naming::Digest } else { Naming::Tag };
        OneImage { ctx, source, wanted: &self.wanted, naming, image: &self.image }
    }
}

impl Place {
    fn open(&self, ctx: &PullContext) -> Result<Source, PullFailure> {
        match self {
            Self::Layout(path) => Ok(Source::Layout(Box::new(Layout::open(path)?))),
            Self::Registry { host, repository } => {
                let config = ctx.registries.get(host).cloned().unwrap_or_default();
                let client = Box::new(Client::new(host, &config, &ctx.traffic, &ctx.floor)?);
                Ok(Source::Registry { client, repository: repository.clone() })
            }
        }
    }
}

/// An image by its documents, which were believed.
struct Described {
    /// What was asked for (an index, or the manifest itself), and the manifest.
    top: Document,
    document: Document,
    config: Vec<u8>,
    /// Lowest first.
    layers: Vec<Layer>,
    ready: ReadyImage,
}

/// How the image is called, which decides what must hold for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Naming {
    Digest,
    Tag,
    /// Nobody has named it yet: what may ever be asked of it is enough for now.
    Later,
}

struct OneImage<'p> {
    ctx: &'p PullContext,
    source: &'p Source,
    wanted: &'p str,
    naming: Naming,
    image: &'p str,
}

impl OneImage<'_> {
    fn describe(&self) -> Result<Described, PullFailure> {
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
    fn needs(&self, described: &Described) -> Vec<(Digest, Need)> {
        let missing = described.layers.iter().filter(|layer| !self.ctx.content.has_layer(layer.chain));
        size::needs(self.source, missing, self.ctx.disk())
    }

    fn fetch(
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
