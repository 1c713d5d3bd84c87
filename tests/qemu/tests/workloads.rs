//! The whole way: signed images in a real registry, a signed manifest pushed, workloads under quota.

use std::time::Duration;

use anyhow::Context;
use edged_qemu::arch::Arch;
use edged_qemu::filesystem::FileOnDisk;
use edged_qemu::machine::Machine;
use edged_qemu::power;
use edged_qemu::site::{PROMPT, Site, console_shows};
use edged_qemu::story;
use edged_qemu::wait::{self, LONG};

/// Times that `manifest sign --expires` replaces.
const HEAD: &str = "apiVersion: edge/v1\ndevice: edge-1\nissued: 2026-01-01T00:00:00Z\nexpires: 2036-01-01T00:00:00Z\n";

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn a_signed_workload_runs_under_its_quota_and_comes_back_after_a_power_cut() {
    story::tell("workloads", |firmware, dir| {
        let site = Site::start(dir, firmware.arch)?;
        let (programs, nginx) = (site.publish("programs")?, site.publish("nginx")?);
        let setup = site.device(&dir.join("device"))?;
        let mut device = Machine::boot(firmware, &dir.join("device"), &setup)?;
        let manifest = format!(
            "{HEAD}sequence: 1\nworkloads:\n  \
             web:\n    image: {nginx}\n    resources: {{ memory: 32Mi, cpu: 300m }}\n    \
             capabilities: {{ add: [CAP_CHOWN, CAP_SETUID, CAP_SETGID, CAP_NET_BIND_SERVICE] }}\n    \
             health: {{ probe: {{ http: {{ port: 80, path: /healthz }} }}, startPeriod: 60s, interval: 2s }}\n  \
             hog:\n    image: {programs}\n    args: [hog]\n    resources: {{ memory: 16Mi, cpu: 200m }}\n  \
             crash:\n    image: {programs}\n    args: [crash]\n    resources: {{ memory: 8Mi, cpu: 100m }}\n"
        );
        let signed = site.keys.sign("first", &manifest)?;
        site.push(&device, &signed)?;
        console_shows(&mut device, "ps", "healthy", 3 * LONG)?;
        // The crash and the memory are told apart.
        console_shows(&mut device, "inspect crash", "exit code 3", LONG)?;
        console_shows(&mut device, "inspect hog", "memory", LONG)?;
        // Frozen, nobody takes it for sick; thawed, it goes on.
        device.console.say("pause web")?;
        console_shows(&mut device, "ps", "paused", LONG)?;
        device.console.say("resume web")?;
        console_shows(&mut device, "ps", "healthy", LONG)?;
        // Other limits reach the run that is there: the kernel has them, and it is the same process.
        let pid = |shown: &str| shown.lines().find(|line| line.starts_with("pid ")).map(str::to_owned);
        let before = pid(&console_shows(&mut device, "inspect web", "33554432", LONG)?);
        let other = manifest.replace("sequence: 1", "sequence: 2").replace("memory: 32Mi", "memory: 28Mi");
        site.push(&device, &site.keys.sign("limits", &other)?)?;
        let after = pid(&console_shows(&mut device, "inspect web", "29360128", 3 * LONG)?);
        assert!(before.is_some() && before == after, "{before:?} {after:?}");

        // No registry, no operator, a cut at any time: what ran runs again.
        let mut device = power::cut(device, firmware, &setup)?;
        device.cable(false)?;
        console_shows(&mut device, "ps", "healthy", 3 * LONG)?;
        device.console.say("poweroff")?;
        device.wait_for_power_off(LONG + Duration::from_secs(30))
    });
}

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn what_is_not_signed_by_us_does_not_run() {
    story::tell("refused", |firmware, dir| {
        let site = Site::start(dir, firmware.arch)?;
        let unsigned = site.publish_unsigned("programs")?;
        // Without a DHCP server's help: QEMU's user network as its documentation has it.
        let setup = site.device(&dir.join("device"))?.configure(
            "\n[network]\nmode = \"static\"\naddress = \"10.0.2.15/24\"\ngateway = \"10.0.2.2\"\ndns = [\"10.0.2.3\"]\n",
        );
        let mut device = Machine::boot(firmware, &dir.join("device"), &setup)?;
        let manifest = |sequence: u32, resources: &str| {
            let image = site.image("programs", &unsigned);
            format!(
                "{HEAD}sequence: {sequence}\nworkloads:\n  w:\n    image: {image}\n    args: [hang]\n    resources: {resources}\n"
            )
        };
        // Signed by a key that is not in the trust root's manifest role.
        let walls = "{ memory: 8Mi, cpu: 100m }";
        let stranger = site.keys.sign_with("stranger", &manifest(1, walls), &site.keys.private("image"))?;
        let why = site.push_refused(&device, &stranger)?;
        assert!(why.contains("sign"), "{why}");
        // More than there is.
        let greedy = site.keys.sign("greedy", &manifest(2, "{ memory: 4Gi, cpu: 100m }"))?;
        let why = site.push_refused(&device, &greedy)?;
        assert!(why.contains("4Gi") || why.contains("4 GiB"), "{why}");
        // The manifest is ours, the image is nobody's.
        let ours = site.keys.sign("ours", &manifest(3, walls))?;
        site.push(&device, &ours)?;
        console_shows(&mut device, "status", "is not signed", LONG)?;
        // A sequence below one that was seen does not come any more.
        let below = site.keys.sign("below", &manifest(2, walls))?;
        let why = site.push_refused(&device, &below)?;
        assert!(why.contains("sequence"), "{why}");
        device.console.say("poweroff")?;
        device.wait_for_power_off(LONG)
    });
}

/// The size of the layer that is cut, in MiB: more than is synced at a time.
const LARGE_MIB: usize = 7;

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn what_a_database_acknowledged_is_there_after_a_power_cut() {
    story::tell("redis", |firmware, dir| {
        const PORT: u16 = 6379;
        let site = Site::start(dir, firmware.arch)?;
        let (redis, busybox) = (site.publish("redis")?, site.publish_large("busybox", "large", LARGE_MIB)?);
        let mut setup = site.device(&dir.join("device"))?;
        setup.forward.push(PORT);
        let on_a_slow_link = setup.clone().configure("\n[images]\nrate-max = \"2Mi\"\nkeep-partial-after = \"1s\"\n");
        let mut device = Machine::boot(firmware, &dir.join("device"), &on_a_slow_link)?;
        let manifest = format!(
            "{HEAD}sequence: 1\nvolumes: {{ db: {{}} }}\nworkloads:\n  \
             redis:\n    image: {redis}\n    resources: {{ memory: 48Mi, cpu: 400m }}\n    \
             mounts: [{{ source: {{ volume: db }}, target: /data }}]\n    ports: [{{ host: {PORT}, container: {PORT} }}]\n    \
             health: {{ probe: {{ exec: {{ command: [/usr/bin/redis-cli, ping] }} }}, startPeriod: 60s, interval: 2s, timeout: 10s }}\n  \
             shell:\n    image: {busybox}\n    command: [/bin/sh, -c, 'echo hello from busybox; exec sleep 100000']\n    \
             dependsOn: {{ redis: healthy }}\n    resources: {{ memory: 8Mi, cpu: 100m }}\n"
        );
        site.push(&device, &site.keys.sign("first", &manifest)?)?;
        // In the middle of a large layer the power goes: what is on the disk does not come again.
        wait::until("most of the large layer", LONG, || Ok((fetched_mib(&mut device)? > 4.7).then_some(())))?;
        let mut device = power::cut(device, firmware, &setup)?;
        console_shows(&mut device, "logs shell", "hello from busybox", 3 * LONG)?;
        let blob_bytes = blob_bytes_of_last_answer(&site.registry.service.said(), "large")?;
        // The layer has a MiB besides, and a little.
        let at_most = ((LARGE_MIB + 2) as u64 - 4) << 20;
        assert!(blob_bytes < at_most, "{blob_bytes} bytes came again, {at_most} were still to come");
        let port = device.port(PORT)?;
        let answer = redis_says(port, "SET pumped 42\r\n")?;
        assert!(answer.starts_with("+OK"), "{answer}");

        // The power goes, and the disk comes back damaged: the metadata of a file, and all but the first page of a program.
        let disk = setup.disk.clone().unwrap_or_default();
        let mut device = power::cut_and(device, firmware, &setup, || {
            if firmware.arch != Arch::X86_64 {
                return Ok(());
            }
            FileOnDisk::in_a_layer(&disk, "lib/x86_64-linux-gnu/libm.so.6")?.harm_metadata()?;
            // The server by another name.
            FileOnDisk::in_a_layer(&disk, "usr/bin/redis-check-rdb")?.harm_all_but_the_first_block()
        })?;
        console_shows(&mut device, "ps", "healthy", 3 * LONG)?;
        let port = device.port(PORT)?;
        let answer = wait::until("answer of redis", LONG, || {
            let answer = redis_says(port, "GET pumped\r\n")?;
            Ok((!answer.starts_with("-LOADING")).then_some(answer))
        })?;
        assert_eq!(answer, "$2\r\n42\r\n");
        if firmware.arch == Arch::X86_64 {
            let events = device.console.ask("events --tail 60 -o json", PROMPT, LONG)?;
            for told in ["libm.so.6 is `", "redis-check-rdb cannot be read", "after an unclean stop", "because"] {
                assert!(events.contains(told), "{told}: {events}");
            }
            let df = device.console.ask("df", PROMPT, LONG)?;
            assert!(df.contains("under fs-verity") && !df.contains("no layer"), "{df}");
            for told in events.lines().filter(|line| line.contains("layers were checked")) {
                println!("{told}");
            }
            let scrubbing = setup.clone().configure("\n[images]\nscrub = \"1s\"\nscrub-rate = \"64Mi\"\n");
            device = power::cut_and(device, firmware, &scrubbing, || {
                FileOnDisk::in_a_layer(&disk, "noise")?.harm_all_but_the_first_block()
            })?;
            the_scrub_finds_what_nobody_reads(&mut device)?;
        }
        device.console.say("poweroff")?;
        device.wait_for_power_off(LONG)
    });
}

/// The check after a power cut measures a file under fs-verity, and nobody reads this one.
fn the_scrub_finds_what_nobody_reads(device: &mut Machine) -> anyhow::Result<()> {
    console_shows(device, "events --tail 60 -o json", "noise cannot be read", 3 * LONG)?;
    // Its workload runs on: its layer is fetched again when that is restarted.
    console_shows(device, "ps", "healthy", 3 * LONG)?;
    device.console.ask("restart shell", PROMPT, LONG)?;
    console_shows(device, "df", "read, none damaged", 3 * LONG)?;
    console_shows(device, "ps", "running", LONG).map(drop)
}

/// How far the large image is, by the device's own list: `…/large  -  4.8Mi of 8Mi  0  shell [1]`.
fn fetched_mib(device: &mut Machine) -> anyhow::Result<f64> {
    let list = device.console.ask("images", PROMPT, LONG)?;
    let line = list.lines().find(|line| line.contains("/large")).unwrap_or_default();
    let done = line.split_once("Mi of ").and_then(|(done, _)| done.rsplit(' ').next()?.parse().ok());
    Ok(done.unwrap_or(0.0))
}

/// The bytes that the registry sent last of the only large blob, of which it was asked for a part.
fn blob_bytes_of_last_answer(log: &str, repository: &str) -> anyhow::Result<u64> {
    let path = format!("\"GET /v2/{repository}/blobs/sha256:");
    let answers = log.lines().filter_map(|line| line.split_once(&path)?.1.split_once("\" 206 "));
    let mut bytes = answers.filter_map(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok());
    // A few bytes are asked for to learn how large it unpacks.
    bytes.rfind(|bytes| *bytes > 1000).with_context(|| format!("nothing was asked for in part:\n{log}"))
}

/// One inline command (redis protocol), and the first bytes of its answer.
fn redis_says(port: u16, command: &str) -> anyhow::Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(command.as_bytes())?;
    let mut answer = [0; 64];
    let length = stream.read(&mut answer)?;
    anyhow::ensure!(length > 0, "redis hung up");
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}
