//! Debian's kernel, and exactly the modules a device needs: each with what it depends on (modules.dep(5)) and what it
//! needs without saying so in its symbols (modules.softdep).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::Artifacts;
use edged_qemu::filesystem::Filesystem;
use edged_qemu::process;

use crate::debian::Archive;
use crate::progress;

/// The release whose kernel boots the devices: 6.12, a long-term one.
const SUITE: &str = "trixie";

/// What a device loads, in this order. What the kernel has built in, or does not have at all, is left out.
const WANTED: [&str; 10] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "overlay",
    "i6300esb",
    "softdog",
    // A kernel that panics leaves its last words where the command line says.
    "ramoops",
];

/// A kernel and the tree of its modules.
#[derive(Debug)]
pub struct Kernel {
    pub release: String,
    pub image: PathBuf,
    modules: PathBuf,
    dependencies: String,
    soft: String,
}

/// Modules picked out of the tree.
#[derive(Debug, Default)]
pub struct Picked {
    /// For /etc/modules-load.d: names in order.
    pub names: Vec<String>,
    /// Files below /lib/modules/<release>/, as modules.dep names them.
    pub files: Vec<String>,
}

impl Kernel {
    pub fn fetch(artifacts: &Artifacts, arch: Arch, filesystem: Filesystem) -> Result<Self> {
        let archive = Archive::open(&artifacts.cache(), SUITE, arch.debian())?;
        let follows = arch.kernel_package(filesystem);
        let pinned = artifacts.cache().join(match filesystem {
            Filesystem::Ext4 => format!("kernel-{arch}"),
            Filesystem::F2fs => format!("kernel-{arch}-f2fs"),
        });
        let package = match fs::read_to_string(&pinned) {
            Ok(package) => package,
            Err(_) => {
                let depends = archive.field(follows, "Depends")?;
                let package = depends.first().and_then(|d| d.split(' ').next()).context("no kernel in the archive")?;
                fs::write(&pinned, package)?;
                package.to_owned()
            }
        };
        let tree = archive.unpack(&package, None)?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        let modules = module_tree(&tree, &release)?;
        let read = |name: &str| fs::read_to_string(modules.join(name)).with_context(|| format!("no {name}"));
        let (dependencies, soft) = (read("modules.dep")?, read("modules.softdep")?);
        Ok(Self { image: tree.join(format!("boot/vmlinuz-{release}")), release, modules, dependencies, soft })
    }

    /// What a device needs, dependencies first. The data disk's file system is there to be loaded when the keeper has seen
    /// the disk; it is not among the names.
    pub fn pick(&self, filesystem: Filesystem) -> Picked {
        let mut picked = Picked::default();
        let mut seen = BTreeSet::new();
        for name in WANTED {
            self.take(name, &mut seen, &mut picked);
        }
        let at_boot = picked.names.len();
        // Beside the data there may be a system's own part, which is ext4 whatever the data is.
        for name in [filesystem.name(), Filesystem::Ext4.name()] {
            self.take(name, &mut seen, &mut picked);
        }
        picked.names.truncate(at_boot);
        picked
    }

    fn take(&self, name: &str, seen: &mut BTreeSet<String>, picked: &mut Picked) {
        let name = name.replace('-', "_");
        let Some((path, needs)) = self.find(&name) else { return };
        if !seen.insert(name.clone()) {
            return;
        }
        let first: Vec<String> = needs.iter().map(|path| module_name(path)).chain(self.soft_needs(&name)).collect();
        for need in first {
            self.take(&need, seen, picked);
        }
        picked.names.push(name);
        picked.files.push(path);
    }

    fn find(&self, name: &str) -> Option<(String, Vec<String>)> {
        self.dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| module_name(path) == name)
            .map(|(path, needs)| (path.to_owned(), needs.split_whitespace().map(str::to_owned).collect()))
    }

    /// `softdep ext4 pre: crypto-crc32c post: …`. A name may be an alias of several modules; the one that runs on every
    /// processor is taken.
    fn soft_needs(&self, name: &str) -> Vec<String> {
        let lines = self.soft.lines().filter_map(|line| line.strip_prefix("softdep ")?.split_once(" pre:"));
        let of_name = lines.filter(|(module, _)| module.replace('-', "_") == name);
        of_name
            .flat_map(|(_, rest)| rest.split(" post:").next().unwrap_or(rest).split_whitespace())
            .map(|need| need.strip_prefix("crypto-").unwrap_or(need))
            .flat_map(|need| [need.to_owned(), format!("{need}_generic")])
            .collect()
    }

    /// The module itself, unpacked: it is packed once, together with the whole initramfs.
    pub fn module(&self, path: &str) -> Result<Vec<u8>> {
        let file = self.modules.join(path);
        if file.extension().is_some_and(|extension| extension == "xz") {
            return Ok(process::run(Command::new("xz").arg("-dc").arg(&file))?.stdout);
        }
        Ok(fs::read(file)?)
    }

    /// By its name; `None` where the kernel has no such module, or has it built in.
    pub fn module_called(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.find(name).map(|(path, _)| self.module(&path)).transpose()
    }

    /// modules.dep of the picked ones alone, under the names they have in the initramfs. What a module needs without
    /// saying so in its symbols is listed like the rest: the keeper reads this one file.
    pub fn dependencies_of(&self, picked: &Picked) -> String {
        let mut text = String::new();
        for path in &picked.files {
            let name = module_name(path);
            let needs = self.find(&name).map(|(_, needs)| needs).unwrap_or_default();
            let soft = self.soft_needs(&name).into_iter().filter_map(|need| self.find(&need)).map(|(path, _)| path);
            let needs: Vec<String> = needs.into_iter().chain(soft).filter(|need| picked.files.contains(need)).collect();
            text.push_str(&format!("{path}: {}\n", needs.join(" ")).replace(".ko.xz", ".ko"));
        }
        text
    }
}

/// `kernel/fs/overlayfs/overlay.ko.xz`: `overlay`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// The modules where depmod(8) looks for them, with its files written.
fn module_tree(tree: &Path, release: &str) -> Result<PathBuf> {
    let home = tree.join("lib/modules").join(release);
    if home.join("modules.dep").exists() {
        return Ok(home);
    }
    if !home.exists() {
        let merged = tree.join("usr/lib/modules").join(release);
        ensure!(merged.exists(), "the kernel package has no modules for {release}");
        fs::create_dir_all(tree.join("lib/modules"))?;
        fs::rename(merged, &home)?;
    }
    progress::step(&format!("reading the modules of {release}"));
    let program = if Path::new("/usr/sbin/depmod").exists() { "/usr/sbin/depmod" } else { "depmod" };
    process::run(Command::new(program).arg("-b").arg(tree).arg(release))?;
    Ok(home)
}
