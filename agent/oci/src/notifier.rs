//! Who decides in the filter's stead: `linux.seccomp.listenerPath` (config-linux.md, "The Container Process State";
//! seccomp_unotify(2)). The runtime connects, since the path is the host's; the child sends the filter's descriptor, since
//! it has it, and the state beside it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use oci_spec::runtime::LinuxSeccomp;
use serde_json::json;

use crate::error::OciError;
use crate::seccomp;
use crate::state::{Record, Status};

pub struct Notifier {
    pub socket: OwnedFd,
    metadata: String,
}

impl Notifier {
    /// Of a profile that leaves something to a listener.
    pub fn connect(profile: &LinuxSeccomp) -> Result<Option<Self>, OciError> {
        let Some(path) = profile.listener_path().as_ref().filter(|_| seccomp::asks_a_listener(profile)) else {
            return Ok(None);
        };
        let socket = UnixStream::connect(path).map_err(OciError::file(path))?;
        Ok(Some(Self { socket: socket.into(), metadata: profile.listener_metadata().clone().unwrap_or_default() }))
    }

    /// The container process state, for a process of the container.
    pub fn words(&self, record: &Record, status: Status, pid: i32) -> String {
        json!({
            "ociVersion": record.oci_version,
            "fds": ["seccompFd"],
            "pid": pid,
            "metadata": self.metadata,
            "state": record.as_state(status),
        })
        .to_string()
    }
}
