//! From the request to exec, as a device starts a workload: groups made, the specification translated, the keeper asked,
//! its answer heard. Beside it, in turns, the bare system calls of the same container (`xtask/src/bench/bare.c`), timed
//! by themselves. `cargo xtask bench start` runs it and prints the table; one JSON line comes out here.
//!
//! Arguments: bundle, compiled filter, the bare program, rounds.

#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../tests/host/rig.rs"]
mod rig;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use edged_model::keeper::{ReplyBody, RequestBody, Rootfs};
use edged_oci::cgroup::Groups;
use edged_oci::spec::{LaunchPlace, launch_spec};
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::{LinuxResources, Spec};
use rig::{Link, Rig};

struct Container {
    spec: Spec,
    bundle: PathBuf,
    filter: Vec<u8>,
    groups: Groups,
}

impl Container {
    /// The agent looks once, when it starts, where the hierarchies are.
    fn groups(&self, key: &str) -> Groups {
        match &self.groups {
            Groups::V2 { path } => Groups::V2 { path: path.with_file_name(key) },
            Groups::V1 { hierarchies } => Groups::V1 {
                hierarchies: hierarchies.iter().map(|(name, path)| (name.clone(), path.with_file_name(key))).collect(),
            },
        }
    }
}

fn resources(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref().and_then(|linux| linux.resources().as_ref())
}

fn main() -> ExitCode {
    // cargo adds `--bench` behind.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["agent", hub] => rig::play_agent(hub),
        ["keeper", hub] => rig::play_keeper(hub),
        [bundle, filter, bare, rounds] => measure(bundle, filter, bare, rounds.parse().unwrap()),
        _ => {
            println!("cargo xtask bench start gives this its arguments");
            ExitCode::SUCCESS
        }
    }
}

fn measure(bundle: &str, filter: &str, bare: &str, rounds: usize) -> ExitCode {
    let config = std::fs::read(Path::new(bundle).join("config.json")).unwrap();
    let spec: Spec = serde_json::from_slice(&config).unwrap();
    let groups = Groups::place(None, "start", resources(&spec)).unwrap();
    let container = Container { spec, bundle: bundle.into(), filter: std::fs::read(filter).unwrap(), groups };
    let (_rig, mut link) = Rig::start();
    let ready = network_namespace();
    let ready_path = format!("/proc/{}/fd/{}", std::process::id(), ready.as_raw_fd());
    let mut took: [Vec<f64>; 4] = std::array::from_fn(|_| Vec::new());
    for round in 0..rounds + rounds / 2 {
        // An agent that says nothing for half a minute is taken for dead.
        link.send(RequestBody::Heartbeat, &[]);
        for place in 0..4 {
            let which = (place + round) % 4;
            let time = match which {
                0 => of_bare(bare, &container.bundle, round, "1", filter),
                1 => of_bare(bare, &container.bundle, round, &ready_path, filter),
                2 => of_keeper(&mut link, &container, round, None),
                _ => of_keeper(&mut link, &container, round, Some(&ready)),
            };
            if round >= rounds / 2 {
                took[which].push(time);
            }
        }
    }
    let [bare_network, bare_ready, keeper_network, keeper_ready] = took;
    let all = serde_json::json!({
        "bare_with_network": bare_network, "bare_with_ready_network": bare_ready,
        "keeper_with_network": keeper_network, "keeper_with_ready_network": keeper_ready,
    });
    println!("{all}");
    ExitCode::SUCCESS
}

/// One that lives as long as this process, as the agent pins one for each workload.
fn network_namespace() -> OwnedFd {
    std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        File::open("/proc/thread-self/ns/net").unwrap().into()
    })
    .join()
    .unwrap()
}

fn milliseconds(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1000.0
}

/// The program says how long it took, from its first call to exec.
fn of_bare(bare: &str, bundle: &Path, round: usize, network: &str, filter: &str) -> f64 {
    let mut command = Command::new(bare);
    command
        .arg(bundle.join("rootfs"))
        .arg(format!("bare-{round}"))
        .args(["", network, filter])
        .arg(bundle.join("work"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

fn of_keeper(link: &mut Link, container: &Container, round: usize, ready: Option<&OwnedFd>) -> f64 {
    let key = format!("start-{round}-{}", ready.is_some());
    let resources = resources(&container.spec);
    let in_bundle = |name: &str| container.bundle.join(name).to_string_lossy().into_owned();

    let begin = Instant::now();
    let groups = container.groups(&key);
    groups.create(resources).unwrap();
    let mut fds: Vec<OwnedFd> = ready.iter().map(|fd| fd.try_clone().unwrap()).collect();
    let (cgroup, cgroup_fds) = groups.entry(fds.len()).unwrap();
    fds.extend(cgroup_fds);
    let place = LaunchPlace {
        key: key.clone(),
        note: String::new(),
        rootfs: Rootfs::Overlay {
            lower: vec![in_bundle("rootfs")],
            upper: in_bundle("work/upper"),
            work: in_bundle("work/work"),
            mount_at: in_bundle("work/merged"),
            volatile: false,
            read_only: false,
        },
        cgroup,
        netns_fd: ready.map(|_| 0),
        seccomp: container.filter.clone(),
        cgroups: groups.view(true),
    };
    let spec = launch_spec(&container.spec, place).unwrap();
    let (answer, outputs) = link.ask(RequestBody::Launch(Box::new(spec)), &fds);
    let time = milliseconds(begin);

    assert!(matches!(answer, ReplyBody::Launched { .. }), "{answer:?}");
    drop(outputs);
    assert_eq!(link.exit_of(&key).code, Some(0));
    link.ask(RequestBody::Forget { key }, &[]);
    groups.remove().unwrap();
    time
}
