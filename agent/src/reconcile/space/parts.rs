//! Whose each file below the data directory is: every one belongs to one part, and what edged did not put there to the last.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use edged_model::disk::{DiskPart, UnknownFile};
use edged_model::id::Digest;
use edged_model::quantity::Bytes;

use crate::config::Places;
use crate::content::usage::walk;

/// Unknown files and directories that are named, largest first.
const NAMED_MAX: usize = 10;

/// In the order in which they are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// With the tables that they are held against.
    Layers,
    Copies,
    /// Layers while they are unpacked, copied or taken away.
    Staging,
    Documents,
    /// What names have become.
    Names,
    Partials,
    Workloads,
    Volumes,
    Logs,
    State,
    /// Stores that were damaged and set aside.
    DamagedState,
    Keep,
    /// Sockets and namespaces: with `--root` they lie there too.
    Run,
    /// Single small files: the clock, ids, counts; and the directories between.
    Notes,
    Other,
}

const ALL: [Part; 15] = [
    Part::Layers,
    Part::Copies,
    Part::Staging,
    Part::Documents,
    Part::Names,
    Part::Partials,
    Part::Workloads,
    Part::Volumes,
    Part::Logs,
    Part::State,
    Part::DamagedState,
    Part::Keep,
    Part::Run,
    Part::Notes,
    Part::Other,
];

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Layers => "layers",
            Self::Copies => "layer copies",
            Self::Staging => "layers in work",
            Self::Documents => "documents",
            Self::Names => "image names",
            Self::Partials => "partial layers",
            Self::Workloads => "workloads",
            Self::Volumes => "volumes",
            Self::Logs => "logs",
            Self::State => "state",
            Self::DamagedState => "damaged state",
            Self::Keep => "keep",
            Self::Run => "run",
            Self::Notes => "notes",
            Self::Other => "other",
        }
    }

    /// Which items of a collection are in it.
    fn kind(self) -> Option<&'static str> {
        use crate::execute::reclaim::{DOCUMENT, LAYER, LAYER_COPY, PARTIAL_LAYER};
        match self {
            Self::Layers => Some(LAYER),
            Self::Copies => Some(LAYER_COPY),
            Self::Documents => Some(DOCUMENT),
            Self::Partials => Some(PARTIAL_LAYER),
            _ => None,
        }
    }
}

/// Where a file belongs, and at which depth the things lie that are counted there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Belongs {
    part: Part,
    counted_at: usize,
}

/// A path from the data directory on, as text: no name of ours is anything else.
struct Names<'n>(&'n [OsString]);

impl<'n> Names<'n> {
    fn at(&self, depth: usize) -> &'n str {
        self.0.get(depth).and_then(|name| name.to_str()).unwrap_or_default()
    }

    fn is_digest(&self, depth: usize) -> bool {
        is_digest(self.at(depth))
    }

    /// Also while it is written under another name, or its table.
    fn is_about_digest(&self, depth: usize) -> bool {
        is_digest(self.at(depth).split('.').next().unwrap_or_default())
    }
}

fn is_digest(name: &str) -> bool {
    Digest::parse(&format!("{}{name}", Digest::PREFIX)).is_ok()
}

/// `own`: files of the configuration that lie there.
fn belongs(names: &[OsString], own: &[PathBuf]) -> Belongs {
    let text = Names(names);
    let to = |part, counted_at| Belongs { part, counted_at };
    let other = to(Part::Other, usize::MAX);
    let if_known = |is_known: bool, part, counted_at| if is_known { to(part, counted_at) } else { other };
    // Of a file of ours while it is written under another name.
    let base = |depth: usize| text.at(depth).split(".new-").next().unwrap_or_default();
    match (text.at(0), names.len()) {
        (_, 0) => to(Part::Notes, usize::MAX),
        ("layers", 1) => to(Part::Layers, usize::MAX),
        ("layers", depth) => match text.at(1) {
            "ingest" => to(Part::Staging, 3),
            "copies" if depth < 4 => if_known(depth < 3 || text.at(2).parse::<u32>().is_ok(), Part::Copies, usize::MAX),
            "copies" => if_known(text.is_about_digest(3), Part::Copies, if text.is_digest(3) { 4 } else { usize::MAX }),
            _ => if_known(text.is_digest(1), Part::Layers, 2),
        },
        ("content", 1) => to(Part::Notes, usize::MAX),
        ("content", depth) => match base(1) {
            "blobs" => if_known(depth < 3 || text.is_about_digest(2), Part::Documents, 3),
            "images" => if_known(depth < 3 || text.is_about_digest(2), Part::Names, 3),
            "partial" => if_known(depth < 3 || text.is_about_digest(2), Part::Partials, 3),
            "tables" => if_known(depth < 3 || text.is_about_digest(2), Part::Layers, usize::MAX),
            "in-use" | "scrub" | "traffic" => to(Part::Notes, 2),
            _ => other,
        },
        ("workloads", _) => to(Part::Workloads, 2),
        ("volumes", _) => to(Part::Volumes, 2),
        ("log", _) => to(Part::Logs, 2),
        ("state", _) => to(Part::State, 2),
        ("keep", _) => to(Part::Keep, 2),
        ("run", _) => to(Part::Run, 2),
        // Made with the file system; what a repair has put there is nobody's.
        ("lost+found", 1) => to(Part::Notes, 1),
        (name, _) if name.starts_with("state.damaged-") => to(Part::DamagedState, 1),
        _ => {
            let is_ours =
                matches!(base(0), "clock" | "clock-end" | "user-ids" | "volume-ids" | "last-panic" | "state.opening");
            let leads_to = |path: &PathBuf| path.starts_with(names.iter().collect::<PathBuf>());
            if_known(is_ours || own.iter().any(leads_to), Part::Notes, 1)
        }
    }
}

/// What the data directory holds.
#[derive(Debug, Default)]
pub(super) struct Holdings {
    sizes: BTreeMap<Part, (u64, u64)>,
    unknown: BTreeMap<PathBuf, u64>,
}

impl Holdings {
    /// Looks at every file.
    pub(super) fn look(places: &Places, trust_root: Option<&Path>) -> Self {
        let data = places.data();
        let trust_beside = places.config_file.with_file_name("trust.cose");
        let configured = [places.config_file.as_path(), &trust_beside].into_iter().chain(trust_root);
        let own: Vec<PathBuf> =
            configured.filter_map(|path| path.strip_prefix(data).ok()).map(Path::to_owned).collect();
        let mut holdings = Self::default();
        walk(data, &mut |names, bytes, _| holdings.add(names, bytes, &own));
        holdings
    }

    fn add(&mut self, names: &[OsString], bytes: u64, own: &[PathBuf]) {
        let Belongs { part, counted_at } = belongs(names, own);
        let (count, sum) = self.sizes.entry(part).or_default();
        *sum += bytes;
        *count += u64::from(names.len() == counted_at);
        if part == Part::Other {
            // The topmost that is unknown stands for all below it.
            let depth = (1..=names.len()).find(|depth| belongs(&names[..*depth], own).part == Part::Other);
            let path: PathBuf = names[..depth.unwrap_or(names.len())].iter().collect();
            if !self.unknown.contains_key(&path) {
                *count += 1;
            }
            *self.unknown.entry(path).or_default() += bytes;
        }
    }

    /// `reclaimable`: by the kind of items.
    pub(super) fn parts(&self, reclaimable: impl Fn(&str) -> Bytes) -> Vec<DiskPart> {
        let part = |part: Part| {
            let (count, bytes) = self.sizes.get(&part).copied().unwrap_or_default();
            let reclaimable = part.kind().map_or(Bytes(0), &reclaimable);
            DiskPart { what: part.name().to_owned(), count, size: Bytes(bytes), reclaimable }
        };
        ALL.into_iter().map(part).collect()
    }

    pub(super) fn unknown(&self) -> Vec<UnknownFile> {
        let mut largest_first: Vec<(&PathBuf, u64)> = self.unknown.iter().map(|(path, bytes)| (path, *bytes)).collect();
        largest_first.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let named = largest_first.into_iter().take(NAMED_MAX);
        named
            .map(|(path, bytes)| UnknownFile { path: path.to_string_lossy().into_owned(), size: Bytes(bytes) })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// The same in other words: what `du -x` adds up.
    fn charged(path: &Path, seen: &mut BTreeSet<u64>) -> u64 {
        let meta = fs::symlink_metadata(path).unwrap();
        let below = if meta.is_dir() {
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect()
        } else {
            vec![]
        };
        let own = if seen.insert(meta.ino()) { meta.blocks() * 512 } else { 0 };
        own + below.iter().map(|path| charged(path, seen)).sum::<u64>()
    }

    #[test]
    fn every_file_is_in_one_part_and_what_nobody_knows_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        let digest = Digest::of(b"a").hex();
        // In each part another number of blocks, so that none stands for another.
        let files = [
            ("layers/DIGEST/bin/sh", "layers", 1),
            ("content/tables/DIGEST", "layers", 1),
            ("content/tables/DIGEST.new-1", "layers", 1),
            ("layers/copies/1879048192/DIGEST/bin/sh", "layer copies", 1),
            ("layers/copies/1879048192/DIGEST.table", "layer copies", 3),
            ("layers/ingest/DIGEST/half", "layers in work", 5),
            ("layers/ingest/gone-DIGEST/half", "layers in work", 1),
            ("content/blobs/DIGEST", "documents", 7),
            ("content/blobs/DIGEST.new-3", "documents", 1),
            ("content/images/DIGEST", "image names", 9),
            ("content/partial/DIGEST", "partial layers", 10),
            ("workloads/web/0123/upper/file", "workloads", 11),
            ("volumes/data/deep/file", "volumes", 12),
            ("log/web/0.log", "logs", 13),
            ("state/db", "state", 14),
            ("state.damaged-1/db", "damaged state", 15),
            ("keep/summary", "keep", 16),
            ("run/agent.sock", "run", 17),
            ("clock", "notes", 1),
            ("clock-end", "notes", 1),
            ("content/traffic", "notes", 1),
            ("content/scrub", "notes", 1),
            ("content/in-use", "notes", 1),
            ("user-ids", "notes", 1),
            ("volume-ids", "notes", 1),
            ("last-panic", "notes", 1),
            ("state.opening", "notes", 1),
            ("agent.toml", "notes", 1),
            ("keys/root.cose", "notes", 1),
            ("lost+found/#12", "other", 1),
            ("stranger/deep/file", "other", 30),
            ("stranger/deep/another", "other", 1),
            ("content/strange", "other", 1),
            ("layers/strange", "other", 1),
            ("layers/copies/strange/file", "other", 1),
            ("content/blobs/strange", "other", 1),
        ];
        let mut blocks: BTreeMap<&str, u64> = BTreeMap::new();
        for (name, part, pages) in files {
            let path = data.join(name.replace("DIGEST", &digest));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, vec![7; pages << 12]).unwrap();
            *blocks.entry(part).or_default() += (pages as u64) << 12;
        }
        // A second name costs nothing, whosever it is; a hole neither.
        fs::hard_link(data.join("volumes/data/deep/file"), data.join("volumes/data/again")).unwrap();
        fs::File::create(data.join("volumes/data/hole")).unwrap().set_len(1 << 30).unwrap();
        let places = Places::new(Some(data), None);
        let holdings = Holdings::look(&places, Some(&data.join("keys/root.cose")));
        let parts = holdings.parts(|kind| Bytes(kind.len() as u64));
        let sum: u64 = parts.iter().map(|part| part.size.0).sum();
        assert_eq!(sum, charged(data, &mut BTreeSet::new()), "{parts:#?}");
        for part in &parts {
            // Directories may cost a block each, or nothing.
            let files = blocks.remove(part.what.as_str()).unwrap_or_else(|| panic!("{} has no file", part.what));
            assert!((files..files + (16 << 12)).contains(&part.size.0), "{part:?}: {files} of files");
        }
        assert_eq!(blocks, BTreeMap::new(), "parts that are not shown");
        let counts: Vec<(&str, u64)> = parts.iter().map(|part| (part.what.as_str(), part.count)).collect();
        let expected = [
            ("layers", 1),
            ("layer copies", 1),
            ("layers in work", 2),
            ("documents", 2),
            ("image names", 1),
            ("partial layers", 1),
            ("workloads", 1),
            ("volumes", 1),
            ("logs", 1),
            ("state", 1),
            ("damaged state", 1),
            ("keep", 1),
            ("run", 1),
        ];
        assert_eq!(counts[..13], expected);
        assert_eq!(counts[14], ("other", 6));
        let unknown: Vec<String> = holdings.unknown().into_iter().map(|file| file.path).collect();
        assert_eq!(unknown[0], "stranger", "the largest first");
        for path in
            ["lost+found/#12", "content/strange", "layers/strange", "layers/copies/strange", "content/blobs/strange"]
        {
            assert!(unknown.iter().any(|unknown| unknown == path), "{path}: {unknown:?}");
        }
        assert_eq!(unknown.len(), 6, "{unknown:?}");
        assert_eq!(parts[0].reclaimable, Bytes(5), "what a collection calls `layer`");
    }
}
