//! The manifest `edge/v1`: what an operator wants to run on a device. Names follow Compose and Kubernetes where they
//! have one. Written in YAML, TOML or JSON; travels as CBOR under COSE (`envelope.rs`).
//!
//! This file is the shape alone. What must hold beyond the shape is in `validate.rs`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{DeviceId, GroupName, NetworkName, SecretName, Sequence, VolumeName, WorkloadName};
use crate::moment::{Apply, Window};
use crate::quantity::{Bytes, MilliCpu, Span, Timestamp};
use crate::spec::Spec;

/// The only `apiVersion` this agent reads.
pub const API_VERSION: &str = "edge/v1";

/// A signed document that says all that a device shall run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Manifest {
    /// Always `edge/v1`.
    pub api_version: String,
    /// The one device this manifest is for. Either this or `group`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceId>,
    /// The group of devices this manifest is for. Either this or `device`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupName>,
    /// Strictly rising per device: a manifest with a sequence already seen, or lower, is refused.
    pub sequence: Sequence,
    /// When the manifest was made. Also moves the device's time floor.
    pub issued: Timestamp,
    /// After this time the manifest is not accepted any more. One that already runs goes on running.
    pub expires: Timestamp,
    /// What to run, by name.
    #[serde(default)]
    #[schemars(with = "BTreeMap<WorkloadName, Workload>")]
    pub workloads: BTreeMap<WorkloadName, Spec>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub networks: BTreeMap<NetworkName, Network>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<VolumeName, Volume>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<SecretName, Secret>,
    #[serde(default)]
    pub update: Update,
}

/// How a new generation takes over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Update {
    /// How long every workload must be healthy before the generation counts as good.
    pub probation: Span,
    /// How long the generation may take to get there before the last good one comes back.
    pub deadline: Span,
    /// How many changed workloads may be down at once.
    pub max_unavailable: u32,
    /// When it takes over, once it is staged.
    #[serde(skip_serializing_if = "is_at_once")]
    pub apply: Apply,
    /// For `apply: window`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Window>,
}

fn is_at_once(apply: &Apply) -> bool {
    *apply == Apply::Now
}

impl Default for Update {
    fn default() -> Self {
        Self {
            probation: Span::from_secs(30),
            deadline: Span::from_secs(300),
            max_unavailable: 1,
            apply: Apply::Now,
            window: None,
        }
    }
}

/// One container and the rules it runs under.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Workload {
    /// `registry/repository@sha256:…`, or `registry/repository:tag` where the image itself is signed.
    pub image: String,
    /// Replaces the image's entrypoint.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Replaces the image's arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Added to the image's environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// `uid`, `uid:gid`, or names from the image's `/etc/passwd`. `host`: the image's user, with the device's own ids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Whose ids it runs with: `private` (a range of its own, root inside is nobody outside) or `host`.
    #[serde(default, skip_serializing_if = "UsernsMode::is_private")]
    pub userns_mode: UsernsMode,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// The walls. `memory` and `cpu` must be there.
    #[serde(default)]
    pub resources: Resources,
    #[serde(default)]
    pub restart: Restart,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// What must have been reached by others before this one starts.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub depends_on: BTreeMap<WorkloadName, DependsOn>,
    /// `bridge` (own address on the device's bridge), `none` (loopback only) or `host`.
    #[serde(default)]
    pub network_mode: NetworkMode,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// Networks to join in `bridge` mode, with the names under which others find it there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub networks: BTreeMap<NetworkName, NetworkAttachment>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
    /// Secrets that appear as files under `/run/secrets/`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<SecretName>,
    #[serde(default)]
    pub capabilities: Capabilities,
    #[serde(default)]
    pub seccomp: Seccomp,
    /// Makes the root file system read-only.
    #[serde(default)]
    pub read_only: bool,
    /// A tiny init as the first process: it passes signals on, reaps, and ends with the program's code.
    #[serde(default, skip_serializing_if = "is_false")]
    pub init: bool,
    /// Device nodes of the host to pass in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<Device>,
    /// Sent first on stop; a signal name such as `SIGTERM`. Default: the image's, else SIGTERM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// How long after `stopSignal` SIGKILL follows.
    #[serde(default = "default_stop_timeout")]
    pub stop_timeout: Span,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn default_stop_timeout() -> Span {
    Span::from_secs(10)
}

/// The `user` that is none of the image's: the ids of the device.
const USER_HOST: &str = "host";

impl Workload {
    /// Root inside is root outside: `user: host`, or `usernsMode: host` beside a user of the image.
    pub fn has_host_ids(&self) -> bool {
        self.userns_mode == UsernsMode::Host || self.user.as_deref() == Some(USER_HOST)
    }

    /// Who it runs as inside, if not as the image says.
    pub fn user_inside(&self) -> Option<&str> {
        self.user.as_deref().filter(|user| *user != USER_HOST)
    }
}

/// Hard limits. All of them are walls: a workload that reaches one is throttled, refused or killed, never its neighbours.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Resources {
    /// cgroup v2 `memory.max`. Required.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
    /// cgroup v2 `cpu.max` as a share of one core. Required.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<MilliCpu>,
    /// cgroup v2 `pids.max`.
    #[serde(default = "default_pids")]
    pub pids: u32,
    /// cgroup v2 `io.max` on the data disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io: Option<Io>,
    /// What its writable root and log may take of the data disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Bytes>,
}

fn default_pids() -> u32 {
    128
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Io {
    /// Bytes read per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_bytes: Option<Bytes>,
    /// Bytes written per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_bytes: Option<Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_ops: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_ops: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    #[default]
    Always,
    OnFailure,
    Never,
}

/// When and how fast a workload that ended is started again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Restart {
    pub policy: RestartPolicy,
    /// Wait before the second restart in a row; doubles from there. The first restart is at once.
    pub backoff: Span,
    /// The wait never grows beyond this: a budget spent is never dead for ever.
    pub backoff_max: Span,
    /// A run this long resets the back-off.
    pub stable_after: Span,
    /// Restarts in a row after which a generation in probation counts as failed. The workload itself is still retried.
    pub attempts: u32,
    /// Exit codes that mean "do not restart", whatever the policy.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub no_restart_exit_codes: Vec<i32>,
}

impl Default for Restart {
    fn default() -> Self {
        Self {
            policy: RestartPolicy::Always,
            backoff: Span::from_secs(1),
            backoff_max: Span::from_secs(300),
            stable_after: Span::from_secs(60),
            attempts: 5,
            no_restart_exit_codes: Vec::new(),
        }
    }
}

/// What to ask, one of three.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Probe {
    /// A command inside the container: exit code 0 is healthy.
    Exec { command: Vec<String> },
    /// `GET` on the container's own address: 200 to 399 is healthy.
    Http {
        port: u16,
        #[serde(default = "default_path")]
        path: String,
    },
    /// A connection to the container's own address.
    Tcp { port: u16 },
}

fn default_path() -> String {
    "/".to_owned()
}

/// What follows when a workload is unhealthy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HealthAction {
    #[default]
    Restart,
    /// Only reported.
    None,
}

/// A health check. Until `startPeriod` is over, failures do not count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Health {
    pub probe: Probe,
    #[serde(default = "default_start_period")]
    pub start_period: Span,
    #[serde(default = "default_interval")]
    pub interval: Span,
    #[serde(default = "default_timeout")]
    pub timeout: Span,
    /// Failures in a row that make it unhealthy.
    #[serde(default = "default_retries")]
    pub retries: u32,
    #[serde(default)]
    pub action: HealthAction,
}

fn default_start_period() -> Span {
    Span::from_secs(10)
}
fn default_interval() -> Span {
    Span::from_secs(10)
}
fn default_timeout() -> Span {
    Span::from_secs(3)
}
fn default_retries() -> u32 {
    3
}

/// What another workload must have reached first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DependsOn {
    Started,
    Healthy,
    /// Ended with exit code 0.
    Completed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkMode {
    #[default]
    Bridge,
    None,
    Host,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum UsernsMode {
    #[default]
    Private,
    /// Root inside is root outside; must be allowed by the device's `agent.toml`.
    Host,
}

impl UsernsMode {
    fn is_private(&self) -> bool {
        *self == Self::Private
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
}

/// A port of the device that leads to one of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Port {
    pub host: u16,
    pub container: u16,
    #[serde(default)]
    pub protocol: Protocol,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NetworkAttachment {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Network {
    /// No way out to other networks.
    pub internal: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Volume {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// Where a secret's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Secret {
    /// In the manifest: signed, not encrypted. Anyone who may read the manifest may read it.
    Value(String),
    /// A file of the device, put there in the factory, under `/etc/edged/secrets/`.
    File(String),
}

/// What to mount, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mount {
    pub source: MountSource,
    /// Absolute path inside the container.
    pub target: String,
    #[serde(default)]
    pub read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum MountSource {
    Volume(VolumeName),
    /// A path of the device; must be allowed by the device's `agent.toml`.
    Bind(String),
    /// Memory, counted against the workload's limit.
    Tmpfs {
        size: Bytes,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Capabilities {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub add: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drop: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Seccomp {
    #[default]
    Default,
    /// No filter; must be allowed by the device's `agent.toml`.
    Unconfined,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    /// On the host, e.g. `/dev/ttyUSB0`.
    pub path: String,
    /// Inside the container; the same path if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Some of `r`, `w`, `m`.
    #[serde(default = "default_device_access")]
    pub access: String,
}

fn default_device_access() -> String {
    "rw".to_owned()
}

impl Manifest {
    /// A manifest with nothing in it.
    pub fn empty() -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            device: None,
            group: None,
            sequence: Sequence(0),
            issued: Timestamp(0),
            expires: Timestamp(0),
            workloads: BTreeMap::new(),
            networks: BTreeMap::new(),
            volumes: BTreeMap::new(),
            secrets: BTreeMap::new(),
            update: Update::default(),
        }
    }
}

impl Workload {
    /// A workload with an image and all defaults (and so, without its walls, not yet a valid one).
    pub fn of_image(image: &str) -> Self {
        Self {
            image: image.to_owned(),
            command: Vec::new(),
            args: Vec::new(),
            env: BTreeMap::new(),
            workdir: None,
            user: None,
            userns_mode: UsernsMode::default(),
            hostname: None,
            resources: Resources { pids: default_pids(), ..Resources::default() },
            restart: Restart::default(),
            health: None,
            depends_on: BTreeMap::new(),
            network_mode: NetworkMode::default(),
            ports: Vec::new(),
            networks: BTreeMap::new(),
            mounts: Vec::new(),
            secrets: Vec::new(),
            capabilities: Capabilities::default(),
            seccomp: Seccomp::default(),
            read_only: false,
            init: false,
            devices: Vec::new(),
            stop_signal: None,
            stop_timeout: default_stop_timeout(),
            labels: BTreeMap::new(),
        }
    }
}
