//! Takes away what no generation needs. What that is was decided by [`edged_plan::garbage`]; here it is looked up and done.
//! Nobody may be pulling meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use edged_model::api::{Pruned, PrunedItem};
use edged_model::id::{Digest, WorkloadName};
use edged_model::quantity::{Bytes, Timestamp};
use edged_plan::garbage::{Fate, fate};
use oci_spec::image::ImageManifest;

use super::pull::ReadyImage;
use crate::content::usage::Item;
use crate::content::{Content, ContentError};
use crate::crash_point;

/// What is asked of a collection.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Every image on record, by the name in its manifest.
    pub images: BTreeMap<String, ReadyImage>,
    /// The names that some generation needs.
    pub needed: BTreeSet<String>,
    /// For each range of ids, the images whose layers it needs copies of.
    pub copies: BTreeMap<u32, BTreeSet<String>>,
    /// Who may have a range of ids.
    pub workloads: BTreeSet<WorkloadName>,
    pub now: Timestamp,
    pub keep_unused_secs: u64,
    /// Age saves nothing.
    pub room_is_short: bool,
    pub dry_run: bool,
}

impl Wish {
    fn fate(&self, item: &Item, is_needed: bool) -> Fate {
        let age = self.now.0.saturating_sub(item.since_unix_secs);
        fate(is_needed, u64::try_from(age).unwrap_or(0), self.keep_unused_secs, self.room_is_short)
    }

    fn needed_images(&self) -> impl Iterator<Item = (&String, &ReadyImage)> {
        self.images.iter().filter(|(name, _)| self.needed.contains(*name))
    }
}

/// Collects, and says what went. The names of images that cannot be run any more come second: their records go too.
pub fn collect(content: &Content, wish: &Wish) -> Result<(Pruned, Vec<String>), ContentError> {
    let needed_layers: BTreeSet<Digest> =
        wish.needed_images().flat_map(|(_, image)| image.layers.iter().copied()).collect();
    let needed_documents: BTreeSet<Digest> =
        wish.needed_images().flat_map(|(name, image)| documents_of(content, name, image)).collect();
    let mut pruned = Pruned { dry_run: wish.dry_run, ..Pruned::default() };
    for layer in content.layers()? {
        if wish.fate(&layer, needed_layers.contains(&layer.digest)) == Fate::Goes {
            let of = wish.images.iter().find(|(_, image)| image.layers.contains(&layer.digest));
            if !wish.dry_run {
                content.remove_layer(layer.digest)?;
                crash_point::pass("layer-removed");
            }
            note(&mut pruned, "layer", &layer, of.map(|(name, _)| name.clone()));
        }
    }
    for document in content.documents()? {
        if wish.fate(&document, needed_documents.contains(&document.digest)) == Fate::Goes {
            if !wish.dry_run {
                content.remove_document(document.digest)?;
            }
            note(&mut pruned, "document", &document, None);
        }
    }
    for partial in content.partials()? {
        if wish.fate(&partial, false) == Fate::Goes {
            if !wish.dry_run {
                content.remove_partial(partial.digest)?;
            }
            note(&mut pruned, "partial layer", &partial, None);
        }
    }
    let gone: BTreeSet<Digest> = pruned.items.iter().map(|item| item.digest).collect();
    copies(content, wish, &mut pruned)?;
    let is_broken = |image: &ReadyImage| image.layers.iter().any(|layer| gone.contains(layer));
    let broken: Vec<String> =
        wish.images.iter().filter(|(_, image)| is_broken(image)).map(|(name, _)| name.clone()).collect();
    if !wish.dry_run {
        for name in &broken {
            content.remove_record(name)?;
            crash_point::pass("record-removed");
        }
    }
    Ok((pruned, broken))
}

/// Copies are made again without a network: those that nobody needs wait for nothing.
fn copies(content: &Content, wish: &Wish, pruned: &mut Pruned) -> Result<(), ContentError> {
    for copy in content.copies()? {
        let needed = wish.copies.get(&copy.first);
        let images = wish.images.iter().filter(|(_, image)| image.layers.contains(&copy.item.digest));
        let mut names = images.map(|(name, _)| name);
        let any = names.clone().next().cloned();
        if names.any(|name| needed.is_some_and(|needed| needed.contains(name))) {
            continue;
        }
        if !wish.dry_run {
            content.remove_copy(copy.item.digest, copy.first)?;
        }
        note(pruned, LAYER_COPY, &copy.item, any);
    }
    Ok(())
}

/// As `df` and `prune` call it.
pub const LAYER_COPY: &str = "layer copy";

fn note(pruned: &mut Pruned, kind: &str, item: &Item, image: Option<String>) {
    pruned.size = Bytes(pruned.size.0 + item.bytes);
    let size = Bytes(item.bytes);
    pruned.items.push(PrunedItem { kind: kind.to_owned(), digest: item.digest, size, image });
}

/// An image's manifest, its configuration, and the index by which its name says it was found.
fn documents_of(content: &Content, name: &str, image: &ReadyImage) -> Vec<Digest> {
    let mut list = vec![image.digest];
    list.extend(name.rsplit_once('@').and_then(|(_, digest)| Digest::parse(digest).ok()));
    let manifest = content.document(image.digest);
    let manifest = manifest.and_then(|bytes| serde_json::from_slice::<ImageManifest>(&bytes).ok());
    list.extend(manifest.and_then(|manifest| Digest::parse(manifest.config().digest().as_ref()).ok()));
    list
}
