//! What a device that only runs and reports writes to its flash: counted by the kernel (proc_pid_io(5), `write_bytes`: pages
//! made dirty in the page cache, without what the file system adds), over reports that come faster than they do, and told as
//! a day of the shipped interval. Everything else that is written meanwhile counts with them.

use std::fs;

use crate::rig::{DEVICE, Device, Factory, head, until};

/// `fleet.report-interval` as shipped: 5 min.
const REPORTS_A_DAY: u64 = 288;
/// What an idle day may cost the flash.
const DAY_MAX_BYTES: u64 = 1 << 20;
const WORKLOADS: usize = 20;
const REPORTS: u64 = 8;

fn written(device: &Device) -> u64 {
    let keeper = device.keeper_pid();
    let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap();
    let is_agent = |pid: &str| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|byte| *byte == 0).nth(1) == Some(b"agent")
    };
    let agent = children.split_whitespace().find(|pid| is_agent(pid)).expect("an agent").to_owned();
    let of = |pid: &str| -> u64 {
        let text = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: ")).unwrap();
        line.parse().unwrap()
    };
    of(&keeper.to_string()) + of(&agent)
}

#[test]
fn what_twenty_idle_workloads_and_their_reports_write_is_counted_and_bounded() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let fleet = factory.fleet();
    let config = format!(
        "[fleet]\nurl = \"{}\"\nca = \"{}\"\nenroll-token = \"{}\"\npoll-wait = \"30s\"\nreport-interval = \"1s\"\n",
        fleet.url_seen_from_host(),
        factory.authority.cert().display(),
        fleet.enroll_token().unwrap()
    );
    let device = factory.device(&config);
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
    let bytes = written(&device) - before;
    let each = bytes / (end - begin);
    println!(
        "idle, {WORKLOADS} workloads: {each} bytes for each of {} reports, {} KiB in a day of {REPORTS_A_DAY}",
        end - begin,
        (each * REPORTS_A_DAY) >> 10
    );
    assert!(each * REPORTS_A_DAY <= DAY_MAX_BYTES, "{each} bytes for each report");
}
