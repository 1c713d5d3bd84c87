//! Two things about the keeper's own program.
//!
//! *Sealed* ([`edged_sys::own_program`]): at its start the keeper executes itself once more from a detached read-only mount
//! of its own file. It costs one exec at boot and nothing per start.
//!
//! *Resumed*: after a fault, on SIGUSR2, or on SIGHUP or the agent's word (an upgrade: the agent is replaced too), the
//! keeper writes its table into a memfd, lets the descriptors live through the exec, and runs itself again. Children do not
//! notice; zombies wait for the new image. Signals stay blocked through it (execve(2)), so that none is lost and none kills.
//! After a fault the same image runs; else the file that now lies where the program came from, and a descriptor of the
//! former image goes along until the new one has proved itself ([`crate::trial`]).

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use edged_sys::inherit::{leave, take};
use edged_sys::{own_program, pidfd};
use serde::{Deserialize, Serialize};

use crate::log;
use crate::program;
use crate::serve::{AllDoors, Doors, Outgoing};
use crate::table::Table;

const SEALED_ENV: &str = "EDGED_SEALED";
const RESUME_ENV: &str = "EDGED_RESUME_FD";
/// Where the program was started from: `/proc/self/exe` of a sealed one no longer tells.
const PROGRAM_ENV: &str = "EDGED_PROGRAM";
/// The proved program, while its successor is on trial.
const FORMER_ENV: &str = "EDGED_FORMER_FD";

/// What the keeper tells itself through an exec; nobody else's business.
pub const OWN_ENV: [&str; 4] = [SEALED_ENV, RESUME_ENV, PROGRAM_ENV, FORMER_ENV];

/// The descriptors, and what waits to be sent.
#[derive(Debug, Default)]
pub struct Kept {
    pub doors: AllDoors,
    pub agent: Option<OwnedFd>,
    pub outgoing: VecDeque<Outgoing>,
    /// The program that comes back if this one does not prove itself.
    pub former: Option<OwnedFd>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The image that runs.
    Same,
    /// What lies at its place now.
    Newest,
    /// The one before: its descriptor, else what lies at its place again.
    Former,
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
    let left = leave_all(kept).and_then(|()| save(table, kept, agent_too));
    let memfd = match left {
        Ok(memfd) => memfd,
        Err(error) => return error,
    };
    let execute = |program: &OwnedFd, is_sealed: bool, former: Option<&OwnedFd>| -> io::Error {
        let number = OsString::from(memfd.as_raw_fd().to_string());
        let former = former.map(|former| OsString::from(former.as_raw_fd().to_string()));
        let mut with: Vec<(&str, &OsStr)> = vec![(RESUME_ENV, &number)];
        with.extend(former.as_deref().map(|former| (FORMER_ENV, former)));
        let without: &[&str] = if is_sealed { &[FORMER_ENV] } else { &[SEALED_ENV, FORMER_ENV] };
        own_program::execute(program, without, &with).into()
    };
    let open = |path: &Path| own_program::open(path).map_err(io::Error::from);
    let place = || self::program().ok_or_else(|| io::Error::other("it is not known where this program came from"));
    match program {
        Program::Same => match open(Path::new(own_program::EXE)) {
            Ok(own) => execute(&own, true, kept.former.as_ref()),
            Err(error) => error,
        },
        // Unsealed, so that it seals its own file.
        Program::Newest => match place().and_then(|place| open(&place)) {
            Ok(new) => execute(&new, false, kept.former.as_ref()),
            Err(error) => error,
        },
        Program::Former => {
            if let Some(former) = &kept.former {
                let error = execute(former, true, None);
                log::line(&format!("the former program: {error}"));
            }
            match place().and_then(|place| open(&place)) {
                Ok(again) => execute(&again, false, None),
                Err(error) => error,
            }
        }
    }
}

/// A copy of the table for a program that is only tried: it takes over nothing.
pub fn for_rehearsal(command: &mut Command, table: &File) {
    for name in OWN_ENV {
        command.env_remove(name);
    }
    command.env(RESUME_ENV, table.as_raw_fd().to_string());
}

/// In a program that is tried: whether the table can be read.
pub fn rehearse() -> io::Result<()> {
    let number = std::env::var(RESUME_ENV).ok().and_then(|text| text.parse().ok());
    let memfd = take(number.ok_or_else(|| io::Error::other("there is no table"))?)?;
    read(&mut File::from(memfd)).map(drop)
}

fn read(memfd: &mut File) -> io::Result<Saved> {
    let mut bytes = Vec::new();
    memfd.read_to_end(&mut bytes)?;
    edged_model::cbor::read(&bytes).map_err(io::Error::other)
}

/// Descriptors that live through the next exec.
fn leave_all(kept: &Kept) -> io::Result<()> {
    let doors = kept.doors.values().flat_map(|child| child.outputs.iter().chain(&child.talk));
    doors.chain(&kept.agent).chain(&kept.former).try_for_each(leave)
}

pub fn save(table: &Table, kept: &Kept, agent_too: bool) -> io::Result<File> {
    let mut doors = Vec::new();
    for (key, child) in &kept.doors {
        let outputs = child.outputs.iter().map(AsRawFd::as_raw_fd).collect();
        doors.push(SavedDoors { key: key.clone(), talk: child.talk.as_ref().map(AsRawFd::as_raw_fd), outputs });
    }
    let agent = kept.agent.as_ref().map(AsRawFd::as_raw_fd);
    let saved = Saved { table: table.clone(), agent_too, doors, agent, outgoing: kept.outgoing.clone() };
    let bytes = serde_cbor::to_vec(&saved).map_err(io::Error::other)?;
    let mut memfd = File::from(rustix::fs::memfd_create("edged-table", rustix::fs::MemfdFlags::empty())?);
    memfd.write_all(&bytes)?;
    memfd.rewind()?;
    Ok(memfd)
}

/// The table that an earlier image of this process left, if one did. Who cannot read it and has a former program lets that
/// one have it.
pub fn restore() -> io::Result<Option<(Table, Kept, bool)>> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let Some(memfd) = number(RESUME_ENV) else { return Ok(None) };
    let former = number(FORMER_ENV).map(take).transpose()?;
    let mut memfd = File::from(take(memfd)?);
    let (saved, former) = match (read(&mut memfd), former) {
        (Ok(saved), former) => (saved, former),
        (Err(error), Some(former)) => {
            log::line(&format!("the table cannot be read: {error}; the former program takes it"));
            memfd.rewind()?;
            leave(&memfd)?;
            if let Some(place) = program() {
                let _ = program::put_back(&place);
            }
            return Err(own_program::execute(&former, &[FORMER_ENV], &[]).into());
        }
        (Err(error), None) => return Err(error),
    };
    let mut kept = Kept { outgoing: saved.outgoing, former, ..Kept::default() };
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
