//! What must hold in a manifest beyond its shape. Every problem is told, each with the path of its field.

use std::collections::BTreeSet;
use std::fmt;

use crate::id::WorkloadName;
use crate::manifest::{API_VERSION, Health, Manifest, MountSource, NetworkMode, Probe, Workload};
use crate::quantity::Bytes;
use crate::reason::{Code, Reason};

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub path: String,
    pub code: Code,
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.text)
    }
}

/// Less memory than this starts no program.
const LEAST_MEMORY: Bytes = Bytes(512 << 10);

/// Signals that can stop a program, by the names of signal(7).
const STOP_SIGNALS: [&str; 8] =
    ["SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGKILL"];

struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, path: impl Into<String>, text: impl Into<String>) {
        self.add_as(Code::InvalidManifest, path, text);
    }

    fn add_as(&mut self, code: Code, path: impl Into<String>, text: impl Into<String>) {
        self.0.push(Problem { path: path.into(), code, text: text.into() });
    }
}

/// Everything that is wrong with `manifest`; empty when it may be signed and run.
pub fn problems(manifest: &Manifest) -> Vec<Problem> {
    let mut found = Problems(Vec::new());
    if manifest.api_version != API_VERSION {
        found.add("apiVersion", format!("`{}` is not `{API_VERSION}`", manifest.api_version));
    }
    match (&manifest.device, &manifest.group) {
        (None, None) => found.add("device", "either `device` or `group` must say whom this is for"),
        (Some(_), Some(_)) => found.add("group", "`device` and `group` exclude each other"),
        _ => {}
    }
    if manifest.sequence.0 == 0 {
        found.add("sequence", "begins with 1");
    }
    if manifest.expires <= manifest.issued {
        found.add("expires", format!("{} is not after `issued` ({})", manifest.expires, manifest.issued));
    }
    for (name, workload) in &manifest.workloads {
        check_workload(manifest, name, workload, &mut found);
    }
    check_host_ports(manifest, &mut found);
    check_cycles(manifest, &mut found);
    found.0
}

/// The problems as one reason, the first in full.
pub fn reason(problems: &[Problem]) -> Option<Reason> {
    let first = problems.first()?;
    let more = match problems.len() {
        1 => String::new(),
        n => format!(" (and {} more)", n - 1),
    };
    Some(Reason::new(first.code, format!("{first}{more}")).next("`edgectl manifest validate` lists all problems"))
}

fn check_workload(manifest: &Manifest, name: &WorkloadName, workload: &Workload, found: &mut Problems) {
    let at = |field: &str| format!("workloads.{name}.{field}");
    check_image(&workload.image, at("image"), found);
    match workload.resources.memory {
        None => found.add_as(Code::MissingLimit, at("resources.memory"), "is required: no workload without a wall"),
        Some(memory) if memory < LEAST_MEMORY => {
            found.add(at("resources.memory"), format!("{memory} is less than {LEAST_MEMORY}"));
        }
        Some(_) => {}
    }
    match workload.resources.cpu {
        None => found.add_as(Code::MissingLimit, at("resources.cpu"), "is required: no workload without a wall"),
        Some(cpu) if cpu.0 == 0 => found.add(at("resources.cpu"), "must be at least 1m"),
        Some(_) => {}
    }
    if workload.resources.pids == 0 {
        found.add(at("resources.pids"), "must be at least 1");
    }
    for need in workload.depends_on.keys() {
        if !manifest.workloads.contains_key(need) {
            found.add(at("dependsOn"), format!("there is no workload `{need}`"));
        }
    }
    for network in workload.networks.keys().filter(|network| !manifest.networks.contains_key(*network)) {
        found.add(at("networks"), format!("there is no network `{network}`"));
    }
    if workload.network_mode != NetworkMode::Bridge && !(workload.ports.is_empty() && workload.networks.is_empty()) {
        found.add(at("networkMode"), "ports and networks need `bridge`");
    }
    for secret in workload.secrets.iter().filter(|secret| !manifest.secrets.contains_key(*secret)) {
        found.add(at("secrets"), format!("there is no secret `{secret}`"));
    }
    check_mounts(manifest, name, workload, found);
    if let Some(signal) = workload.stop_signal.as_deref().filter(|signal| !STOP_SIGNALS.contains(signal)) {
        found.add(at("stopSignal"), format!("`{signal}` is none of {}", STOP_SIGNALS.join(", ")));
    }
    for key in workload.env.keys().filter(|key| key.is_empty() || key.contains(['=', '\0'])) {
        found.add(at("env"), format!("`{key}` is no name of a variable"));
    }
    let texts = workload.command.iter().chain(&workload.args).chain(workload.env.values());
    if texts.into_iter().any(|text| text.contains('\0')) {
        found.add(at("command"), "a zero byte cannot be passed to a program");
    }
    if let Some(workdir) = workload.workdir.as_deref().filter(|workdir| !workdir.starts_with('/')) {
        found.add(at("workdir"), format!("`{workdir}` is not absolute"));
    }
    if let Some(health) = &workload.health {
        check_health(name, health, found);
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

fn check_mounts(manifest: &Manifest, name: &WorkloadName, workload: &Workload, found: &mut Problems) {
    let mut targets = BTreeSet::new();
    for (index, mount) in workload.mounts.iter().enumerate() {
        let at = format!("workloads.{name}.mounts[{index}]");
        let clean = mount.target.starts_with('/')
            && mount.target.len() > 1
            && mount.target[1..].split('/').all(|part| !part.is_empty() && part != "." && part != "..");
        if !clean {
            found.add(format!("{at}.target"), format!("`{}` is not a clean absolute path", mount.target));
        }
        if !targets.insert(&mount.target) {
            found.add(format!("{at}.target"), format!("`{}` is mounted twice", mount.target));
        }
        match &mount.source {
            MountSource::Volume(volume) if !manifest.volumes.contains_key(volume) => {
                found.add(format!("{at}.source"), format!("there is no volume `{volume}`"));
            }
            MountSource::Bind(path) if !path.starts_with('/') => {
                found.add(format!("{at}.source"), format!("`{path}` is not absolute"));
            }
            MountSource::Volume(_) | MountSource::Bind(_) | MountSource::Tmpfs { .. } => {}
        }
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
    match &health.probe {
        Probe::Exec { command } if command.is_empty() => found.add(at("probe.exec.command"), "is empty"),
        Probe::Http { path, .. } if !path.starts_with('/') => {
            found.add(at("probe.http.path"), format!("`{path}` does not begin with `/`"));
        }
        Probe::Http { port: 0, .. } | Probe::Tcp { port: 0 } => found.add(at("probe"), "port 0 is none"),
        Probe::Exec { .. } | Probe::Http { .. } | Probe::Tcp { .. } => {}
    }
}

fn check_host_ports(manifest: &Manifest, found: &mut Problems) {
    let mut taken = BTreeSet::new();
    for (name, workload) in &manifest.workloads {
        for port in &workload.ports {
            if !taken.insert((port.host, format!("{:?}", port.protocol))) {
                found.add(format!("workloads.{name}.ports"), format!("port {} of the device is taken", port.host));
            }
        }
    }
}

fn check_cycles(manifest: &Manifest, found: &mut Problems) {
    for start in manifest.workloads.keys() {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&WorkloadName> = manifest.workloads[start].depends_on.keys().collect();
        while let Some(name) = next.pop() {
            if name == start {
                found.add(format!("workloads.{start}.dependsOn"), "depends on itself, by way of others");
                break;
            }
            if reached.insert(name) {
                next.extend(manifest.workloads.get(name).into_iter().flat_map(|workload| workload.depends_on.keys()));
            }
        }
    }
}

/// The known name nearest to a misspelt one, if one is near: for "did you mean".
pub fn nearest<'k>(wrong: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(wrong, name), name))
        .filter(|(distance, name)| *distance <= (name.len().max(3)) / 2)
        .min()
        .map(|(_, name)| name)
}

/// Rewrites serde's "unknown field `x`, expected one of `a`, `b`" into one that names the nearest field.
pub fn explain(error: &str) -> String {
    let Some((before, rest)) = error.split_once("unknown field `") else { return error.to_owned() };
    let Some((wrong, rest)) = rest.split_once('`') else { return error.to_owned() };
    let known: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
    match nearest(wrong, known.iter().copied()) {
        Some(name) => format!("{before}unknown field `{wrong}`; did you mean `{name}`?"),
        None => format!("{before}unknown field `{wrong}`; known are {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{DeviceId, Sequence};
    use crate::manifest::{DependsOn, Mount, Port};
    use crate::quantity::{MilliCpu, Timestamp};

    fn good() -> Manifest {
        let mut web = Workload::of_image("registry.example:5000/web:1");
        web.resources.memory = Some(Bytes::mebi(16));
        web.resources.cpu = Some(MilliCpu(100));
        Manifest {
            device: Some(DeviceId::parse("pump-1").unwrap()),
            sequence: Sequence(1),
            expires: Timestamp(1),
            workloads: [(WorkloadName::parse("web").unwrap(), web)].into(),
            ..Manifest::empty()
        }
    }

    fn texts(change: impl FnOnce(&mut Manifest, &mut Workload)) -> Vec<String> {
        let mut manifest = good();
        let name = WorkloadName::parse("web").unwrap();
        let mut web = manifest.workloads.remove(&name).unwrap();
        change(&mut manifest, &mut web);
        manifest.workloads.insert(name, web);
        problems(&manifest).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_good_one_has_no_problems() {
        assert!(problems(&good()).is_empty());
    }

    #[test]
    fn each_problem_names_its_field() {
        let name = |n: &str| WorkloadName::parse(n).unwrap();
        assert_eq!(
            texts(|_, web| web.resources.memory = None),
            ["workloads.web.resources.memory: is required: no workload without a wall"]
        );
        assert_eq!(
            texts(|_, web| web.image = "nginx".to_owned()),
            [
                "workloads.web.image: `nginx` names no registry (`host[:port]/repository…`)",
                "workloads.web.image: `nginx` has neither a digest nor a tag"
            ]
        );
        assert_eq!(
            texts(|_, web| web.depends_on.extend([(name("db"), DependsOn::Healthy)])),
            ["workloads.web.dependsOn: there is no workload `db`"]
        );
        assert_eq!(
            texts(|_, web| web.depends_on.extend([(name("web"), DependsOn::Started)])),
            ["workloads.web.dependsOn: depends on itself, by way of others"]
        );
        let mount = |target: &str| Mount {
            source: MountSource::Tmpfs { size: Bytes(1) },
            target: target.to_owned(),
            read_only: false,
        };
        assert_eq!(texts(|_, web| web.mounts = vec![mount("/a/../b")]).len(), 1);
        assert_eq!(texts(|_, web| web.mounts = vec![mount("/a"), mount("/a")]).len(), 1);
        let port = Port { host: 80, container: 80, protocol: Default::default() };
        assert_eq!(
            texts(|_, web| web.ports = vec![port.clone(), port]),
            ["workloads.web.ports: port 80 of the device is taken"]
        );
        assert_eq!(texts(|manifest, _| manifest.device = None).len(), 1);
    }

    #[test]
    fn a_misspelt_field_gets_the_nearest_one() {
        let text = "unknown field `memroy`, expected one of `memory`, `cpu`, `pids`";
        assert_eq!(explain(text), "unknown field `memroy`; did you mean `memory`?");
        let text = "unknown field `xyzzyxyzzy`, expected one of `memory`, `cpu`";
        assert_eq!(explain(text), "unknown field `xyzzyxyzzy`; known are memory, cpu");
    }
}
