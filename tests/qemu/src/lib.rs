//! The rig: everything around a booted device that a story or the demo needs, and all of it real.
//!
//! ```text
//!   keys ── edgectl, openssl          registry ── docker-registry, skopeo, cosign
//!     │                                  │
//!     └──────> machine (QEMU) <──────────┴──── fleet ── edgefleet
//!                │    │    └ qmp: cable out, reset, quit
//!              serial  power
//! ```
//!
//! It boots whatever `edged` it is given and knows none of its insides: only the console, the disk, the network and the
//! programs that users type. Nothing here sleeps for a time; everything waits for a condition, with one deadline.

#![forbid(unsafe_code)]

/// The three architectures and what differs between them.
pub mod arch;
/// Where the built things lie: firmware, workload images, programs of the host.
pub mod artifacts;
/// A private certificate authority, made by `openssl`.
pub mod certs;
/// The archive format of an initramfs.
pub mod cpio;
/// What the data disk is formatted as.
pub mod filesystem;
/// The real fleet server.
pub mod fleet;
/// Keys, trust roots and signed manifests, made by the real `edgectl`.
pub mod keys;
/// One booted device.
pub mod machine;
/// The power goes away.
pub mod power;
/// Programs of the host: run to the end, or kept as a service until dropped.
pub mod process;
/// QEMU's control socket.
pub mod qmp;
/// The real registry, pushed to by `skopeo`, signed by `cosign`.
pub mod registry;
/// A serial line: say, and wait for an answer.
pub mod serial;
/// All that stands around a device.
pub mod site;
/// How a story is told.
pub mod story;
/// Conditions with a deadline.
pub mod wait;
