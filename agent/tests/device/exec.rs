//! `edgectl exec`: pipes, terminals, codes, and what is refused.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Stdio;

use edged_qemu::process;

use crate::rig::{Device, Factory, head, until};

fn manifest(image: &str) -> String {
    let resources = "resources: { memory: 16Mi, cpu: 200m }";
    format!(
        "{}workloads:\n  idle:\n    image: {image}\n    command: [/bin/sleep, \"1000\"]\n    {resources}\n  \
         ended:\n    image: {image}\n    command: [\"/bin/true\"]\n    restart: {{ policy: never }}\n    {resources}\n",
        head(1)
    )
}

fn ready() -> (Factory, Device) {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    device.take(&factory.sign("exec", &manifest(&image)));
    device.running("idle");
    (factory, device)
}

#[test]
fn a_command_runs_inside_with_pipes_and_its_own_code() {
    let (_factory, device) = ready();
    let inside = device.edgectl(&["exec", "-e", "A=b", "idle", "sh", "-c", "echo $A; echo err >&2; exit 7"]);
    assert_eq!(inside.status.code(), Some(7), "{inside:?}");
    assert_eq!((inside.stdout.as_slice(), inside.stderr.as_slice()), (&b"b\n"[..], &b"err\n"[..]));

    let mut cat = device.command();
    cat.args(["exec", "-i", "idle", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut cat = cat.spawn().unwrap();
    cat.stdin.take().unwrap().write_all(b"through and back").unwrap();
    let output = cat.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b"through and back"[..]));

    // The operator's word is kept, and what cannot be is told.
    until("the record", || device.events().iter().any(|text| text.contains("a command in idle: sh -c")).then_some(()));
    for (words, why) in [
        (&["exec", "nobody", "true"][..], "there is no workload nobody"),
        (&["exec", "ended", "true"], "does not run"),
        (&["exec", "idle", "no-such-program"], "no-such-program"),
        (&["exec", "-t", "idle", "sh"], "no terminal"),
    ] {
        let refused = device.edgectl(words);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(matches!(refused.status.code(), Some(1 | 2)) && said.contains(why), "{words:?}: {refused:?}");
    }
}

#[test]
fn a_terminal_has_the_size_of_ours_and_a_client_that_leaves_hangs_up() {
    let (_factory, device) = ready();
    let size = nix::pty::Winsize { ws_row: 33, ws_col: 101, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = nix::pty::openpty(Some(&size), None).unwrap();
    let mut command = device.command();
    let end = |fd: &OwnedFd| Stdio::from(fd.try_clone().unwrap());
    command.args(["exec", "-it", "idle", "sh"]).stdin(end(&pty.slave)).stdout(end(&pty.slave)).stderr(end(&pty.slave));
    let mut client = command.spawn().unwrap();
    drop(command);
    drop(pty.slave);
    let mut ours = File::from(pty.master);
    let mut seen = String::new();
    let mut read_until = |ours: &mut File, what: &str| {
        let mut buffer = [0; 1024];
        while !seen.contains(what) {
            let count = ours.read(&mut buffer).unwrap();
            assert!(count > 0, "{what} in {seen}");
            seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    };
    ours.write_all(b"busybox stty size; busybox tty; echo ba''ck\n").unwrap();
    read_until(&mut ours, "33 101");
    read_until(&mut ours, "/dev/pts/");
    read_until(&mut ours, "back");
    let pid = device.pid("idle");
    let others = || {
        process::read(std::process::Command::new("ps").args(["-eo", "args"]))
            .unwrap()
            .lines()
            .filter(|l| *l == "sh")
            .count()
    };
    assert!(others() >= 1);
    client.kill().unwrap();
    client.wait().unwrap();
    until("the end of the shell that was hung up on", || (others() == 0).then_some(()));
    assert_eq!(device.pid("idle"), pid, "the workload itself goes on");
}

#[test]
fn a_terminal_is_left_by_its_keys_and_what_runs_in_it_goes_on() {
    let (_factory, device) = ready();
    let pty = nix::pty::openpty(None, None).unwrap();
    let mut command = device.command();
    let end = |fd: &OwnedFd| Stdio::from(fd.try_clone().unwrap());
    // It prints far more than a terminal holds.
    let script = "i=0; while true; do i=$((i+1)); printf %0400d $i; echo $i > /count; sleep 0.01; done";
    command.args(["exec", "-it", "idle", "sh", "-c", script]);
    command.stdin(end(&pty.slave)).stdout(end(&pty.slave)).stderr(end(&pty.slave));
    let mut client = command.spawn().unwrap();
    drop(command);
    drop(pty.slave);
    let mut ours = File::from(pty.master);
    assert!(ours.read(&mut [0; 1024]).unwrap() > 0);
    ours.write_all(b"\x10\x11").unwrap();
    let reader = std::thread::spawn(move || {
        let mut said = Vec::new();
        // The end of a terminal is an error (pty(7)).
        let _ = ours.read_to_end(&mut said);
        String::from_utf8_lossy(&said).into_owned()
    });
    assert_eq!(client.wait().unwrap().code(), Some(0));
    let said = reader.join().unwrap();
    assert!(said.contains("edgectl: the command runs on in idle"), "{said}");
    let count = || {
        let output = device.edgectl(&["exec", "idle", "cat", "/count"]);
        String::from_utf8_lossy(&output.stdout).trim().parse::<u64>().unwrap_or(0)
    };
    let before = count();
    until("it to print more than a terminal holds", || (count() > before + 200).then_some(()));
    assert_eq!(device.edgectl(&["exec", "--detach-keys", "nonsense", "idle", "true"]).status.code(), Some(2));
}

/// On cgroup v1, where this test mostly runs, the answer is why not; on v2 it stands still and goes on.
#[test]
fn a_workload_is_paused_and_goes_on_or_it_is_told_why_not() {
    let (_factory, device) = ready();
    let paused = device.edgectl(&["pause", "idle"]);
    if !std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        let said = String::from_utf8_lossy(&paused.stderr).into_owned();
        assert!(paused.status.code() == Some(1) && said.contains("cgroup v2"), "{paused:?}");
    } else {
        assert_eq!(paused.status.code(), Some(0), "{paused:?}");
        assert!(device.workload("idle")["why"]["text"].as_str().unwrap().contains("paused by an operator"));
        device.ask(&["resume", "idle"]);
        assert_eq!(device.edgectl(&["exec", "idle", "true"]).status.code(), Some(0));
    }
    assert_eq!(device.edgectl(&["pause", "nobody"]).status.code(), Some(1));
    assert_eq!(device.edgectl(&["resume", "idle"]).status.code(), Some(1), "it is not paused");
}
