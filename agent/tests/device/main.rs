//! A whole device on this machine: the real `edged` under a directory of its own, a real registry with signed images,
//! a real fleet server. Needs root. A few beside each other: most of their time is waiting.

mod clock;
mod crash_points;
mod disk;
mod exec;
#[path = "../support/faults.rs"]
#[expect(dead_code, reason = "the tests of the pull look closer at what was asked")]
mod faults;
mod fleet;
mod frozen;
mod generations;
mod idle;
mod images;
mod journal;
mod life;
mod limits;
mod many_images;
mod moment;
mod network;
mod refusals;
mod reset;
mod rig;
mod rotation;
mod scrub;
mod survived;
mod tables;
#[path = "../support/tmpfs.rs"]
mod tmpfs;
mod upgrade;
mod userns;
