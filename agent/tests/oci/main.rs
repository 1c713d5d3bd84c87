//! `edged oci` as an engine sees it: real containers on this machine, as root. What the container sees is compared with
//! what other runtimes show it for the same bundle.

mod attacks;
mod containerd;
mod cri;
mod engine;
mod fields;
mod life;
mod peers;
mod rig;
