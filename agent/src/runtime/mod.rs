//! Tool: runs a container as the OCI runtime-spec says. It knows a [`oci_spec::runtime::Spec`] and places on disk; it
//! knows no manifest, no image and no store.

/// Capability names and bits.
pub mod caps;
/// Walls: memory, CPU, pids, I/O.
pub mod cgroup;
/// The specification that a workload gets when nothing else is said.
pub mod defaults;
/// The agent's end of the keeper's socket.
pub mod keeper_link;
/// The default filter of system calls.
pub mod seccomp;
/// Specification to launch: pure.
pub mod spec;
