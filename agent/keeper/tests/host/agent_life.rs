//! Workloads outlive the agent, and the keeper outlives itself.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use edged_model::keeper::{RefusedProgram, ReplyBody, RequestBody, ShutdownHow};
use nix::sys::signal::Signal;

use crate::Story;
use crate::rig::{Rig, line, until};

pub const STORIES: &[Story] = &[
    ("a_log_survives_the_agent", a_log_survives_the_agent),
    ("exits_without_an_agent_wait_for_the_next", exits_without_an_agent_wait_for_the_next),
    ("the_keeper_runs_itself_again_and_keeps_its_children", the_keeper_runs_itself_again_and_keeps_its_children),
    ("an_upgrade_runs_the_new_file", an_upgrade_runs_the_new_file),
    (
        "a_program_whose_agent_falls_again_and_again_is_sent_away",
        a_program_whose_agent_falls_again_and_again_is_sent_away,
    ),
    (
        "what_cannot_take_over_is_found_out_before_anything_is_given_up",
        what_cannot_take_over_is_found_out_before_anything_is_given_up,
    ),
    ("a_boot_in_the_middle_of_a_trial_goes_on_with_it", a_boot_in_the_middle_of_a_trial_goes_on_with_it),
    ("orphans_are_reaped", orphans_are_reaped),
    ("the_binary_cannot_be_written_through_proc", the_binary_cannot_be_written_through_proc),
    ("nobody_can_look_into_the_keeper", nobody_can_look_into_the_keeper),
    ("sigterm_ends_everything", sigterm_ends_everything),
    ("exit_leaves_workloads_running", exit_leaves_workloads_running),
];

/// Speaks a number whenever its trap is sprung: the test decides when.
const COUNTER: &str = "n=0; trap 'n=$((n+1)); echo $n' USR1; echo up; while :; do sleep 0.01; done";
const USR1: i32 = 10;

fn a_log_survives_the_agent() {
    let (rig, mut link) = Rig::start();
    let (pid, mut outputs) = link.launch(rig.spec("web", COUNTER));
    assert_eq!(line(&mut outputs[0]), "up");
    link.ask(RequestBody::Signal { key: "web".into(), signal: USR1 }, &[]);
    assert_eq!(line(&mut outputs[0]), "1");
    drop(outputs);
    link.kill();
    // Said while nobody listens: it waits in the pipe.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGUSR1).unwrap();
    let mut link = rig.next_agent();
    let mut list = link.list();
    let [(state, outputs)] = &mut list[..] else { panic!("one child was awaited") };
    assert_eq!((state.key.as_str(), state.pid, state.note.as_str()), ("web", pid, "note of web"));
    assert_eq!(state.exit, None);
    assert_eq!(line(&mut outputs[0]), "2");
    // It restarts each time, however often.
    for _ in 0..3 {
        link.kill();
        link = rig.next_agent();
        assert_eq!(link.list()[0].0.pid, pid);
    }
}

fn exits_without_an_agent_wait_for_the_next() {
    let (rig, mut link) = Rig::start();
    let (pid, mut outputs) =
        link.launch(rig.spec("web", "trap 'echo last words; exit 4' USR1; echo up; while :; do sleep 0.01; done"));
    assert_eq!(line(&mut outputs[0]), "up");
    drop(outputs);
    link.kill();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGUSR1).unwrap();
    let mut link = rig.next_agent();
    let (exit, mut outputs) = until("the exit", || {
        let (state, outputs) = link.list().pop().unwrap();
        Some((state.exit?, outputs))
    });
    assert_eq!((exit.code, exit.pid), (Some(4), pid));
    assert_eq!(line(&mut outputs[0]), "last words");
    // Given again and again until it is forgotten.
    assert_eq!(link.list().len(), 1);
    link.ask(RequestBody::Forget { key: "web".into() }, &[]);
    assert!(link.list().is_empty());
}

fn the_keeper_runs_itself_again_and_keeps_its_children() {
    let (rig, mut link) = Rig::start();
    let (pid, mut outputs) = link.launch(rig.spec("web", COUNTER));
    assert_eq!(line(&mut outputs[0]), "up");
    let (_, _) = link.launch(rig.spec("done", "exit 9"));
    assert_eq!(link.exit_of("done").code, Some(9));
    let keeper_pid = rig.pid();
    for round in 1..=3 {
        rig.signal(Signal::SIGUSR2);
        until("the new image", || (rig.log().matches("runs again with 2 children").count() == round).then_some(()));
        // The same agent on the same socket, the same child, the same pipe.
        let list = link.list();
        assert_eq!(list.iter().map(|(state, _)| state.key.as_str()).collect::<Vec<_>>(), ["done", "web"]);
        assert_eq!((list[0].0.exit.as_ref().and_then(|exit| exit.code), list[1].0.pid), (Some(9), pid));
        link.ask(RequestBody::Signal { key: "web".into(), signal: USR1 }, &[]);
        assert_eq!(line(&mut outputs[0]), round.to_string());
    }
    // A launch that is under way, and ends that come about while the image changes, are lost on nobody.
    for number in 0..20 {
        let id = link.send(RequestBody::Launch(Box::new(rig.spec(&format!("fast-{number}"), "exit 6"))), &[]);
        rig.signal(Signal::SIGUSR2);
        let (answered, body, _) = link.next();
        assert_eq!(answered, id);
        assert!(matches!(body, ReplyBody::Launched { .. }), "{body:?}");
        assert_eq!(link.exit_of(&format!("fast-{number}")).code, Some(6));
    }
    link.ask(RequestBody::Signal { key: "web".into(), signal: 9 }, &[]);
    assert_eq!(link.exit_of("web").signal, Some(9));
    assert_eq!(rig.pid(), keeper_pid);
}

fn an_upgrade_runs_the_new_file() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    let own = std::env::current_exe().unwrap();
    fs::copy(&own, &program).unwrap();
    let (rig, mut link) = Rig::start_program(&program);
    let (pid, mut outputs) = link.launch(rig.spec("web", "echo up; exec sleep 100"));
    assert_eq!(line(&mut outputs[0]), "up");
    let inode = |rig: &Rig| fs::metadata(format!("/proc/{}/exe", rig.pid())).unwrap().ino();
    let old = inode(&rig);
    fs::copy(&own, dir.path().join("new")).unwrap();
    fs::rename(dir.path().join("new"), &program).unwrap();
    rig.signal(Signal::SIGUSR2);
    until("the new file", || (inode(&rig) == fs::metadata(&program).unwrap().ino()).then_some(()));
    assert_ne!(inode(&rig), old);
    assert_eq!(link.list()[0].0.pid, pid);
    // A file that cannot be executed is no upgrade: what runs goes on.
    put(&program, b"no program");
    rig.signal(Signal::SIGUSR2);
    until("the refusal", || rig.log().contains("is not taken").then_some(()));
    assert_eq!(rig.log().matches("runs again").count(), 1, "{}", rig.log());
    assert_eq!(link.list()[0].0.pid, pid);
}

/// Another file of that name, in one step.
fn put(program: &Path, bytes: &[u8]) {
    let new = program.with_extension("new");
    fs::write(&new, bytes).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&new, program).unwrap();
}

/// This very program with some bytes behind it, which make its agent fall ([`crate::rig::play_agent`]).
fn own(ending: &str) -> Vec<u8> {
    let mut bytes = fs::read(std::env::current_exe().unwrap()).unwrap();
    bytes.extend(ending.as_bytes());
    bytes
}

fn version(link: &mut crate::rig::Link) -> (Option<String>, Option<RefusedProgram>) {
    match link.ask(RequestBody::Version, &[]).0 {
        ReplyBody::Version { on_trial_after, refused, .. } => (on_trial_after, refused),
        other => panic!("{other:?}"),
    }
}

fn a_program_whose_agent_falls_again_and_again_is_sent_away() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    put(&program, &own(""));
    let (rig, mut link) = Rig::start_program(&program);
    let (pid, mut outputs) = link.launch(rig.spec("web", COUNTER));
    assert_eq!(line(&mut outputs[0]), "up");
    drop(outputs);
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let (first, keeper) = (inode(&program), PathBuf::from(format!("/proc/{}/exe", rig.pid())));
    put(&program, &own("AGENT FALLS"));
    let bad = inode(&program);
    rig.signal(Signal::SIGHUP);
    until("the new program", || rig.log().contains("is of the version before").then_some(()));
    // Three falls, then the agent of the former program.
    let mut link = rig.next_agent();
    until("the former program", || (inode(&keeper) == first).then_some(()));
    let log = rig.log();
    assert_eq!(log.matches("the agent ended (exit code 3)").count(), 3, "{log}");
    let mut list = link.list();
    let [(state, outputs)] = &mut list[..] else { panic!("one child was awaited") };
    assert_eq!((state.key.as_str(), state.pid, state.exit.clone()), ("web", pid, None));
    link.ask(RequestBody::Signal { key: "web".into(), signal: USR1 }, &[]);
    assert_eq!(line(&mut outputs[0]), "1", "the same pipe");
    let (trial, refused) = version(&mut link);
    let refused = refused.unwrap();
    assert!(trial.is_none() && refused.has_run && !refused.is_told, "{refused:?}");
    assert!(refused.why.contains("fell 3 times") && refused.why.contains("exit code 3"), "{refused:?}");
    link.ask(RequestBody::RefusalTold, &[]);
    assert!(version(&mut link).1.unwrap().is_told);
    // The former program lies in its place again: a boot starts it.
    assert_eq!(fs::read(&program).unwrap(), own(""));
    assert_eq!(inode(&dir.path().join("program.refused")), bad);
    assert!(!dir.path().join("program.former").exists());

    // The same bytes are not taken again.
    put(&program, &own("AGENT FALLS"));
    let (answer, _) = link.ask(RequestBody::Rehearse { again: false }, &[]);
    assert!(matches!(&answer, ReplyBody::Refused { why } if why.contains("was sent away")), "{answer:?}");
    // Unless somebody insists.
    assert_eq!(link.ask(RequestBody::Rehearse { again: true }, &[]).0, ReplyBody::Done);
    // And another file is another program.
    put(&program, &own("another"));
    let good = inode(&program);
    assert_eq!(link.ask(RequestBody::Rehearse { again: false }, &[]).0, ReplyBody::Done);
    assert_eq!(link.ask(RequestBody::Upgrade, &[]).0, ReplyBody::Done);
    let mut link = rig.next_agent();
    assert_eq!(inode(&keeper), good);
    assert_eq!(link.list()[0].0.pid, pid);
    let (trial, refused) = version(&mut link);
    assert!(trial.is_some() && refused.is_none(), "{trial:?} {refused:?}");
    assert_eq!(fs::read(dir.path().join("program.former")).unwrap(), own(""), "there after a power cut, too");
}

fn what_cannot_take_over_is_found_out_before_anything_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    put(&program, &own(""));
    let (rig, mut link) = Rig::start_program(&program);
    let (pid, _outputs) = link.launch(rig.spec("web", "echo up; exec sleep 100"));
    let mut other_machine = own("");
    // e_machine of the ELF header (elf(5)): aarch64 here, x86_64 there.
    other_machine[18] = if cfg!(target_arch = "x86_64") { 183 } else { 62 };
    let half = own("")[..100_000].to_vec();
    let cases: [(&[u8], &str); 5] = [
        (&other_machine, "Exec format error"),
        (&half, "cannot take over"),
        (b"#!/bin/sh\nexit 7\n", "exit code 7"),
        (b"#!/bin/sh\necho hello\n", "it said `hello`"),
        (b"#!/bin/sh\nexec sleep 1000\n", "not done after 10 s"),
    ];
    for (bytes, why) in cases {
        put(&program, bytes);
        let (answer, _) = link.ask(RequestBody::Rehearse { again: false }, &[]);
        assert!(matches!(&answer, ReplyBody::Refused { why: said } if said.contains(why)), "{why}: {answer:?}");
        assert!(!dir.path().join("program.former").exists());
    }
    assert_eq!(link.list()[0].0.pid, pid);
    assert_eq!(rig.log().matches("runs again").count(), 0, "{}", rig.log());
}

/// The power is cut in the middle of a trial: the keeper that boots goes on with it.
fn a_boot_in_the_middle_of_a_trial_goes_on_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    put(&program, &own("AGENT FALLS"));
    put(&dir.path().join("program.former"), &own(""));
    let (rig, mut link) = Rig::start_program(&program);
    let refused = version(&mut link).1.unwrap();
    assert!(refused.has_run && rig.log().contains("is on trial still, at its start number 1"), "{}", rig.log());
    assert_eq!(fs::read(&program).unwrap(), own(""));
    assert!(dir.path().join("program.refused").exists() && !dir.path().join("program.trial").exists());
}

fn orphans_are_reaped() {
    let (rig, mut link) = Rig::start();
    // In the host's pid namespace: the grandchild has nobody but the keeper.
    let mut spec = rig.spec("parent", "(sleep 0.05 & echo $!) ; exit 0");
    spec.namespaces &= !0x2000_0000;
    let (_, out, _) = link.run(spec);
    let orphan: i32 = out.trim().parse().unwrap();
    until("the orphan's end", || (!fs::exists(format!("/proc/{orphan}")).unwrap()).then_some(()));
    let children = || fs::read_to_string(format!("/proc/{0}/task/{0}/children", rig.pid())).unwrap();
    assert_eq!(children().trim(), link.agent_pid.to_string(), "the agent alone is left");
}

fn the_binary_cannot_be_written_through_proc() {
    let (rig, _link) = Rig::start();
    // With O_TRUNC the mount is asked before the running text is: EROFS, and not merely ETXTBSY (CVE-2019-5736).
    let error = fs::File::options().write(true).truncate(true).open(format!("/proc/{}/exe", rig.pid())).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{error}");
}

fn nobody_can_look_into_the_keeper() {
    let (rig, mut link) = Rig::start();
    assert!(rig.log().is_empty(), "{}", rig.log());
    // Root by number, without CAP_SYS_PTRACE, in the host's pid namespace.
    let mut spec = rig.spec("spy", &format!("readlink /proc/{0}/exe; cat /proc/{0}/environ", rig.pid()));
    spec.namespaces &= !0x2000_0000;
    let (_, out, err) = link.run(spec);
    assert_eq!(out, "", "{err}");
    let comm = fs::read_to_string(format!("/proc/{}/comm", rig.pid())).unwrap();
    assert_eq!(comm.trim(), "edged");
}

fn sigterm_ends_everything() {
    let (mut rig, mut link) = Rig::start();
    let (polite, mut first) =
        link.launch(rig.spec("polite", "trap 'exit 0' TERM; echo up; while :; do sleep 0.01; done"));
    let (deaf, mut second) = link.launch(rig.spec("deaf", "trap '' TERM; echo up; while :; do sleep 0.01; done"));
    assert_eq!([line(&mut first[0]), line(&mut second[0])], ["up", "up"]);
    rig.signal(Signal::SIGTERM);
    let status = until("the keeper's end", || rig.keeper.try_wait().unwrap());
    assert!(status.success(), "{status}");
    for pid in [polite, deaf, link.agent_pid] {
        assert!(!fs::exists(format!("/proc/{pid}")).unwrap(), "{pid}");
    }
}

fn exit_leaves_workloads_running() {
    let (mut rig, mut link) = Rig::start();
    let (pid, mut outputs) = link.launch(rig.spec("web", "echo up; exec sleep 100"));
    assert_eq!(line(&mut outputs[0]), "up");
    let (answer, _) = link.ask(RequestBody::Shutdown { how: ShutdownHow::Exit }, &[]);
    assert_eq!(answer, ReplyBody::Done);
    let status = until("the keeper's end", || rig.keeper.try_wait().unwrap());
    assert!(status.success(), "{status}");
    assert!(fs::exists(format!("/proc/{pid}")).unwrap());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}
