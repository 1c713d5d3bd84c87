//! The fleet endpoint. It stores signed manifests and signed reports and hands them out; it decides nothing, and devices
//! believe signatures, not it. Stateless but for one SQLite file.

#![forbid(unsafe_code)]

/// What is kept, and the SQLite that keeps it.
pub mod db;
/// The HTTP surface (docs/fleet.md).
pub mod http;
