//! What is kept of a container, `ROOT/ID/`: `state.json` (written under another name, then renamed), the specification
//! as it was, the compiled filter, and until `start` the gate. What a container is *now* is asked of the kernel.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::cgroup::Groups;
use crate::error::OciError;

/// The version of the specification that this implements.
pub const OCI_VERSION: &str = "1.2.0";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub oci_version: String,
    pub id: String,
    pub pid: i32,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub created: String,
    #[serde(default, skip_serializing_if = "HashMap::is_empty")]
    pub annotations: HashMap<String, String>,
    /// When the process began (proc_pid_stat(5), field 22): another process with its number began at another time.
    pub start_ticks: u64,
    pub groups: Groups,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub fn text(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// The directory of one container.
#[derive(Debug, Clone)]
pub struct Home {
    pub id: String,
    pub path: PathBuf,
}

impl Home {
    pub fn new(root: &Path, id: &str) -> Result<Self, OciError> {
        let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
        if id.is_empty() || id.len() > 1024 || id == "." || id == ".." || !id.bytes().all(fine) {
            return Err(OciError::BadId { id: id.to_owned() });
        }
        Ok(Self { id: id.to_owned(), path: root.join(id) })
    }

    /// Takes the id, or says that it is taken.
    pub fn make(&self) -> Result<(), OciError> {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(0o711);
        match builder.create(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let root = self.path.parent().unwrap_or(Path::new("/"));
                std::fs::DirBuilder::new().mode(0o711).recursive(true).create(root).map_err(OciError::file(root))?;
                builder.create(&self.path).map_err(OciError::file(&self.path))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(OciError::Exists { id: self.id.clone() }),
            made => made.map_err(OciError::file(&self.path)),
        }
    }

    pub fn gate(&self) -> PathBuf {
        self.path.join("gate")
    }

    pub fn config(&self) -> PathBuf {
        self.path.join("config.json")
    }

    pub fn filter(&self) -> PathBuf {
        self.path.join("seccomp.bpf")
    }

    pub fn save(&self, record: &Record) -> Result<(), OciError> {
        let path = self.path.join("state.json");
        let bytes = serde_json::to_vec(record).map_err(|error| OciError::system("state.json", error))?;
        write_renamed(&path, &bytes)
    }

    pub fn load(&self) -> Result<Record, OciError> {
        let path = self.path.join("state.json");
        match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(OciError::NoSuchContainer { id: self.id.clone() })
            }
            read => {
                let bytes = read.map_err(OciError::file(&path))?;
                serde_json::from_slice(&bytes).map_err(|error| OciError::Config {
                    path,
                    place: "state".to_owned(),
                    why: error.to_string(),
                })
            }
        }
    }

    pub fn status(&self, record: &Record) -> Status {
        if !record.is_alive() {
            Status::Stopped
        } else if self.gate().exists() {
            Status::Created
        } else if record.groups.is_frozen() {
            Status::Paused
        } else {
            Status::Running
        }
    }

    pub fn remove(&self) -> Result<(), OciError> {
        // What is there is known, as a rule, and need not be listed.
        for name in ["config.json", "seccomp.bpf", "state.json"] {
            let _ = rustix::fs::unlink(self.path.join(name));
        }
        if matches!(rustix::fs::rmdir(&self.path), Ok(()) | Err(rustix::io::Errno::NOENT)) {
            return Ok(());
        }
        match std::fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(OciError::File { path: self.path.clone(), source: error })
            }
            _ => Ok(()),
        }
    }
}

/// The record and its directory, or that there is none.
pub fn find(root: &Path, id: &str) -> Result<(Home, Record), OciError> {
    let home = Home::new(root, id)?;
    let record = home.load()?;
    Ok((home, record))
}

pub fn write_renamed(path: &Path, bytes: &[u8]) -> Result<(), OciError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    std::fs::write(&temporary, bytes).map_err(OciError::file(&temporary))?;
    std::fs::rename(&temporary, path).map_err(OciError::file(path))
}

impl Record {
    /// Its first process, if it lives: never another one that has its number by now.
    pub fn process(&self) -> Option<OwnedFd> {
        let pidfd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // Asked after the descriptor was opened: what it stands for cannot change any more.
        self.is_alive().then_some(pidfd)
    }

    pub fn is_alive(&self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks)
    }

    /// As the specification has it (runtime.md, "State").
    pub fn as_state(&self, status: Status) -> serde_json::Value {
        let mut state = serde_json::json!({
            "ociVersion": self.oci_version,
            "id": self.id,
            "status": status.text(),
            "bundle": self.bundle,
            "annotations": self.annotations,
        });
        if status != Status::Stopped {
            state["pid"] = self.pid.into();
        }
        state
    }
}

/// When a process began; `None` for one that is dead, a zombie included (proc_pid_stat(5)).
pub fn start_ticks(pid: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in brackets, and may have brackets itself.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Seconds and nanoseconds since 1970. A container has its time of creation in its state.
pub fn now() -> (i64, u32) {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    (time.tv_sec, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// RFC 3339 in UTC. Days to dates as in "chrono-Compatible Low-Level Date Algorithms", days counted from 0000-03-01.
pub fn rfc3339((seconds, nanoseconds): (i64, u32)) -> String {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanoseconds:09}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        assert_eq!(rfc3339((0, 0)), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(rfc3339((951_782_400, 5)), "2000-02-29T00:00:00.000000005Z");
        assert_eq!(rfc3339((1_763_683_199, 0)), "2025-11-20T23:59:59.000000000Z");
    }

    #[test]
    fn ids_that_are_paths_are_refused() {
        for id in ["", ".", "..", "a/b", "a b", "\u{e4}"] {
            assert!(matches!(Home::new(Path::new("/r"), id), Err(OciError::BadId { .. })), "{id}");
        }
        assert_eq!(Home::new(Path::new("/r"), "a.b-1_+").unwrap().path, Path::new("/r/a.b-1_+"));
    }

    #[test]
    fn a_process_is_known_by_its_number_and_its_beginning() {
        let own = i32::try_from(std::process::id()).unwrap();
        let ticks = start_ticks(own).unwrap();
        assert!(ticks > 0);
        let record = Record {
            oci_version: OCI_VERSION.into(),
            id: "x".into(),
            pid: own,
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: rfc3339((0, 0)),
            annotations: HashMap::new(),
            start_ticks: ticks,
            groups: Groups::V2 { path: "/nonexistent".into() },
        };
        assert!(record.is_alive() && record.process().is_some());
        assert!(!Record { start_ticks: ticks + 1, ..record }.is_alive());
    }

    #[test]
    fn a_taken_id_is_told_and_a_missing_one_too() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::new(&dir.path().join("deep/root"), "web").unwrap();
        assert!(matches!(home.load(), Err(OciError::NoSuchContainer { .. })));
        home.make().unwrap();
        assert!(matches!(home.make(), Err(OciError::Exists { .. })));
        home.remove().unwrap();
        home.remove().unwrap();
    }
}
