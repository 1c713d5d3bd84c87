//! Stage: performs one action and says how it went. It decides nothing.

/// What is on the disk against what was unpacked.
pub mod check;
/// The layers of a workload with ids of its own, where mounts cannot be idmapped.
pub mod copies;
/// From a launch to one with ids and namespaces of its own.
pub mod isolate;
/// The folders and files of a workload.
pub mod place;
/// An image from its registry to its layers.
pub mod pull;
/// Takes away what no generation needs.
pub mod reclaim;
/// Takes away what manifests have brought, when none is left.
pub mod reset;
/// One layer, slowly.
pub mod scrub;
/// A workload from its manifest to a running program.
pub mod start;
/// By which signal, within which time, after whom.
pub mod stop;
/// Whose fault a failed start may be.
pub mod unread;
/// Who a workload runs as.
pub mod user;
/// Whose ids on the device a workload's ids are.
pub mod user_ids;
/// Volumes where mounts cannot be idmapped.
pub mod volumes;
