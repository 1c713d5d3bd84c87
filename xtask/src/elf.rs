//! Which libraries a program needs, of whatever architecture it is: `readelf` reads them all. Only what is needed goes
//! into an image.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use edged_qemu::arch::Arch;
use edged_qemu::process;

/// The directories Debian keeps libraries in, below a tree.
fn library_directories(arch: Arch) -> Vec<String> {
    let triplet = match arch {
        Arch::X86_64 => "x86_64-linux-gnu",
        Arch::Aarch64 => "aarch64-linux-gnu",
        Arch::Armv7 => "arm-linux-gnueabihf",
    };
    vec![
        format!("lib/{triplet}"),
        format!("usr/lib/{triplet}"),
        "lib".to_owned(),
        "usr/lib".to_owned(),
        "lib64".to_owned(),
    ]
}

/// A library: the path at which the program looks for it, and the file in the tree.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Library {
    pub path: String,
    pub file: PathBuf,
}

/// The loader and every library that `programs` need, directly or through others, found in `tree`.
pub fn libraries(arch: Arch, tree: &Path, programs: &[PathBuf]) -> Result<BTreeSet<Library>> {
    let mut found = BTreeSet::new();
    let mut queue: Vec<PathBuf> = programs.to_vec();
    while let Some(file) = queue.pop() {
        let (loader, names) = needed(&file)?;
        if let Some(loader) = loader {
            let path = loader.trim_start_matches('/').to_owned();
            let file = resolve(tree, &path).with_context(|| format!("no loader {path} in the packages"))?;
            found.insert(Library { path, file });
        }
        for name in names {
            let places = library_directories(arch);
            let place = places.iter().map(|dir| format!("{dir}/{name}")).find_map(|p| Some((resolve(tree, &p)?, p)));
            let Some((library, path)) = place else {
                // The loader is a needed library too on some architectures; it was taken by its own path.
                if name.starts_with("ld-linux") {
                    continue;
                }
                bail!("{} needs {name}, which is in none of the packages", file.display());
            };
            if found.insert(Library { path, file: library.clone() }) {
                queue.push(library);
            }
        }
    }
    Ok(found)
}

/// The loader a program asks for and the libraries it names.
fn needed(file: &Path) -> Result<(Option<String>, Vec<String>)> {
    let text = process::read(Command::new("readelf").args(["-dlW"]).arg(file))?;
    let between = |line: &str, open: char, close: char| {
        let start = line.rfind(open)? + 1;
        Some(line[start..].split(close).next()?.to_owned())
    };
    let loader = text
        .lines()
        .find_map(|line| line.split("interpreter: ").nth(1))
        .map(|rest| rest.trim_end_matches(']').trim().to_owned());
    let names = text.lines().filter(|line| line.contains("(NEEDED)")).filter_map(|line| between(line, '[', ']'));
    Ok((loader, names.collect()))
}

/// Follows links inside the tree, where an absolute one starts at the tree's own root.
pub fn resolve(tree: &Path, path: &str) -> Option<PathBuf> {
    let mut relative = PathBuf::from(path);
    for _ in 0..16 {
        let file = tree.join(&relative);
        match fs::symlink_metadata(&file) {
            Ok(meta) if meta.is_symlink() => {
                let target = fs::read_link(&file).ok()?;
                relative = match target.strip_prefix("/") {
                    Ok(absolute) => absolute.to_owned(),
                    Err(_) => relative.parent()?.join(target),
                };
            }
            Ok(meta) if meta.is_file() => return Some(file),
            _ => return None,
        }
    }
    None
}
