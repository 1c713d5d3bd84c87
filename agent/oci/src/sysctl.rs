//! `linux.sysctl`: only what a namespace of the container keeps to itself. Anything else would change the host.

use nix::sched::CloneFlags;
use oci_spec::runtime::Linux;

use crate::spec::{SpecError, bits};

/// Kernel parameters of the IPC namespace (namespaces(7)).
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// The namespace that keeps `name`.
fn keeper_of(name: &str) -> Option<CloneFlags> {
    if IPC.contains(&name) || name.starts_with("fs.mqueue.") {
        Some(CloneFlags::CLONE_NEWIPC)
    } else if name.starts_with("net.") {
        Some(CloneFlags::CLONE_NEWNET)
    } else if matches!(name, "kernel.domainname" | "kernel.hostname") {
        Some(CloneFlags::CLONE_NEWUTS)
    } else {
        None
    }
}

/// The pairs as they are, in a fixed order. `namespaces` are those the container has of its own.
pub fn checked(linux: &Linux, namespaces: u64) -> Result<Vec<(String, String)>, SpecError> {
    let mut pairs = Vec::new();
    for (name, value) in linux.sysctl().iter().flatten() {
        let plain = name.replace('/', ".");
        let safe = !name.split(['.', '/']).any(str::is_empty);
        match keeper_of(&plain) {
            Some(keeper) if safe && namespaces & bits(keeper) != 0 => pairs.push((name.clone(), value.clone())),
            Some(_) if safe => {
                let value = format!("{name}, which without a namespace of its own is the host's");
                return Err(SpecError::Invalid { field: "linux.sysctl", value });
            }
            _ => return Err(SpecError::Unsupported { field: "linux.sysctl", value: name.clone() }),
        }
    }
    pairs.sort();
    Ok(pairs)
}
