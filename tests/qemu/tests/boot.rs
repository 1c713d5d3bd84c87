//! From power-on to power-off, with nothing around the device.

use edged_qemu::machine::{Machine, Setup, blank_disk};
use edged_qemu::story;
use edged_qemu::wait::LONG;

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn an_empty_disk_is_formatted_once_and_found_again() {
    story::tell("boot", |firmware, dir| {
        let setup = Setup { disk: Some(dir.join("data.img")), ..Setup::default() };
        blank_disk(&dir.join("data.img"), 256)?;

        let mut device = Machine::boot(firmware, dir, &setup)?;
        let first = device.kernel.wait_for("is up after", LONG)?;
        assert!(first.contains("/dev/vda is empty: formatting it"), "{first}");
        assert!(!first.contains("boot: "), "a step of the boot failed:\n{first}");
        device.kernel.wait_for("placeholder: boot number 1", LONG)?;
        device.wait_for_power_off(LONG)?;

        let mut device = Machine::boot(firmware, dir, &setup)?;
        let second = device.kernel.wait_for("is up after", LONG)?;
        assert!(!second.contains("formatting"), "{second}");
        device.kernel.wait_for("placeholder: boot number 2", LONG)?;
        device.wait_for_power_off(LONG)
    });
}
