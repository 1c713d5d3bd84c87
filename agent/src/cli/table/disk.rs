//! `df` and `prune`.

use std::fmt::Write;

use edged_model::api::GenerationRole;
use edged_model::disk::{Cause, DiskItem, DiskUse, ItemFate, NeededBy, Pruned, Unused};
use edged_model::id::WorkloadName;
use edged_model::quantity::Bytes;

use super::{aligned, line, widths, wrapped};

/// `all`: with each thing that came with an image, and what keeps it.
pub fn used(used: &DiskUse, all: bool) -> String {
    let header = ["WHAT", "COUNT", "SIZE", "RECLAIMABLE"].map(str::to_owned);
    // What is not there need not be told, but that nothing is unknown.
    let shown = used.parts.iter().filter(|part| part.size.0 > 0 || part.count > 0 || part.what == "other");
    let rows: Vec<[String; 4]> = shown
        .map(|part| [part.what.clone(), part.count.to_string(), part.size.human(), part.reclaimable.human()])
        .collect();
    let widths = widths(&header, &rows);
    let mut out = String::new();
    for row in [&header].into_iter().chain(&rows) {
        line(&mut out, &aligned(row, &widths));
    }
    for unknown in &used.unknown {
        wrapped(&mut out, "  not edged's: ", &format!("{} ({})", unknown.path, unknown.size.human()));
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
    let parts: u64 = used.parts.iter().map(|part| part.size.0).sum();
    let besides = used.total.0.saturating_sub(used.free.0).saturating_sub(parts);
    let _ = writeln!(out, "{} beside these: the file system's own, or of others on it", Bytes(besides).human());
    if let Some(budget) = used.budget {
        let images: u64 = used.items.iter().map(|item| item.size.0).sum();
        let _ = writeln!(out, "{} of images, of a budget of {}", Bytes(images).human(), budget.human());
    }
    for said in super::scrub::all(&used.scrub) {
        let _ = writeln!(out, "{said}");
    }
    if all && !used.items.is_empty() {
        out.push('\n');
        used.items.iter().for_each(|shown| item(&mut out, shown));
    }
    out
}

pub fn pruned(pruned: &Pruned) -> String {
    let mut out = String::new();
    for shown in &pruned.items {
        item(&mut out, shown);
    }
    let said = match (pruned.items.is_empty(), pruned.dry_run) {
        (true, _) => "nothing to take away: every image is needed by a generation".to_owned(),
        (false, true) => format!("{} would be given back", pruned.size.human()),
        (false, false) => format!("{} given back", pruned.size.human()),
    };
    line(&mut out, &said);
    if !pruned.stays.is_empty() {
        out.push_str("\nWhat stays:\n");
        pruned.stays.iter().for_each(|shown| item(&mut out, shown));
    }
    out
}

/// What it is, and below that why it stays or goes.
fn item(out: &mut String, item: &DiskItem) {
    let of = item.image.as_ref().map(|image| format!("  of {image}")).unwrap_or_default();
    let copy = item.copy.map(|first| format!(" for the ids from {first}")).unwrap_or_default();
    line(out, &format!("{:<13} {}  {:>8}{copy}{of}", item.kind, item.digest.short(), item.size.human()));
    if let Some(fate) = &item.fate {
        wrapped(out, "  ", &in_words(fate));
    }
}

fn in_words(fate: &ItemFate) -> String {
    match fate {
        ItemFate::Needed { by } => format!("stays: needed by {}", whom(by)),
        ItemFate::Awaited { by } => format!("stays unless the room is needed: on its way to {}", whom(by)),
        ItemFate::Young { unused, until } => {
            format!("stays until {until} (images.keep-unused): {}", since(unused))
        }
        ItemFate::Goes { cause: Cause::MadeAgain, .. } => {
            "goes: no workload with these ids needs it, and it is made again without a network".to_owned()
        }
        ItemFate::Goes { unused, cause } => {
            let cause = match cause {
                Cause::MadeAgain | Cause::Asked => "",
                Cause::Old => ", for longer than images.keep-unused",
                Cause::OverBudget => ", and all images together are over images.budget",
                Cause::RoomIsShort => ", and a pull needs the room",
            };
            format!("goes: {}{cause}", since(unused))
        }
    }
}

fn since(unused: &Unused) -> String {
    match unused.generation {
        Some(last) => format!("no generation needs it since {}, when generation {last} was over", unused.since),
        None => format!("no generation that is remembered needs it; here since {}", unused.since),
    }
}

/// `web, db of generation 4 (active), web of generation 3 (last good)`
fn whom(by: &[NeededBy]) -> String {
    let one = |by: &NeededBy| {
        let names: Vec<_> = by.workloads.iter().map(WorkloadName::as_str).collect();
        let role = match by.role {
            GenerationRole::Active => "active",
            GenerationRole::LastGood => "last good",
            GenerationRole::Candidate => "coming",
        };
        format!("{} of generation {} ({role})", names.join(", "), by.generation)
    };
    by.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::disk::{DiskPart, UnknownFile};
    use edged_model::id::{Digest, Sequence};
    use edged_model::quantity::Timestamp;
    use edged_model::scrub::ScrubStatus;

    fn layer(name: &str, fate: ItemFate) -> DiskItem {
        let (kind, image) = ("layer".to_owned(), Some(format!("r.example/{name}")));
        let digest = Digest::of(name.as_bytes());
        DiskItem { kind, digest, copy: None, size: Bytes(12 << 20), image, fate: Some(fate) }
    }

    fn items() -> [DiskItem; 3] {
        let unused = Unused { since: Timestamp(1_700_000_000), generation: Some(Sequence(3)) };
        let by = |generation, role| NeededBy {
            generation: Sequence(generation),
            role,
            workloads: ["db", "web"].map(|name| WorkloadName::parse(name).unwrap()).into(),
        };
        let needed = vec![by(4, GenerationRole::LastGood), by(5, GenerationRole::Active)];
        [
            layer("needed", ItemFate::Needed { by: needed }),
            layer("young", ItemFate::Young { unused, until: Timestamp(1_700_086_400) }),
            layer("old", ItemFate::Goes { unused: Unused { generation: None, ..unused }, cause: Cause::Old }),
        ]
    }

    const EACH: &str = "\
layer         c0cea2dd2852      12Mi  of r.example/needed
  stays: needed by db, web of generation 4 (last good), db, web of generation 5
  (active)
layer         dbba921ce205      12Mi  of r.example/young
  stays until 2023-11-15T22:13:20Z (images.keep-unused): no generation needs it
  since 2023-11-14T22:13:20Z, when generation 3 was over
layer         cba06b5736fa      12Mi  of r.example/old
  goes: no generation that is remembered needs it; here since
  2023-11-14T22:13:20Z, for longer than images.keep-unused
";

    #[test]
    fn what_takes_the_disk_and_what_keeps_each_thing_there() {
        let part = |what: &str, mebibytes| DiskPart {
            what: what.to_owned(),
            count: 2,
            size: Bytes::mebi(mebibytes),
            reclaimable: Bytes(0),
        };
        let used = DiskUse {
            total: Bytes::mebi(100),
            free: Bytes::mebi(50),
            reserve: Bytes::mebi(8),
            budget: Some(Bytes::mebi(64)),
            protected: None,
            scrub: ScrubStatus::default(),
            parts: vec![part("layers", 36), DiskPart { count: 0, ..part("run", 0) }, part("other", 1)],
            unknown: vec![UnknownFile { path: "stranger\u{1b}[2J".to_owned(), size: Bytes::mebi(1) }],
            items: items().into(),
        };
        let short = super::used(&used, false);
        let expected = "\
WHAT    COUNT  SIZE  RECLAIMABLE
layers  2      36Mi  0B
other   2      1Mi   0B
  not edged's: stranger\u{fffd}[2J (1Mi)
no layer is under fs-verity: switched off, or kernel or disk have none
50Mi free of 100Mi; no pull takes the last 8Mi
13Mi beside these: the file system's own, or of others on it
36Mi of images, of a budget of 64Mi
no scrub: it is switched off
";
        assert_eq!(short, expected);
        assert_eq!(super::used(&used, true), format!("{short}\n{EACH}"));
    }

    #[test]
    fn a_dry_run_says_of_each_thing_why_it_would_go_or_stay() {
        let [needed, young, old] = items();
        let pruned = Pruned { dry_run: true, items: vec![old], size: Bytes::mebi(12), stays: vec![needed, young] };
        let shown = super::pruned(&pruned);
        let old_first = EACH.rfind("layer ").unwrap();
        let (stays, goes) = EACH.split_at(old_first);
        assert_eq!(shown, format!("{goes}12Mi would be given back\n\nWhat stays:\n{stays}"));
    }
}
