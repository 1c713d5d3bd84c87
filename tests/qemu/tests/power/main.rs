//! The power goes at any moment, and what the device had promised holds.
//!
//! One run is recorded ([`record`]). Then disks are made as a power cut at some moment may have left them, and each is
//! booted, with the network out ([`cuts`]).

mod cuts;
mod record;

use edged_qemu::filesystem::Filesystem;
use edged_qemu::story;

/// On each of the two architectures, which makes twenty-four; the long run has a thousand on each, and
/// `EDGED_CUTS` any other number.
const CUTS: usize = 12;
/// On one architecture.
const CUTS_ON_F2FS: usize = 5;

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn what_was_promised_holds_after_a_cut_at_any_moment() {
    story::tell("power", |firmware, dir| cuts::anywhere(firmware, dir, CUTS));
}

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn what_was_promised_holds_on_f2fs_too() {
    story::tell_on(Filesystem::F2fs, "power-f2fs", |firmware, dir| cuts::anywhere(firmware, dir, CUTS_ON_F2FS));
}
