//! A new generation takes over when it suits: locks, windows, boots, an operator's word.

use serde_json::Value;

use crate::rig::{Device, Factory, head, until};

fn manifest(sequence: u32, image: &str, update: &str) -> String {
    let update = format!("update: {{ probation: 1s{update} }}");
    let head = head(sequence).replace("update: { probation: 2s }", &update);
    // The lock is held by the workload itself, which runs as nobody; `sleep` in one process is ended by its stop.
    format!(
        "{head}volumes:\n  update-locks: {{}}\nworkloads:\n  changes:\n    image: {image}\n    user: \"65534:65534\"\n    \
         command: [/bin/sh, -c, 'echo 10m >/locks/camera; exec sleep {sequence}00000']\n    \
         mounts: [{{ source: {{ volume: update-locks }}, target: /locks }}]\n    \
         resources: {{ memory: 8Mi, cpu: 100m }}\n"
    )
}

fn awaits(device: &Device, word: &str) -> Value {
    until(&format!("the candidate to wait for {word}"), || {
        let candidate = device.status()["candidate"].clone();
        let why = candidate["reason"]["text"].as_str()?;
        (candidate["state"] == "staged" && why.contains(word)).then_some(candidate)
    })
}

#[test]
fn a_generation_waits_for_a_lock_a_window_a_boot_and_an_operator_and_says_so() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("[update]\ntimezone = \"+02:00\"\n");
    let give = |sequence: u32, update: &str| {
        device.take(&factory.sign(&format!("m{sequence}"), &manifest(sequence, &image, update)));
    };
    // There is nothing to disturb yet: the first one waits for nobody.
    give(1, ", apply: manual");
    device.wait_for_generation(1, "good");
    let lock = device.path("volumes/update-locks/camera");
    until("the lock of the workload", || lock.exists().then_some(()));

    give(2, "");
    let candidate = awaits(&device, "the lock `camera`");
    assert!(candidate["reason"]["next"].as_str().unwrap().contains("edgectl activate 2"), "{candidate:#}");
    for shown in [device.ask(&["status"]), device.ask(&["generations"])] {
        assert!(shown.contains("waits for the lock `camera`") && shown.contains("edgectl activate 2"), "{shown}");
    }
    let pid = device.pid("changes");
    // The next agent finds it waiting, and waits as well: it does not take its own start for a reason to switch.
    let agent = device.agent_pid();
    device.kill_agent();
    until("another agent", || {
        (device.edgectl(&["version"]).status.success() && device.agent_pid() != agent).then_some(())
    });
    awaits(&device, "the lock `camera`");
    assert_eq!(device.pid("changes"), pid, "nothing that runs was touched");
    std::fs::remove_file(&lock).unwrap();
    device.wait_for_generation(2, "good");

    // Every other way to wait, each ended by an operator's word: also while a lock is held.
    until("the lock of the workload", || lock.exists().then_some(()));
    std::fs::remove_file(&lock).unwrap();
    // A window that is closed at any time: it opens on the day after tomorrow.
    let days = ["thu", "fri", "sat", "sun", "mon", "tue", "wed"];
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let day = days[usize::try_from((now / 86_400 + 2) % 7).unwrap()];
    let window = format!(", apply: window, window: {{ days: [{day}], from: \"12:00\", to: \"13:00\" }}");
    for (sequence, update, word) in [
        (3, window.as_str(), "its window"),
        (4, ", apply: next-boot", "the next boot"),
        (5, ", apply: manual", "an operator's word"),
    ] {
        give(sequence, update);
        awaits(&device, word);
        let wrong = device.edgectl(&["activate", "77"]);
        assert!(String::from_utf8_lossy(&wrong.stderr).contains(&format!("it is generation {sequence}")), "{wrong:?}");
        let said = device.ask(&["activate"]);
        assert!(said.contains(&format!("generation {sequence} shall take over at once")), "{said}");
        device.wait_for_generation(sequence.into(), "good");
        until("the lock of the workload", || lock.exists().then_some(()));
        std::fs::remove_file(&lock).unwrap();
    }
    let nothing = device.edgectl(&["activate"]);
    assert_eq!(nothing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("no generation is on its way"), "{nothing:?}");
}
