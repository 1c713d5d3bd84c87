//! The rig: a real registry over TLS, a real fleet endpoint, real keys and signatures, and a device in QEMU. `cargo xtask
//! demo` and the stories under `tests/` use the same parts.

/// Programs: run one, wait for a condition.
pub mod run;

/// What was built beforehand and where it lies.
pub mod artifacts;
/// Keys, trust root, signed manifests: made by the real `edgectl`.
pub mod operator;
/// The fleet endpoint.
pub mod fleet;
/// docker-registry with TLS and a password; images signed by cosign.
pub mod registry;

/// The device in QEMU.
pub mod machine;

/// All of it together.
pub mod lab;
