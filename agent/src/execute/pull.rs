//! Fetches, verifies and unpacks an image, in two steps that block: a look at what it is and needs, and the fetching. Between
//! them the images of an update are weighed together. What is on disk already is not fetched again; what is not whole and
//! verified is not visible.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use edged_model::id::Digest;
use edged_model::quantity::Bytes;
use edged_model::reason::{Code, Reason};
use serde::{Deserialize, Serialize};

use crate::config::{DeviceNodes, ImagePolicy, Images, Registry};
use crate::content::Content;
use crate::crash_point;
use crate::registry::layout::{Layout, LayoutReference};
use crate::registry::traffic::Traffic;
use crate::registry::{Client, Floor, Reference, RegistryError, Source};
use crate::verify::cosign::Wanted;
use crate::verify::image_policy::{self, Demand, Rule};
use one_image::{Described, Naming, OneImage};
pub use order::Order;
use room::{Disk, Need, Promise, Promises, weigh_alone};
use slots::Slots;

mod claims;
mod depth;
mod layers;
/// Images that are brought on a stick.
pub mod load;
mod one_image;
mod order;
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
    let away = Away::find(ctx, &name, places, nobody);
    ctx.traffic.settle();
    let found = match away {
        Ok(away) => Found::Away(Box::new(away)),
        Err(failure) => Found::Here(or_what_was_loaded(ctx, image, failure)?),
    };
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
        Found::Away(away) => away.fetch(ctx, &name, promise, order, progress),
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

    /// Here, or at the others in turn.
    fn fetch(
        mut self,
        ctx: &PullContext,
        name: &Name,
        mut promise: Arc<Promise>,
        order: &Order,
        progress: &dyn Fn(Progress),
    ) -> Result<ReadyImage, PullFailure> {
        let image = &name.image;
        loop {
            let fetched = name.of(ctx, &self.source).fetch(&self.described, &promise, order, progress);
            // Last of all: what it speaks of is on the disk.
            match fetched.and_then(|ready| remember(ctx, image, false, ctx.device_nodes(image), ready)) {
                Err(failure) if !order.is_withdrawn() => self = Self::find(ctx, name, self.others, failure)?,
                fetched => return fetched,
            }
            // Its room is free for the next try.
            drop(promise);
            promise = ctx.weigh_alone(image, &self.needs)?;
        }
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
