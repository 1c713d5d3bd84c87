//! Takes away what no generation needs. What that is, is decided by [`edged_plan::garbage`]; here it is looked up and done.
//! Nobody may be pulling meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use edged_model::disk::{DiskItem, ItemFate, NeededBy, Pruned, Unused};
use edged_model::id::{Digest, Sequence, WorkloadName};
use edged_model::quantity::{Bytes, Timestamp};
use edged_plan::garbage::{Fate, Need, Rules, Thing, fates};
use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};

use super::pull::{ReadyImage, ground};
use crate::config::DeviceNodes;
use crate::content::usage::Item;
use crate::content::{Content, ContentError, chain_id};
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
        found.push(images.found(LAYER, &item));
    }
    for item in content.documents()? {
        found.push(images.found(DOCUMENT, &item));
    }
    for item in content.partials()? {
        found.push(images.found(PARTIAL_LAYER, &item));
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

/// Collects, and says what went and what stays. The names of images that cannot be run any more come second: their records go too.
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

/// An image that is on record, or that a manifest names.
struct Image<'w> {
    name: &'w str,
    by: &'w [NeededBy],
    unused: Unused,
}

/// Which things belong to which images.
#[derive(Default)]
struct Images<'w> {
    all: Vec<Image<'w>>,
    /// Layers, documents, and layers as they travel, each by the digest it is known by: no two of them have the same.
    parts: BTreeMap<Digest, Vec<usize>>,
    /// Needed, and nobody knows yet what belongs to them.
    unknown: Vec<usize>,
}

impl<'w> Images<'w> {
    fn look(content: &Content, wish: &'w Wish, layers: &[Item]) -> Self {
        let came: BTreeMap<Digest, i64> = layers.iter().map(|layer| (layer.digest, layer.since_unix_secs)).collect();
        let mut images = Self::default();
        for (name, image) in &wish.images {
            // It came as a whole when its last layer came.
            let whole_since = image.layers.iter().filter_map(|chain| came.get(chain)).max().copied().unwrap_or(0);
            let of = Documents::read(content, name, Some(image.digest));
            images.add(wish, name, Timestamp(whole_since), of.all.into_iter().chain(image.layers.iter().copied()));
        }
        // On their way, or damaged and to be fetched again: what is there of them is not fetched twice.
        for name in wish.needed.keys().filter(|name| !wish.images.contains_key(*name)) {
            let of = Documents::read(content, name, None);
            let is_unknown = of.layers.is_empty();
            let index = images.add(wish, name, Timestamp(0), of.all.into_iter().chain(of.layers));
            images.unknown.extend(is_unknown.then_some(index));
        }
        images
    }

    fn add(&mut self, wish: &'w Wish, name: &'w str, came: Timestamp, parts: impl Iterator<Item = Digest>) -> usize {
        let by = wish.needed.get(name).map_or(&[][..], Vec::as_slice);
        let former = wish.former.get(name).filter(|former| former.until >= came);
        let unused = former.map_or(Unused { since: came, generation: None }, |former| Unused {
            since: former.until,
            generation: Some(former.generation),
        });
        let index = self.all.len();
        self.all.push(Image { name, by, unused });
        for part in parts {
            self.parts.entry(part).or_default().push(index);
        }
        index
    }

    /// It is theirs who need it; else it goes with the image that goes last of those that it belongs to.
    fn found(&self, kind: &str, item: &Item) -> Found {
        let of = self.parts.get(&item.digest).map_or(&[][..], Vec::as_slice);
        let by = together(of.iter().flat_map(|index| self.all[*index].by));
        let last = of.iter().copied().max_by_key(|index| {
            let image = &self.all[*index];
            (!image.by.is_empty(), image.unused.since, *index)
        });
        let own = Unused { since: Timestamp(item.since_unix_secs), generation: None };
        let unused = last.map_or(own, |last| self.all[last].unused);
        let (need, by) = match (by.is_empty(), of.is_empty() && !self.unknown.is_empty()) {
            (false, _) if kind == PARTIAL_LAYER => (Need::Pull, by),
            (false, _) => (Need::Generation, by),
            // One of those may go on from it.
            (true, true) => (Need::Pull, together(self.unknown.iter().flat_map(|index| self.all[*index].by))),
            (true, false) => (Need::Nobody, by),
        };
        Found {
            item: described(kind, item, None, last.map(|last| self.all[last].name.to_owned())),
            thing: Thing { need, unused_since: Some(unused.since), of: last.unwrap_or(OF_NO_IMAGE), bytes: item.bytes },
            by,
            unused,
        }
    }

    /// Copies are made again without a network: those that nobody needs wait for nothing.
    fn found_copy(&self, wish: &Wish, item: &Item, first: u32) -> Found {
        let of = self.parts.get(&item.digest).into_iter().flatten().map(|index| self.all[*index].name);
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

/// What the documents on the disk say of an image.
#[derive(Default)]
struct Documents {
    /// Its manifest, its configuration, and the index by which its name says it was found.
    all: BTreeSet<Digest>,
    /// As they travel, and by their chain ids, whatever the policy for device nodes was.
    layers: BTreeSet<Digest>,
}

impl Documents {
    /// `manifest`: of one that is not on record it is known by a digest in its name.
    fn read(content: &Content, name: &str, manifest: Option<Digest>) -> Self {
        let named = name.rsplit_once('@').and_then(|(_, digest)| Digest::parse(digest).ok());
        let parsed = |digest: &oci_spec::image::Digest| Digest::parse(digest.as_ref()).ok();
        let mut documents = Self { all: named.into_iter().chain(manifest).collect(), layers: BTreeSet::new() };
        let mut manifests = documents.all.clone();
        if let (None, Some(index)) = (manifest, named.and_then(|named| read::<ImageIndex>(content, named))) {
            manifests.extend(index.manifests().iter().filter_map(|one| parsed(one.digest())));
        }
        for digest in manifests {
            let Some(manifest) = read::<ImageManifest>(content, digest) else { continue };
            documents.all.insert(digest);
            documents.layers.extend(manifest.layers().iter().filter_map(|layer| parsed(layer.digest())));
            let Some(config) = parsed(manifest.config().digest()) else { continue };
            documents.all.insert(config);
            let Some(config) = read::<ImageConfiguration>(content, config) else { continue };
            for nodes in [DeviceNodes::Refuse, DeviceNodes::Ignore, DeviceNodes::Allow] {
                let diff_ids = config.rootfs().diff_ids().iter().map_while(|diff_id| Digest::parse(diff_id).ok());
                documents.layers.extend(diff_ids.scan(ground(nodes), |below, diff_id| {
                    *below = Some(chain_id(*below, diff_id));
                    *below
                }));
            }
        }
        documents
    }
}

fn read<T: serde::de::DeserializeOwned>(content: &Content, digest: Digest) -> Option<T> {
    serde_json::from_slice(&content.document(digest)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Places;
    use crate::content::table::Sums;
    use edged_model::api::GenerationRole;
    use edged_model::disk::Cause;
    use edged_plan::garbage::Room;
    use serde_json::json;

    const NOW: Timestamp = Timestamp(4_000_000_000);

    fn unpack(content: &Content, chain: Digest) {
        let staged = content.stage(chain).unwrap().unwrap();
        std::fs::write(staged.path().join("file"), "content").unwrap();
        staged.publish(&Sums::default()).unwrap();
    }

    fn wish(needed: &str, room: Room) -> Wish {
        let workloads = vec![WorkloadName::parse("app").unwrap()];
        let by = NeededBy { generation: Sequence(4), role: GenerationRole::LastGood, workloads };
        Wish {
            images: BTreeMap::new(),
            needed: [(needed.to_owned(), vec![by])].into(),
            former: BTreeMap::new(),
            copies: BTreeMap::new(),
            workloads: BTreeSet::new(),
            rules: Rules { now: NOW, keep_unused_secs: 60, budget: Some(0), room },
            dry_run: false,
        }
    }

    fn digests(content: &Content, wish: &Wish, is: impl Fn(&ItemFate) -> bool) -> BTreeSet<Digest> {
        let items = survey(content, wish).unwrap();
        items.into_iter().filter(|item| item.fate.as_ref().is_some_and(&is)).map(|item| item.digest).collect()
    }

    fn is_needed(fate: &ItemFate) -> bool {
        matches!(fate, ItemFate::Needed { by } if by[0].generation == Sequence(4))
    }

    #[test]
    fn what_is_left_of_a_needed_image_that_lost_a_layer_stays_however_short_the_room_is() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(&Places::new(Some(dir.path()), None)).unwrap();
        let diff_ids = [1_u8, 2].map(|number| Digest::of(&[number]));
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids.map(|id| id.to_string())},
        });
        let config = content.put_document(config.to_string().as_bytes()).unwrap();
        let travelling = Digest::of(b"as it travels");
        let descriptor = |kind: &str, digest: Digest| json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "size": 1, "digest": digest.to_string()});
        let manifest = json!({
            "schemaVersion": 2, "config": descriptor("config.v1+json", config),
            "layers": [descriptor("layer.v1.tar+gzip", travelling), descriptor("layer.v1.tar+gzip", Digest::of(b"2"))],
        });
        let manifest = content.put_document(manifest.to_string().as_bytes()).unwrap();
        let other = content.put_document(b"{}").unwrap();
        // The upper one of two is there, the lower one comes again; a third is nobody's.
        let below = chain_id(None, diff_ids[0]);
        let (left, stranger) = (chain_id(Some(below), diff_ids[1]), Digest::of(b"stranger"));
        unpack(&content, left);
        unpack(&content, stranger);
        content.new_partial(travelling).unwrap().append(b"half").unwrap();

        let wish = wish(&format!("r.example/app@{manifest}"), Room::ShortBy(1));
        assert_eq!(digests(&content, &wish, is_needed), [manifest, config, left].into());
        let is_awaited = |fate: &ItemFate| matches!(fate, ItemFate::Awaited { .. });
        assert_eq!(digests(&content, &wish, is_awaited), [travelling].into());
        let is_old = |fate: &ItemFate| matches!(fate, ItemFate::Goes { cause: Cause::Old, .. });
        assert_eq!(digests(&content, &wish, is_old), [stranger, other].into());

        let short = Wish { rules: Rules { room: Room::Short, ..wish.rules }, ..wish };
        let (pruned, _) = collect(&content, &short).unwrap();
        let gone: BTreeSet<Digest> = pruned.items.iter().map(|item| item.digest).collect();
        assert_eq!(gone, [stranger, other, travelling].into());
        assert!(content.has_layer(left) && !content.has_layer(stranger));
    }

    #[test]
    fn while_it_is_not_known_what_a_needed_image_has_nothing_of_no_image_goes_but_for_room() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(&Places::new(Some(dir.path()), None)).unwrap();
        let (layer, partial) = (Digest::of(b"layer"), Digest::of(b"partial"));
        unpack(&content, layer);
        content.new_partial(partial).unwrap().append(b"half").unwrap();
        let wish = wish("r.example/app:latest", Room::Asked);
        let (pruned, _) = collect(&content, &wish).unwrap();
        assert_eq!(pruned.items, []);
        let short = Wish { rules: Rules { room: Room::Short, ..wish.rules }, ..wish.clone() };
        let is_for_room = |fate: &ItemFate| matches!(fate, ItemFate::Goes { cause: Cause::RoomIsShort, .. });
        assert_eq!(digests(&content, &short, is_for_room), [layer, partial].into());
        let (pruned, _) = collect(&content, &Wish { needed: Needed::new(), ..wish }).unwrap();
        assert_eq!(pruned.items.len(), 2);
    }

    #[test]
    fn a_collection_that_left_what_could_go_for_room_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(&Places::new(Some(dir.path()), None)).unwrap();
        unpack(&content, Digest::of(b"first"));
        unpack(&content, Digest::of(b"second"));
        let by_age = wish("r.example/app:latest", Room::ShortBy(1));
        let keep_unused_secs = u64::MAX;
        let rules = Rules { now: Timestamp(0), keep_unused_secs, budget: None, ..by_age.rules };
        let short = Wish { needed: Needed::new(), rules, ..by_age };
        let is_young = |item: &DiskItem| matches!(item.fate, Some(ItemFate::Young { .. }));
        for left in [1, 0] {
            let (pruned, _) = collect(&content, &short).unwrap();
            assert_eq!((pruned.items.len(), pruned.stays.len()), (1, left), "{pruned:?}");
            assert!(pruned.stays.iter().all(is_young), "{pruned:?}");
        }
    }
}
