//! What comes of a launch: exits, signals, failures by their stage, answers to what is no request.

use std::os::fd::OwnedFd;

use edged_model::keeper::{MAX_MESSAGE_BYTES, ReplyBody, RequestBody, Stdio};
use nix::sys::signal::Signal;

use crate::Story;
use crate::rig::{Rig, line, until};

pub const STORIES: &[Story] = &[
    ("exit_codes_and_signals_are_told", exit_codes_and_signals_are_told),
    ("a_step_that_fails_is_named", a_step_that_fails_is_named),
    ("what_this_host_may_not_do_fails_by_name", what_this_host_may_not_do_fails_by_name),
    ("launches_at_once_are_each_answered", launches_at_once_are_each_answered),
    ("nonsense_and_giants_are_refused", nonsense_and_giants_are_refused),
    ("given_descriptors_are_the_streams", given_descriptors_are_the_streams),
    ("no_descriptor_of_the_keeper_leaks", no_descriptor_of_the_keeper_leaks),
];

fn exit_codes_and_signals_are_told() {
    let (rig, mut link) = Rig::start();
    assert_eq!(
        link.run(rig.spec("seven", "echo out; echo err >&2; exit 7")),
        (Some(7), "out\n".into(), "err\n".into())
    );

    let (_, mut outputs) = link.launch(rig.spec("sleeper", "echo up; exec sleep 100"));
    assert_eq!(line(&mut outputs[0]), "up");
    let (answer, _) = link.ask(RequestBody::Signal { key: "sleeper".into(), signal: 9 }, &[]);
    assert_eq!(answer, ReplyBody::Done);
    let exit = link.exit_of("sleeper");
    assert_eq!((exit.code, exit.signal, exit.core_dumped), (None, Some(9), false));

    // A real-time signal, as SIGRTMIN+3 stops systemd: a shell with a trap takes it.
    let (_, mut outputs) = link.launch(rig.spec("trap", "trap 'exit 5' 37; echo up; while :; do sleep 0.01; done"));
    assert_eq!(line(&mut outputs[0]), "up");
    link.ask(RequestBody::Signal { key: "trap".into(), signal: 37 }, &[]);
    assert_eq!(link.exit_of("trap").code, Some(5));

    let (answer, _) = link.ask(RequestBody::Signal { key: "nobody".into(), signal: 9 }, &[]);
    assert!(matches!(answer, ReplyBody::Refused { .. }), "{answer:?}");
}

fn a_step_that_fails_is_named() {
    let (rig, mut link) = Rig::start();
    let mut spec = rig.spec("x", "");
    spec.argv = vec!["no-such-program".into()];
    assert_eq!(link.fails(spec), ("exec (no-such-program)".into(), 2));

    let mut spec = rig.spec("x", "");
    spec.cwd = "/nowhere".into();
    assert_eq!(link.fails(spec), ("working directory (/nowhere)".into(), 2));

    let mut spec = rig.spec("x", "");
    spec.mounts[1].fstype = "nofs".into();
    assert_eq!(link.fails(spec), ("mounts (nofs tmpfs at /dev)".into(), 19));

    let mut spec = rig.spec("x", "");
    spec.seccomp = vec![0; 8];
    assert_eq!(link.fails(spec), ("seccomp".into(), 22));

    let mut spec = rig.spec("x", "");
    spec.join = Some("nobody".into());
    let (answer, _) = link.ask(RequestBody::Launch(Box::new(spec)), &[]);
    assert!(matches!(answer, ReplyBody::Refused { .. }), "{answer:?}");
    // Nothing is left of any of them.
    assert!(link.list().is_empty());
}

fn what_this_host_may_not_do_fails_by_name() {
    const SYS_RESOURCE: u64 = 1 << 24;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    if u64::from_str_radix(effective.trim(), 16).unwrap() & SYS_RESOURCE != 0 {
        println!("  (not tried: this host has CAP_SYS_RESOURCE)");
        return;
    }
    let (rig, mut link) = Rig::start();
    let mut spec = rig.spec("x", "");
    spec.rlimits = vec![(7, 1 << 20, 1 << 20)];
    assert_eq!(link.fails(spec), ("resource limits".into(), 1));
    let mut spec = rig.spec("x", "");
    spec.oom_score_adj = Some(-900);
    assert_eq!(link.fails(spec), ("oom score".into(), 13));
}

fn launches_at_once_are_each_answered() {
    let (rig, mut link) = Rig::start();
    let ids: Vec<_> = (0..50)
        .map(|number| {
            let mut spec = rig.spec(&format!("many-{number}"), "exit 3");
            if number % 5 == 0 {
                spec.argv = vec!["/missing".into()];
            }
            link.send(RequestBody::Launch(Box::new(spec)), &[])
        })
        .collect();
    let (mut launched, mut failed) = (Vec::new(), Vec::new());
    for _ in &ids {
        match link.next() {
            (id, ReplyBody::Launched { .. }, _) => launched.push(id),
            (id, ReplyBody::LaunchFailed { .. }, _) => failed.push(id),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((launched.len(), failed.len()), (40, 10));
    for number in (0..50).filter(|number| number % 5 != 0) {
        assert_eq!(link.exit_of(&format!("many-{number}")).code, Some(3));
    }
    assert_eq!(link.list().len(), 40);
}

fn nonsense_and_giants_are_refused() {
    let (_rig, mut link) = Rig::start();
    for message in [b"nonsense".to_vec(), vec![0xff; 3], vec![0; MAX_MESSAGE_BYTES + 100]] {
        link.send_raw(&message, &[]);
        let (id, answer, _) = link.next();
        assert!(matches!((id, &answer), (0, ReplyBody::Refused { .. })), "{answer:?}");
    }
    let (answer, _) = link.ask(RequestBody::Version, &[]);
    assert!(matches!(answer, ReplyBody::Version { .. }), "{answer:?}");
}

fn given_descriptors_are_the_streams() {
    use std::io::Read;
    let (rig, mut link) = Rig::start();
    let (mut read, write) = nix::unistd::pipe().map(|(read, write)| (std::fs::File::from(read), write)).unwrap();
    let input = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&input, b"from a file\n", 0).unwrap();
    let mut spec = rig.spec("given", "cat; echo done >&2");
    spec.stdio = Stdio::Given { stdin_fd: 0, stdout_fd: 1, stderr_fd: 1 };
    let (_, outputs) = link.launch_with(spec, &[OwnedFd::from(input), write]);
    assert!(outputs.is_empty());
    // The keeper and the test hold no writer any more: the text ends.
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "from a file\ndone\n");
    assert_eq!(link.exit_of("given").code, Some(0));
}

fn no_descriptor_of_the_keeper_leaks() {
    let (rig, mut link) = Rig::start();
    let count = |rig: &Rig| std::fs::read_dir(format!("/proc/{}/fd", rig.pid())).unwrap().count();
    // An answer: the keeper has come back from starting the agent, and holds no end of its socket any more.
    link.ask(RequestBody::Version, &[]);
    let before = count(&rig);
    for number in 0..20 {
        let (code, out, _) = link.run(rig.spec(&format!("leak-{number}"), "ls /proc/self/fd"));
        // 0 1 2 and the directory itself.
        assert_eq!((code, out.lines().count()), (Some(0), 4), "{out}");
        let mut spec = rig.spec("fails", "");
        spec.argv = vec!["/missing".into()];
        link.fails(spec);
    }
    until("the keeper's descriptors", || (count(&rig) == before).then_some(()));
    rig.signal(Signal::SIGTERM);
}
