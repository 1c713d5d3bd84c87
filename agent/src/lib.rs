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

/// This version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Unix seconds when this was built, or of the release where the build sets `SOURCE_DATE_EPOCH`: no clock is earlier.
pub const BUILT_AT: i64 = parse_decimal(env!("EDGED_BUILT_AT"));

const fn parse_decimal(text: &str) -> i64 {
    let (bytes, mut at, mut value) = (text.as_bytes(), 0, 0);
    while at < bytes.len() {
        value = value * 10 + (bytes[at] - b'0') as i64;
        at += 1;
    }
    value
}

/// Where a test lets the agent die.
pub mod crash_point;

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

/// The local socket and the console.
pub mod api;
/// The loop that knows them all.
pub mod reconcile;
/// What leaves the device, and what the fleet has for it.
pub mod report;

/// Keys, trust roots and manifests, made and signed away from any device.
pub mod authoring;
/// What `edgectl` prints and asks.
pub mod cli;
