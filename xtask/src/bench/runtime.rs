//! create, start, wait, delete of a container that exits at once: `edged oci run` beside crun, runc and the bare system
//! calls, in turns, with the same bundle and the same limits. A table, and the figures as JSON.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::Artifacts;
use edged_qemu::process;
use serde_json::{Value, json};

use super::Quantiles;
use crate::progress;
use crate::setup::{self, Need};
use crate::toolchain::{self, Profile};

/// Enough for a median that stays when the run is repeated; half of it is thrown away as warm-up.
const ROUNDS: usize = 200;

/// Set for the part that runs in a mount namespace of its own.
const INSIDE: &str = "EDGED_BENCH_RUNTIME";

/// A program that is measured, and how it is asked.
struct Runner {
    name: &'static str,
    /// The words before the container's name and after it.
    before: Vec<String>,
    after: Vec<String>,
    times: Vec<f64>,
    /// Of the processor, all processes of it together.
    work: Vec<f64>,
}

struct Programs<'p> {
    /// The runtime alone, and inside the program that is everything.
    alone: &'p Path,
    whole: &'p Path,
    bare: &'p Path,
}

pub fn run() -> Result<()> {
    if std::env::var_os(INSIDE).is_none() {
        return in_own_mounts();
    }
    setup::ensure(&[Need::HostTests])?;
    let arch = Arch::host().context("this machine's architecture is none of ours")?;
    let alone = toolchain::build(arch, Profile::Runtime, "edged-oci", &["edged-oci"])?.join("edged-oci");
    let whole = toolchain::build(arch, Profile::Release, "edged", &["edged"])?.join("edged");
    let dir = tempfile::tempdir()?;
    // Where every engine has it: in memory.
    process::run(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/run"]))?;
    let bare = build_bare(dir.path())?;
    let mut figures = Vec::new();
    for network in [true, false] {
        figures.push(measure(dir.path(), &Programs { alone: &alone, whole: &whole, bare: &bare }, network)?);
    }
    let path = Artifacts::find().root().join("target/bench-runtime.json");
    fs::write(&path, format!("{:#}\n", Value::from(figures)))?;
    progress::step(&format!("the figures are in {}", path.display()));
    Ok(())
}

/// Sets up what `measure` needs for one container, and says where: bundle, compiled filter, the bare system calls.
pub fn prepare(dir: &Path) -> Result<[PathBuf; 3]> {
    setup::ensure(&[Need::HostTests])?;
    let arch = Arch::host().context("this machine's architecture is none of ours")?;
    let program = toolchain::build(arch, Profile::Runtime, "edged-oci", &["edged-oci"])?.join("edged-oci");
    let bundle = make_bundle(dir, &program, true)?;
    let filter = filter_of(dir, &program, &bundle)?;
    Ok([bundle, filter, build_bare(dir)?])
}

/// Once more, in a mount namespace where crun takes a hybrid hierarchy for v1, and where nothing that is mounted stays.
fn in_own_mounts() -> Result<()> {
    let script = "if [ -e /sys/fs/cgroup/unified ]; then mount -t tmpfs none /sys/fs/cgroup/unified; fi; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
    command.args(std::env::args_os().take(1)).args(["bench", "runtime"]).env(INSIDE, "1");
    Err(command.exec()).context("unshare")
}

fn build_bare(dir: &Path) -> Result<PathBuf> {
    let (source, program) = (dir.join("bare.c"), dir.join("bare"));
    fs::write(&source, include_str!("bare.c"))?;
    process::run(Command::new("cc").args(["-O2", "-static", "-o"]).arg(&program).arg(&source))?;
    Ok(program)
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).context("a path that is no UTF-8")
}

/// A program on a read-only mount, as on a device: it need not seal itself.
fn sealed(at: &Path, program: &Path) -> Result<()> {
    fs::create_dir_all(at.parent().context("no parent")?)?;
    fs::write(at, "")?;
    process::run(Command::new("mount").arg("--bind").arg(program).arg(at))?;
    process::run(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(at)).map(drop)
}

fn make_bundle(dir: &Path, program: &Path, network: bool) -> Result<PathBuf> {
    let bundle = dir.join(format!("bundle-{network}"));
    let root = bundle.join("rootfs");
    for name in ["bin", "proc", "dev", "sys", "tmp"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy("/bin/busybox", root.join("bin/true"))?;
    process::run(Command::new(program).args(["spec", "--bundle"]).arg(&bundle))?;
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    // The version that all three know.
    config["ociVersion"] = "1.0.2".into();
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = json!(["/bin/true"]);
    config["root"]["readonly"] = false.into();
    config["linux"]["resources"] = json!({
        "memory": { "limit": 67_108_864 }, "pids": { "limit": 64 }, "cpu": { "quota": 50_000, "period": 100_000 },
    });
    let profile = Artifacts::find().root().join("config/seccomp.json");
    config["linux"]["seccomp"] = serde_json::from_slice(&fs::read(profile)?)?;
    if !network {
        let namespaces = config["linux"]["namespaces"].as_array_mut().context("no namespaces")?;
        namespaces.retain(|namespace| namespace["type"] != "network");
    }
    fs::write(&path, config.to_string())?;
    Ok(bundle)
}

fn measure(dir: &Path, programs: &Programs<'_>, network: bool) -> Result<Value> {
    let bundle = make_bundle(dir, programs.alone, network)?;
    let (alone, whole) =
        (dir.join(format!("alone-{network}/edged-oci")), dir.join(format!("whole-{network}/edged-oci")));
    sealed(&alone, programs.alone)?;
    sealed(&whole, programs.whole)?;
    let filter = filter_of(dir, &alone, &bundle)?;
    let bundle = text(&bundle)?;
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let runtime = |name, program: &str| Runner {
        name,
        before: words(&[program, "--root", "/run/edged-bench", "run", "--bundle", &bundle]),
        after: Vec::new(),
        times: Vec::new(),
        work: Vec::new(),
    };
    let mut runners = vec![
        Runner {
            name: "bare system calls",
            before: vec![text(programs.bare)?, format!("{bundle}/rootfs")],
            after: words(&["", if network { "1" } else { "0" }, &text(&filter)?]),
            times: Vec::new(),
            work: Vec::new(),
        },
        runtime("edged-oci", &text(&alone)?),
        runtime("edged-oci, sealing itself", &text(programs.alone)?),
        runtime("edged oci", &text(&whole)?),
        runtime("crun", "crun"),
        runtime("runc", "runc"),
    ];
    for round in 0..ROUNDS + ROUNDS / 2 {
        let count = runners.len();
        for place in 0..count {
            let runner = &mut runners[(place + round) % count];
            let (time, work) = once(runner, round)?;
            if round >= ROUNDS / 2 {
                runner.times.push(time);
                runner.work.push(work);
            }
        }
    }
    Ok(table(network, runners))
}

/// The filter that edged makes of the profile, for the bare calls.
fn filter_of(dir: &Path, program: &Path, bundle: &Path) -> Result<PathBuf> {
    let state = dir.join("state-filter");
    let call = |words: &[&str]| {
        let mut command = Command::new(program);
        command.arg("--root").arg(&state).args(words).stdin(Stdio::null()).stdout(Stdio::null());
        let status = command.status()?;
        ensure!(status.success(), "edged-oci {words:?}: {status}");
        Ok(())
    };
    call(&["create", "--bundle", &text(bundle)?, "filter"])?;
    let path = dir.join("filter.bpf");
    let copied = fs::copy(state.join("filter/seccomp.bpf"), &path);
    call(&["delete", "--force", "filter"])?;
    copied.context("the compiled filter")?;
    Ok(path)
}

/// How long it took, and how much of the processor.
fn once(runner: &Runner, round: usize) -> Result<(f64, f64)> {
    let mut words = runner.before.iter();
    let mut command = Command::new(words.next().context("no program")?);
    command.args(words).arg(format!("bench-{round}")).args(&runner.after).stdin(Stdio::null()).stdout(Stdio::null());
    let work_before = work_of_children_ms()?;
    let begin = Instant::now();
    let status = command.status()?;
    let took = begin.elapsed().as_secs_f64() * 1000.0;
    let work = work_of_children_ms()? - work_before;
    if !status.success() {
        bail!("{}: {status}", runner.name);
    }
    Ok((took, work))
}

/// User and system time of all children that have ended, and of theirs (getrusage(2)).
fn work_of_children_ms() -> Result<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN)?;
    let ms = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 * 1e3 + time.tv_usec() as f64 / 1e3;
    Ok(ms(usage.user_time()) + ms(usage.system_time()))
}

fn table(network: bool, runners: Vec<Runner>) -> Value {
    let title = format!("run to its end, {} network namespace, ms", if network { "with" } else { "without" });
    Quantiles::print_head(&title);
    let mut floor = None;
    let rows = runners.into_iter().map(|runner| {
        let (took, work) = (Quantiles::of(runner.times), Quantiles::of(runner.work));
        let (floor, floor_work) = *floor.get_or_insert((took, work));
        took.print(runner.name, floor);
        work.print("    of the processor", floor_work);
        json!({
            "name": runner.name, "median_ms": took.median, "p95_ms": took.p95, "to_bare": took.median / floor.median,
            "quarter_ms": took.quarter, "processor_ms": work.median, "processor_to_bare": work.median / floor_work.median,
        })
    });
    json!({ "network_namespace": network, "rounds": ROUNDS, "rows": rows.collect::<Vec<_>>() })
}
