//! What a device has to bear: neighbours that take all they can, a clock that knows nothing, a machine that hangs.

mod starvation;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use edged_qemu::arch::Arch;
use edged_qemu::machine::{Machine, OnReset};
use edged_qemu::power;
use edged_qemu::site::{PROMPT, Site, console_shows};
use edged_qemu::story;
use edged_qemu::wait::LONG;

const HEAD: &str = "apiVersion: edge/v1\ndevice: edge-1\nissued: 2026-01-01T00:00:00Z\nexpires: 2036-01-01T00:00:00Z\n\
                    update: { probation: 2s, deadline: 10m }\n";

fn steady(image: &str) -> String {
    format!("  steady:\n    image: {image}\n    args: [hang]\n    resources: {{ memory: 8Mi, cpu: 50m }}\n")
}

/// How long the console takes to answer, the slowest of some times left out.
fn latency(device: &mut Machine) -> Result<Duration> {
    const ASKED: usize = 30;
    let mut times = Vec::with_capacity(ASKED);
    for _ in 0..ASKED {
        let begin = Instant::now();
        device.console.ask("version", PROMPT, LONG)?;
        times.push(begin.elapsed());
    }
    times.sort_unstable();
    Ok(times[ASKED - 2])
}

/// A neighbour that is started again whatever becomes of it.
fn greedy(image: &str, name: &str, args: &str, cpu_milli: u32) -> String {
    format!(
        "  {name}:\n    image: {image}\n    args: {args}\n    stopTimeout: 1s\n    \
         restart: {{ attempts: 1000000, backoff: 1s, backoffMax: 2s }}\n    \
         resources: {{ memory: 16Mi, cpu: {cpu_milli}m, pids: 32 }}\n"
    )
}

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn neighbours_that_take_all_they_can_get_leave_the_others_and_the_operator_theirs() {
    story::tell("starvation", |firmware, dir| {
        let site = Site::start(dir, firmware.arch)?;
        let image = site.publish("programs")?;
        let mut setup = site.device(&dir.join("device"))?;
        setup.memory_mib = 320;
        let mut device = Machine::boot(firmware, &dir.join("device"), &setup)?;
        let web = format!(
            "  web:\n    image: {image}\n    args: [http, \"80\"]\n    resources: {{ memory: 8Mi, cpu: 100m }}\n    \
             health: {{ probe: {{ http: {{ port: 80 }} }}, startPeriod: 60s, interval: 1s, timeout: 5s }}\n    \
             capabilities: {{ add: [CAP_NET_BIND_SERVICE] }}\n"
        );
        let quiet = format!("{HEAD}sequence: 1\nworkloads:\n{web}");
        site.push(&device, &site.keys.sign("quiet", &quiet)?)?;
        console_shows(&mut device, "generations", "good", LONG)?;
        let idle = latency(&mut device)?;

        let bad = |name, args, cpu_milli| greedy(&image, name, args, cpu_milli);
        let crowd = [
            bad("hog", "[hog]", 100),
            bad("spinner", "[spin]", 300),
            bad("bomb", "[fork]", 100),
            bad("flood", "[log, \"1000000000\"]", 100),
            bad("filler", "[disk, /tmp/all]", 100),
        ];
        let crowded = format!("{HEAD}sequence: 2\nworkloads:\n{web}{}", crowd.concat());
        site.push(&device, &site.keys.sign("crowded", &crowded)?)?;
        console_shows(&mut device, "inspect hog", "out of memory", 3 * LONG)?;
        console_shows(&mut device, "logs bomb", "stopped at", 3 * LONG)?;
        console_shows(&mut device, "logs filler", "No space left", 3 * LONG)?;
        let loaded = latency(&mut device)?;
        println!("the console answers within {idle:?} when idle, within {loaded:?} under load");
        let bound = (2 * idle).max(Duration::from_millis(500));
        ensure!(loaded <= bound, "the console takes {loaded:?} under load, {idle:?} when idle");

        // The neighbour was neither restarted nor found sick.
        let web = device.console.ask("inspect web -o json", PROMPT, LONG)?;
        ensure!(web.contains("\"health\": \"healthy\"") && web.contains("\"restarts\": 0"), "{web}");
        // The disk is full, and the operator's word is still written down, and outlives a cut.
        let said = device.console.ask("stop spinner", PROMPT, LONG)?;
        ensure!(said.contains("shall stop"), "{said}");
        let mut device = power::cut(device, firmware, &setup)?;
        console_shows(&mut device, "ps", "healthy", 3 * LONG)?;
        let table = console_shows(&mut device, "ps", "spinner", LONG)?;
        ensure!(table.lines().any(|line| line.starts_with("spinner") && line.contains("stopped")), "{table}");
        Ok(())
    });
}

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn neighbours_that_take_what_the_kernel_has_only_so_much_of_leave_answers_quick() {
    story::tell("greed", |firmware, dir| {
        if firmware.arch != Arch::X86_64 {
            println!("looked at on x86_64: its emulation is the steadiest clock");
            return Ok(());
        }
        starvation::take_all(firmware, dir)
    });
}

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn a_clock_in_1970_and_no_network_start_what_was_good() {
    story::tell("clock", |firmware, dir| {
        let site = Site::start(dir, firmware.arch)?;
        let image = site.publish("programs")?;
        let mut setup = site.device(&dir.join("device"))?;
        let mut device = Machine::boot(firmware, &dir.join("device"), &setup)?;
        let manifest = format!("{HEAD}sequence: 1\nworkloads:\n{}", steady(&image));
        site.push(&device, &site.keys.sign("first", &manifest)?)?;
        console_shows(&mut device, "generations", "good", LONG)?;

        // The battery of the clock is empty, and the cable is out.
        setup.clock = Some("1970-01-01T00:00:00".to_owned());
        let mut device = power::cut(device, firmware, &setup)?;
        device.cable(false)?;
        let table = console_shows(&mut device, "ps", "running", 2 * LONG)?;
        ensure!(table.contains("steady"), "{table}");
        let status = device.console.ask("status", PROMPT, LONG)?;
        ensure!(!status.contains("1970"), "time goes on from what was known:\n{status}");
        let events = device.console.ask("events --tail 20 -o json", PROMPT, LONG)?;
        ensure!(events.contains("its power had gone"), "{events}");

        // And far ahead: certificates and manifests would be over, what runs is not.
        setup.clock = Some("2099-01-01T00:00:00".to_owned());
        let mut device = power::cut(device, firmware, &setup)?;
        device.cable(false)?;
        console_shows(&mut device, "ps", "running", 2 * LONG)?;
        device.console.say("poweroff")?;
        device.wait_for_power_off(LONG)
    });
}

/// A megabyte in the middle of the memory that nobody uses: it is there after a reset.
const LAST_WORDS: [&str; 6] = [
    "panic=1",
    "memmap=1M$0x8000000",
    "ramoops.mem_address=0x8000000",
    "ramoops.mem_size=0x100000",
    "ramoops.record_size=0x20000",
    "ramoops.ecc=1",
];

/// What `edgectl status -o json` says about this boot and all before it.
fn has_survived(device: &mut Machine, cause: &str, counts: [(&str, u64); 3]) -> Result<()> {
    let said = console_shows(device, "status -o json", &format!("\"bootCause\": \"{cause}\""), LONG)?;
    for (name, count) in counts {
        ensure!(said.contains(&format!("\"{name}\": {count},")), "{name} is not {count}: {said}");
    }
    Ok(())
}

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn a_machine_that_hangs_is_reset_by_its_watchdog_and_says_so() {
    story::tell("watchdog", |firmware, dir| {
        if firmware.arch != Arch::X86_64 {
            println!("only the x86_64 machine has a watchdog of its own; the kernel's timer dies with the kernel");
            return Ok(());
        }
        let site = Site::start(dir, firmware.arch)?;
        let image = site.publish("programs")?;
        let mut setup = site.device(&dir.join("device"))?;
        setup.has_watchdog = true;
        setup.on_reset = OnReset::Boot;
        // A panic that ends in nothing: the kernel stands still for ever.
        setup.kernel.extend(["panic=0", "unknown_nmi_panic", "edged.watchdog=10"].map(str::to_owned));
        let mut device = Machine::boot(firmware, &dir.join("device"), &setup)?;
        device.kernel.wait_for("i6300ESB", LONG)?;
        let manifest = format!("{HEAD}sequence: 1\nworkloads:\n{}", steady(&image));
        site.push(&device, &site.keys.sign("first", &manifest)?)?;
        console_shows(&mut device, "generations", "good", LONG)?;
        let first = console_shows(&mut device, "events --tail 30 -o json", "first boot", LONG)?;
        ensure!(!first.contains("watchdog reset"), "{first}");

        device.qmp.execute("inject-nmi", serde_json::json!({}))?;
        device.kernel.wait_for("Kernel panic", LONG)?;
        device.kernel.wait_for("is up after", 2 * LONG)?;
        console_shows(&mut device, "status", "its watchdog reset it", LONG)?;
        console_shows(&mut device, "ps", "running", LONG)?;
        has_survived(&mut device, "watchdog", [("watchdogResets", 1), ("powerLosses", 0), ("kernelPanics", 0)])?;

        // The power goes; and the next board keeps what a kernel says last, and resets itself when it panics.
        setup.kernel.retain(|word| !word.starts_with("panic="));
        setup.kernel.extend(LAST_WORDS.map(str::to_owned));
        let mut device = power::cut(device, firmware, &setup)?;
        console_shows(&mut device, "ps", "running", 2 * LONG)?;
        has_survived(&mut device, "powerLoss", [("watchdogResets", 1), ("powerLosses", 1), ("kernelPanics", 0)])?;

        device.qmp.execute("inject-nmi", serde_json::json!({}))?;
        device.kernel.wait_for("Kernel panic", LONG)?;
        device.kernel.wait_for("is up after", 2 * LONG)?;
        console_shows(&mut device, "ps", "running", 2 * LONG)?;
        has_survived(&mut device, "panic", [("watchdogResets", 1), ("powerLosses", 1), ("kernelPanics", 1)])?;
        let told = console_shows(&mut device, "events --tail 30 -o json", "Kernel panic - not syncing", LONG)?;
        ensure!(told.contains("/var/lib/edged/last-panic"), "{told}");

        // In order: the next boot says that as well, and finds no panic again.
        device.console.say("reboot")?;
        device.kernel.wait_for("is up after", 2 * LONG)?;
        console_shows(&mut device, "events --tail 3 -o json", "switched off in order", LONG)?;
        has_survived(&mut device, "requested", [("watchdogResets", 1), ("powerLosses", 1), ("kernelPanics", 1)])?;
        Ok(())
    });
}
