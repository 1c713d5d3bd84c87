//! What may go. Whatever the active, the last good or the coming generation names stays: a rollback needs no network.

use std::collections::BTreeSet;

use edged_model::observed::Desired;

/// The images that some generation needs, as its manifest spells them.
pub fn needed_images(desired: &Desired) -> BTreeSet<&str> {
    let pointers = &desired.pointers;
    [pointers.active, pointers.last_good, pointers.candidate]
        .into_iter()
        .flatten()
        .filter_map(|sequence| desired.generations.get(&sequence))
        .flat_map(|generation| generation.manifest.workloads.values().map(|workload| workload.image.as_str()))
        .collect()
}
