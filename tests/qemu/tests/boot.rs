//! From power-on to power-off, with nothing around the device.

use edged_qemu::machine::{Machine, Setup, blank_disk};
use edged_qemu::story;
use edged_qemu::wait::LONG;

const CONFIG: &str = "[console]\ntty = \"/dev/hvc0\"\nmode = \"full\"\n";

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn an_empty_disk_is_formatted_once_and_found_again() {
    story::tell("boot", |firmware, dir| {
        let disk = dir.join("data.img");
        blank_disk(&disk, 256)?;
        let setup = Setup { disk: Some(disk), ..Setup::default() }.file("etc/edged/agent.toml", CONFIG);

        let mut device = Machine::boot(firmware, dir, &setup)?;
        let first = device.kernel.wait_for("is up after", LONG)?;
        assert!(first.contains("/dev/vda is empty: formatting it"), "{first}");
        assert!(!first.contains("boot: "), "a step of the boot failed:\n{first}");
        assert!(!first.contains("could not be sealed"), "{first}");
        device.console.wait_for("> ", LONG)?;
        device.console.say("poweroff")?;
        device.wait_for_power_off(LONG)?;

        let mut device = Machine::boot(firmware, dir, &setup)?;
        let second = device.kernel.wait_for("is up after", LONG)?;
        assert!(!second.contains("formatting"), "{second}");
        device.console.wait_for("> ", LONG)?;
        device.console.say("poweroff")?;
        device.wait_for_power_off(LONG)
    });
}
