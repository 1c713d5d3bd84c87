//! Kernel modules of a device, with what modules.dep(5) says they need.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::PathBuf;

use edged_sys::device::load_module;

/// Where the running kernel's modules are.
struct Home {
    path: PathBuf,
    dependencies: String,
    /// The kernel's command line: it has parameters of modules too (kernel-parameters.rst).
    command_line: String,
}

impl Home {
    fn find() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let path = PathBuf::from("/lib/modules").join(release);
        let dependencies = fs::read_to_string(path.join("modules.dep")).unwrap_or_default();
        let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
        Self { path, dependencies, command_line }
    }

    /// What could not be loaded goes to `failed`; what is built into the kernel is there already.
    fn load(&self, name: &str, failed: &mut Vec<String>) {
        for file in load_order(&self.dependencies, name) {
            let parameters = parameters(&self.command_line, module_name(&file));
            if let Err(error) = load_module(&self.path.join(&file), &parameters) {
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

fn module_name(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file)
}

/// `ramoops.mem_size=0x100000` is for ramoops, as modprobe(8) reads it.
fn parameters(command_line: &str, module: &str) -> CString {
    let module = module.replace('-', "_");
    let of_module = |word: &str| {
        let (name, parameter) = word.split_once('.')?;
        (name.replace('-', "_") == module).then(|| parameter.to_owned())
    };
    let words: Vec<String> = command_line.split_whitespace().filter_map(of_module).collect();
    CString::new(words.join(" ")).unwrap_or_default()
}

/// The files to load for `name`, dependencies first (modules.dep lists them in reverse order; depmod(8)). Empty for
/// what is built into the kernel.
fn load_order(dependencies: &str, name: &str) -> Vec<String> {
    let wanted = name.replace('-', "_");
    for line in dependencies.lines() {
        let Some((path, needs)) = line.split_once(':') else { continue };
        if module_name(path).replace('-', "_") == wanted {
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

    #[test]
    fn parameters_come_from_the_kernels_command_line() {
        let line = "console=ttyS0 ramoops.mem_address=0x8000000 edged.data=/dev/vda ramoops.mem_size=0x100000 i6300esb.heartbeat=9";
        assert_eq!(parameters(line, "ramoops").as_c_str(), c"mem_address=0x8000000 mem_size=0x100000");
        assert_eq!(parameters(line, "virtio-net").as_c_str(), c"");
    }
}
