//! The children, living and ended. An ended one stays until the agent says that it wrote the end down.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use edged_model::keeper::{ChildExit, ChildState};

#[derive(Debug)]
pub struct Child {
    pub pid: i32,
    pub pidfd: Option<OwnedFd>,
    pub started_boot_ms: u64,
    pub note: String,
    /// Read ends of its output, or a pty's master.
    pub outputs: Vec<OwnedFd>,
    pub life: Life,
}

#[derive(Debug)]
pub enum Life {
    /// Cloned, exec not reached yet; who asked, and the pipe that tells.
    Launching {
        request: u64,
        failure: OwnedFd,
    },
    Running,
    Ended(ChildExit),
}

impl Child {
    pub fn state(&self, key: &str) -> ChildState {
        ChildState {
            key: key.to_owned(),
            pid: self.pid,
            started_boot_ms: self.started_boot_ms,
            note: self.note.clone(),
            exit: match &self.life {
                Life::Ended(exit) => Some(exit.clone()),
                Life::Launching { .. } | Life::Running => None,
            },
        }
    }

    pub fn is_living(&self) -> bool {
        !matches!(self.life, Life::Ended(_))
    }
}

/// More children than any device runs; a bound against an agent gone wild.
pub const MAX_CHILDREN: usize = 2048;

#[derive(Debug, Default)]
pub struct Table {
    pub children: BTreeMap<String, Child>,
}

impl Table {
    pub fn key_of_pid(&self, pid: i32) -> Option<String> {
        let living = |(_, child): &(&String, &Child)| child.pid == pid && child.is_living();
        self.children.iter().find(living).map(|(key, _)| key.clone())
    }

    pub fn living(&self) -> impl Iterator<Item = (&String, &Child)> {
        self.children.iter().filter(|(_, child)| child.is_living())
    }
}
