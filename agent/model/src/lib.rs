//! The dictionary of edged, in the order in which data flows. Words only: no I/O, no clock, no thread.
//!
//! ```text
//! envelope ─> trust ─> manifest ─> generation ─> action ─> observed ─> report
//!                                                  │                    api
//!                                                keeper
//! ```

#![forbid(unsafe_code)]

/// Names, digests and sequences.
pub mod id;
/// Bytes, CPU, spans and times as people write them.
pub mod quantity;
/// Every *why*: code, sentence, what to do next.
pub mod reason;

/// The strict reading of CBOR.
pub mod cbor;
/// Signed documents: COSE.
pub mod envelope;
/// Ed25519 keys as PEM files.
pub mod keys;
/// From a CBOR value to a type, and where it does not fit.
pub mod value;

/// The trust root: roles, keys, thresholds.
pub mod trust;

/// The manifest `edge/v1` as it travels.
pub mod manifest;
/// One of its workloads, and what tells it from another.
pub mod spec;

/// What must hold in a manifest beyond its shape.
pub mod validate;

/// What differs between two manifests.
pub mod difference;

/// A manifest's life on the device.
pub mod generation;
/// When a generation may take over.
pub mod moment;

/// What the planner may order.
pub mod action;
/// What the planner is told.
pub mod observed;

/// Between agent and keeper.
pub mod keeper;

/// Phases, exits, health of one workload.
pub mod workload;

/// Device to fleet.
pub mod report;

/// What a device has survived, counted.
pub mod survived;

/// JSON bodies of the fleet protocol.
pub mod fleet;

/// `edgectl` to agent.
pub mod api;

/// What takes the disk and what keeps it there, for `edgectl`.
pub mod disk;
/// Images and volumes on the disk, for `edgectl`.
pub mod images;
/// Layers read slowly, again and again.
pub mod scrub;
