//! `agent.toml`: the device's own configuration, and the places on its disk. Every key has a default; an unknown key is
//! an error, so that a spelling mistake is not a silent default.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use edged_model::id::{DeviceId, GroupName};
use edged_model::moment::UtcOffset;
use edged_model::quantity::{Bytes, MilliCpu, Span};
use serde::{Deserialize, Serialize};

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is not a valid agent.toml")]
    Parse {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    pub device: Device,
    pub fleet: Fleet,
    pub api: Api,
    pub console: Console,
    pub limits: Limits,
    pub images: Images,
    /// By registry host and port, as image names spell it.
    pub registry: BTreeMap<String, Registry>,
    pub allow: Allow,
    pub runtime: Runtime,
    pub log: Log,
    pub network: Network,
    pub time: Time,
    pub update: Update,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Device {
    pub id: DeviceId,
    pub groups: Vec<GroupName>,
    /// The factory trust root. Default: `trust.cose` beside this file.
    pub trust_root: Option<PathBuf>,
}

impl Default for Device {
    fn default() -> Self {
        Self {
            id: DeviceId::parse("edged").unwrap_or_else(|_| unreachable!("a valid label")),
            groups: Vec::new(),
            trust_root: None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Fleet {
    /// `https://fleet.example`; empty: no fleet, manifests come by `edgectl push` or a stick.
    pub url: Option<String>,
    /// PEM file with the CA of the fleet endpoint; without it the built-in roots.
    pub ca: Option<PathBuf>,
    /// One-time token for `POST /v1/enroll`, or a file that holds it.
    pub enroll_token: Option<String>,
    /// How long one long-poll may wait.
    pub poll_wait: Span,
    /// Pause between two polls of an endpoint that does not long-poll.
    pub poll_interval: Span,
    /// A report is sent when something changed, and at least this often.
    pub report_interval: Span,
    /// Reports kept while the network is gone; the oldest go first, and are counted.
    pub outbox_max: u32,
}

impl Default for Fleet {
    fn default() -> Self {
        Self {
            url: None,
            ca: None,
            enroll_token: None,
            poll_wait: Span::from_secs(60),
            poll_interval: Span::from_secs(30),
            report_interval: Span::from_secs(300),
            outbox_max: 500,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Api {
    /// Address of the direct-push HTTPS port, e.g. `0.0.0.0:7443`; empty: off.
    pub listen: Option<String>,
    /// Its certificate and key (PEM); without them a self-signed pair is made on first start.
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    /// Group that may use the local socket besides root.
    pub group: String,
}

impl Default for Api {
    fn default() -> Self {
        Self { listen: None, tls_cert: None, tls_key: None, group: "edged".to_owned() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleMode {
    Off,
    #[default]
    ReadOnly,
    /// All verbs. Whoever reaches the line rules the device.
    Full,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Console {
    /// Terminal of the line console, e.g. `/dev/hvc0`, `/dev/ttyS1`; empty: none.
    pub tty: Option<PathBuf>,
    pub mode: ConsoleMode,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Limits {
    /// Kept for kernel, keeper and agent: workloads may have the rest of the memory.
    pub memory_reserve: Bytes,
    /// `memory.max` of the agent itself.
    pub agent_memory: Bytes,
    /// Kept for the supervisor out of all cores.
    pub cpu_reserve: MilliCpu,
    /// Workloads may be promised this many times the cores there are (1 = none over). Memory is never promised twice.
    pub cpu_overcommit: u32,
    /// Free space that no pull and no workload may take.
    pub disk_reserve: Bytes,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_reserve: Bytes::mebi(64),
            agent_memory: Bytes::mebi(48),
            cpu_reserve: MilliCpu(50),
            cpu_overcommit: 1,
            disk_reserve: Bytes::mebi(64),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImagePolicy {
    /// Every image must be signed by `threshold` keys of the trust root's `image` role.
    #[default]
    Signature,
    /// A digest in the signed manifest is enough.
    Digest,
}

/// What becomes of device nodes in layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceNodes {
    /// The layer is refused.
    #[default]
    Refuse,
    /// As if the entry were not there.
    Ignore,
    /// They are made. Which of them a workload may open is for its device list to say.
    Allow,
}

/// Whether the kernel protects the files of layers (fs-verity).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FsVerity {
    /// Where kernel and file system can.
    #[default]
    Auto,
    Off,
    /// What cannot be protected is not unpacked.
    Required,
}

/// How often all layers are read and held against what was unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Scrub {
    Off,
    Every(Span),
}

impl TryFrom<String> for Scrub {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::Off);
        }
        match text.parse::<Span>() {
            Ok(span) if span.ms >= 1000 => Ok(Self::Every(span)),
            Ok(_) => Err(format!("scrub = \"{text}\": at least a second, or \"off\"")),
            Err(error) => Err(format!("scrub: {error}, nor \"off\"")),
        }
    }
}

impl From<Scrub> for String {
    fn from(scrub: Scrub) -> Self {
        match scrub {
            Scrub::Off => "off".to_owned(),
            Scrub::Every(span) => span.to_string(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Images {
    pub policy: ImagePolicy,
    /// By the beginning of the image's name; the longest counts.
    pub device_nodes: BTreeMap<String, DeviceNodes>,
    /// The most that one layer may unpack to.
    pub layer_max: Bytes,
    pub layer_entries_max: u64,
    /// Layers fetched at the same time, of all images together.
    pub parallel: u32,
    /// How long an image that no generation needs stays, while there is room.
    pub keep_unused: Span,
    /// What all images together may take while there is one that no generation needs. Default: what the disk has.
    pub budget: Option<Bytes>,
    /// After an unclean stop the layers about to be used are checked; contents are read for so long at most.
    pub check_time: Span,
    pub fs_verity: FsVerity,
    /// All layers are read once in this time.
    pub scrub: Scrub,
    /// Bytes per second that it reads, on the average.
    pub scrub_rate: Bytes,
    /// Bytes per second from all registries together.
    pub rate_max: Option<Bytes>,
    /// Bytes a day (UTC) from all registries together.
    pub daily_max: Option<Bytes>,
    /// A layer that takes longer than this to fetch is kept while it is on its way, so that a restart costs none of it.
    pub keep_partial_after: Span,
}

impl Default for Images {
    fn default() -> Self {
        Self {
            policy: ImagePolicy::Signature,
            device_nodes: BTreeMap::new(),
            layer_max: Bytes::mebi(4096),
            layer_entries_max: 500_000,
            parallel: 3,
            keep_unused: Span::from_secs(86_400),
            budget: None,
            check_time: Span::from_secs(30),
            fs_verity: FsVerity::Auto,
            scrub: Scrub::Every(Span::from_secs(30 * 86_400)),
            scrub_rate: Bytes::mebi(1),
            rate_max: None,
            daily_max: None,
            keep_partial_after: Span::from_secs(30),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Registry {
    pub username: Option<String>,
    pub password: Option<String>,
    /// A file that holds the password.
    pub password_file: Option<PathBuf>,
    /// PEM file with the registry's CA.
    pub ca: Option<PathBuf>,
    /// PEM files with the certificate and the key by which this device shows who it is.
    pub client_cert: Option<PathBuf>,
    pub client_key: Option<PathBuf>,
    /// `http://[user:password@]host:port`, asked by CONNECT. Default: what the environment says; empty: none.
    pub proxy: Option<String>,
    /// Hosts that are asked first, in order.
    pub mirrors: Vec<String>,
    /// Plain HTTP: only sensible on loopback; the digest still guards the content.
    pub insecure_http: bool,
}

/// What manifests may ask of this device. Nothing, unless said here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Allow {
    /// Paths of the device (and all below) that may be bind-mounted.
    pub bind: Vec<PathBuf>,
    /// Device nodes that may be passed in.
    pub devices: Vec<PathBuf>,
    /// Capabilities beyond the default set that may be added.
    pub capabilities: Vec<String>,
    pub host_network: bool,
    /// `usernsMode: host`: workloads whose root is the device's root.
    pub host_users: bool,
    pub seccomp_unconfined: bool,
}

/// How workloads are run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Runtime {
    /// Each workload has ids of its own. Without, root inside is root outside, for all of them.
    pub user_namespaces: bool,
    /// Where those ids come from.
    pub user_ids: UserIds,
    /// Layers reach them through idmapped mounts where that can be; else, and without, by copies.
    pub idmapped_layers: bool,
}

impl Default for Runtime {
    fn default() -> Self {
        let user_ids = UserIds { first: 0x7000_0000, count: 0x1000_0000 };
        Self { user_namespaces: true, user_ids, idmapped_layers: true }
    }
}

/// Ids of the device that are given to workloads, 65,536 to each. The default is a part that systemd's table of ids
/// leaves free, enough for 4,096 workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawUserIds")]
pub struct UserIds {
    first: u32,
    count: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawUserIds {
    first: u32,
    count: u32,
}

impl TryFrom<RawUserIds> for UserIds {
    type Error = String;

    fn try_from(raw: RawUserIds) -> Result<Self, String> {
        Self::new(raw.first, raw.count)
    }
}

impl UserIds {
    /// The sentence says what is wrong.
    pub fn new(first: u32, count: u32) -> Result<Self, String> {
        if first < 65_536 {
            return Err(format!("user-ids: first = {first}: ids below 65536 are the device's own users"));
        }
        if count < 65_536 {
            return Err(format!("user-ids: count = {count}: one workload needs 65536"));
        }
        // The highest number is no id (setresuid(2)).
        match first.checked_add(count) {
            Some(end) if end < u32::MAX => Ok(Self { first, count }),
            _ => Err(format!("user-ids: first = {first} and count = {count} go beyond 4294967294")),
        }
    }

    pub fn first(self) -> u32 {
        self.first
    }

    pub fn count(self) -> u32 {
        self.count
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, or directives such as `edged::registry=debug`.
    pub level: String,
    /// Log space of one workload.
    pub workload_max: Bytes,
    /// What is kept, for a second, of each of a workload's two streams, once a burst of sixteen seconds' worth is used up.
    pub rate: Bytes,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), workload_max: Bytes::mebi(4), rate: Bytes(64 << 10) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InterfaceMode {
    #[default]
    Dhcp,
    Static,
    /// Somebody else sets it up: what a host wants.
    None,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Network {
    /// The device's own interface. Only looked at when edged is PID 1.
    pub mode: InterfaceMode,
    /// Its name; empty: the first Ethernet interface.
    pub interface: Option<String>,
    /// `192.0.2.10/24`, for `static`.
    pub address: Option<String>,
    pub gateway: Option<String>,
    pub dns: Vec<String>,
    /// Where workloads in `bridge` mode live.
    pub bridge: String,
    pub subnet: String,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            mode: InterfaceMode::Dhcp,
            interface: None,
            address: None,
            gateway: None,
            dns: Vec::new(),
            bridge: "edged0".to_owned(),
            subnet: "10.88.0.0/16".to_owned(),
        }
    }
}

/// Who is asked for the time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Time {
    /// SNTP servers, `host` or `host:port`. Empty: on a device those that DHCP names, on a host none.
    pub servers: Vec<String>,
    pub interval: Span,
}

impl Default for Time {
    fn default() -> Self {
        Self { servers: Vec::new(), interval: Span::from_secs(3_600) }
    }
}

/// When new generations take over.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Update {
    /// Local time against UTC, for windows that name no offset of their own.
    pub timezone: UtcOffset,
}

impl Config {
    /// Reads `path`; a missing file is all defaults.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text)
                .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        }
    }

    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }
}

/// Where everything lies: `/etc/edged`, `/run/edged`, `/var/lib/edged`, or all of it under one directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    pub config_file: PathBuf,
    run: PathBuf,
    data: PathBuf,
}

impl Places {
    /// With `root`, everything lies under it, so that several agents run side by side.
    pub fn new(root: Option<&Path>, config: Option<&Path>) -> Self {
        let (run, data, etc) = match root {
            Some(root) => (root.join("run"), root.to_owned(), root.join("agent.toml")),
            None => ("/run/edged".into(), "/var/lib/edged".into(), "/etc/edged/agent.toml".into()),
        };
        Self { config_file: config.map_or(etc, Path::to_owned), run, data }
    }

    pub fn run(&self) -> &Path {
        &self.run
    }
    pub fn data(&self) -> &Path {
        &self.data
    }
    pub fn socket(&self) -> PathBuf {
        self.run.join("agent.sock")
    }
    /// Network namespaces, kept by bind mounts so that they outlive a run.
    pub fn netns(&self) -> PathBuf {
        self.run.join("netns")
    }
    /// User namespaces of workloads, kept likewise.
    pub fn userns(&self) -> PathBuf {
        self.run.join("userns")
    }
    /// Which volume was given to which ids.
    pub fn volume_ids(&self) -> PathBuf {
        self.data.join("volume-ids")
    }
    /// Which workload has which ids.
    pub fn user_ids(&self) -> PathBuf {
        self.data.join("user-ids")
    }
    pub fn state(&self) -> PathBuf {
        self.data.join("state")
    }
    pub fn keep(&self) -> PathBuf {
        self.data.join("keep")
    }
    pub fn content(&self) -> PathBuf {
        self.data.join("content")
    }
    pub fn layers(&self) -> PathBuf {
        self.data.join("layers")
    }
    pub fn workloads(&self) -> PathBuf {
        self.data.join("workloads")
    }
    pub fn volumes(&self) -> PathBuf {
        self.data.join("volumes")
    }
    pub fn log(&self) -> PathBuf {
        self.data.join("log")
    }
    /// The device's own key pair, made on first start.
    pub fn device_key(&self) -> PathBuf {
        self.keep().join("device.key")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_often_layers_are_read_is_a_span_or_off() {
        let scrub =
            |text: &str| Config::parse(&format!("[images]\nscrub = {text}\n")).map(|config| config.images.scrub);
        assert_eq!(Images::default().scrub, Scrub::Every(Span::from_secs(30 * 86_400)));
        assert_eq!(scrub("\"30days\"").unwrap(), Images::default().scrub);
        assert_eq!(scrub("\"30d\"").unwrap(), Images::default().scrub);
        assert_eq!(scrub("\"off\"").unwrap(), Scrub::Off);
        for (bad, said) in [
            ("\"never\"", "`never` is not a time span"),
            ("\"0s\"", "at least a second"),
            ("\"30\"", "is not a time span"),
            ("30", "invalid type"),
        ] {
            let error = scrub(bad).unwrap_err().to_string();
            assert!(error.contains(said), "{bad}: {error}");
        }
    }
}
