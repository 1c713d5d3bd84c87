//! `edged oci` under cgroup v2, as an engine would drive it: the firmware's kernel, and a shell script instead of the
//! keeper that plays the engine. The script tells of each step whether it came out as it must.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::Artifacts;
use edged_qemu::machine::{Machine, Setup};
use edged_qemu::wait::LONG;
use edged_qemu::{process, story};
use serde_json::{Value, json};

const FIRST: &str = include_str!("first.sh");
const ENGINE: &str = include_str!("engine.sh");

/// Enough for every limit to be met at once and for the kernel to live on.
const MEMORY_LIMIT_BYTES: u64 = 32 << 20;

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn an_engine_drives_the_runtime_under_cgroup_v2() {
    story::tell("runtime", |firmware, dir| {
        let busybox = busybox(firmware.arch)?;
        let mut setup = Setup::default();
        let program = |path: &str| (path.to_owned(), 0o755, busybox.clone());
        setup.files.extend([program("oci/busybox"), program("oci/bundle/rootfs/bin/busybox")]);
        setup.files.extend([
            ("oci/first.sh".to_owned(), 0o755, FIRST.into()),
            ("oci/engine.sh".to_owned(), 0o755, ENGINE.into()),
        ]);
        for (name, arguments) in programs() {
            let config = config(&arguments)?.to_string();
            setup = setup.file(&format!("oci/configs/{name}.json"), config);
        }
        setup.kernel = ["rdinit=/oci/busybox", "--", "sh", "/oci/first.sh"].map(str::to_owned).into();
        let mut device = Machine::boot(firmware, dir, &setup)?;
        let log = device.kernel.wait_for("all steps are done", LONG)?;
        let failed: Vec<_> = log.lines().filter(|line| line.contains("not ok ")).collect();
        ensure!(failed.is_empty(), "{}\n{log}", failed.join("\n"));
        let passed = log.lines().filter(|line| line.trim_start().starts_with("ok ")).count();
        ensure!(passed >= ENGINE.matches("\nstep ").count(), "only {passed} steps came out:\n{log}");
        device.wait_for_power_off(LONG)
    });
}

/// What the containers run, by the name of its bundle.
fn programs() -> [(&'static str, Vec<&'static str>); 5] {
    let shell = |script| vec!["/bin/busybox", "sh", "-c", script];
    [
        ("exits", shell("exit 7")),
        ("sleeps", shell("exec /bin/busybox sleep 1000")),
        ("walls", shell("cd /sys/fs/cgroup && /bin/busybox cat memory.max pids.max cpu.max")),
        ("hog", shell("/bin/busybox dd if=/dev/zero of=/dev/shm/full bs=1M count=100")),
        ("forks", shell("for n in 1 2 3 4 5 6 7 8 9 10; do /bin/busybox sleep 30 & done; wait")),
    ]
}

/// What `edged oci spec` says, with walls.
fn config(arguments: &[&str]) -> Result<Value> {
    let edged = Artifacts::find().host_program("edged")?;
    let dir = std::env::temp_dir().join(format!("edged-spec-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    process::run(Command::new(edged).args(["oci", "spec", "--bundle"]).arg(&dir))?;
    let mut config: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json"))?)?;
    std::fs::remove_dir_all(&dir)?;
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = json!(arguments);
    config["root"]["readonly"] = false.into();
    // To make a device node, and see that it does not open.
    for set in ["bounding", "effective", "permitted"] {
        config["process"]["capabilities"][set].as_array_mut().context("no capabilities")?.push("CAP_MKNOD".into());
    }
    config["linux"]["resources"] = json!({
        "memory": { "limit": MEMORY_LIMIT_BYTES, "swap": MEMORY_LIMIT_BYTES },
        "pids": { "limit": 8 },
        "cpu": { "quota": 50_000, "period": 100_000 },
        "devices": config["linux"]["resources"]["devices"],
    });
    Ok(config)
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
    anyhow::bail!("no layer of {} has bin/busybox", layout.display())
}
