//! Neighbours that take all they can get, all at once, on one emulated core: what the others and the operator keep.
//!
//! How long it takes is measured in the state of rest first and then beside the crowd; probes also while the agent unpacks a
//! large image, when the crowd has gone. The console's answers by the rig (the line of a technician, from the last key to the next prompt), in what the
//! emulated processor works meanwhile; probes by the device itself, whose clock counts instructions (`-icount`), so that a
//! busy host makes neither of them longer; reports from an operator's word until the fleet has it. Whoever asks takes a
//! breath in between: the agent comes before every workload, and asked without a pause it has the one core for itself.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use edged_model::quantity::Bytes;
use edged_qemu::artifacts::Firmware;
use edged_qemu::machine::Machine;
use edged_qemu::site::{DEVICE, PROMPT, Site, console_shows};
use edged_qemu::wait::{self, LONG};
use serde_json::Value;

use crate::{HEAD, greedy};

/// Enough that a ninety-ninth part is not the one that met the host's own hiccup.
const ASKED: usize = 300;

/// Between two questions.
const BREATH: Duration = Duration::from_millis(50);

/// Some ten ticks of the guest's scheduler: below this a ratio of two ninety-ninth parts tells of the emulation.
const TICKS: Duration = Duration::from_millis(50);

/// Some seconds of decoding, of digests and of writing.
const LARGE_MIB: usize = 20;

/// Probes that must have passed in a state: as many as the device keeps the times of.
const PROBED: u64 = 256;

/// Unpacking and the workloads have their turns in between; without its share of time a probe takes seconds.
const BESIDE_A_PULL: Duration = Duration::from_millis(125);

/// After the second that it is given. Neighbours that fail again and again must not hold it up: they are told every five
/// seconds, of the device, whose clock is slower than ours on a busy host.
const REPORTED: Duration = Duration::from_secs(6);

/// The ninety-ninth of a hundred answers of the console.
fn console_p99(device: &mut Machine) -> Result<Duration> {
    let mut times = Vec::with_capacity(ASKED);
    for _ in 0..ASKED {
        let (worked, begin) = (device.worked()?, Instant::now());
        device.console.ask("version", PROMPT, LONG)?;
        times.push((device.worked()? - worked, begin.elapsed()));
        wait::pause(BREATH);
    }
    times.sort_unstable();
    for (part, at) in [("half", ASKED / 2), ("95 %", ASKED * 95 / 100), ("all", ASKED - 1)] {
        println!("console: {part} within {:?} of work ({:?} on the wall)", times[at].0, times[at].1);
    }
    Ok(times[ASKED * 99 / 100].0)
}

/// Asks for a document until it says so.
fn json(device: &mut Machine, verb: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    wait::until(what, LONG, || {
        let text = device.console.ask(&format!("{verb} -o json"), PROMPT, LONG)?;
        // Behind it stands the beginning of the next prompt.
        last = serde_json::from_str(&text[..=text.rfind(['}', ']']).context("no document")?])?;
        Ok(holds(&last).then(|| last.clone()))
    })
    .map_err(|error| error.context(format!("the last answer was {last:#}")))
}

/// How many probes have passed, and the ninety-ninth of a hundred of the last ones, once there are so many.
fn probe_p99(device: &mut Machine, at_least: u64) -> Result<(u64, Duration)> {
    let times = |found: &Value| found["probe"]["times"].as_u64();
    let found = json(device, "inspect web", "probes enough", |found| {
        wait::pause(20 * BREATH);
        times(found) >= Some(at_least)
    })?;
    println!("probe: {}, throttled: {}", found["probe"], found["throttled"]);
    let us = found["probe"]["p99Us"].as_u64().context("the device tells how long its probes took")?;
    Ok((times(&found).unwrap_or(0), Duration::from_micros(us)))
}

/// From an operator's word until the fleet has the report that tells of it.
fn report_of(device: &mut Machine, site: &Site, word: &str, name: &str, phase: &str) -> Result<Duration> {
    let fleet = site.fleet.as_ref().context("this site has a fleet")?;
    let begin = Instant::now();
    let said = device.console.ask(&format!("{word} {name}"), PROMPT, LONG)?;
    let mut last = Value::Null;
    wait::until(&format!("report of {name} {phase}"), LONG, || {
        let known: Value = serde_json::from_str(&fleet.tool(&["device", DEVICE])?)?;
        last = known["report"]["workloads"][name].clone();
        Ok((last["phase"] == phase).then_some(()))
    })
    .map_err(|error| error.context(format!("`{word}` was answered by `{said}`, the last report was {last:#}")))?;
    Ok(begin.elapsed())
}

fn crowd(image: &str) -> String {
    let bad = |name, args, cpu_milli| greedy(image, name, args, cpu_milli);
    let all = [
        bad("hog", "[hog]", 80),
        bad("spinner", "[spin]", 150),
        bad("bomb", "[fork]", 80),
        bad("breeder", "[breed]", 80),
        bad("flood", "[flood]", 80),
        bad("files", "[files]", 50),
        bad("watches-a", "[watches, /tmp]", 50),
        bad("watches-b", "[watches, /tmp]", 50),
    ];
    all.concat()
}

/// What each of them is to have got.
fn is_at_work(device: &mut Machine) -> Result<()> {
    console_shows(device, "inspect hog", "out of memory", 3 * LONG)?;
    for (name, words) in [
        ("bomb", "stopped at"),
        ("breeder", "begins"),
        ("files", "open, then"),
        // One alone does not take what its neighbour needs.
        ("watches-a", "instances,"),
        ("watches-b", "instances,"),
    ] {
        console_shows(device, &format!("logs {name} --tail 5"), words, 3 * LONG)?;
    }
    for name in ["watches-a", "watches-b"] {
        let said = console_shows(device, &format!("logs {name} --tail 5"), "instances,", LONG)?;
        let instances = said.split_once("watches: ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<u32>().ok());
        ensure!(instances > Some(128), "{name} shares the kernel's 128 instances with its neighbours: {said}");
    }
    Ok(())
}

pub fn take_all(firmware: &Firmware, dir: &std::path::Path) -> Result<()> {
    let site = Site::start(dir, firmware.arch)?.with_fleet()?;
    let image = site.publish("programs")?;
    let groups = "/sys/fs/cgroup/edged/workloads";
    let mut setup = site.device(&dir.join("device"))?.configure(&format!("\n[allow]\nbind = [\"{groups}\"]\n"));
    setup.memory_mib = 384;
    // Two nanoseconds for each instruction.
    setup.qemu.extend(["-icount", "shift=1,sleep=on"].map(str::to_owned));
    let mut device = Machine::boot(firmware, &dir.join("device"), &setup)?;
    // Not in step with the hundred milliseconds in which limits of time are counted: each probe meets another moment of them.
    let quiet = format!(
        "  web:\n    image: {image}\n    args: [http, \"80\"]\n    resources: {{ memory: 8Mi, cpu: 200m }}\n    \
         health: {{ probe: {{ http: {{ port: 80 }} }}, startPeriod: 60s, interval: 107ms, timeout: 5s }}\n    \
         capabilities: {{ add: [CAP_NET_BIND_SERVICE] }}\n  \
         eye:\n    image: {image}\n    args: [groups, /groups]\n    resources: {{ memory: 8Mi, cpu: 20m }}\n    \
         stopTimeout: 1s\n    mounts: [{{ target: /groups, readOnly: true, source: {{ bind: {groups} }} }}]\n"
    );
    site.push(&device, &site.keys.sign("quiet", &format!("{HEAD}sequence: 1\nworkloads:\n{quiet}"))?)?;
    console_shows(&mut device, "generations", "good", LONG)?;
    let reported_at_rest = report_of(&mut device, &site, "stop", "eye", "stopped")?;
    device.console.ask("start eye", PROMPT, LONG)?;
    let console_at_rest = console_p99(&mut device)?;
    let (_, probe_at_rest) = probe_p99(&mut device, PROBED)?;

    let crowded = format!("{HEAD}sequence: 2\nworkloads:\n{quiet}{}", crowd(&image));
    site.push(&device, &site.keys.sign("crowded", &crowded)?)?;
    is_at_work(&mut device)?;
    let (probed, _) = probe_p99(&mut device, 1)?;
    let console = console_p99(&mut device)?;
    let (_, probe) = probe_p99(&mut device, probed + PROBED)?;
    println!("99 of 100 answers of the console within {console_at_rest:?} at rest, {console:?} beside the crowd");
    println!("99 of 100 probes within {probe_at_rest:?} at rest, {probe:?} beside the crowd");
    let twice = |rest: Duration| (2 * rest).max(TICKS);
    the_supervisor_has_its_own(&mut device)?;
    nothing_is_left_of_the_breeder(&mut device, &site, reported_at_rest)?;
    let probe_at_pull = probe_beside_a_pull(&mut device, &site, &quiet)?;
    println!("99 of 100 probes within {probe_at_pull:?} beside a pull");
    ensure!(
        probe_at_pull <= (2 * probe_at_rest).max(BESIDE_A_PULL),
        "a probe takes {probe_at_pull:?} beside a pull, at rest {probe_at_rest:?}"
    );
    ensure!(console <= twice(console_at_rest), "the console takes {console:?}, at rest {console_at_rest:?}");
    ensure!(probe <= twice(probe_at_rest), "a probe takes {probe:?}, at rest {probe_at_rest:?}");
    Ok(())
}

/// A large image comes and is unpacked, with all that the one core has; the crowd has gone.
fn probe_beside_a_pull(device: &mut Machine, site: &Site, quiet: &str) -> Result<Duration> {
    let generation = |device: &mut Machine, sequence: u32, more: &str| {
        let yaml = format!("{HEAD}sequence: {sequence}\nworkloads:\n{quiet}{more}");
        site.push(device, &site.keys.sign(&format!("generation-{sequence}"), &yaml)?)?;
        json(device, "status", &format!("generation {sequence} to be good"), |status| {
            status["generation"]["sequence"] == sequence && status["generation"]["state"] == "good"
        })
    };
    generation(device, 3, "")?;
    // Its next run has no times yet.
    device.console.ask("restart web", PROMPT, LONG)?;
    let large = site.publish_large("busybox", "large", LARGE_MIB)?;
    let more = format!(
        "  large:\n    image: {large}\n    command: [/bin/sh, -c, 'exec sleep 100000']\n    \
         resources: {{ memory: 8Mi, cpu: 50m }}\n"
    );
    generation(device, 4, &more)?;
    probe_p99(device, 1).map(|(_, p99)| p99)
}

/// Its memory, its life, and the count of what it let go.
fn the_supervisor_has_its_own(device: &mut Machine) -> Result<()> {
    let status = json(device, "status", "lines that were dropped", |status| {
        status["survived"]["logLinesDropped"].as_u64() > Some(0)
    })?;
    let own = |what: &str| {
        let bytes: Bytes = serde_json::from_value(status["supervisor"][what].clone())
            .with_context(|| format!("{what}: {}", status["supervisor"]))?;
        anyhow::Ok(bytes.0)
    };
    let (memory, peak, max) = (own("memory")?, own("memoryPeak")?, own("memoryMax")?);
    println!("the agent holds {memory} of {max} bytes, with caches it had {peak}");
    ensure!(memory < max / 4 * 3 && peak < max, "the agent holds {memory}, had {peak} of {max} bytes");
    ensure!(status["survived"]["agentRestarts"] == 0, "the agent did not live through it: {}", status["survived"]);
    // The neighbour was neither restarted nor found sick, and its log has all its lines.
    let web = json(device, "inspect web", "a healthy neighbour", |web| web["status"]["health"] == "healthy")?;
    ensure!(web["status"]["restarts"] == 0, "{web:#}");
    let flood = json(device, "inspect flood", "a flood that is told of", |flood| {
        flood["status"]["logLinesDropped"].as_u64() > Some(0)
    })?;
    ensure!(flood["status"]["restarts"] == 0, "whoever floods is neither blocked nor ended: {flood:#}");
    // Nobody else loses a line by that.
    let all = json(device, "ps", "a list", Value::is_array)?;
    let lost: Vec<_> = all.as_array().into_iter().flatten().filter(|one| one["logLinesDropped"] != 0).collect();
    let names: Vec<_> = lost.iter().map(|one| &one["name"]).collect();
    ensure!(names == ["flood"], "lines of theirs are missing: {lost:?}");
    Ok(())
}

/// It forks faster than one can kill it, and does not listen: an operator's stop ends all of it.
fn nothing_is_left_of_the_breeder(device: &mut Machine, site: &Site, at_rest: Duration) -> Result<()> {
    let had = console_shows(device, "logs eye --tail 1", "breeder ", LONG)?;
    ensure!(!had.contains("breeder 0"), "it has children: {had}");
    let reported = report_of(device, site, "stop", "breeder", "stopped")?;
    println!("a stop was reported within {at_rest:?} at rest, {reported:?} beside the crowd");
    ensure!(
        reported <= (3 * at_rest).max(REPORTED),
        "the fleet heard of a stop after {reported:?}, at rest after {at_rest:?}"
    );
    let mut last = String::new();
    wait::until("the last of the breeder", LONG, || {
        last = device.console.ask("logs eye --tail 1", PROMPT, LONG)?;
        let groups =
            last.split_once("groups: ").and_then(|(_, groups)| groups.split_once('.')).map(|(groups, _)| groups);
        Ok(groups.is_some_and(|groups| !groups.contains("breeder ") || groups.contains("breeder 0")).then_some(()))
    })
    .map_err(|error| error.context(last))
}
