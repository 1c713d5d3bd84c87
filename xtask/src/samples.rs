//! The images that tests and demo run, as OCI layouts, for the device's architecture; packed by `edgectl image build`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use edged_qemu::run::run;

use crate::apt::Suite;
use crate::build::{self, Arch, Programs};
use crate::say;

/// cosign, from the first suite of Debian that has it.
pub fn cosign() -> Result<PathBuf> {
    let found = Suite::open("sid")?.unpacked("cosign", "amd64")?.join("usr/bin/cosign");
    Ok(found)
}

/// Packs all images for `arch` and returns their directory.
pub fn build(arch: Arch, programs: &Programs, edgectl: &Path) -> Result<PathBuf> {
    let out = build::root().join("target/image").join(arch.name()).join("layouts");
    say::step(&format!("packing the images for {}", arch.name()));
    let pack = |name: &str, layers: &[PathBuf], words: &[&str]| {
        let layout = out.join(name);
        if layout.exists() {
            std::fs::remove_dir_all(&layout)?;
        }
        let mut command = Command::new(edgectl);
        command.args(["image", "build", "--arch", arch.oci(), "--output"]).arg(&layout);
        run(command.args(words.iter().map(|word| format!("--{word}"))).args(layers)).map(drop)
    };
    pack("sample", std::slice::from_ref(&programs.sample), &["entrypoint=/sample", "cmd=hang"])?;
    let suite = Suite::open("bookworm")?;
    let busybox = suite.unpacked("busybox-static", arch.debian())?;
    let root = out.join("busybox.root");
    if root.exists() {
        std::fs::remove_dir_all(&root)?;
    }
    std::fs::create_dir_all(root.join("bin"))?;
    let binary = ["bin/busybox", "usr/bin/busybox"].map(|path| busybox.join(path)).into_iter().find(|path| path.exists());
    std::fs::copy(binary.context("busybox")?, root.join("bin/busybox"))?;
    for applet in ["sh", "cat", "echo", "ls", "sleep", "httpd", "id", "mount", "wget"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))?;
    }
    pack("busybox", &[root], &["cmd=/bin/sh"])?;
    Ok(out)
}
