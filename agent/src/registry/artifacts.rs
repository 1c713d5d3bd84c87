//! What hangs on an image and may be a signature of it: found by a tag, by the referrers API (distribution-spec, "Listing
//! Referrers") or in a layout, and looked at one by one. Whoever may push to a registry can hang anything on an image, and a
//! hostile registry lists what it likes: all of it together stays within bounds.

use std::collections::VecDeque;
use std::fmt;

use edged_model::id::Digest;
use edged_model::quantity::Bytes;
use edged_model::reason::Code;
use oci_spec::image::ImageIndex;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{DOCUMENT_MAX_BYTES, Document, RegistryError, Source};

/// Manifests that are looked at.
pub const ARTIFACTS_MAX: usize = 32;
/// Manifests and signatures of one image together.
const ALL_MAX_BYTES: u64 = 4 << 20;
/// One of them. What cosign writes takes some 10 KiB.
const ONE_MAX_BYTES: u64 = 256 << 10;
/// Lists of referrers, all pages together.
const LISTS_MAX_BYTES: u64 = DOCUMENT_MAX_BYTES;
const PAGES_MAX: usize = 16;

/// What a list says of an artifact. Only what is read is kept: a list may hold millions of annotations.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Listed {
    digest: String,
    size: u64,
    pub artifact_type: Option<String>,
    pub annotations: Option<ListedAnnotations>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ListedAnnotations {
    /// What a bundle states (cosign's BUNDLE_SPEC.md).
    #[serde(rename = "dev.sigstore.bundle.predicateType")]
    pub predicate_type: Option<String>,
}

/// How a layout calls what elsewhere is a tag.
const REFERENCE: &str = "org.opencontainers.image.ref.name";

/// The same, by its name.
const PREDICATE_TYPE: &str = "dev.sigstore.bundle.predicateType";

/// Whether what is listed can be a signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// Its type says so.
    Yes,
    /// The list does not say.
    Perhaps,
    No,
}

/// One after the other, each fetched when it is asked for.
pub struct Artifacts<'s> {
    source: &'s Source,
    image: Digest,
    fit: fn(&Listed) -> Fit,
    /// What its list says to be a signature, on whatever page; then what may be one.
    likely: VecDeque<String>,
    possible: VecDeque<String>,
    /// Of the list, what comes next.
    page: Option<Page>,
    pages: usize,
    looked_at: usize,
    left_bytes: u64,
    left_list_bytes: u64,
    /// Why the rest of the list did not come.
    failed: Option<RegistryError>,
    /// The first thing that was not looked at, and why.
    left_out: Option<String>,
}

enum Page {
    First,
    At(String),
}

impl<'s> Artifacts<'s> {
    pub fn new(source: &'s Source, image: Digest, fit: fn(&Listed) -> Fit) -> Self {
        let mut artifacts = Self {
            source,
            image,
            fit,
            likely: VecDeque::new(),
            possible: VecDeque::new(),
            page: None,
            pages: 0,
            looked_at: 0,
            left_bytes: ALL_MAX_BYTES,
            left_list_bytes: LISTS_MAX_BYTES,
            failed: None,
            left_out: None,
        };
        match source {
            Source::Registry { .. } => {
                artifacts.likely.push_back(signature_tag(image));
                artifacts.page = Some(Page::First);
            }
            // Everything else in the layout may be a signature.
            Source::Layout(layout) => artifacts.take_from(layout.index()),
        }
        artifacts
    }

    /// The next manifest that may hold a signature.
    pub fn next_manifest(&mut self) -> Result<Option<Document>, RegistryError> {
        loop {
            let next = match self.likely.pop_front() {
                None => match self.page.take() {
                    Some(page) => {
                        match self.turn_to(page) {
                            // What the parts before have listed is looked at all the same.
                            Err(error) if self.pages > 0 => self.failed = Some(error),
                            turned => turned?,
                        }
                        continue;
                    }
                    None => self.possible.pop_front(),
                },
                likely => likely,
            };
            let Some(name) = next else { return self.failed.take().map_or(Ok(None), Err) };
            if self.looked_at == ARTIFACTS_MAX {
                self.leave_out(too_many);
                return Ok(None);
            }
            let source = self.source;
            let found = self.within(|bytes_max| source.manifest_within(&name, bytes_max))?;
            let Some(document) = found else { continue };
            self.looked_at += 1;
            // In a layout the list of referrers may lie where elsewhere only its entries are.
            if let Ok(index) = serde_json::from_slice::<ImageIndex>(&document.bytes) {
                self.take_from(&index);
                continue;
            }
            return Ok(Some(document));
        }
    }

    /// A payload or a bundle that such a manifest names; `None`: it is not there or not looked at.
    pub fn blob(&mut self, digest: Digest, size: u64) -> Result<Option<Vec<u8>>, RegistryError> {
        if size > ONE_MAX_BYTES {
            self.leave_out(|| too_large(digest));
            return Ok(None);
        }
        let source = self.source;
        let found = self.within(|bytes_max| source.small_blob_within(digest, bytes_max))?;
        Ok(found.map(|document| document.bytes))
    }

    /// What hangs on the image and was not looked at.
    pub fn left_out(&self) -> Option<&str> {
        self.left_out.as_deref()
    }

    pub fn leave_out(&mut self, why: impl FnOnce() -> String) {
        self.left_out.get_or_insert_with(why);
    }

    /// Fetches at most what is left of the bound. `None`: it is not there (a list may outlive what it lists), or too large.
    fn within(
        &mut self,
        fetch: impl FnOnce(u64) -> Result<Document, RegistryError>,
    ) -> Result<Option<Document>, RegistryError> {
        let bytes_max = self.left_bytes.min(ONE_MAX_BYTES);
        if bytes_max == 0 {
            self.leave_out(all_too_large);
            return Ok(None);
        }
        match fetch(bytes_max) {
            Ok(document) => {
                self.left_bytes -= document.bytes.len() as u64;
                Ok(Some(document))
            }
            Err(error) if error.reason.code == Code::ImageNotFound => Ok(None),
            Err(error) if error.reason.code == Code::ImageUnusable => {
                // It may have been read up to there.
                self.left_bytes -= bytes_max;
                match self.left_bytes {
                    0 => self.leave_out(all_too_large),
                    _ => self.leave_out(|| error.reason.text),
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn turn_to(&mut self, page: Page) -> Result<(), RegistryError> {
        let Source::Registry { client, repository } = self.source else { return Ok(()) };
        if self.pages == PAGES_MAX || self.left_list_bytes == 0 {
            let pages = self.pages;
            self.leave_out(|| format!("the list of what hangs on it is longer than {pages} pages"));
            return Ok(());
        }
        let at = match &page {
            Page::First => None,
            Page::At(path) => Some(path.as_str()),
        };
        let referrers = match client.referrers(repository, self.image, at, self.left_list_bytes) {
            Ok(Some(referrers)) => referrers,
            Ok(None) if at.is_none() => return Ok(()),
            Ok(None) => {
                self.leave_out(|| "the list of what hangs on it ends in the middle".to_owned());
                return Ok(());
            }
            Err(error) if error.reason.code == Code::ImageUnusable => {
                self.leave_out(|| error.reason.text);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.pages += 1;
        self.left_list_bytes -= referrers.index.bytes.len() as u64;
        let mut sorted = Sorted::new(self.fit, self.image);
        let mut json = serde_json::Deserializer::from_slice(&referrers.index.bytes);
        // Whoever is on the way may have answered in the registry's place.
        IndexSeed(&mut sorted).deserialize(&mut json).map_err(|error| {
            let text = format!("{}/{repository}: the referrers of {} cannot be read: {error}", client.name, self.image);
            RegistryError::new(Code::RegistryUnavailable, text, false)
        })?;
        self.take(sorted);
        match referrers.next {
            Some(Ok(path)) => self.page = Some(Page::At(path)),
            Some(Err(host)) => self.leave_out(|| format!("the list of what hangs on it goes on at {host}")),
            None => {}
        }
        Ok(())
    }

    fn take_from(&mut self, index: &ImageIndex) {
        let mut sorted = Sorted::new(self.fit, self.image);
        for descriptor in index.manifests() {
            let annotation = |name: &str| descriptor.annotations().as_ref().and_then(|all| all.get(name)).cloned();
            if annotation(REFERENCE).is_some_and(|name| name == signature_tag(self.image)) {
                self.likely.push_back(descriptor.digest().to_string());
                continue;
            }
            sorted.offer(Listed {
                digest: descriptor.digest().to_string(),
                size: descriptor.size(),
                artifact_type: descriptor.artifact_type().as_ref().map(ToString::to_string),
                annotations: Some(ListedAnnotations { predicate_type: annotation(PREDICATE_TYPE) }),
            });
        }
        self.take(sorted);
    }

    fn take(&mut self, sorted: Sorted) {
        if let Some(why) = sorted.left_out {
            self.leave_out(|| why);
        }
        self.likely.extend(sorted.likely.iter().map(ToString::to_string));
        self.possible.extend(sorted.possible.iter().map(ToString::to_string));
        if self.possible.len() > ARTIFACTS_MAX {
            self.leave_out(too_many);
            self.possible.truncate(ARTIFACTS_MAX);
        }
    }
}

/// Where cosign puts simple signing.
fn signature_tag(image: Digest) -> String {
    format!("sha256-{}.sig", image.hex())
}

fn too_many() -> String {
    format!("more than {ARTIFACTS_MAX} artifacts hang on it")
}

fn all_too_large() -> String {
    format!("what hangs on it takes more than {}", Bytes(ALL_MAX_BYTES).human())
}

fn too_large(name: Digest) -> String {
    format!("{name} is larger than {}", Bytes(ONE_MAX_BYTES).human())
}

/// Of one list what may be a signature, the likely first: a hundred bills of materials before it do not hide it.
struct Sorted {
    fit: fn(&Listed) -> Fit,
    image: Digest,
    likely: Vec<Digest>,
    possible: Vec<Digest>,
    left_out: Option<String>,
}

impl Sorted {
    fn new(fit: fn(&Listed) -> Fit, image: Digest) -> Self {
        Self { fit, image, likely: Vec::new(), possible: Vec::new(), left_out: None }
    }

    fn offer(&mut self, listed: Listed) {
        let Ok(digest) = Digest::parse(&listed.digest) else { return };
        let these = match (self.fit)(&listed) {
            Fit::Yes => &mut self.likely,
            Fit::Perhaps => &mut self.possible,
            Fit::No => return,
        };
        if digest == self.image {
            return;
        }
        // One more than can be looked at, which tells that there are more.
        if these.len() > ARTIFACTS_MAX {
            return;
        }
        if listed.size > ONE_MAX_BYTES {
            self.left_out.get_or_insert_with(|| too_large(digest));
        } else {
            these.push(digest);
        }
    }
}

/// Reads an index entry by entry, and keeps none of it but the digests that count.
struct IndexSeed<'a>(&'a mut Sorted);

impl<'de> DeserializeSeed<'de> for IndexSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for IndexSeed<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an index")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "manifests" {
                map.next_value_seed(ListSeed(&mut *self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct ListSeed<'a>(&'a mut Sorted);

impl<'de> DeserializeSeed<'de> for ListSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ListSeed<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of descriptors")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(listed) = seq.next_element::<Listed>()? {
            self.0.offer(listed);
        }
        Ok(())
    }
}
