//! edged, room by room, in the order in which data flows.
//!
//! ```text
//! signed manifest ─> verify ─> store ─> plan ─> execute ─> observe ─> report
//!                    trust     sled     pure    pull, start, exits,    outbox ─> fleet
//!                                               stop, remove health
//! ```
//!
//! Stages (`verify execute observe report api`) use tools and never each other; tools (`store content registry runtime
//! network`) know no stage; only `reconcile` knows them all.

#![forbid(unsafe_code)]

/// `agent.toml` and the places on disk.
pub mod config;

/// Containers by the OCI runtime-spec: namespaces, walls, filters.
pub mod runtime;

/// The state store: sled behind one door, and its second copy.
pub mod store;
/// Bytes to believed documents.
pub mod verify;

/// Images on disk: documents by digest, layers unpacked once.
pub mod content;
/// Images from a registry or a directory.
pub mod registry;

/// The device's interface, namespaces and ports.
pub mod network;

/// One action at a time.
pub mod execute;
/// The world as events.
pub mod observe;
