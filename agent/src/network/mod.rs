//! Tool: the device's own interface, the network namespaces of workloads, and the ports that lead into them.

/// The device's own interface, when edged is PID 1.
pub mod interface;
/// Network namespaces that outlive a run.
pub mod netns;
/// Ports of the device that lead into a workload.
pub mod ports;
/// The time from outside.
pub mod sntp;
