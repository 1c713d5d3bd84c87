//! A newer edged takes over from the one that runs, and no workload notices.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use edged::crash_point::FILE_ENV;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::rig::{Device, Factory, head, until};

fn runs_file(pid: i32) -> Option<u64> {
    Some(fs::metadata(format!("/proc/{pid}/exe")).ok()?.ino())
}

/// Another file of the same name, in one step, as package managers do it.
fn replace(program: &Path, by: impl FnOnce(&Path)) -> u64 {
    let new = program.with_extension("new");
    by(&new);
    fs::rename(&new, program).unwrap();
    fs::metadata(program).unwrap().ino()
}

fn ticks(device: &Device) -> Vec<u64> {
    let log = device.ask(&["logs", "ticker", "--tail", "2000"]);
    log.lines().filter_map(|line| line.rsplit_once("tick ")?.1.trim().parse().ok()).collect()
}

#[test]
fn a_newer_program_takes_over_and_no_workload_notices() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let own = Path::new(env!("CARGO_BIN_EXE_edged"));
    let program = factory.path("edged");
    fs::copy(own, &program).unwrap();
    let device = factory.device_of(&program, "device", "", &[]);
    let yaml = format!(
        "{}workloads:\n  \
         ticker:\n    image: {image}\n    command: [/bin/sh, -c, 'n=0; while true; do echo tick $n; n=$((n+1)); sleep 0.1; done']\n    \
         resources: {{ memory: 8Mi, cpu: 100m }}\n  \
         web:\n    image: {image}\n    command: [/bin/httpd, -f, -p, \"8080\", -h, /www]\n    \
         resources: {{ memory: 16Mi, cpu: 100m }}\n    \
         health: {{ probe: {{ http: {{ port: 8080 }} }}, interval: 500ms }}\n",
        head(1)
    );
    device.take(&factory.sign("first", &yaml));
    device.wait_for_generation(1, "good");
    let (ticker, web, keeper) = (device.pid("ticker"), device.pid("web"), device.keeper_pid());
    let taken_over = |inode: u64, agent: i32| {
        until("the new program as keeper and as agent", || {
            let new = device.agent().filter(|new| *new != agent)?;
            (runs_file(keeper) == Some(inode) && runs_file(new) == Some(inode)).then_some(())
        });
        until("an answer of the new agent", || device.edgectl(&["status"]).status.success().then_some(()));
        assert_eq!((device.pid("ticker"), device.pid("web")), (ticker, web), "they run on");
        assert_eq!(device.workload("web")["restarts"], 0);
        let last = *ticks(&device).last().unwrap();
        until("more ticks", || (*ticks(&device).last()? > last + 3).then_some(()));
        let all = ticks(&device);
        assert!(all.windows(2).all(|pair| pair[1] == pair[0] + 1), "a gap in {all:?}");
    };

    // By an operator's word.
    let agent = device.agent_pid();
    let inode = replace(&program, |new| assert!(fs::copy(own, new).unwrap() > 0));
    assert_ne!(runs_file(keeper), Some(inode));
    let said = device.ask(&["upgrade"]);
    assert!(said.contains("takes over from"), "{said}");
    taken_over(inode, agent);
    assert!(device.events().iter().any(|text| text.contains("takes over from")), "the story has it");

    // By the signal of a service manager.
    let agent = device.agent_pid();
    let inode = replace(&program, |new| assert!(fs::copy(own, new).unwrap() > 0));
    kill(Pid::from_raw(keeper), Signal::SIGHUP).unwrap();
    taken_over(inode, agent);

    let said = device.said();
    assert!(!said.contains("it is killed"), "the former agents write down what they have read, and end: {said}");

    // What is no edged is refused, and what runs goes on.
    let agent = device.agent_pid();
    replace(&program, |new| {
        fs::write(new, "#!/bin/sh\necho something else\n").unwrap();
        fs::set_permissions(new, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    });
    let refused = device.edgectl(&["upgrade"]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1));
    assert!(why.contains("is no edged that runs here") && why.contains("something else"), "{why}");
    // Half of a file, which the kernel may even begin to execute.
    let bytes = fs::read(own).unwrap();
    replace(&program, |new| {
        fs::write(new, &bytes[..bytes.len() / 3]).unwrap();
        fs::set_permissions(new, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    });
    let refused = device.edgectl(&["upgrade"]);
    assert_eq!(refused.status.code(), Some(1), "{}", String::from_utf8_lossy(&refused.stdout));
    // One that does not understand the configuration it would find: its agent could not live.
    fs::File::options().append(true).open(factory.path("device.toml")).unwrap().write_all(b"\n[later]\n").unwrap();
    replace(&program, |new| assert!(fs::copy(own, new).unwrap() > 0));
    let refused = device.edgectl(&["upgrade"]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1));
    assert!(why.contains("device.toml") && why.contains("unknown field `later`"), "{why}");
    assert_eq!((device.agent_pid(), device.pid("ticker")), (agent, ticker));
}

/// The bytes of edged and some more: another program that does the same.
fn variant(ending: &str) -> impl FnOnce(&Path) {
    move |new| {
        fs::copy(env!("CARGO_BIN_EXE_edged"), new).unwrap();
        fs::File::options().append(true).open(new).unwrap().write_all(ending.as_bytes()).unwrap();
    }
}

#[test]
fn a_newer_program_whose_agent_falls_three_times_gives_way_to_the_former_one() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let program = factory.path("edged");
    variant("")(&program);
    let armed = factory.path("crash-point");
    let device = factory.device_of(&program, "device", "", &[(FILE_ENV, &armed)]);
    let yaml = format!(
        "{}workloads:\n  app:\n    image: {image}\n    command: [/bin/sleep, \"100000\"]\n    \
         resources: {{ memory: 8Mi, cpu: 100m }}\n",
        head(1)
    );
    device.take(&factory.sign("first", &yaml));
    device.wait_for_generation(1, "good");
    let (app, keeper, former) = (device.pid("app"), device.keeper_pid(), runs_file(device.keeper_pid()));
    let answers = || device.edgectl(&["status"]).status.success().then_some(());
    let agent_after = |before: i32| until("another agent", || device.agent().filter(|agent| *agent != before));

    // Each of its agents dies before it has opened the store.
    let before = device.agent_pid();
    let bad = replace(&program, variant("newer"));
    let arm = || {
        let written = armed.with_extension("written");
        fs::write(&written, "store-opening 1").unwrap();
        fs::rename(&written, &armed).unwrap();
    };
    arm();
    assert!(device.ask(&["upgrade"]).contains("takes over from"));
    for fall in 1..=3 {
        until(&format!("fall {fall}"), || (!armed.exists()).then_some(()));
        if fall < 3 {
            arm();
        }
    }
    until("the former program", || (runs_file(keeper) == former).then_some(()));
    agent_after(before);
    until("its answer", answers);
    assert_eq!(device.pid("app"), app, "it ran on");
    assert!(!device.said().contains("the state store was damaged"), "{}", device.said());
    until("the story of it", || {
        let told = device.events().iter().filter(|text| text.contains("its agent fell 3 times")).count();
        assert!(told <= 1);
        (told == 1).then_some(())
    });
    let status = device.status();
    assert_eq!(status["upgrade"]["code"], "upgradeReturned", "{status:#}");
    assert_eq!(status["survived"]["upgradesReturned"], 1);
    let shown = device.ask(&["status"]);
    assert!(shown.contains("is sent away") && shown.contains("upgrade --again"), "{shown}");
    let refused = program.with_file_name("edged.refused");
    assert_eq!(fs::metadata(&refused).unwrap().ino(), bad);
    assert_eq!(fs::read(&program).unwrap(), fs::read(env!("CARGO_BIN_EXE_edged")).unwrap(), "what a boot would start");

    // Brought once more, it is known; the next agent tells nothing twice.
    replace(&program, variant("newer"));
    let no = device.edgectl(&["upgrade"]);
    assert!(String::from_utf8_lossy(&no.stderr).contains("ran here before and was sent away"), "{no:?}");
    let before = device.agent_pid();
    device.kill_agent();
    let before = agent_after(before);
    until("its answer", answers);
    assert_eq!(device.events().iter().filter(|text| text.contains("its agent fell 3 times")).count(), 1);
    // Unless an operator insists.
    let insisted = fs::metadata(&program).unwrap().ino();
    device.ask(&["upgrade", "--again"]);
    until("the newer program", || (runs_file(keeper) == Some(insisted)).then_some(()));
    agent_after(before);
    until("its answer", answers);
    until("its trial", || (device.status()["upgrade"]["code"] == "upgradeOnTrial").then_some(()));
    assert_eq!(device.pid("app"), app);
}
