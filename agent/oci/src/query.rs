//! `state`, `list`, `ps`, `events`, `features`, `spec`: they look and change nothing.

use std::io::Write;
use std::path::PathBuf;

use oci_spec::runtime::{Arch, LinuxSeccompAction};
use serde_json::{Value, json};

use crate::arguments::Parsed;
use crate::cgroup::stats;
use crate::error::OciError;
use crate::state::{self, Home, Record, Status};
use crate::{caps, mounts};

fn print(text: &str) -> Result<(), OciError> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| OciError::system("standard output", error))
}

fn print_json(value: &Value) -> Result<(), OciError> {
    print(&format!("{value:#}\n"))
}

pub fn version(version: &str) -> Result<(), OciError> {
    print(&format!("edged-oci version {version}\nspec: {}\n", state::OCI_VERSION))
}

pub fn state(parsed: &Parsed) -> Result<(), OciError> {
    let (home, record) = state::find(&parsed.global.root, parsed.id()?)?;
    let status = home.status(&record);
    print_json(&full(&record, status))
}

/// What the specification asks for, and what engines look at beyond it.
fn full(record: &Record, status: Status) -> Value {
    let mut state = record.as_state(status);
    state["pid"] = if status == Status::Stopped { 0 } else { record.pid }.into();
    state["rootfs"] = record.rootfs.to_string_lossy().into();
    state["created"] = record.created.clone().into();
    state["owner"] = "root".into();
    state
}

pub fn list(parsed: &Parsed) -> Result<(), OciError> {
    let root = &parsed.global.root;
    let mut ids: Vec<String> = match std::fs::read_dir(root) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        entries => {
            let entries = entries.map_err(OciError::file(root))?;
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
        }
    };
    ids.sort();
    let records = ids.iter().filter_map(|id| {
        let home = Home::new(root, id).ok()?;
        let record = home.load().ok()?;
        let status = home.status(&record);
        Some((record, status))
    });
    if parsed.has("quiet") {
        return print(&records.map(|(record, _)| record.id + "\n").collect::<String>());
    }
    match parsed.value("format") {
        Some("json") => print_json(&records.map(|(record, status)| full(&record, status)).collect()),
        None | Some("table") => {
            let mut text = format!("{:<24} {:>8} {:<8} {:<31} {}\n", "ID", "PID", "STATUS", "CREATED", "BUNDLE");
            for (record, status) in records {
                let pid = if status == Status::Stopped { 0 } else { record.pid };
                let (status, bundle) = (status.text(), record.bundle.display());
                text.push_str(&format!("{:<24} {pid:>8} {status:<8} {:<31} {bundle}\n", record.id, record.created));
            }
            print(&text)
        }
        Some(other) => Err(OciError::Usage { text: format!("--format: `{other}` is neither table nor json") }),
    }
}

pub fn ps(parsed: &Parsed) -> Result<(), OciError> {
    let (_, record) = state::find(&parsed.global.root, parsed.id()?)?;
    let pids = record.groups.pids();
    match parsed.value("format") {
        Some("json") => print_json(&json!(pids)),
        None | Some("table") => {
            let mut text = format!("{:>8} {:>8} {}\n", "PID", "PPID", "COMMAND");
            for pid in pids {
                let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
                let stat = String::from_utf8_lossy(&read("stat")).into_owned();
                let parent =
                    stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1).map(str::to_owned));
                let command = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
                text.push_str(&format!("{pid:>8} {:>8} {}\n", parent.unwrap_or_default(), command.trim_end()));
            }
            print(&text)
        }
        Some(other) => Err(OciError::Usage { text: format!("--format: `{other}` is neither table nor json") }),
    }
}

pub fn events(parsed: &Parsed) -> Result<(), OciError> {
    let (home, record) = state::find(&parsed.global.root, parsed.id()?)?;
    let every_ms = interval_ms(parsed.value("interval").unwrap_or("5s"))?;
    loop {
        let status = home.status(&record);
        if status == Status::Stopped {
            let wanted = "running";
            return Err(OciError::WrongState { id: home.id, is: status.text(), verb: "events", wanted });
        }
        let line = json!({ "type": "stats", "id": record.id, "data": stats::of(&record.groups) });
        print(&format!("{line}\n"))?;
        if parsed.has("stats") || !lives_on_for(&record, every_ms) {
            return Ok(());
        }
    }
}

/// Waits for the end of the container, at most so long; says whether it lives.
fn lives_on_for(record: &Record, wait_ms: u64) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::os::fd::AsFd;
    let Some(process) = record.process() else { return false };
    let timeout = Timespec {
        tv_sec: i64::try_from(wait_ms / 1000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(wait_ms % 1000 * 1_000_000).unwrap_or(0) as _,
    };
    let mut watched = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
    matches!(poll(&mut watched, Some(&timeout)), Ok(0))
}

fn interval_ms(text: &str) -> Result<u64, OciError> {
    let bad = || OciError::Usage { text: format!("--interval: `{text}` is not like 500ms or 5s") };
    let (number, factor) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => (number, 1),
        (None, Some(number)) => (number, 1000),
        (None, None) => (text, 1000),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    Some(number.saturating_mul(factor)).filter(|ms| *ms > 0).ok_or_else(bad)
}

const SECCOMP_FLAGS: [&str; 4] = [
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
];

/// features.md of the specification: what this program does, wherever it runs.
pub fn features() -> Result<(), OciError> {
    let native = match std::env::consts::ARCH {
        "x86_64" => [Some(Arch::ScmpArchX86_64), Some(Arch::ScmpArchX86)],
        "aarch64" => [Some(Arch::ScmpArchAarch64), Some(Arch::ScmpArchArm)],
        "arm" => [Some(Arch::ScmpArchArm), None],
        _ => [None, None],
    };
    let actions = [
        LinuxSeccompAction::ScmpActAllow,
        LinuxSeccompAction::ScmpActErrno,
        LinuxSeccompAction::ScmpActKill,
        LinuxSeccompAction::ScmpActKillProcess,
        LinuxSeccompAction::ScmpActKillThread,
        LinuxSeccompAction::ScmpActLog,
        LinuxSeccompAction::ScmpActNotify,
        LinuxSeccompAction::ScmpActTrace,
        LinuxSeccompAction::ScmpActTrap,
    ];
    print_json(&json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": state::OCI_VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": mounts::words(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": caps::all().collect::<Vec<_>>(),
            "cgroup": { "v1": true, "v2": true, "systemd": false, "systemdUser": false, "rdma": true },
            "seccomp": {
                "enabled": true,
                "actions": actions,
                "operators": ["SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"],
                "archs": native.iter().flatten().collect::<Vec<_>>(),
                "knownFlags": SECCOMP_FLAGS,
                "supportedFlags": SECCOMP_FLAGS,
            },
            "apparmor": { "enabled": true },
            "selinux": { "enabled": true },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
        // No annotation changes anything.
        "potentiallyUnsafeConfigAnnotations": [],
    }))
}

pub fn spec(parsed: &Parsed) -> Result<(), OciError> {
    let path = parsed.path("bundle").unwrap_or_else(|| PathBuf::from(".")).join("config.json");
    let mut file = std::fs::File::options().write(true).create_new(true).open(&path).map_err(OciError::file(&path))?;
    file.write_all(&template()).map_err(OciError::file(&path))
}

/// A shell with the walls that workloads of a manifest have.
pub fn template() -> Vec<u8> {
    let capabilities: Vec<_> = caps::DEFAULT.iter().map(|name| format!("CAP_{name}")).collect();
    let namespaces: Vec<_> =
        ["pid", "network", "ipc", "uts", "mount", "cgroup"].iter().map(|kind| json!({ "type": kind })).collect();
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let document = json!({
        "ociVersion": state::OCI_VERSION,
        "process": {
            "terminal": true,
            "user": { "uid": 0, "gid": 0 },
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "edged",
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=64k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": namespaces,
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    });
    format!("{document:#}\n").into_bytes()
}
