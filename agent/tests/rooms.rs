//! What must hold for the tree itself: who may use whom (docs/architecture.md), and that the tests which the docs call as
//! witnesses exist. A plain scan of the text, which rustfmt keeps plain.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each room of `src/` with the rooms it may use. Tools know no stage, stages know no stage, `reconcile` knows all; the
/// signer's side (`authoring`) and the command line stand before the agent and are used by none of its rooms.
const MAY_USE: [(&str, &[&str]); 16] = [
    ("config", &[]),
    // Where a test lets the agent die; nothing in a release.
    ("crash_point", &[]),
    // Tools.
    ("store", &["config", "crash_point"]),
    ("content", &["store", "config", "crash_point"]),
    ("registry", &["content", "store", "config"]),
    ("runtime", &["crash_point"]),
    ("network", &["store", "config"]),
    // Stages.
    ("verify", &[]),
    ("execute", &["verify", "content", "registry", "runtime", "store", "network", "config", "crash_point"]),
    ("observe", &["network", "config", "crash_point"]),
    ("report", &["registry", "store", "network", "config", "crash_point"]),
    ("api", &["config"]),
    // The loop.
    (
        "reconcile",
        &[
            "verify",
            "execute",
            "observe",
            "report",
            "api",
            "store",
            "content",
            "registry",
            "runtime",
            "network",
            "config",
            "crash_point",
            // Which verbs the serial console has.
            "cli",
        ],
    ),
    // Before the agent.
    // What `-o` takes is said in one place.
    ("authoring", &["cli", "verify", "report", "registry", "content", "config"]),
    ("cli", &["authoring", "api"]),
    ("bin", &[]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn files(under: &Path, ending: &str, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(under).unwrap_or_else(|error| panic!("{}: {error}", under.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if !path.ends_with("target") {
                files(&path, ending, into);
            }
        } else if path.to_string_lossy().ends_with(ending) {
            into.push(path);
        }
    }
}

/// The rooms named after `crate::` in a file, one by one or in braces. Tests may look anywhere.
fn used_rooms(text: &str) -> BTreeSet<String> {
    let mut rooms = BTreeSet::new();
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    for line_or_group in code.split("crate::").skip(1) {
        let first_name =
            |text: &str| text.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next().map(str::to_owned);
        match line_or_group.strip_prefix('{') {
            None => rooms.extend(first_name(line_or_group)),
            Some(group) => {
                let group = group.split(';').next().unwrap_or_default();
                let mut depth = 0;
                let mut name = String::new();
                for c in group.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => rooms.extend(first_name(&std::mem::take(&mut name))),
                        c if depth == 0 => name.push(c),
                        _ => {}
                    }
                }
                rooms.extend(first_name(&name));
            }
        }
    }
    rooms
}

#[test]
fn rooms_use_only_what_they_may() {
    let source = root().join("agent/src");
    let known: BTreeSet<&str> = MAY_USE.iter().map(|(room, _)| *room).collect();
    let mut paths = Vec::new();
    files(&source, ".rs", &mut paths);
    let mut wrong = Vec::new();
    for path in paths {
        let inside = path.strip_prefix(&source).unwrap();
        if inside.ends_with("lib.rs") || path.ends_with("tests.rs") {
            continue;
        }
        let room = inside.iter().next().unwrap().to_string_lossy();
        let room = room.trim_end_matches(".rs");
        let Some((_, may)) = MAY_USE.iter().find(|(name, _)| *name == room) else {
            panic!("{room} is a new room: say here and in docs/architecture.md what it may use");
        };
        for used in used_rooms(&fs::read_to_string(&path).unwrap()) {
            if known.contains(used.as_str()) && used != room && !may.contains(&used.as_str()) {
                wrong.push(format!("{}: {room} uses {used}", inside.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_scan_sees_names_in_braces() {
    let text = "use crate::{store::{Door, Kept}, verify};\nfn f() { crate::api::serve(); }\n#[cfg(test)]\nmod tests { use crate::cli; }";
    assert_eq!(used_rooms(text).into_iter().collect::<Vec<_>>(), ["api", "store", "verify"]);
}

/// Docs name a witness as `file.rs: test_function`.
#[test]
fn the_tests_that_the_docs_name_exist() {
    let (mut docs, mut sources) = (Vec::new(), Vec::new());
    files(&root().join("docs"), ".md", &mut docs);
    for place in ["agent", "fleet", "tests", "xtask"] {
        files(&root().join(place), ".rs", &mut sources);
    }
    let mut named = 0;
    let mut missing = Vec::new();
    for doc in docs {
        for span in fs::read_to_string(&doc).unwrap().split('`').skip(1).step_by(2) {
            let Some((file, test)) = span.split_once(".rs: ") else { continue };
            named += 1;
            let is_there = sources
                .iter()
                .filter(|source| source.ends_with(format!("{file}.rs")))
                .any(|source| fs::read_to_string(source).is_ok_and(|text| text.contains(&format!("fn {test}("))));
            if !is_there {
                missing.push(format!("{}: {span}", doc.display()));
            }
        }
    }
    assert!(named > 0 && missing.is_empty(), "{missing:#?}");
}

/// docs/trust.md: attacker, what they hold, can, cannot, and the test that shows it.
#[test]
fn every_attacker_of_the_threat_table_has_a_witness() {
    let text = fs::read_to_string(root().join("docs/trust.md")).unwrap();
    let section = text.split("\n## ").find(|section| section.starts_with("Threat model")).expect("a threat model");
    let rows: Vec<&str> = section.lines().filter(|line| line.starts_with("| ")).skip(1).collect();
    assert!(rows.len() > 10, "{rows:#?}");
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        assert!(cells.len() == 5 && cells.iter().all(|cell| !cell.is_empty()), "{row}");
        assert!(cells[4].contains(".rs: ") || cells[4].starts_with("not defended: "), "{row}");
    }
}
