//! What must hold in a manifest beyond its shape. Every problem is told, each with the path of its field.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;

mod spelling;
mod workload;

pub(crate) use spelling::is_unknown_field;
pub use spelling::{explain, nearest};
pub use workload::CAPABILITIES;

use crate::id::WorkloadName;
use crate::manifest::{API_VERSION, Manifest, Protocol, Secret};
use crate::moment::Apply;
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

/// The device never goes back below the highest it has seen, so a slip of the hand must not use up all numbers. Also the
/// largest whole number that every JSON program keeps exactly.
pub const MOST_SEQUENCE: u64 = (1 << 53) - 1;

/// More than a manifest of 1 MiB can fill with sense; each one costs a cgroup, an overlay and log space.
const MOST_WORKLOADS: usize = 256;

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
    if manifest.sequence.0 > MOST_SEQUENCE {
        found.add("sequence", format!("{} is above {MOST_SEQUENCE}: nothing could follow it", manifest.sequence));
    }
    if manifest.expires <= manifest.issued {
        found.add("expires", format!("{} is not after `issued` ({})", manifest.expires, manifest.issued));
    }
    if manifest.update.max_unavailable == 0 {
        found.add("update.maxUnavailable", "must be at least 1, or nothing can ever change");
    }
    if manifest.update.deadline < manifest.update.probation {
        found.add(
            "update.deadline",
            format!("{} is shorter than `probation` ({})", manifest.update.deadline, manifest.update.probation),
        );
    }
    match (manifest.update.apply, &manifest.update.window) {
        (Apply::Window, None) => found.add("update.window", "must be there for `apply: window`"),
        (Apply::Now | Apply::NextBoot | Apply::Manual, Some(_)) => {
            found.add("update.window", "goes with `apply: window` only");
        }
        _ => {}
    }
    if manifest.workloads.len() > MOST_WORKLOADS {
        found.add("workloads", format!("{} are too many; {MOST_WORKLOADS} are allowed", manifest.workloads.len()));
    }
    for (name, secret) in &manifest.secrets {
        if let Some(path) = secret_file(secret).filter(|path| !is_secret_file(path)) {
            found.add(format!("secrets.{name}.file"), format!("`{path}` is no file directly in {SECRETS_DIR}"));
        }
    }
    for (name, workload) in &manifest.workloads {
        workload::check(manifest, name, workload, &mut found);
    }
    check_host_ports(manifest, &mut found);
    check_cycles(manifest, &mut found);
    found.0
}

/// Where a device keeps the files of its secrets.
const SECRETS_DIR: &str = "/etc/edged/secrets/";

/// A plain name, with or without the one folder it can be in.
fn is_secret_file(path: &str) -> bool {
    let name = path.strip_prefix(SECRETS_DIR).unwrap_or(path);
    is_clean(&format!("/{name}")) && !name.contains('/')
}

fn secret_file(secret: &Secret) -> Option<&str> {
    match secret {
        Secret::File(path) => Some(path),
        Secret::Value(_) => None,
    }
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

/// Absolute, without empty parts, `.` or `..`, and not the root itself.
fn is_clean(path: &str) -> bool {
    path.strip_prefix('/').is_some_and(|rest| {
        !rest.contains('\0') && rest.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
    })
}

fn check_host_ports(manifest: &Manifest, found: &mut Problems) {
    let mut taken: BTreeMap<(u16, bool), &WorkloadName> = BTreeMap::new();
    for (name, workload) in &manifest.workloads {
        for (index, port) in workload.ports.iter().enumerate() {
            let at = format!("workloads.{name}.ports[{index}]");
            for (field, number) in [("host", port.host), ("container", port.container)] {
                if number == 0 {
                    found.add(format!("{at}.{field}"), "0 is no port");
                }
            }
            let key = (port.host, port.protocol == Protocol::Udp);
            if let Some(other) = taken.insert(key, name).filter(|_| port.host != 0) {
                found.add(format!("{at}.host"), format!("port {} of the device is taken by `{other}`", port.host));
            }
        }
    }
}

/// Each ring of dependencies once, told in full: nobody in it could ever start.
fn check_cycles(manifest: &Manifest, found: &mut Problems) {
    for start in manifest.workloads.keys() {
        let Some(ring) = way_back(manifest, start) else { continue };
        // The ring is told by its first name in the alphabet, and only there.
        if ring.iter().all(|name| start <= name) {
            let way: Vec<&str> = ring.iter().map(|name| name.as_str()).chain([start.as_str()]).collect();
            let text = format!("{}: none of them could ever start", way.join(" -> "));
            found.add(format!("workloads.{start}.dependsOn"), text);
        }
    }
}

/// The shortest way along `dependsOn` from `start` back to it.
fn way_back<'m>(manifest: &'m Manifest, start: &'m WorkloadName) -> Option<Vec<&'m WorkloadName>> {
    let mut came_from: BTreeMap<&WorkloadName, &WorkloadName> = BTreeMap::new();
    let mut next = VecDeque::from([start]);
    while let Some(name) = next.pop_front() {
        for need in
            manifest.workloads.get(name)?.depends_on.keys().filter(|need| manifest.workloads.contains_key(*need))
        {
            if need == start {
                let mut ring = vec![name];
                while *ring.last()? != start {
                    ring.push(came_from.get(ring.last()?)?);
                }
                ring.reverse();
                return Some(ring);
            }
            if let Entry::Vacant(vacant) = came_from.entry(need) {
                vacant.insert(name);
                next.push_back(need);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests;
