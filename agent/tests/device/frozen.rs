//! Somebody holds new manifests back: the dates of the one that is here run out, and that is said, in three places and in
//! the story once. What runs goes on. And a factory trust root that cannot be read is said as well.

use std::process::Command;

use edged_qemu::process;
use serde_json::Value;

use crate::rig::{DEVICE, Factory, until};

/// `date -d`, as RFC 3339.
fn date(when: &str) -> String {
    process::read(Command::new("date").args(["-u", "-d", when, "+%FT%TZ"])).unwrap().trim().to_owned()
}

fn trust_concerns(report: &Value) -> Vec<String> {
    let concerns = report["trust"]["concerns"].as_array().cloned().unwrap_or_default();
    concerns.iter().filter_map(|why| Some(why["text"].as_str()?.to_owned())).collect()
}

#[test]
fn a_manifest_that_outlives_its_dates_is_told_once_and_in_every_report_and_what_runs_goes_on() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let fleet = factory.fleet();
    let device = factory.device(&format!(
        "[fleet]\nurl = \"{}\"\nca = \"{}\"\nenroll-token = \"{}\"\npoll-wait = \"2s\"\nreport-interval = \"2s\"\n",
        fleet.url_seen_from_host(),
        factory.authority.cert().display(),
        fleet.enroll_token().unwrap()
    ));
    let (issued, expires) = (date("-1 minute"), date("+15 seconds"));
    let signed = factory.sign(
        "brief",
        &format!(
            "apiVersion: edge/v1\ndevice: {DEVICE}\nsequence: 1\nissued: {issued}\nexpires: {expires}\n\
             update: {{ probation: 1s }}\nworkloads:\n  app:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    \
             resources: {{ memory: 8Mi, cpu: 100m }}\n"
        ),
    );
    device.take(&signed);
    device.wait_for_generation(1, "good");
    let pid = device.pid("app");

    let concern = format!("manifest 1 expired at {expires}, and no newer one has come");
    until("the concern in the status", || trust_concerns(&device.status()).contains(&concern).then_some(()));
    let shown = device.edgectl(&["status"]);
    let text = String::from_utf8_lossy(&shown.stdout);
    assert_eq!(shown.status.code(), Some(4), "{text}");
    assert!(text.contains("NOT WELL: manifest 1 expired") && text.contains("-> sign and push"), "{text}");
    until("the concern at the fleet", || {
        let seen: Value = serde_json::from_str(&fleet.tool(&["device", DEVICE]).ok()?).ok()?;
        trust_concerns(&seen["report"]).contains(&concern).then_some(())
    });
    assert!(fleet.tool(&["devices"]).unwrap().contains("trust: manifest 1 expired"));

    // It runs on, and a new agent does not tell the same once more.
    device.kill_agent();
    until("another agent", || {
        let status: Value = serde_json::from_slice(&device.edgectl(&["status", "-o", "json"]).stdout).ok()?;
        trust_concerns(&status).contains(&concern).then_some(())
    });
    assert_eq!(device.pid("app"), pid);
    // It looks before it beats a second time.
    until("the new agent's report", || {
        let seen: Value = serde_json::from_str(&fleet.tool(&["device", DEVICE]).ok()?).ok()?;
        (seen["report"]["uptimeSecs"].as_u64()? > device.status()["uptimeSecs"].as_u64()?.saturating_sub(3))
            .then_some(())
    });
    let told = |text: &str| device.events().iter().filter(|event| event.starts_with(text)).count();
    assert_eq!(told(&concern), 1);

    // A newer one ends it. Its factory root is broken meanwhile: the stored one holds, and the file is named.
    device.take(&factory.sign("later", &format!("{}workloads: {{}}\n", crate::rig::head(2))));
    until("no more concern", || trust_concerns(&device.status()).is_empty().then_some(()));
    device.switch_off();
    std::fs::write(factory.keys.trust_root(), "not a trust root").unwrap();
    let device = factory.device("");
    let status = device.status();
    let concerns = trust_concerns(&status);
    assert!(concerns.len() == 1 && concerns[0].contains("trust.cose: trust root"), "{status:#}");
    assert_eq!(status["trust"]["root"], 1, "the stored one holds");
    assert!(device.events().iter().any(|event| event == &concerns[0]));
}
