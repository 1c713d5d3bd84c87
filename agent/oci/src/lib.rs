//! A specification of the OCI runtime-spec becomes a launch ([`spec`], used by the agent too), and `edged oci` is the
//! same executor with the command line of an OCI runtime, for other engines and for suites. One thread, no server, no
//! state but files under `--root`; a container's file system, namespaces and program are made by `edged-sys`, here as in
//! the keeper.
//!
//! ```text
//! create: config.json -> spec -> LaunchSpec ─ groups, state, gate ─> clone ─ hooks ─> child waits at its gate
//! start:  connects to the gate ─> child: startContainer hooks, exec ─> the connection closes, or says what failed
//! ```
//!
//! It must never start a thread (a clone copies one), nor print anything on success that was not asked for.

#![forbid(unsafe_code)]

/// Capability names and bits.
pub mod caps;
/// Control groups as `linux.resources` wants them.
pub mod cgroup;
/// What this kernel has, and what its configuration calls what it lacks.
pub mod kernel;
/// Mounts: option words, cgroup views.
pub mod mounts;
mod notifier;
/// System call filters.
pub mod seccomp;
/// Specification to launch: pure.
pub mod spec;

/// Scheduler, labels, hooks.
mod life;
/// Kernel parameters of namespaces.
mod sysctl;

/// The command line.
mod arguments;
/// `config.json`.
mod bundle;
/// `create`, `run`, `start`.
mod create;
/// Everything that can go wrong, in words.
mod error;
/// `exec`.
mod exec;
/// `kill`, `delete`, `pause`, `resume`, `update`.
mod manage;
/// `state`, `list`, `ps`, `events`, `features`, `spec`.
mod query;
/// The program file, out of a container's reach.
mod seal;
/// What is kept of a container under `--root`.
mod state;
/// Terminals: given away, or relayed.
mod terminal;
/// The flags of `update`.
mod update;
/// Waiting for a program in the foreground.
mod wait;

use std::ffi::OsString;
use std::process::ExitCode;

use arguments::{Parsed, Verb};
use error::OciError;

pub use bundle::parse as parse_config;

/// Exit codes.
const SUCCESS: u8 = 0;
const FAILURE: u8 = 1;

/// The name under which edged is this program.
pub const PROGRAM: &str = "edged-oci";

/// Runs one command. `words` do not have the program's name.
pub fn main(words: impl IntoIterator<Item = OsString>, version: &str) -> ExitCode {
    ExitCode::from(run_words(words.into_iter().collect(), version))
}

/// As [`main`], with the exit code as a number.
pub fn run_words(words: Vec<OsString>, version: &str) -> u8 {
    let parsed = match arguments::parse(&words) {
        Ok(parsed) => parsed,
        Err(error) => {
            error::report(&arguments::Global::of(&words), &error);
            return FAILURE;
        }
    };
    // Nobody in a container may look into us, nor into what we clone until it has exec'd (CVE-2016-9962).
    let result = edged_sys::privilege::set_not_dumpable()
        .map_err(|errno| OciError::system("prctl(PR_SET_DUMPABLE)", errno))
        .and_then(|()| run(&parsed, version));
    match result {
        Ok(code) => code,
        Err(error) => {
            error::report(&parsed.global, &error);
            // What shells and engines take for "not found" and "not executable".
            error.exit_code()
        }
    }
}

fn run(parsed: &Parsed, version: &str) -> Result<u8, OciError> {
    if matches!(parsed.verb, Verb::Create | Verb::Run | Verb::Exec) {
        seal::ensure()?;
    }
    let done = |result: Result<(), OciError>| result.map(|()| SUCCESS);
    match parsed.verb {
        Verb::Help => {
            print!("{}", arguments::help(parsed.words.first().map(String::as_str)));
            Ok(SUCCESS)
        }
        Verb::Version => done(query::version(version)),
        Verb::Create => done(create::create(parsed)),
        Verb::Run => create::run(parsed),
        Verb::Start => done(create::start(parsed)),
        Verb::Exec => exec::exec(parsed),
        Verb::State => done(query::state(parsed)),
        Verb::List => done(query::list(parsed)),
        Verb::Ps => done(query::ps(parsed)),
        Verb::Events => done(query::events(parsed)),
        Verb::Features => done(query::features()),
        Verb::Spec => done(query::spec(parsed)),
        Verb::Kill => done(manage::kill(parsed)),
        Verb::Delete => done(manage::delete(parsed)),
        Verb::Pause => done(manage::freeze(parsed, true)),
        Verb::Resume => done(manage::freeze(parsed, false)),
        Verb::Update => done(update::update(parsed)),
    }
}
