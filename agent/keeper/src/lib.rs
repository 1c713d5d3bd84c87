//! The keeper: PID 1 of a device, or a child-subreaper under another init. One thread, one epoll loop. It knows no
//! network, no database and no byte from outside; it launches what the agent asks for, reaps every orphan, keeps the
//! log pipes open while the agent is away, and takes the machine down in order.
//!
//! ```text
//!            signalfd   agent socket   launch pipes   timers
//!                 └───────────┴──────┬──────┴────────────┘
//!                                  wait ─> handle ─> send
//! ```
//!
//! Rules that keep it alive: nothing is unwrapped, no call waits, each queue is bounded, and a panic re-executes the
//! program with the table of its children instead of ending it ([`resume`]).

#![forbid(unsafe_code)]

/// The agent: started, heard of, restarted.
mod agent;
/// A device's first steps: mounts, modules, data disk, clock.
mod boot;
/// Lines to the kernel's log, or to stderr under another init.
mod log;
/// The keeper's own binary, out of every container's reach; and the table through an exec.
mod resume;
/// The loop.
mod serve;
/// The way down.
mod shutdown;
/// Living and ended children.
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

/// What the keeper is told at its start.
#[derive(Debug, Clone)]
pub struct KeeperConfig {
    /// Arguments of the agent, behind the program's own name.
    pub agent_args: Vec<String>,
    /// PID 1: mounts, modules, watchdog and power are ours.
    pub device: bool,
    /// cgroup v2 `memory.max` of the agent.
    pub agent_memory_max_bytes: u64,
    /// How long children may take to end after SIGTERM on the way down.
    pub stop_timeout_ms: u64,
    /// Unix seconds at build time: the clock is never before that.
    pub built_at: i64,
    /// Where the data disk is mounted on a device.
    pub data: PathBuf,
}

/// The environment variable that names the agent's socket.
pub const SOCKET_ENV: &str = "EDGED_KEEPER_FD";

/// Runs until the machine goes down (device) or the keeper is told to end (host).
pub fn run(config: KeeperConfig) -> ExitCode {
    log::to_kernel(config.device);
    if config.device {
        boot::early();
    }
    if let Err(error) = resume::seal_binary() {
        log::line(&format!("the binary could not be sealed against containers: {error}"));
    }
    if config.device && !resume::is_resuming() {
        boot::run(&config);
    }
    match serve::Keeper::new(config) {
        Ok(keeper) => keeper.run(),
        Err(error) => {
            log::line(&format!("cannot start: {error}"));
            ExitCode::FAILURE
        }
    }
}
