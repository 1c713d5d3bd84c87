//! Two things about the keeper's own program.
//!
//! *Sealed*: a container that runs `/proc/self/exe` runs edged, and could then open that file for writing
//! (CVE-2019-5736). At its start the keeper executes itself once more from a detached read-only mount of its own file:
//! every `/proc/<pid>/exe` of it then leads through a mount on which no write is possible. It costs one exec at boot
//! and nothing per start.
//!
//! *Resumed*: on a panic, or on SIGUSR2 (an upgrade), the keeper writes its table into a memfd, lets the descriptors
//! live through the exec, and runs itself again. Children do not notice; zombies wait for the new image.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use edged_model::keeper::ChildExit;
use edged_sys::mount::{Attributes, clone_tree, set_attributes};
use serde::{Deserialize, Serialize};

use crate::table::{Child, Life, Table};

const SEALED_ENV: &str = "EDGED_SEALED";
const RESUME_ENV: &str = "EDGED_RESUME_FD";

/// Executes this program again from a read-only mount of its file; comes back only if that was done already or failed.
pub fn seal_binary() -> io::Result<()> {
    if std::env::var_os(SEALED_ENV).is_some() {
        return Ok(());
    }
    let tree = clone_tree(File::open("/proc/self/exe")?.as_fd(), false)?;
    // MOUNT_ATTR_RDONLY (mount_setattr(2)).
    set_attributes(tree.as_fd(), Attributes { set: 1, ..Attributes::default() })?;
    let path = format!("/proc/self/fd/{}", tree.as_raw_fd());
    Err(Command::new(path).args(std::env::args_os().skip(1)).env(SEALED_ENV, "1").exec())
}

pub fn is_resuming() -> bool {
    std::env::var_os(RESUME_ENV).is_some()
}

/// What goes through the exec. Descriptors by number.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    children: Vec<SavedChild>,
    agent: Option<SavedAgent>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedChild {
    key: String,
    pid: i32,
    started_boot_ms: u64,
    note: String,
    outputs: Vec<i32>,
    exit: Option<ChildExit>,
}

/// The agent lives on: its socket goes along.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedAgent {
    pub pid: i32,
    pub socket: i32,
}

/// Runs this program anew with the table. Comes back only when that failed.
pub fn exec_self(table: &Table, agent: Option<SavedAgent>) -> io::Error {
    match save(table, agent) {
        Ok(memfd) => Command::new("/proc/self/exe")
            .args(std::env::args_os().skip(1))
            .env(RESUME_ENV, memfd.as_raw_fd().to_string())
            .exec(),
        Err(error) => error,
    }
}

fn save(table: &Table, agent: Option<SavedAgent>) -> io::Result<File> {
    let mut children = Vec::new();
    for (key, child) in &table.children {
        for output in &child.outputs {
            edged_sys::inherit::leave(output)?;
        }
        let state = child.state(key);
        children.push(SavedChild {
            key: state.key,
            pid: state.pid,
            started_boot_ms: state.started_boot_ms,
            note: state.note,
            outputs: child.outputs.iter().map(AsRawFd::as_raw_fd).collect(),
            exit: state.exit,
        });
    }
    let bytes = serde_cbor::to_vec(&Saved { children, agent }).map_err(io::Error::other)?;
    let mut memfd = File::from(rustix::fs::memfd_create("edged-table", rustix::fs::MemfdFlags::empty())?);
    memfd.write_all(&bytes)?;
    memfd.rewind()?;
    Ok(memfd)
}

/// The table that an earlier image of this process left, if one did.
pub fn restore() -> io::Result<Option<(Table, Option<SavedAgent>)>> {
    let Some(number) = std::env::var(RESUME_ENV).ok().and_then(|text| text.parse().ok()) else { return Ok(None) };
    let mut bytes = Vec::new();
    File::from(edged_sys::inherit::take(number)?).read_to_end(&mut bytes)?;
    let saved: Saved = serde_cbor::from_slice(&bytes).map_err(io::Error::other)?;
    let mut table = Table::default();
    for child in saved.children {
        let outputs = child.outputs.iter().map(|fd| edged_sys::inherit::take(*fd)).collect::<io::Result<_>>()?;
        let life = child.exit.map_or(Life::Running, Life::Ended);
        let entry = Child {
            pid: child.pid,
            // Nobody but us reaps it, so the number is still the same process.
            pidfd: pidfd_of(child.pid),
            started_boot_ms: child.started_boot_ms,
            note: child.note,
            outputs,
            life,
        };
        table.children.insert(child.key, entry);
    }
    Ok(Some((table, saved.agent)))
}

fn pidfd_of(pid: i32) -> Option<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid)?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}
