//! `images`, `volumes`, `image load` and `image check`.

use edged_model::id::{Sequence, WorkloadName};
use edged_model::images::{CheckedLayer, ImageInfo, ImageState, LoadedImage, VolumeInfo};
use edged_model::quantity::Bytes;

use super::{aligned, cut, line, reason, widths};

pub fn images(list: &[ImageInfo]) -> String {
    if list.is_empty() {
        return "none: a signed manifest brings them, or `edgectl image load`\n".to_owned();
    }
    let header = ["IMAGE", "DIGEST", "SIZE", "OWN", "USED BY"].map(str::to_owned);
    let rows: Vec<[String; 5]> = list
        .iter()
        .map(|image| {
            let size = match &image.state {
                ImageState::Ready => image.size.human(),
                ImageState::Pulling { done, total } => format!("{} of {}", done.human(), total.human()),
                ImageState::Failed(_) => "failed".to_owned(),
            };
            let digest = image.digest.map_or("-".to_owned(), |digest| digest.short());
            let name = image.names.iter().find(|name| !name.starts_with("sha256:"));
            let name = name.map_or("(loaded)", |name| name.split('@').next().unwrap_or(name));
            [cut(name, 34), digest, size, image.own.human(), users(&image.workloads, &image.generations)]
        })
        .collect();
    let widths = widths(&header, &rows);
    let mut out = String::new();
    line(&mut out, &aligned(&header, &widths));
    for (image, row) in list.iter().zip(&rows) {
        line(&mut out, &aligned(row, &widths));
        if let ImageState::Failed(why) = &image.state {
            reason(&mut out, why);
        }
    }
    out
}

fn users(workloads: &[WorkloadName], generations: &[Sequence]) -> String {
    if workloads.is_empty() && generations.is_empty() {
        return "nobody".to_owned();
    }
    let names: Vec<_> = workloads.iter().map(WorkloadName::as_str).collect();
    let numbers: Vec<_> = generations.iter().map(ToString::to_string).collect();
    format!("{} [{}]", names.join(", "), numbers.join(", "))
}

pub fn volumes(list: &[VolumeInfo]) -> String {
    if list.is_empty() {
        return "none\n".to_owned();
    }
    let header = ["VOLUME", "SIZE", "USED BY"].map(str::to_owned);
    let rows: Vec<[String; 3]> = list
        .iter()
        .map(|volume| {
            let users = users(&volume.workloads, &volume.generations);
            [volume.name.to_string(), volume.size.human(), users]
        })
        .collect();
    let widths = widths(&header, &rows);
    let mut out = String::new();
    for row in [&header].into_iter().chain(&rows) {
        line(&mut out, &aligned(row, &widths));
    }
    out
}

pub fn loaded(list: &[LoadedImage]) -> String {
    let mut out = String::new();
    for image in list {
        line(&mut out, &format!("{} layers are on disk and verified; a manifest may name", image.layers));
        for name in &image.names {
            // Not cut: it is there to be copied.
            out.push_str(&format!("  {}\n", super::clean(name)));
        }
    }
    out
}

pub fn checked(list: &[CheckedLayer]) -> String {
    let mut out = String::new();
    for layer in list {
        let verdict = match (layer.damage.is_empty(), layer.unread) {
            (false, _) => "DAMAGED",
            (true, true) => "not all was read",
            (true, false) => "as unpacked",
        };
        let read = layer.read.human();
        let copy = layer.copy.map(|first| format!(" (copy for the ids from {first})")).unwrap_or_default();
        let protected = match layer.protected {
            Bytes(0) => String::new(),
            bytes => format!(", {} under fs-verity", bytes.human()),
        };
        let said =
            format!("{}{copy}  {verdict}: {} entries, {read} read{protected}", layer.chain.short(), layer.entries);
        line(&mut out, &said);
        for damage in &layer.damage {
            line(&mut out, &format!("  {damage}"));
        }
        for image in layer.images.iter().filter(|_| !layer.damage.is_empty()) {
            line(&mut out, &format!("  of {image}"));
        }
    }
    let damaged = list.iter().filter(|layer| !layer.damage.is_empty()).count();
    let said = match (list.len(), damaged) {
        (0, _) => "there is no image".to_owned(),
        (all, 0) => format!("{all} layers are as they were unpacked"),
        (all, damaged) => format!(
            "{damaged} of {all} layers are damaged: they are fetched again when the device is started the next time"
        ),
    };
    line(&mut out, &said);
    out
}
