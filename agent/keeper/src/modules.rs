//! Kernel modules of a device, with what modules.dep(5) says they need.

use std::fs;
use std::io;
use std::path::PathBuf;

use edged_sys::device::load_module;

/// Where the running kernel's modules are.
struct Home {
    path: PathBuf,
    dependencies: String,
}

impl Home {
    fn find() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let path = PathBuf::from("/lib/modules").join(release);
        let dependencies = fs::read_to_string(path.join("modules.dep")).unwrap_or_default();
        Self { path, dependencies }
    }

    /// What could not be loaded goes to `failed`; what is built into the kernel is there already.
    fn load(&self, name: &str, failed: &mut Vec<String>) {
        for file in load_order(&self.dependencies, name) {
            if let Err(error) = load_module(&self.path.join(&file)) {
                failed.push(format!("{file}: {error}"));
            }
        }
    }
}

fn all_or_named(failed: &[String]) -> io::Result<()> {
    if failed.is_empty() { Ok(()) } else { Err(io::Error::other(failed.join("; "))) }
}

/// One that is needed now.
pub fn load(name: &str) -> io::Result<()> {
    let mut failed = Vec::new();
    Home::find().load(name, &mut failed);
    all_or_named(&failed)
}

/// Loads what `/etc/modules-load.d/*.conf` names, in order (modules-load.d(5)).
pub fn load_listed() -> io::Result<()> {
    let home = Home::find();
    let mut files: Vec<_> = match fs::read_dir("/etc/modules-load.d") {
        Ok(entries) => entries.filter_map(Result::ok).map(|entry| entry.path()).collect(),
        Err(_) => return Ok(()),
    };
    files.sort();
    let mut failed = Vec::new();
    for file in files.iter().filter(|path| path.extension().is_some_and(|e| e == "conf")) {
        for name in fs::read_to_string(file)?.lines().map(str::trim) {
            if !name.is_empty() && !name.starts_with(['#', ';']) {
                home.load(name, &mut failed);
            }
        }
    }
    all_or_named(&failed)
}

/// The files to load for `name`, dependencies first (modules.dep lists them in reverse order; depmod(8)). Empty for
/// what is built into the kernel.
fn load_order(dependencies: &str, name: &str) -> Vec<String> {
    let wanted = name.replace('-', "_");
    let module_name = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split('.').next().unwrap_or(file).replace('-', "_")
    };
    for line in dependencies.lines() {
        let Some((path, needs)) = line.split_once(':') else { continue };
        if module_name(path) == wanted {
            let needs = needs.split_whitespace().rev();
            return needs.chain([path]).map(str::to_owned).collect();
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let dep = "kernel/fs/overlayfs/overlay.ko.xz:\nkernel/net/bridge/bridge.ko.xz: kernel/net/802/stp.ko.xz kernel/net/llc/llc.ko.xz\n";
        assert_eq!(load_order(dep, "overlay"), ["kernel/fs/overlayfs/overlay.ko.xz"]);
        assert_eq!(
            load_order(dep, "bridge"),
            ["kernel/net/llc/llc.ko.xz", "kernel/net/802/stp.ko.xz", "kernel/net/bridge/bridge.ko.xz"]
        );
        assert!(load_order(dep, "ext4").is_empty());
    }
}
