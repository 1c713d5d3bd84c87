//! The time of the build, for the time floor: `SOURCE_DATE_EPOCH` where it is set (reproducible builds), else that of the
//! newest source file of this package, so that the same tree gives the same binary.

use std::path::Path;
use std::time::UNIX_EPOCH;

fn newest(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let age = |entry: std::fs::DirEntry| {
        let path = entry.path();
        if path.is_dir() {
            return newest(&path);
        }
        let modified = entry.metadata().and_then(|meta| meta.modified()).ok();
        modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map_or(0, |since| since.as_secs())
    };
    entries.map(age).max().unwrap_or(0)
}

fn main() {
    println!("cargo::rerun-if-env-changed=SOURCE_DATE_EPOCH");
    println!("cargo::rerun-if-changed=src");
    let epoch = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    println!("cargo::rustc-env=EDGED_BUILT_AT={}", epoch.unwrap_or_else(|| newest(Path::new("src"))));
}
