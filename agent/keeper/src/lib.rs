//! The keeper: PID 1 of a device, or a child-subreaper under another init. One thread, one epoll loop. It knows no
//! network, no database and no byte from outside; it launches what the agent asks for, reaps every orphan, keeps the
//! log pipes open while the agent is away, and takes the machine down in order.
//!
//! ```text
//!   signalfd   agent socket   launches   clock
//!       └───────────┴──────┬──────┴────────┘
//!                        event ─> decide(table) ─> acts ─> system calls
//! ```
//!
//! Rules that keep it alive: nothing is unwrapped, no call waits, each queue is bounded, and a panic re-executes the
//! program with the table of its children instead of ending it ([`resume`]).

#![forbid(unsafe_code)]

/// The agent: how it is started.
mod agent;
/// A device's first steps: mounts, modules, data disk, clock.
mod boot;
/// `(table, event, now) -> acts`: pure.
mod decide;
/// The data disk: found, made, mended, mounted.
mod disk;
/// What must hold whatever comes over the socket.
pub mod fuzz;
/// Lines to the kernel's log, or to stderr under another init.
mod log;
/// Kernel modules.
mod modules;
/// The files of an upgrade.
mod program;
/// The keeper's own binary, out of every container's reach; and the table through an exec.
mod resume;
/// The loop.
mod serve;
/// The last steps of a device.
mod shutdown;
pub use shutdown::FAREWELL;
/// Living and ended children, the agent, the way down.
mod table;
/// A newer program: tried, on trial, sent away. Pure.
mod trial;

pub use program::{REHEARSE, SET_ASIDE, set_aside};

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;

/// What the keeper is told at its start.
#[derive(Debug, Clone)]
pub struct KeeperConfig {
    /// Arguments of the agent, behind the program's own name and `agent`.
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

/// Three descriptors for each child there may be, and some for ourselves.
const OPEN_FILES: u64 = 3 * table::MAX_CHILDREN as u64 + 256;

/// Runs until the machine goes down (device) or the keeper is told to end (host). Must be called before the process has
/// a second thread. It executes the program anew with the same arguments, once at the start and after a fault.
pub fn run(config: KeeperConfig) -> ExitCode {
    log::to_kernel(config.device);
    std::panic::set_hook(Box::new(|fault| log::line(&fault.to_string())));
    if config.device && !resume::is_sealed() && !resume::is_resuming() {
        // Without /proc there is no way to one's own binary.
        boot::run_first(&config);
    }
    if let Err(error) = resume::seal_binary() {
        log::line(&format!("the binary could not be sealed against containers: {error}"));
    }
    // An exec gave the process the name of a descriptor.
    let _ = nix::sys::prctl::set_name(c"edged");
    match edged_sys::privilege::raise_open_files(OPEN_FILES) {
        Ok(files) if files < OPEN_FILES => {
            log::line(&format!("only {files} files may be open: enough for {} children", files / 3))
        }
        Ok(_) => {}
        Err(error) => log::line(&format!("the limit on open files: {error}")),
    }
    if config.device && !resume::is_resuming() {
        boot::run_rest(&config);
    }
    loop {
        let device = config.device;
        match catch_unwind(AssertUnwindSafe(|| serve::Keeper::new(config.clone()))) {
            Ok(Ok(keeper)) => return keeper.run(),
            Ok(Err(error)) => log::line(&format!("cannot start: {error}")),
            Err(_) => log::line("cannot start: a fault"),
        }
        if !device {
            return ExitCode::FAILURE;
        }
        // The kernel panics when PID 1 ends; what is missing may come back.
        #[expect(clippy::disallowed_methods, reason = "nothing runs yet that could be waited for")]
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

/// In a program that is tried: says so if it can read the table that it is shown. All that the program does before
/// [`run`] is to be done before this too, so that what would fail fails here.
pub fn rehearse() -> ExitCode {
    match resume::rehearse() {
        Ok(()) => {
            println!("{}{}", trial::READY, trial::version());
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("the table of children cannot be read: {error}");
            ExitCode::FAILURE
        }
    }
}
