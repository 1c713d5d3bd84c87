//! The workload images of `images/`: what the tests and the demo run. Built from Debian's packages for the device's
//! architecture, with exactly the libraries their programs need, in layers that images share.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::Artifacts;
use edged_qemu::process;

use crate::debian::Archive;
use crate::elf;
use crate::image::SUITE;
use crate::oci::{self, Start};
use crate::progress;
use crate::setup::{self, Need};
use crate::toolchain::{self, Profile};

/// An image made of programs from Debian's packages.
struct Recipe {
    name: &'static str,
    packages: &'static [&'static str],
    programs: &'static [&'static str],
    /// More files and directories of the packages.
    files: &'static [&'static str],
    links: &'static [(&'static str, &'static str)],
    /// `edgectl` for the device's architecture as well.
    has_edgectl: bool,
    start: Start,
}

const NO_START: Start = Start { entrypoint: &[], cmd: &[], env: &[], stop_signal: None };

const RECIPES: [Recipe; 4] = [
    Recipe {
        name: "busybox",
        packages: &["busybox-static"],
        programs: &["bin/busybox"],
        files: &[],
        links: &[
            ("bin/sh", "busybox"),
            ("bin/cat", "busybox"),
            ("bin/echo", "busybox"),
            ("bin/false", "busybox"),
            ("bin/ls", "busybox"),
            ("bin/ps", "busybox"),
            ("bin/sleep", "busybox"),
            ("bin/true", "busybox"),
            ("bin/wget", "busybox"),
            ("bin/nc", "busybox"),
            ("bin/httpd", "busybox"),
            ("bin/top", "busybox"),
            ("bin/mount", "busybox"),
            ("bin/id", "busybox"),
            ("bin/ip", "busybox"),
            ("bin/kill", "busybox"),
        ],
        has_edgectl: false,
        start: Start { cmd: &["/bin/sh"], ..NO_START },
    },
    Recipe {
        name: "nginx",
        packages: &["nginx-light"],
        programs: &["usr/sbin/nginx"],
        files: &["etc/nginx/mime.types"],
        links: &[("var/log/nginx/access.log", "/dev/stdout"), ("var/log/nginx/error.log", "/dev/stderr")],
        has_edgectl: false,
        start: Start {
            entrypoint: &["/usr/sbin/nginx"],
            cmd: &["-g", "daemon off;"],
            stop_signal: Some("SIGQUIT"),
            ..NO_START
        },
    },
    Recipe {
        name: "redis",
        packages: &["redis-server"],
        programs: &["usr/bin/redis-check-rdb", "usr/bin/redis-cli"],
        files: &[],
        links: &[("usr/bin/redis-server", "redis-check-rdb")],
        has_edgectl: false,
        start: Start { entrypoint: &["/usr/bin/redis-server"], cmd: &["/etc/redis.conf"], ..NO_START },
    },
    Recipe {
        name: "ssh",
        packages: &["dropbear-bin", "busybox-static"],
        programs: &["usr/sbin/dropbear", "bin/busybox"],
        files: &[],
        links: &[("bin/sh", "busybox"), ("bin/ls", "busybox"), ("bin/cat", "busybox")],
        has_edgectl: true,
        // In the foreground, to stderr, no passwords; a host key of its own, made at the first connection.
        start: Start { entrypoint: &["/usr/sbin/dropbear", "-F", "-E", "-s", "-R", "-p", "22"], ..NO_START },
    },
];

pub fn run(arch: Arch) -> Result<()> {
    for path in build_all(arch)? {
        println!("{}", path.display());
    }
    Ok(())
}

/// Builds what is not there or has changed; gives back the layouts.
pub fn build_all(arch: Arch) -> Result<Vec<PathBuf>> {
    setup::ensure(&[Need::Build(arch)])?;
    let artifacts = Artifacts::find();
    let mut layouts = vec![programs(&artifacts, arch)?];
    for recipe in &RECIPES {
        layouts.push(build(&artifacts, arch, recipe)?);
    }
    Ok(layouts)
}

fn build(artifacts: &Artifacts, arch: Arch, recipe: &Recipe) -> Result<PathBuf> {
    let out = artifacts.image(arch, recipe.name);
    let ours = artifacts.root().join("images").join(recipe.name).join("files");
    let tree = Archive::open(&artifacts.cache(), SUITE, arch.debian())?.unpack_with_dependencies(recipe.packages)?;
    let edgectl = match recipe.has_edgectl {
        true => Some(toolchain::build(arch, Profile::Firmware, "edged", &["edgectl"])?.join("edgectl")),
        false => None,
    };
    // The packages with their versions, our own files, and this very recipe: if none changed, the image stands.
    let key = [
        fs::read_to_string(tree.join(".packages"))?,
        digest_of_tree(&ours)?,
        edgectl.as_ref().map(fs::read).transpose()?.map(|bytes| oci::digest(&bytes)).unwrap_or_default(),
        oci::digest(include_bytes!("workloads.rs")),
        oci::digest(include_bytes!("oci.rs")),
    ]
    .join("\n");
    if is_current(&out, &key) {
        return Ok(out);
    }
    progress::step(&format!("building the image {} for {arch}", recipe.name));
    let scratch = Scratch::beside(&out)?;
    let [base, libraries, program, site] = ["base", "libraries", "program", "site"].map(|name| scratch.0.join(name));
    for dir in ["etc", "tmp", "run", "var/log/nginx", "data"] {
        fs::create_dir_all(base.join(dir))?;
    }
    fs::write(
        base.join("etc/passwd"),
        "root:x:0:0::/:/bin/sh\nwww-data:x:33:33::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
    )?;
    fs::write(base.join("etc/group"), "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n")?;
    for path in recipe.programs.iter().chain(recipe.files) {
        let file = elf::resolve(&tree, path).with_context(|| format!("no {path} in {:?}", recipe.packages))?;
        copy(&file, &program.join(path))?;
    }
    for (path, target) in recipe.links {
        let link = program.join(path);
        fs::create_dir_all(link.parent().context("a link has a directory")?)?;
        symlink(target, link)?;
    }
    let needed: Vec<PathBuf> = recipe.programs.iter().filter_map(|path| elf::resolve(&tree, path)).collect();
    for library in elf::libraries(arch, &tree, &needed)? {
        // The C library is the same in every image: its layer is stored once.
        let is_common =
            ["libc.so", "ld-linux", "libm.so", "libpthread", "libdl"].iter().any(|n| library.path.contains(n));
        copy(&library.file, &if is_common { &base } else { &libraries }.join(&library.path))?;
    }
    if let Some(edgectl) = &edgectl {
        copy(edgectl, &site.join("usr/bin/edgectl"))?;
    }
    if ours.is_dir() {
        process::run(Command::new("cp").arg("-r").arg(ours.join(".")).arg(fresh(&site)?))?;
    }
    let layers: Vec<&Path> =
        [&base, &libraries, &program, &site].into_iter().map(PathBuf::as_path).filter(|d| d.is_dir()).collect();
    finish(&out, &scratch, &key, arch, &layers, recipe.start)?;
    Ok(out)
}

/// Our own programs: one static binary, one layer.
fn programs(artifacts: &Artifacts, arch: Arch) -> Result<PathBuf> {
    let out = artifacts.image(arch, "programs");
    let binary = toolchain::build(arch, Profile::Firmware, "sample-programs", &["sample"])?.join("sample");
    let key = oci::digest(&fs::read(&binary)?);
    if is_current(&out, &key) {
        return Ok(out);
    }
    progress::step(&format!("building the image programs for {arch}"));
    let scratch = Scratch::beside(&out)?;
    let root = scratch.0.join("root");
    for dir in ["etc", "tmp", "proc", "sys", "dev"] {
        fs::create_dir_all(root.join(dir))?;
    }
    copy(&binary, &root.join("sample"))?;
    finish(&out, &scratch, &key, arch, &[&root], Start { entrypoint: &["/sample"], ..NO_START })?;
    Ok(out)
}

/// The layout appears complete, with the key it was built from, or not at all.
fn finish(out: &Path, scratch: &Scratch, key: &str, arch: Arch, layers: &[&Path], start: Start) -> Result<()> {
    let layout = scratch.0.join("layout");
    oci::write(&layout, arch, layers, start)?;
    fs::write(layout.join(".key"), key)?;
    let _ = fs::remove_dir_all(out);
    fs::rename(layout, out)?;
    Ok(())
}

fn is_current(out: &Path, key: &str) -> bool {
    fs::read_to_string(out.join(".key")).is_ok_and(|old| old == key)
}

fn fresh(dir: &Path) -> Result<&Path> {
    fs::create_dir_all(dir)?;
    Ok(dir)
}

/// Copies content and mode; a link is copied as what it leads to.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file has a directory")?)?;
    fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    Ok(())
}

fn digest_of_tree(dir: &Path) -> Result<String> {
    let mut files = BTreeSet::new();
    let mut queue = vec![dir.to_owned()];
    while let Some(dir) = queue.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten() {
            let path = entry?.path();
            if path.is_dir() {
                queue.push(path);
            } else {
                files.insert(format!("{} {}", path.display(), oci::digest(&fs::read(&path)?)));
            }
        }
    }
    Ok(oci::digest(files.into_iter().collect::<Vec<_>>().join("\n").as_bytes()))
}

/// A directory that is gone when we are done.
struct Scratch(PathBuf);

impl Scratch {
    fn beside(out: &Path) -> Result<Self> {
        let path = out.with_extension("scratch");
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
