//! What must hold in one workload.

use std::collections::BTreeSet;

use super::{Problems, is_clean, nearest};
use crate::id::WorkloadName;
use crate::manifest::{
    DependsOn, Health, Manifest, Mount, MountSource, NetworkMode, Probe, Resources, Restart, RestartPolicy, Workload,
};
use crate::quantity::Bytes;
use crate::reason::Code;

/// Less memory than this starts no program.
const LEAST_MEMORY: Bytes = Bytes(512 << 10);

/// Signals that can stop a program, by the names of signal(7).
const STOP_SIGNALS: [&str; 8] = ["SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGKILL"];

/// capabilities(7), in the order of their numbers.
pub const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

pub(super) fn check(manifest: &Manifest, name: &WorkloadName, workload: &Workload, found: &mut Problems) {
    let at = |field: &str| format!("workloads.{name}.{field}");
    check_image(&workload.image, at("image"), found);
    check_resources(&at("resources"), &workload.resources, found);
    check_restart(&at("restart"), &workload.restart, found);
    check_needs(manifest, name, workload, found);
    check_mounts(manifest, name, workload, found);
    check_program(name, workload, found);
    check_rights(name, workload, found);
    if workload.network_mode != NetworkMode::Bridge && !(workload.ports.is_empty() && workload.networks.is_empty()) {
        found.add(at("networkMode"), "ports and networks need `bridge`");
    }
    if let Some(health) = &workload.health {
        check_health(name, health, found);
    }
}

fn check_resources(at: &str, resources: &Resources, found: &mut Problems) {
    match resources.memory {
        None => found.add_as(Code::MissingLimit, format!("{at}.memory"), "is required: no workload without a wall"),
        Some(memory) if memory < LEAST_MEMORY => {
            found.add(format!("{at}.memory"), format!("{memory} is less than {LEAST_MEMORY}"));
        }
        Some(_) => {}
    }
    match resources.cpu {
        None => found.add_as(Code::MissingLimit, format!("{at}.cpu"), "is required: no workload without a wall"),
        Some(cpu) if cpu.0 == 0 => found.add(format!("{at}.cpu"), "must be at least 1m"),
        Some(_) => {}
    }
    if resources.pids == 0 {
        found.add(format!("{at}.pids"), "must be at least 1");
    }
    if resources.disk == Some(Bytes(0)) {
        found.add(format!("{at}.disk"), "must be more than nothing");
    }
    let io = resources.io.clone().unwrap_or_default();
    let bytes = [("readBytes", io.read_bytes), ("writeBytes", io.write_bytes)].map(|(k, v)| (k, v.map(|v| v.0)));
    let limits = bytes.into_iter().chain([("readOps", io.read_ops), ("writeOps", io.write_ops)]);
    for (field, _) in limits.filter(|(_, limit)| *limit == Some(0)) {
        found.add(format!("{at}.io.{field}"), "must be more than nothing");
    }
}

fn check_restart(at: &str, restart: &Restart, found: &mut Problems) {
    if restart.backoff_max < restart.backoff {
        let text = format!("{} is shorter than `backoff` ({})", restart.backoff_max, restart.backoff);
        found.add(format!("{at}.backoffMax"), text);
    }
    if restart.backoff.ms == 0 {
        found.add(format!("{at}.backoff"), "must be more than nothing: a crash loop would take the CPU");
    }
    for code in restart.no_restart_exit_codes.iter().filter(|code| !(0..=255).contains(*code)) {
        found.add(format!("{at}.noRestartExitCodes"), format!("{code} is no exit code (0 to 255)"));
    }
}

/// What a workload refers to must be in the manifest.
fn check_needs(manifest: &Manifest, name: &WorkloadName, workload: &Workload, found: &mut Problems) {
    let at = |field: &str| format!("workloads.{name}.{field}");
    for (need, condition) in &workload.depends_on {
        match manifest.workloads.get(need) {
            None => {
                let near = nearest(need.as_str(), manifest.workloads.keys().map(WorkloadName::as_str));
                let hint = near.map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
                found.add(at("dependsOn"), format!("there is no workload `{need}`{hint}"));
            }
            Some(other) if *condition == DependsOn::Completed && other.restart.policy == RestartPolicy::Always => {
                let text = format!("`{need}` never completes: its `restart.policy` is `always`");
                found.add(at("dependsOn"), text);
            }
            Some(_) => {}
        }
    }
    for network in workload.networks.keys().filter(|network| !manifest.networks.contains_key(*network)) {
        found.add(at("networks"), format!("there is no network `{network}`"));
    }
    for (network, attachment) in &workload.networks {
        for alias in attachment.aliases.iter().filter(|alias| WorkloadName::parse(alias).is_err()) {
            found.add(at(&format!("networks.{network}.aliases")), format!("`{alias}` is no host name"));
        }
    }
    let mut secrets = BTreeSet::new();
    for secret in &workload.secrets {
        if !manifest.secrets.contains_key(secret) {
            found.add(at("secrets"), format!("there is no secret `{secret}`"));
        }
        if !secrets.insert(secret) {
            found.add(at("secrets"), format!("`{secret}` is there twice"));
        }
    }
}

/// What the program is started with.
fn check_program(name: &WorkloadName, workload: &Workload, found: &mut Problems) {
    let at = |field: &str| format!("workloads.{name}.{field}");
    if let Some(signal) = workload.stop_signal.as_deref().filter(|signal| !STOP_SIGNALS.contains(signal)) {
        found.add(at("stopSignal"), format!("`{signal}` is none of {}", STOP_SIGNALS.join(", ")));
    }
    for key in workload.env.keys().filter(|key| key.is_empty() || key.contains(['=', '\0'])) {
        found.add(at("env"), format!("`{key}` is no name of a variable"));
    }
    for (field, texts) in [("command", &workload.command), ("args", &workload.args)] {
        if texts.iter().any(|text| text.contains('\0')) {
            found.add(at(field), "a zero byte cannot be passed to a program");
        }
    }
    for (key, _) in workload.env.iter().filter(|(_, value)| value.contains('\0')) {
        found.add(at(&format!("env.{key}")), "a zero byte cannot be passed to a program");
    }
    if let Some(workdir) = workload.workdir.as_deref().filter(|workdir| *workdir != "/" && !is_clean(workdir)) {
        found.add(at("workdir"), format!("`{workdir}` is not a clean absolute path"));
    }
    if let Some(hostname) = workload.hostname.as_deref().filter(|hostname| !is_host_name(hostname)) {
        found.add(at("hostname"), format!("`{hostname}` is no host name (at most 64 of a-z, 0-9, `-` and `.`)"));
    }
    if let Some(user) = workload.user.as_deref().filter(|user| !is_user(user)) {
        found.add(at("user"), format!("`{user}` is not `user` or `user:group`, as names or numbers"));
    }
}

/// `HOST_NAME_MAX` is 64 on Linux (gethostname(2)).
fn is_host_name(text: &str) -> bool {
    let labels_are_good = text.split('.').all(|label| {
        let edges = !label.starts_with('-') && !label.ends_with('-');
        !label.is_empty() && edges && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    });
    text.len() <= 64 && labels_are_good
}

fn is_user(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    let is_name = |part: &&str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'$'))
    };
    parts.len() <= 2 && parts.iter().all(is_name)
}

/// What the workload may do beyond the usual.
fn check_rights(name: &WorkloadName, workload: &Workload, found: &mut Problems) {
    let at = |field: &str| format!("workloads.{name}.{field}");
    let capabilities = &workload.capabilities;
    for (field, names) in [("capabilities.add", &capabilities.add), ("capabilities.drop", &capabilities.drop)] {
        for wrong in names.iter().filter(|n| !CAPABILITIES.contains(&n.strip_prefix("CAP_").unwrap_or(n))) {
            if field == "capabilities.drop" && wrong == "ALL" {
                continue;
            }
            let plain = wrong.strip_prefix("CAP_").unwrap_or(wrong).to_ascii_uppercase();
            let text = match nearest(&plain, CAPABILITIES) {
                Some(near) => format!("`{wrong}` is no capability; did you mean `{near}`?"),
                None => format!("`{wrong}` is no capability (capabilities(7))"),
            };
            found.add(at(field), text);
        }
    }
    for (index, device) in workload.devices.iter().enumerate() {
        let at = at(&format!("devices[{index}]"));
        for (field, path) in [("path", Some(&device.path)), ("target", device.target.as_ref())] {
            if let Some(path) = path.filter(|path| !(is_clean(path) && path.starts_with("/dev/"))) {
                found.add(format!("{at}.{field}"), format!("`{path}` is not a clean path below /dev"));
            }
        }
        let letters: BTreeSet<char> = device.access.chars().collect();
        let is_access = letters.len() == device.access.len() && letters.iter().all(|c| "rwm".contains(*c));
        if device.access.is_empty() || !is_access {
            found.add(format!("{at}.access"), format!("`{}` is not some of `r`, `w`, `m`", device.access));
        }
    }
}

/// `host[:port]/repository` with a digest or a tag. What the registry room parses in full, checked here for its shape.
fn check_image(image: &str, path: String, found: &mut Problems) {
    let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
    if image.starts_with("oci:") {
        return;
    }
    let host = name.split_once('/').map_or("", |(host, _)| host);
    if !(host.contains(['.', ':']) || host == "localhost") {
        found.add(&*path, format!("`{image}` names no registry (`host[:port]/repository…`)"));
    }
    let tagged = name.rsplit('/').next().is_some_and(|last| last.contains(':'));
    match digest {
        Some(digest) if crate::id::Digest::parse(digest).is_err() => {
            found.add(path, format!("`{digest}` is not a sha256 digest"));
        }
        None if !tagged => found.add(path, format!("`{image}` has neither a digest nor a tag")),
        _ => {}
    }
}

/// What the executor puts there itself.
const TAKEN_TARGETS: [&str; 4] = ["/proc", "/sys", "/dev", "/run/secrets"];

fn check_mounts(manifest: &Manifest, name: &WorkloadName, workload: &Workload, found: &mut Problems) {
    let mut targets = BTreeSet::new();
    for (index, mount) in workload.mounts.iter().enumerate() {
        let at = format!("workloads.{name}.mounts[{index}]");
        if !is_clean(&mount.target) {
            found.add(format!("{at}.target"), format!("`{}` is not a clean absolute path", mount.target));
        }
        if TAKEN_TARGETS.contains(&mount.target.as_str()) {
            found.add(format!("{at}.target"), format!("`{}` is set up by the device", mount.target));
        }
        if !targets.insert(&mount.target) {
            found.add(format!("{at}.target"), format!("`{}` is mounted twice", mount.target));
        }
        check_mount_source(manifest, workload, mount, &at, found);
    }
}

fn check_mount_source(manifest: &Manifest, workload: &Workload, mount: &Mount, at: &str, found: &mut Problems) {
    match &mount.source {
        MountSource::Volume(volume) if !manifest.volumes.contains_key(volume) => {
            found.add(format!("{at}.source.volume"), format!("there is no volume `{volume}`"));
        }
        MountSource::Bind(path) if !is_clean(path) => {
            found.add(format!("{at}.source.bind"), format!("`{path}` is not a clean absolute path"));
        }
        MountSource::Tmpfs { size: Bytes(0) } => {
            found.add(format!("{at}.source.tmpfs.size"), "must be more than nothing");
        }
        MountSource::Tmpfs { size } => {
            if let Some(memory) = workload.resources.memory.filter(|memory| size > memory) {
                let text = format!("{size} is more than `resources.memory` ({memory}), which it counts against");
                found.add(format!("{at}.source.tmpfs.size"), text);
            }
        }
        MountSource::Volume(_) | MountSource::Bind(_) => {}
    }
}

fn check_health(name: &WorkloadName, health: &Health, found: &mut Problems) {
    let at = |field: &str| format!("workloads.{name}.health.{field}");
    if health.interval.ms < 100 {
        found.add(at("interval"), "must be at least 100ms");
    }
    if health.timeout.ms == 0 {
        found.add(at("timeout"), "must be more than nothing");
    }
    if health.retries == 0 {
        found.add(at("retries"), "must be at least 1");
    }
    match &health.probe {
        Probe::Exec { command } if command.is_empty() => found.add(at("probe.exec.command"), "is empty"),
        Probe::Http { port: 0, .. } => found.add(at("probe.http.port"), "0 is no port"),
        Probe::Tcp { port: 0 } => found.add(at("probe.tcp.port"), "0 is no port"),
        // What a request line may hold (RFC 9112, 3.2): it is sent as it is.
        Probe::Http { path, .. } if !path.starts_with('/') || path.bytes().any(|b| !b.is_ascii_graphic()) => {
            found.add(at("probe.http.path"), format!("`{path}` is not an absolute path without spaces"));
        }
        Probe::Exec { .. } | Probe::Http { .. } | Probe::Tcp { .. } => {}
    }
}
