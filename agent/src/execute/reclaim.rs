//! Takes away what no generation needs. What that is, is decided by [`edged_plan::garbage`]; here it is looked up and done.
//! Nobody may be pulling meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use edged_model::disk::{DiskItem, ItemFate, NeededBy, Pruned, Unused};
use edged_model::id::{Digest, Sequence, WorkloadName};
use edged_model::quantity::{Bytes, Timestamp};
use edged_plan::garbage::{Fate, Need, Rules, Thing, fates};
use oci_spec::image::{ImageIndex, ImageManifest};

use super::pull::ReadyImage;
use crate::content::usage::Item;
use crate::content::{Content, ContentError};
use crate::crash_point;

/// As `df` and `prune` call them.
pub const LAYER: &str = "layer";
pub const LAYER_COPY: &str = "layer copy";
pub const DOCUMENT: &str = "document";
pub const PARTIAL_LAYER: &str = "partial layer";

/// By an image's name: who needs it.
pub type Needed = BTreeMap<String, Vec<NeededBy>>;

/// The last generation that named an image and is not come back to any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Former {
    pub generation: Sequence,
    pub until: Timestamp,
}

/// What is asked of a collection.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Every image on record, by the name in its manifest.
    pub images: BTreeMap<String, ReadyImage>,
    pub needed: Needed,
    /// By an image's name.
    pub former: BTreeMap<String, Former>,
    /// For each range of ids, the images whose layers it needs copies of.
    pub copies: BTreeMap<u32, Needed>,
    /// Who may have a range of ids.
    pub workloads: BTreeSet<WorkloadName>,
    pub rules: Rules,
    pub dry_run: bool,
}

/// What is on the disk of images, each with what becomes of it.
pub fn survey(content: &Content, wish: &Wish) -> Result<Vec<DiskItem>, ContentError> {
    let items = content.layers()?;
    let images = Images::look(content, wish, &items);
    let mut found: Vec<Found> = Vec::new();
    for item in items {
        found.push(images.found(LAYER, &item, images.by_layer.get(&item.digest)));
    }
    for item in content.documents()? {
        found.push(images.found(DOCUMENT, &item, images.by_document.get(&item.digest)));
    }
    for item in content.partials()? {
        found.push(images.found(PARTIAL_LAYER, &item, images.by_partial.get(&item.digest)));
    }
    for copy in content.copies()? {
        found.push(images.found_copy(wish, &copy.item, copy.first));
    }
    // What belongs to no image goes one by one.
    for (number, found) in found.iter_mut().enumerate() {
        found.thing.of = if found.thing.of == OF_NO_IMAGE { images.all.len() + number } else { found.thing.of };
    }
    let things: Vec<Thing> = found.iter().map(|found| found.thing).collect();
    Ok(found.into_iter().zip(fates(&things, &wish.rules)).map(|(found, fate)| found.with(fate)).collect())
}

/// Collects, and says what went. The names of images that cannot be run any more come second: their records go too.
pub fn collect(content: &Content, wish: &Wish) -> Result<(Pruned, Vec<String>), ContentError> {
    let (items, stays): (Vec<_>, Vec<_>) =
        survey(content, wish)?.into_iter().partition(|item| matches!(item.fate, Some(ItemFate::Goes { .. })));
    let gone: BTreeSet<Digest> = items.iter().filter(|item| item.kind == LAYER).map(|item| item.digest).collect();
    let is_broken = |image: &ReadyImage| image.layers.iter().any(|layer| gone.contains(layer));
    let broken: Vec<String> =
        wish.images.iter().filter(|(_, image)| is_broken(image)).map(|(name, _)| name.clone()).collect();
    if !wish.dry_run {
        for item in &items {
            take_away(content, item)?;
        }
        for name in &broken {
            content.remove_record(name)?;
            crash_point::pass("record-removed");
        }
    }
    let size = Bytes(items.iter().map(|item| item.size.0).sum());
    let stays = if wish.dry_run { stays } else { Vec::new() };
    Ok((Pruned { dry_run: wish.dry_run, items, size, stays }, broken))
}

fn take_away(content: &Content, item: &DiskItem) -> Result<(), ContentError> {
    match (item.kind.as_str(), item.copy) {
        (_, Some(first)) => content.remove_copy(item.digest, first),
        (LAYER, None) => {
            content.remove_layer(item.digest)?;
            crash_point::pass("layer-removed");
            Ok(())
        }
        (DOCUMENT, None) => content.remove_document(item.digest),
        (_, None) => content.remove_partial(item.digest),
    }
}

/// Before it is told to which image it belongs.
const OF_NO_IMAGE: usize = usize::MAX;

struct Found {
    item: DiskItem,
    thing: Thing,
    by: Vec<NeededBy>,
    unused: Unused,
}

impl Found {
    fn with(self, fate: Fate) -> DiskItem {
        let Self { item, thing, by, unused } = self;
        let fate = match (fate, thing.need) {
            (Fate::Needed, Need::Pull) => ItemFate::Awaited { by },
            (Fate::Needed, Need::Generation | Need::Nobody) => ItemFate::Needed { by },
            (Fate::Young { until }, _) => ItemFate::Young { unused, until },
            (Fate::Goes(cause), _) => ItemFate::Goes { unused, cause },
        };
        DiskItem { fate: Some(fate), ..item }
    }
}

/// An image that a manifest names.
struct Image<'w> {
    name: &'w str,
    by: &'w [NeededBy],
    unused: Unused,
    /// It is on record, and so on the disk as a whole.
    is_whole: bool,
}

/// The images on record and those that are on their way, and what belongs to which.
struct Images<'w> {
    all: Vec<Image<'w>>,
    by_layer: BTreeMap<Digest, Vec<usize>>,
    by_document: BTreeMap<Digest, Vec<usize>>,
    by_partial: BTreeMap<Digest, Vec<usize>>,
}

impl<'w> Images<'w> {
    fn look(content: &Content, wish: &'w Wish, layers: &[Item]) -> Self {
        let came: BTreeMap<Digest, i64> = layers.iter().map(|layer| (layer.digest, layer.since_unix_secs)).collect();
        let mut images = Self {
            all: Vec::new(),
            by_layer: BTreeMap::new(),
            by_document: BTreeMap::new(),
            by_partial: BTreeMap::new(),
        };
        for (name, image) in &wish.images {
            // It came as a whole when its last layer came.
            let whole_since = image.layers.iter().filter_map(|chain| came.get(chain)).max().copied().unwrap_or(0);
            let index = images.add(wish, name, Timestamp(whole_since), true);
            for chain in &image.layers {
                images.by_layer.entry(*chain).or_default().push(index);
            }
            for document in documents_of(content, name, Some(image.digest)).0 {
                images.by_document.entry(document).or_default().push(index);
            }
        }
        for name in wish.needed.keys().filter(|name| !wish.images.contains_key(*name)) {
            let index = images.add(wish, name, Timestamp(0), false);
            let (documents, layers) = documents_of(content, name, None);
            for document in documents {
                images.by_document.entry(document).or_default().push(index);
            }
            for layer in layers {
                images.by_partial.entry(layer).or_default().push(index);
            }
        }
        images
    }

    fn add(&mut self, wish: &'w Wish, name: &'w str, came: Timestamp, is_whole: bool) -> usize {
        let by = wish.needed.get(name).map_or(&[][..], Vec::as_slice);
        let former = wish.former.get(name).filter(|former| former.until >= came);
        let unused = former.map_or(Unused { since: came, generation: None }, |former| Unused {
            since: former.until,
            generation: Some(former.generation),
        });
        self.all.push(Image { name, by, unused, is_whole });
        self.all.len() - 1
    }

    /// `of`: the images that it is a part of. It is theirs who need it; else it goes with the one that goes last.
    fn found(&self, kind: &str, item: &Item, of: Option<&Vec<usize>>) -> Found {
        let of: Vec<usize> = of.into_iter().flatten().copied().collect();
        let by = together(of.iter().flat_map(|index| self.all[*index].by));
        let is_needed = |index: &&usize| !self.all[**index].by.is_empty();
        let last = of.iter().filter(is_needed).chain(&of).copied().reduce(|first, second| {
            let last_unused = |index: usize| (self.all[index].unused.since, index);
            match (self.all[first].by.is_empty(), last_unused(first) < last_unused(second)) {
                (true, true) => second,
                _ => first,
            }
        });
        let own = Unused { since: Timestamp(item.since_unix_secs), generation: None };
        let need = match (by.is_empty(), of.iter().any(|index| self.all[*index].is_whole && is_needed(&index))) {
            (true, _) => Need::Nobody,
            (false, true) => Need::Generation,
            (false, false) => Need::Pull,
        };
        let unused = last.map_or(own, |last| self.all[last].unused);
        Found {
            item: described(kind, item, None, last.map(|last| self.all[last].name.to_owned())),
            thing: Thing { need, unused_since: Some(unused.since), of: last.unwrap_or(OF_NO_IMAGE), bytes: item.bytes },
            by,
            unused,
        }
    }

    /// Copies are made again without a network: those that nobody needs wait for nothing.
    fn found_copy(&self, wish: &Wish, item: &Item, first: u32) -> Found {
        let of = self.by_layer.get(&item.digest).into_iter().flatten().map(|index| self.all[*index].name);
        let names: Vec<&str> = of.collect();
        let needed = wish.copies.get(&first);
        let by = together(names.iter().filter_map(|name| needed?.get(*name)).flatten());
        let is_needed = |name: &&&str| needed.is_some_and(|needed| needed.contains_key(**name));
        let name = names.iter().find(is_needed).or(names.first()).map(|name| (*name).to_owned());
        let need = if by.is_empty() { Need::Nobody } else { Need::Generation };
        Found {
            item: described(LAYER_COPY, item, Some(first), name),
            thing: Thing { need, unused_since: None, of: OF_NO_IMAGE, bytes: item.bytes },
            by,
            unused: Unused { since: Timestamp(item.since_unix_secs), generation: None },
        }
    }
}

fn described(kind: &str, item: &Item, copy: Option<u32>, image: Option<String>) -> DiskItem {
    DiskItem { kind: kind.to_owned(), digest: item.digest, copy, size: Bytes(item.bytes), image, fate: None }
}

/// Each generation once, with all its workloads.
fn together<'n>(all: impl Iterator<Item = &'n NeededBy>) -> Vec<NeededBy> {
    let mut by: BTreeMap<Sequence, NeededBy> = BTreeMap::new();
    for one in all {
        let known = by.entry(one.generation).or_insert_with(|| NeededBy { workloads: Vec::new(), ..one.clone() });
        known.workloads.extend(one.workloads.iter().cloned());
        known.workloads.sort();
        known.workloads.dedup();
    }
    by.into_values().collect()
}

/// An image's manifest, its configuration, and the index by which its name says it was found; and its layers as they
/// travel. Of one that is on its way, as far as they have come.
fn documents_of(content: &Content, name: &str, manifest: Option<Digest>) -> (Vec<Digest>, Vec<Digest>) {
    let named = name.rsplit_once('@').and_then(|(_, digest)| Digest::parse(digest).ok());
    let parsed = |digest: &oci_spec::image::Digest| Digest::parse(digest.as_ref()).ok();
    let read = |digest: Digest| content.document(digest);
    let listed = |index: Digest| {
        let index = read(index).and_then(|bytes| serde_json::from_slice::<ImageIndex>(&bytes).ok());
        let listed = index.into_iter().flat_map(|index| index.manifests().clone());
        listed.filter_map(move |one| parsed(one.digest())).collect::<Vec<_>>()
    };
    let on_its_way = || named.into_iter().flat_map(|named| std::iter::once(named).chain(listed(named)));
    let manifests = manifest.map_or_else(|| on_its_way().collect(), |manifest| vec![manifest]);
    let mut documents: Vec<Digest> = manifests.iter().copied().chain(named).collect();
    let mut layers = Vec::new();
    for manifest in manifests {
        let manifest = read(manifest).and_then(|bytes| serde_json::from_slice::<ImageManifest>(&bytes).ok());
        let Some(manifest) = manifest else { continue };
        documents.extend(parsed(manifest.config().digest()));
        layers.extend(manifest.layers().iter().filter_map(|layer| parsed(layer.digest())));
    }
    documents.sort();
    documents.dedup();
    (documents, layers)
}
