//! What keeper and agent say to each other: one CBOR document per `SOCK_SEQPACKET` message, descriptors beside it
//! (`SCM_RIGHTS`). The agent asks, the keeper answers with the same `id`; `Exited` comes unasked.

use serde::{Deserialize, Serialize};

/// The largest message either side sends. A launch with a large environment is the biggest; more is refused by name.
pub const MAX_MESSAGE_BYTES: usize = 192 * 1024;

/// The most descriptors that travel with one message (the kernel's SCM_MAX_FD is 253): each mount of a workload with ids
/// of its own is one.
pub const MAX_MESSAGE_FDS: usize = 96;

/// Agent to keeper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub id: u64,
    pub body: RequestBody,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RequestBody {
    /// "I am alive and the planner makes progress." Without one for `HEARTBEAT_TIMEOUT_MS` the agent is killed and
    /// started anew.
    Heartbeat,
    /// Start a container or, with `LaunchSpec::join`, a process in a living one. Descriptors: as the spec's indexes say.
    Launch(Box<LaunchSpec>),
    /// A signal by pidfd: never to a reused pid.
    Signal {
        key: String,
        signal: i32,
    },
    /// Another note for a child: what it runs as was changed.
    Note {
        key: String,
        note: String,
    },
    /// All living children and all exits not yet forgotten. Answer: `Table`, then one `Child` message per entry.
    List,
    /// The agent has made this exit durable; the keeper may forget it.
    Forget {
        key: String,
    },
    /// Take the machine down in order. Under another init: end the keeper.
    Shutdown {
        how: ShutdownHow,
    },
    /// Store the time floor: on a device, set the clock to it if the clock is behind.
    TimeFloor {
        unix_seconds: i64,
    },
    /// On a device, set the clock forward to this; never back.
    MoveClock {
        unix_ms: i64,
    },
    Version,
    /// Try the program that lies where this one came from, in a child; nothing changes. `Done`, or `Refused` with its words.
    Rehearse {
        /// Also if it is the one that was refused before.
        again: bool,
    },
    /// Run the program that lies where this one came from: the keeper with its table, then an agent of that program.
    Upgrade,
    /// The planner has nothing to do but wait: once by each agent. A program on trial is judged by it.
    Settled,
    /// What became of a program that was refused is in the story.
    RefusalTold,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShutdownHow {
    PowerOff,
    Reboot,
    /// Leave the workloads running and end (host mode only).
    Exit,
}

/// Keeper to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's id; 0 for what comes unasked.
    pub id: u64,
    pub body: ReplyBody,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplyBody {
    Done,
    /// exec was reached. Descriptors: the read ends of stdout and stderr (or the pty's master).
    Launched {
        key: String,
        pid: i32,
        boot_ms: u64,
    },
    /// The child failed before exec. Nothing is left of it.
    LaunchFailed {
        key: String,
        stage: String,
        errno: i32,
    },
    /// How many `Child` messages follow.
    Table {
        children: u32,
        keeper_version: String,
    },
    /// One entry. Descriptors: as in `Launched` (for a child that has ended too: its last words are still in the pipe).
    Child(ChildState),
    Exited(ChildExit),
    Version {
        version: String,
        /// Where the program came from, and a newer one is looked for.
        #[serde(default)]
        program: Option<String>,
        /// What comes back if the agents of this one fall.
        #[serde(default)]
        on_trial_after: Option<String>,
        #[serde(default)]
        refused: Option<RefusedProgram>,
    },
    Refused {
        why: String,
    },
}

/// A newer program that was not taken, or that was taken and sent away again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedProgram {
    /// A sentence with the file and the numbers.
    pub why: String,
    /// It ran, and its agents fell.
    pub has_run: bool,
    /// The story has it.
    pub is_told: bool,
    pub file: Option<FileId>,
}

/// A file, whatever its name (stat(2)). The number of one that was removed is given to the next: hence the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    pub device: u64,
    pub inode: u64,
    #[serde(default)]
    pub bytes: u64,
    #[serde(default)]
    pub modified_s: i64,
    #[serde(default)]
    pub modified_ns: i64,
}

/// One child of the keeper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildState {
    pub key: String,
    pub pid: i32,
    pub started_boot_ms: u64,
    /// The agent's own words about the launch (`LaunchSpec::note`), given back as they were.
    pub note: String,
    pub exit: Option<ChildExit>,
    /// How the launch said it is to be ended: the manifest of today may say something else, or nothing.
    #[serde(default)]
    pub stop: StopPlan,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildExit {
    pub key: String,
    pub pid: i32,
    /// As in wait(2): an exit code, or the signal.
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub core_dumped: bool,
    pub boot_ms: u64,
}

/// How a child is ended when everything goes down. The keeper knows it itself: the agent may be gone by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopPlan {
    pub signal: i32,
    /// From the signal to SIGKILL.
    pub timeout_ms: u64,
    /// Children of a higher order end first, all of one order together: who depends on others before those.
    pub order: u32,
}

impl Default for StopPlan {
    /// A command inside a container, say: nobody waits for it.
    fn default() -> Self {
        Self { signal: 15, timeout_ms: 10_000, order: u32::MAX }
    }
}

/// Everything the child does between clone and exec, prepared by the runtime: plain data, no decision left.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LaunchSpec {
    /// The keeper's name for this run, unique among its children: `workload` or `workload/exec-N`.
    pub key: String,
    /// Kept by the keeper and given back in `ChildState`.
    pub note: String,
    pub stop: StopPlan,
    /// Enter the namespaces of this living child instead of making new ones.
    pub join: Option<String>,
    /// New namespaces: CLONE_NEW* flags. `CLONE_NEWCGROUP` is unshared after the cgroup is entered.
    pub namespaces: u64,
    /// Index of a descriptor of a network namespace to enter.
    pub netns_fd: Option<u32>,
    /// Other namespaces to enter instead of making them.
    pub joins: Vec<NamespaceJoin>,
    /// Of the new user namespace (`CLONE_NEWUSER` in `namespaces`); the keeper writes them.
    pub uid_map: Vec<IdMapping>,
    pub gid_map: Vec<IdMapping>,
    /// The child says when its namespaces are there, and waits for the word to go on.
    pub hold: bool,
    /// Index of a listening socket: with all set up but exec, the child waits there for somebody to connect.
    pub gate_fd: Option<u32>,
    pub cgroup: CgroupEntry,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    pub argv: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
    pub umask: Option<u32>,
    pub rootfs: Option<Rootfs>,
    /// Of the new root: MS_SHARED and the like, with MS_REC; 0: private, and host mounts arrive as slaves.
    pub root_propagation: u64,
    /// In order, inside the new root.
    pub mounts: Vec<MountStep>,
    pub device_nodes: Vec<DeviceNode>,
    /// `link` then `target`, e.g. `/dev/fd` to `/proc/self/fd`.
    pub symlinks: Vec<(String, String)>,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    pub sysctls: Vec<(String, String)>,
    /// RLIMIT number, soft, hard.
    pub rlimits: Vec<(u32, u64, u64)>,
    pub oom_score_adj: Option<i32>,
    /// The five sets as bit masks.
    pub capabilities: CapabilitySets,
    pub no_new_privs: bool,
    /// The compiled filter: `struct sock_filter` array as bytes, native endian. Empty: none.
    #[serde(with = "serde_bytes_vec")]
    pub seccomp: Vec<u8>,
    /// The filter comes while the child makes its file system: whoever launches it says it to the child, and nothing
    /// before it. Not through the keeper, and not where the child holds.
    #[serde(skip)]
    pub seccomp_follows: bool,
    /// SECCOMP_FILTER_FLAG_*.
    pub seccomp_flags: u32,
    /// Index of a connected socket, for a filter that asks somebody outside (seccomp_unotify(2)): the filter's descriptor
    /// goes there, beside words that whoever launches has sent the child.
    pub seccomp_listener_fd: Option<u32>,
    /// The only processors it may run on, as far as its cgroup has them; empty: no wish.
    pub cpus: Vec<u32>,
    pub stdio: Stdio,
    /// Descriptors 3 and up that go through exec: this many.
    pub kept_fds: u32,
    /// ioprio_set(2): class and level as one number.
    pub io_priority: Option<u32>,
    pub scheduler: Option<Scheduler>,
    /// personality(2).
    pub personality: Option<u32>,
    /// The profile or context that exec shall change to.
    pub label: Option<SecurityLabel>,
    /// The SELinux context of the empty file systems that hide paths.
    pub mount_label: Option<String>,
    /// Run by the child after the mounts, before the new root is the root.
    pub create_container_hooks: Vec<Hook>,
    /// Run by the child in the new root, just before exec.
    pub start_container_hooks: Vec<Hook>,
    /// Stay in the session keyring of whoever launches, instead of a new one.
    pub keep_keyring: bool,
    /// edged stays as process 1, passes signals on, reaps, and leaves with the program's code.
    pub init: bool,
}

/// A namespace by descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceJoin {
    /// One CLONE_NEW* flag.
    pub flag: u64,
    /// Index of its descriptor.
    pub fd: u32,
}

/// One line of `/proc/PID/uid_map` (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    pub inside: u32,
    pub outside: u32,
    pub count: u32,
}

/// sched_setattr(2), all of `struct sched_attr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Scheduler {
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime_ns: u64,
    pub deadline_ns: u64,
    pub period_ns: u64,
}

/// What a security module calls a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SecurityLabel {
    AppArmor(String),
    SeLinux(String),
}

/// A program of the OCI runtime-spec's `hooks`; the container's state is its standard input.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Hook {
    pub path: String,
    pub args: Vec<String>,
    pub env: Vec<String>,
    /// 0: as long as it takes.
    pub timeout_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum CgroupEntry {
    /// Stay where the keeper is (tests).
    #[default]
    Inherit,
    /// Index of a descriptor of a cgroup v2 directory: `CLONE_INTO_CGROUP`.
    V2 { dir_fd: u32 },
    /// Indexes of opened `cgroup.procs` files, one per v1 hierarchy: the child writes `0` first of all.
    V1 { procs_fds: Vec<u32> },
}

/// The root file system, mounted in the child's own mount namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rootfs {
    /// Layers from the top down; all absolute paths.
    Overlay { lower: Vec<String>, upper: String, work: String, mount_at: String, volatile: bool, read_only: bool },
    /// A ready directory, bind-mounted onto itself.
    Directory { path: String, read_only: bool },
    /// A ready, detached mount, by the index of its descriptor. It is put onto `mount_at`, which anybody may enter.
    Tree { tree_fd: u32, mount_at: String, read_only: bool },
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MountStep {
    /// A path of the host for a bind, else the source name (`proc`, `tmpfs`).
    #[serde(skip_serializing_if = "is_default")]
    pub source: String,
    /// Absolute path inside the new root; made if missing (a file for a file, else a directory).
    #[serde(skip_serializing_if = "is_default")]
    pub target: String,
    #[serde(skip_serializing_if = "is_default")]
    pub fstype: String,
    /// MS_* flags of the mount itself.
    #[serde(skip_serializing_if = "is_default")]
    pub flags: u64,
    /// MS_* flags that were asked not to be (`exec`, `suid`): what a bind brings along is cleared.
    #[serde(skip_serializing_if = "is_default")]
    pub clear: u64,
    /// The same for every mount below as well (`rro`).
    #[serde(skip_serializing_if = "is_default")]
    pub flags_below: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub clear_below: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub data: String,
    #[serde(skip_serializing_if = "is_default")]
    pub bind: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub recursive: bool,
    /// Change the mount that is at `target`, make none.
    #[serde(skip_serializing_if = "is_default")]
    pub remount: bool,
    /// Fill the new file system with what the root has at `target` (`tmpcopyup`).
    #[serde(skip_serializing_if = "is_default")]
    pub copy_up: bool,
    /// Do not follow a link at the end of `source`.
    #[serde(skip_serializing_if = "is_default")]
    pub source_no_follow: bool,
    /// Index of a descriptor of a ready, detached mount (an idmapped one): `source` is for messages only.
    #[serde(skip_serializing_if = "is_default")]
    pub tree_fd: Option<u32>,
    /// MS_PRIVATE and the like; 0 leaves it.
    #[serde(skip_serializing_if = "is_default")]
    pub propagation: u64,
    /// The SELinux context of all that is in the new file system.
    #[serde(skip_serializing_if = "is_default")]
    pub label: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// Absolute path inside the root.
    pub path: String,
    /// `c`, `b`, or `p` for a FIFO.
    pub kind: char,
    pub major: u32,
    pub minor: u32,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CapabilitySets {
    pub bounding: u64,
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
    pub ambient: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Stdio {
    /// stdin from /dev/null; stdout and stderr are pipes whose read ends the keeper keeps.
    #[default]
    Pipes,
    /// A pty of the new root, its master given to the agent.
    Terminal { rows: u16, columns: u16 },
    /// Descriptors of the request: stdin, stdout, stderr.
    Given { stdin_fd: u32, stdout_fd: u32, stderr_fd: u32 },
}

/// The agent must be heard of this often.
pub const HEARTBEAT_TIMEOUT_MS: u64 = 30_000;

/// What says nothing need not be sent: of a mount's fields most do not, and a launch has two dozen mounts.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Bytes as a CBOR byte string instead of an array of numbers.
pub(crate) mod serde_bytes_vec {
    use serde::{Deserializer, Serializer, de};
    use std::fmt;

    pub fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        struct BytesVisitor;
        impl de::Visitor<'_> for BytesVisitor {
            type Value = Vec<u8>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a byte string")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }
        }
        d.deserialize_byte_buf(BytesVisitor)
    }
}
