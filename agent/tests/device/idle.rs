//! What a device that only runs and reports writes to its flash in a day: counted by the kernel (proc_pid_io(5), `write_bytes`:
//! pages made dirty in the page cache, without what the file system adds). Reports are made to come faster than they do. What
//! comes by the hour, the day or the month is done for itself, by the code that does it then, and added as often as it comes.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use edged::config::Places;
use edged::content::Content;
use edged::execute::scrub;
use edged::store::Store;
use edged_model::quantity::Timestamp;

use crate::rig::{DEVICE, Device, Factory, head, until};

/// `fleet.report-interval` as shipped: 5 min.
const REPORTS_A_DAY: u64 = 288;
/// By the hour.
const COLLECTIONS_A_DAY: u64 = 24;
/// A day's time floor; the hours in between cost a device an inode's time stamp.
const FLOORS_A_DAY: u64 = 1;
const STAMPS_A_DAY: u64 = 24;
/// Of an inode that was changed and nothing else: a block at most.
const STAMP_BYTES: u64 = 4096;
/// `images.scrub` as shipped: one pass in so many days.
const DAYS_A_SCRUB: u64 = 30;
/// In a pass over so much, where it is, is noted after every 64 MiB.
const SCRUBBED_BYTES: u64 = 2 << 30;
/// What an idle day may cost the flash.
const DAY_MAX_BYTES: u64 = 1 << 20;
const WORKLOADS: usize = 20;
/// So many that one write beside them, such as of a report that a busy machine took too late, is not told as one for each.
const REPORTS: u64 = 32;
const TIMES: u64 = 8;

fn written_by(pid: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: ")).unwrap();
    line.parse().unwrap()
}

fn written(device: &Device) -> u64 {
    written_by(&device.keeper_pid().to_string()) + written_by(&device.agent_pid().to_string())
}

/// What a time floor and a note of the scrub cost, each: written by a process that writes nothing else, to the disk of a
/// device that is switched off.
fn singly(data: &Path) -> (u64, u64) {
    let mut test = Command::new(std::env::current_exe().unwrap());
    test.args(["--exact", "idle::single_writes", "--ignored", "--nocapture"]).env(DATA, data);
    let said = edged_qemu::process::read(&mut test).unwrap();
    let numbers = said.lines().find_map(|line| line.split_once("single writes: ")).expect(&said).1;
    let (floor, note) = numbers.split_once(' ').expect(numbers);
    (floor.parse().unwrap(), note.parse().unwrap())
}

const DATA: &str = "EDGED_TEST_DATA";

#[test]
#[ignore = "a part of the test below, in a process of its own"]
fn single_writes() {
    let places = Places::new(Some(Path::new(&std::env::var_os(DATA).expect(DATA))), None);
    let (store, _) = Store::open(&places, 500).unwrap();
    let content = Content::open(&places).unwrap();
    let each = |write: &dyn Fn(u64)| {
        let before = written_by("self");
        (0..TIMES).for_each(write);
        (written_by("self") - before) / TIMES
    };
    let floor = store.time_floor().unwrap().0;
    let raised = each(&|day| {
        let to = Timestamp(floor + i64::try_from(day + 1).unwrap() * 86_400);
        assert_eq!(store.raise_time_floor(to).unwrap(), to);
    });
    let record = scrub::load(&content);
    let noted = each(&|_| scrub::save(&content, &record).unwrap());
    println!("single writes: {raised} {noted}");
}

#[test]
fn what_twenty_idle_workloads_and_their_reports_write_is_counted_and_bounded() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let fleet = factory.fleet();
    let told = format!(
        "[fleet]\nurl = \"{}\"\nca = \"{}\"\nenroll-token = \"{}\"\npoll-wait = \"30s\"\n",
        fleet.url_seen_from_host(),
        factory.authority.cert().display(),
        fleet.enroll_token().unwrap()
    );
    let device = factory.device(&format!("{told}report-interval = \"1s\"\n[images]\nscrub = \"off\"\n"));
    let mut yaml = format!("{}workloads:\n", head(1));
    for number in 0..WORKLOADS {
        yaml.push_str(&format!(
            "  w{number}:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    \
             resources: {{ memory: 8Mi, cpu: 20m, pids: 16 }}\n"
        ));
    }
    device.take(&factory.sign("idle", &yaml));
    device.wait_for_generation(1, "good");
    let number = || {
        let seen: serde_json::Value = serde_json::from_str(&fleet.tool(&["device", DEVICE]).ok()?).ok()?;
        (seen["report"]["generation"]["state"] == "good").then(|| seen["report"]["number"].as_u64())?
    };
    // What starting has left to write is written when a few reports of the good generation are there.
    let first = until("a report of the good generation", number);
    let begin = until("a few more", || number().filter(|number| *number >= first + 3));
    let before = written(&device);
    let end = until("reports", || number().filter(|number| *number >= begin + REPORTS));
    let report = (written(&device) - before) / (end - begin);

    // The same device with reports as rare as they are: nothing is written that nobody asked for.
    device.switch_off();
    let device = factory.device(&format!("{told}[images]\nscrub = \"off\"\n"));
    device.wait_for_generation(1, "good");
    quiet(&device);
    let before = written(&device);
    for _ in 0..TIMES {
        assert!(device.ask(&["prune"]).contains("nothing to take away"));
    }
    let collection = (written(&device) - before) / TIMES;

    // Passes of the scrub one upon another, each with its line in the story and the report of it.
    device.switch_off();
    let device = factory.device(&format!("{told}[images]\nscrub = \"1s\"\nscrub-rate = \"64Mi\"\n"));
    let passes = || device.events().iter().filter(|text| text.contains("a scrub of ")).count() as u64;
    let begin = until("a pass of the scrub", || Some(passes()).filter(|passes| *passes > 0));
    let before = written(&device);
    let end = until("more passes", || Some(passes()).filter(|passes| *passes >= begin + 4));
    let pass = (written(&device) - before) / (end - begin);

    let data = device.data().to_owned();
    device.switch_off();
    let (floor, note) = singly(&data);
    assert!(floor > 0 && note > 0, "nothing is counted here: is {} in memory?", data.display());

    let scrub = (pass + note * (SCRUBBED_BYTES / scrub::SAVED_EVERY_BYTES)) / DAYS_A_SCRUB;
    let parts = [
        ("reports", report * REPORTS_A_DAY),
        ("collections", collection * COLLECTIONS_A_DAY),
        ("the time floor", floor * FLOORS_A_DAY),
        ("its stamps, at most", STAMP_BYTES * STAMPS_A_DAY),
        ("the scrub of 2 GiB, its day of thirty", scrub),
    ];
    let day: u64 = parts.iter().map(|(_, bytes)| bytes).sum();
    println!("idle, {WORKLOADS} workloads: {} KiB in a day", day >> 10);
    for (what, bytes) in parts {
        println!("  {what}: {bytes} bytes");
    }
    let on_a_host = day - (floor * FLOORS_A_DAY + STAMP_BYTES * STAMPS_A_DAY) + floor * STAMPS_A_DAY;
    println!("on a host, where the store keeps the floor every hour: {} KiB", on_a_host >> 10);
    println!(
        "each: a report {report}, a collection {collection}, a time floor {floor}, a pass {pass}, its note {note}"
    );
    assert!(day <= DAY_MAX_BYTES, "{day} bytes in a day: {parts:?}");
}

/// Waits until two heartbeats and a look for more have written nothing.
fn quiet(device: &Device) {
    let mut last = (written(device), std::time::Instant::now());
    until("a device that is at rest", || {
        let now = written(device);
        if now != last.0 {
            last = (now, std::time::Instant::now());
        }
        (last.1.elapsed() > Duration::from_secs(12)).then_some(())
    });
}
