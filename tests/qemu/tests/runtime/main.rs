//! `edged oci` under cgroup v2, as an engine would drive it: the firmware's kernel, and a shell script instead of the
//! keeper that plays the engine. The script tells of each step whether it came out as it must.

mod bundles;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use bundles::Bundle;
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::{Artifacts, Firmware};
use edged_qemu::machine::{Machine, Setup, blank_disk};
use edged_qemu::wait::LONG;
use edged_qemu::{process, story};
use serde_json::Value;

const FIRST: &str = include_str!("first.sh");
const STEPS: &str = include_str!("steps.sh");
const ENGINE: &str = include_str!("engine.sh");
const SELINUX: &str = include_str!("selinux.sh");

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn an_engine_drives_the_runtime_under_cgroup_v2() {
    story::tell("runtime", |firmware, dir| {
        let disk = dir.join("disk.img");
        blank_disk(&disk, 8)?;
        let mut setup = setup(firmware.arch, ENGINE, &bundles::of_the_engine())?;
        setup.disk = Some(disk);
        let bfq = std::fs::read(firmware.bfq()).context("this kernel's module bfq")?;
        setup = setup.file("oci/profile", apparmor_profile()?).file("oci/bfq.ko", bfq);
        play(firmware, dir, &setup, ENGINE)
    });
}

/// The module is the same on every architecture: one of them tells.
#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn an_engine_labels_containers_under_selinux() {
    story::tell("runtime-selinux", |firmware, dir| {
        if firmware.arch != Arch::X86_64 {
            return Ok(());
        }
        let mut setup = setup(firmware.arch, SELINUX, &bundles::of_selinux())?;
        setup = setup.file("oci/policy", selinux_policy(dir)?);
        setup.kernel.insert(0, "security=selinux".to_owned());
        play(firmware, dir, &setup, SELINUX)
    });
}

/// The script and what it needs, and no keeper.
fn setup(arch: Arch, script: &str, bundles: &[Bundle]) -> Result<Setup> {
    let busybox = busybox(arch)?;
    let mut setup = Setup::default();
    let program = |path: &str| (path.to_owned(), 0o755, busybox.clone());
    setup.files.extend([program("oci/busybox"), program("oci/bundle/rootfs/bin/busybox")]);
    for (path, text) in [("oci/first.sh", FIRST), ("oci/steps.sh", STEPS), ("oci/engine.sh", script)] {
        setup.files.push((path.to_owned(), 0o755, text.into()));
    }
    for path in ["forbidden", "secret/file"] {
        setup = setup.file(&format!("oci/bundle/rootfs/{path}"), "nobody reads this\n");
    }
    let template = template()?;
    for bundle in bundles {
        let mut config = template.clone();
        bundle.write(&mut config);
        setup = setup.file(&format!("oci/configs/{}.json", bundle.name), config.to_string());
    }
    setup.kernel = ["rdinit=/oci/busybox", "--", "sh", "/oci/first.sh"].map(str::to_owned).into();
    Ok(setup)
}

/// Boots, and counts what came out.
fn play(firmware: &Firmware, dir: &Path, setup: &Setup, script: &str) -> Result<()> {
    let mut device = Machine::boot(firmware, dir, setup)?;
    let log = device.kernel.wait_for("all steps are done", LONG)?;
    let failed: Vec<_> = log.lines().filter(|line| line.contains("not ok ")).collect();
    ensure!(failed.is_empty(), "{}\n{log}", failed.join("\n"));
    let passed = log.lines().filter(|line| line.trim_start().starts_with("ok ")).count();
    ensure!(passed >= script.matches("\nstep ").count(), "only {passed} steps came out:\n{log}");
    device.wait_for_power_off(LONG)
}

/// What `edged oci spec` says.
fn template() -> Result<Value> {
    let edged = Artifacts::find().host_program("edged")?;
    let dir = std::env::temp_dir().join(format!("edged-spec-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    process::run(Command::new(edged).args(["oci", "spec", "--bundle"]).arg(&dir))?;
    let config = serde_json::from_slice(&std::fs::read(dir.join("config.json"))?)?;
    std::fs::remove_dir_all(&dir)?;
    Ok(config)
}

/// As the kernel takes it: the host's need not know the module, so the parser is told what a kernel of today can.
fn apparmor_profile() -> Result<Vec<u8>> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/runtime/profile.apparmor");
    let mut parser = Command::new("/sbin/apparmor_parser");
    parser.args(["--skip-kernel-load", "--skip-cache", "--stdout"]);
    for features in ["--kernel-features", "--policy-features"] {
        parser.args([features, "/etc/apparmor.d/abi/3.0"]);
    }
    Ok(process::run(parser.arg(source))?.stdout)
}

fn selinux_policy(dir: &Path) -> Result<Vec<u8>> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/runtime/policy.cil");
    let policy = dir.join("policy");
    let mut compiler = Command::new("secilc");
    compiler.arg("--output").arg(&policy).arg("--filecontext").arg(dir.join("file_contexts"));
    process::run(compiler.arg(source))?;
    Ok(std::fs::read(policy)?)
}

/// The static busybox of the image of that name.
fn busybox(arch: Arch) -> Result<Vec<u8>> {
    let layout = Artifacts::find().image(arch, "busybox");
    let read = |path: &Path| -> Result<Value> {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    let blob = |digest: &Value| -> Result<_> {
        let hex = digest.as_str().and_then(|text| text.strip_prefix("sha256:")).context("no digest")?;
        Ok(layout.join("blobs/sha256").join(hex))
    };
    let manifest = read(&blob(&read(&layout.join("index.json"))?["manifests"][0]["digest"])?)?;
    for layer in manifest["layers"].as_array().context("no layers")? {
        let output = Command::new("tar").arg("-xOzf").arg(blob(&layer["digest"])?).arg("./bin/busybox").output()?;
        if output.status.success() {
            return Ok(output.stdout);
        }
    }
    bail!("no layer of {} has bin/busybox", layout.display())
}
