//! `df` and `prune`.

use std::fmt::Write;

use edged_model::api::{DiskUse, Pruned};

use super::{aligned, line, widths};

pub fn used(used: &DiskUse) -> String {
    let header = ["WHAT", "COUNT", "SIZE", "RECLAIMABLE"].map(str::to_owned);
    let rows: Vec<[String; 4]> = used
        .parts
        .iter()
        .map(|part| [part.what.clone(), part.count.to_string(), part.size.human(), part.reclaimable.human()])
        .collect();
    let widths = widths(&header, &rows);
    let mut out = String::new();
    for row in [&header].into_iter().chain(&rows) {
        line(&mut out, &aligned(row, &widths));
    }
    let _ = match used.protected {
        Some(bytes) => writeln!(out, "{} of the layers are under fs-verity", bytes.human()),
        None => writeln!(out, "no layer is under fs-verity: switched off, or kernel or disk have none"),
    };
    let _ = writeln!(
        out,
        "{} free of {}; no pull takes the last {}",
        used.free.human(),
        used.total.human(),
        used.reserve.human()
    );
    for said in super::scrub::all(&used.scrub) {
        let _ = writeln!(out, "{said}");
    }
    out
}

pub fn pruned(pruned: &Pruned) -> String {
    let mut out = String::new();
    for item in &pruned.items {
        let of = item.image.as_ref().map(|image| format!("  of {image}")).unwrap_or_default();
        line(&mut out, &format!("{:<9} {}  {:>8}{of}", item.kind, item.digest.short(), item.size.human()));
    }
    let said = match (pruned.items.is_empty(), pruned.dry_run) {
        (true, _) => "nothing to take away: every image is needed by a generation".to_owned(),
        (false, true) => format!("{} would be given back", pruned.size.human()),
        (false, false) => format!("{} given back", pruned.size.human()),
    };
    line(&mut out, &said);
    out
}
