//! Holds layers against what was unpacked, and takes damaged ones away so that they, and they alone, are fetched again.
//! Whether it is time for that is told by a mark: the boot in which images were last in use. It is there until the next
//! boot finds it, so a boot that nobody ended in order is noticed whatever ended it.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use edged_model::id::Digest;
use edged_model::images::CheckedLayer;
use edged_model::quantity::Bytes;

use super::pull::ReadyImage;
use crate::content::reading::Reader;
use crate::content::table::Found;
use crate::content::{Content, ContentError};

/// Which images have which layer.
pub fn by_layer(images: &BTreeMap<String, ReadyImage>) -> BTreeMap<Digest, Vec<String>> {
    let mut all: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
    for (name, image) in images {
        for chain in &image.layers {
            all.entry(*chain).or_default().push(name.clone());
        }
    }
    all
}

/// Looks at each layer. `reader` is asked before each content, metadata are always looked at.
pub fn layers(content: &Content, layers: &BTreeMap<Digest, Vec<String>>, reader: &mut dyn Reader) -> Vec<CheckedLayer> {
    let check = |(chain, images): (&Digest, &Vec<String>)| {
        let found = content.check_layer(*chain, reader);
        checked(*chain, None, images, found)
    };
    layers.iter().map(check).collect()
}

/// The same for the copies of these layers that there are for ranges of ids.
pub fn copies(content: &Content, layers: &BTreeMap<Digest, Vec<String>>, reader: &mut dyn Reader) -> Vec<CheckedLayer> {
    let mut list = Vec::new();
    for first in content.copy_ranges() {
        for (chain, images) in layers.iter().filter(|(chain, _)| content.has_copy(**chain, first)) {
            let found = content.check_copy(*chain, first, reader).map(Some);
            list.push(checked(*chain, Some(first), images, found));
        }
    }
    list
}

fn checked(
    chain: Digest,
    copy: Option<u32>,
    images: &[String],
    found: Result<Option<Found>, ContentError>,
) -> CheckedLayer {
    let mut checked = CheckedLayer {
        chain,
        copy,
        images: images.to_vec(),
        entries: 0,
        read: Bytes(0),
        protected: Bytes(0),
        damage: Vec::new(),
        unread: false,
    };
    match found {
        Ok(Some(found)) => {
            checked.entries = found.entries;
            checked.read = Bytes(found.read_bytes);
            checked.protected = Bytes(found.protected_bytes);
            checked.unread = found.unread > 0;
            checked.damage = found.damage;
        }
        Ok(None) => checked.unread = true,
        // A disk that cannot be read is no whole layer.
        Err(error) => checked.damage.push(crate::store::inline_chain(&error)),
    }
    checked
}

/// Whether the images were last in use in another boot than `boot_id` and nobody has said farewell since. Then they are to
/// be looked at until [`done`]: an agent that ends in between leaves it to the next one. Else they are in use in this boot.
pub fn is_due(content: &Content, boot_id: &str, ended_in_order: bool) -> Result<bool, ContentError> {
    let path = mark(content);
    let before = fs::read_to_string(&path).ok();
    if before.as_deref() == Some(boot_id) {
        return Ok(false);
    }
    let is_due = before.as_deref().is_some_and(|mark| mark == UNCLEAN || !ended_in_order);
    if before.as_deref() != Some(UNCLEAN) || !is_due {
        write_mark(path, if is_due { UNCLEAN } else { boot_id })?;
    }
    Ok(is_due)
}

/// All that is needed has been looked at; from now on it is in use in this boot.
pub fn done(content: &Content, boot_id: &str) -> Result<(), ContentError> {
    write_mark(mark(content), boot_id)
}

/// Whether a check was begun, or asked for, and is not done.
pub fn is_begun(content: &Content) -> bool {
    fs::read_to_string(mark(content)).is_ok_and(|mark| mark == UNCLEAN)
}

/// What no boot is called.
const UNCLEAN: &str = "damaged";

/// Has the layers looked at, at the next start of the agent in whatever boot.
pub fn mark_unclean(content: &Content) -> Result<(), ContentError> {
    write_mark(mark(content), UNCLEAN)
}

fn mark(content: &Content) -> PathBuf {
    content.directory().join("in-use")
}

fn write_mark(path: PathBuf, text: &str) -> Result<(), ContentError> {
    crate::content::durable(&path, text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_boot_without_a_farewell_is_an_unclean_stop() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(&crate::config::Places::new(Some(dir.path()), None)).unwrap();
        let is_due = |boot: &str, in_order| is_due(&content, boot, in_order).unwrap();
        assert!(!is_due("one", false), "the first boot has nothing to check");
        assert!(!is_due("one", false), "another agent in the same boot");
        assert!(is_due("two", false), "the power was cut");
        assert!(is_due("two", false) && is_begun(&content), "another agent, and nobody was done");
        done(&content, "two").unwrap();
        assert!(!is_due("two", false) && !is_begun(&content), "looked at already");
        assert!(!is_due("three", true), "it was shut down in order");
        mark_unclean(&content).unwrap();
        assert!(is_due("three", true), "damage was seen");
    }
}
