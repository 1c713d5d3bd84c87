//! What the keeper knows: its children living and ended, the agent, the way down. Words only, so that it can be decided
//! on ([`crate::decide`]) and carried through an exec ([`crate::resume`]); the descriptors are kept beside it.
//!
//! ```text
//!  child   Launching ──exec──> Running ──exit──> Ended ──Forget──> gone
//!              └──a step fails──> Failed ──exit──> gone (LaunchFailed is told when nothing is left of it)
//!
//!  agent   Waiting ──time──> Starting ──> Running ──silent──> Dying      (Closed: between the two)
//!             └────────<──────────┴──ended───┴──────────────────┘        Retired: on the way down
//! ```

use std::collections::BTreeMap;

use edged_model::keeper::{ChildExit, ChildState, HEARTBEAT_TIMEOUT_MS, ShutdownHow, StopPlan};
use serde::{Deserialize, Serialize};

use crate::trial::Upgrade;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Child {
    pub pid: i32,
    pub started_boot_ms: u64,
    pub note: String,
    pub life: Life,
    pub stop: StopPlan,
    /// On the way down: when it was asked to end.
    pub asked_boot_ms: Option<u64>,
    /// On the way down: it did not, and was killed.
    pub is_killed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Life {
    /// Cloned, exec not reached yet; the request that waits for it, or [`NOBODY`].
    Launching {
        request: u64,
    },
    /// A step before exec failed; its end is awaited.
    Failed {
        request: u64,
        stage: String,
        errno: i32,
    },
    Running,
    /// Until the agent has written the end down.
    Ended(ChildExit),
}

/// The agent that asked for a launch is gone: the next one is told of a child, and of its end, but of no answer.
pub const NOBODY: u64 = 0;

impl Child {
    /// What the agent is told; `None` while its launch is still to be answered.
    pub fn state(&self, key: &str) -> Option<ChildState> {
        let exit = match &self.life {
            Life::Launching { request: NOBODY } | Life::Failed { request: NOBODY, .. } | Life::Running => None,
            Life::Launching { .. } | Life::Failed { .. } => return None,
            Life::Ended(exit) => Some(exit.clone()),
        };
        let (note, started_boot_ms) = (self.note.clone(), self.started_boot_ms);
        Some(ChildState { key: key.to_owned(), pid: self.pid, started_boot_ms, note, exit, stop: self.stop })
    }

    /// When its time to end by itself is over; `None` before it was asked and after it was killed.
    pub fn kill_at_boot_ms(&self) -> Option<u64> {
        let asked = self.asked_boot_ms.filter(|_| !self.is_killed)?;
        Some(asked.saturating_add(self.stop.timeout_ms))
    }

    pub fn is_living(&self) -> bool {
        match self.life {
            Life::Launching { .. } | Life::Failed { .. } | Life::Running => true,
            Life::Ended(_) => false,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    pub life: AgentLife,
    pub failures_in_a_row: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentLife {
    Waiting {
        until_boot_ms: u64,
    },
    Starting,
    Running {
        pid: i32,
        started_boot_ms: u64,
        heard_boot_ms: u64,
    },
    /// It has closed its socket, as a process that ends does first of all, or was asked to end: killed if it then does not.
    Closed {
        pid: i32,
        started_boot_ms: u64,
        kill_at_boot_ms: u64,
    },
    /// SIGKILL was sent; its end is awaited.
    Dying {
        pid: i32,
        started_boot_ms: u64,
        since_boot_ms: u64,
    },
    /// On the way down it is not started again.
    Retired,
}

impl AgentLife {
    pub fn pid(&self) -> Option<i32> {
        match self {
            Self::Running { pid, .. } | Self::Closed { pid, .. } | Self::Dying { pid, .. } => Some(*pid),
            Self::Waiting { .. } | Self::Starting | Self::Retired => None,
        }
    }
}

/// Where the way down leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// A device: everything ends, then the machine.
    Machine(ShutdownHow),
    /// A host: everything ends, then the keeper.
    Everything,
    /// A host: only agent and keeper end.
    KeeperAlone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// One order after the other is asked to end; whatever lives at this time is killed.
    Asked {
        kill_at_boot_ms: u64,
    },
    /// SIGKILL was sent; down it goes at this time even if something will not die (a process in disk sleep).
    Forced {
        leave_at_boot_ms: u64,
    },
    Left,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Down {
    pub way: Way,
    pub phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Petting {
    pub every_ms: u64,
    pub next_boot_ms: u64,
}

/// More children than any device runs; a bound against an agent gone wild.
pub const MAX_CHILDREN: usize = 2048;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    pub device: bool,
    /// Everything has ended by then, however long the children may take by their own plans.
    pub stop_timeout_ms: u64,
    pub children: BTreeMap<String, Child>,
    pub agent: Agent,
    pub down: Option<Down>,
    pub watchdog: Option<Petting>,
    /// Where a newer program is looked for.
    #[serde(default)]
    pub program: Option<String>,
    #[serde(default)]
    pub upgrade: Upgrade,
}

impl Table {
    pub fn new(device: bool, stop_timeout_ms: u64) -> Self {
        let agent = Agent { life: AgentLife::Waiting { until_boot_ms: 0 }, failures_in_a_row: 0 };
        Self {
            device,
            stop_timeout_ms,
            children: BTreeMap::new(),
            agent,
            down: None,
            watchdog: None,
            program: None,
            upgrade: Upgrade::default(),
        }
    }

    pub fn key_of_pid(&self, pid: i32) -> Option<&str> {
        let found = self.children.iter().find(|(_, child)| child.pid == pid && child.is_living());
        found.map(|(key, _)| key.as_str())
    }

    /// The numbers of the next agent's requests begin anew: an answer to the one before would be taken for another.
    pub fn forget_requests(&mut self) {
        for child in self.children.values_mut() {
            if let Life::Launching { request } | Life::Failed { request, .. } = &mut child.life {
                *request = NOBODY;
            }
        }
    }

    pub fn living(&self) -> impl Iterator<Item = (&String, &Child)> {
        self.children.iter().filter(|(_, child)| child.is_living())
    }

    /// When something is due without an event.
    pub fn wake_at_boot_ms(&self) -> u64 {
        let agent = match self.agent.life {
            AgentLife::Waiting { until_boot_ms } => until_boot_ms,
            AgentLife::Running { heard_boot_ms, .. } => heard_boot_ms.saturating_add(HEARTBEAT_TIMEOUT_MS + 1),
            AgentLife::Closed { kill_at_boot_ms, .. } => kill_at_boot_ms,
            AgentLife::Starting | AgentLife::Dying { .. } | AgentLife::Retired => u64::MAX,
        };
        let watchdog = self.watchdog.map_or(u64::MAX, |petting| petting.next_boot_ms);
        let patience = || self.living().filter_map(|(_, child)| child.kill_at_boot_ms()).min().unwrap_or(u64::MAX);
        let down = match self.down.map(|down| down.phase) {
            Some(Phase::Asked { kill_at_boot_ms }) => kill_at_boot_ms.min(patience()),
            Some(Phase::Forced { leave_at_boot_ms }) => leave_at_boot_ms,
            Some(Phase::Left) | None => u64::MAX,
        };
        agent.min(watchdog).min(down).min(crate::trial::wake_at_boot_ms(self))
    }
}
