//! Two things about the keeper's own program.
//!
//! *Sealed* ([`edged_sys::own_program`]): at its start the keeper executes itself once more from a detached read-only mount
//! of its own file. It costs one exec at boot and nothing per start.
//!
//! *Resumed*: after a fault, on SIGUSR2, or on SIGHUP or the agent's word (an upgrade: the agent is replaced too), the keeper writes its table into a memfd, lets the descriptors
//! live through the exec, and runs itself again. Children do not notice; zombies wait for the new image. Signals stay
//! blocked through it (execve(2)), so that none is lost and none kills. After a fault the same image runs; on SIGUSR2
//! the file that now lies where the program came from.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use edged_sys::inherit::{leave, take};
use edged_sys::{own_program, pidfd};
use serde::{Deserialize, Serialize};

use crate::log;
use crate::serve::{AllDoors, Doors, Outgoing};
use crate::table::Table;

const SEALED_ENV: &str = "EDGED_SEALED";
const RESUME_ENV: &str = "EDGED_RESUME_FD";
/// Where the program was started from: `/proc/self/exe` of a sealed one no longer tells.
const PROGRAM_ENV: &str = "EDGED_PROGRAM";

/// What the keeper tells itself through an exec; nobody else's business.
pub const OWN_ENV: [&str; 3] = [SEALED_ENV, RESUME_ENV, PROGRAM_ENV];

/// The descriptors, and what waits to be sent.
#[derive(Debug, Default)]
pub struct Kept {
    pub doors: AllDoors,
    pub agent: Option<OwnedFd>,
    pub outgoing: VecDeque<Outgoing>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The image that runs.
    Same,
    /// What lies at its place now.
    Newest,
}

pub fn is_sealed() -> bool {
    std::env::var_os(SEALED_ENV).is_some()
}

pub fn is_resuming() -> bool {
    std::env::var_os(RESUME_ENV).is_some()
}

/// Where the program came from, and a newer one is looked for.
pub fn program() -> Option<PathBuf> {
    std::env::var_os(PROGRAM_ENV).map(PathBuf::from)
}

/// Executes this program again from a read-only mount of its file; comes back only if that was done already or failed.
pub fn seal_binary() -> io::Result<()> {
    if is_sealed() {
        return Ok(());
    }
    let place = std::fs::read_link(own_program::EXE)?;
    let file = own_program::sealed()?;
    Err(own_program::execute(&file, &[], &[(SEALED_ENV, "1".as_ref()), (PROGRAM_ENV, place.as_os_str())]).into())
}

/// What goes through the exec. Descriptors by number.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    table: Table,
    /// An upgrade: the agent is to be replaced too.
    #[serde(default)]
    agent_too: bool,
    doors: Vec<SavedDoors>,
    agent: Option<i32>,
    outgoing: VecDeque<Outgoing>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedDoors {
    key: String,
    talk: Option<i32>,
    outputs: Vec<i32>,
}

/// Runs the program anew with the table. Comes back only when that failed.
pub fn exec_self(table: &Table, kept: &Kept, program: Program, agent_too: bool) -> io::Error {
    let memfd = match save(table, kept, agent_too) {
        Ok(memfd) => memfd,
        Err(error) => return error,
    };
    let number = OsString::from(memfd.as_raw_fd().to_string());
    let place = self::program().filter(|place| place.is_file());
    if let (Program::Newest, Some(place)) = (program, place) {
        // Unsealed, so that it seals its own file.
        let error = execute(&place, &[SEALED_ENV], &number);
        log::line(&format!("{}: {error}; the program that runs starts itself again", place.display()));
    }
    execute(Path::new(own_program::EXE), &[], &number)
}

fn execute(program: &Path, without: &[&str], memfd: &OsStr) -> io::Error {
    let errno = match own_program::open(program) {
        Ok(file) => own_program::execute(&file, without, &[(RESUME_ENV, memfd)]),
        Err(errno) => errno,
    };
    errno.into()
}

fn save(table: &Table, kept: &Kept, agent_too: bool) -> io::Result<File> {
    let mut doors = Vec::new();
    for (key, child) in &kept.doors {
        for fd in child.outputs.iter().chain(&child.talk) {
            leave(fd)?;
        }
        let outputs = child.outputs.iter().map(AsRawFd::as_raw_fd).collect();
        doors.push(SavedDoors { key: key.clone(), talk: child.talk.as_ref().map(AsRawFd::as_raw_fd), outputs });
    }
    if let Some(socket) = &kept.agent {
        leave(socket)?;
    }
    let agent = kept.agent.as_ref().map(AsRawFd::as_raw_fd);
    let saved = Saved { table: table.clone(), agent_too, doors, agent, outgoing: kept.outgoing.clone() };
    let bytes = serde_cbor::to_vec(&saved).map_err(io::Error::other)?;
    let mut memfd = File::from(rustix::fs::memfd_create("edged-table", rustix::fs::MemfdFlags::empty())?);
    memfd.write_all(&bytes)?;
    memfd.rewind()?;
    Ok(memfd)
}

/// The table that an earlier image of this process left, if one did.
pub fn restore() -> io::Result<Option<(Table, Kept, bool)>> {
    let Some(number) = std::env::var(RESUME_ENV).ok().and_then(|text| text.parse().ok()) else { return Ok(None) };
    let mut bytes = Vec::new();
    File::from(take(number)?).read_to_end(&mut bytes)?;
    let saved: Saved = edged_model::cbor::read(&bytes).map_err(io::Error::other)?;
    let mut kept = Kept { outgoing: saved.outgoing, ..Kept::default() };
    for doors in saved.doors {
        let living = saved.table.children.get(&doors.key).filter(|child| child.is_living());
        let entry = Doors {
            pidfd: living.and_then(|child| pidfd::open_child(child.pid).ok()),
            talk: doors.talk.map(take).transpose()?,
            outputs: doors.outputs.into_iter().map(take).collect::<io::Result<_>>()?,
        };
        kept.doors.insert(doors.key, entry);
    }
    kept.agent = saved.agent.map(take).transpose()?;
    Ok(Some((saved.table, kept, saved.agent_too)))
}
