//! Tool: runs a container as the OCI runtime-spec says. It knows a [`oci_spec::runtime::Spec`] and places on disk; it
//! knows no manifest, no image and no store.

/// Walls: memory, CPU, pids, I/O.
pub mod cgroup;
/// The specification that a workload gets when nothing else is said.
pub mod defaults;
/// The agent's end of the keeper's socket.
pub mod keeper_link;

/// File systems for a container with ids of its own.
pub mod mapped;

/// Capabilities, what the kernel has, the default filter of system calls, specification to launch: what the agent shares with `edged oci`.
pub use edged_oci::{caps, kernel, seccomp, spec};
