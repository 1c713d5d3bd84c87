//! The life of a container, command by command, and what is said when it cannot be.

use std::fs;

use serde_json::json;

use crate::rig::{Bundle, until};

const SLEEPER: &str = "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done";

#[test]
fn create_waits_start_runs_kill_ends_delete_takes_away() {
    let bundle = Bundle::new(SLEEPER);
    let pid_file = bundle.dir.path().join("pid");
    let seen = bundle.create_with(&["--pid-file", pid_file.to_str().unwrap()]);
    assert_eq!((seen.code, seen.err.as_str()), (Some(0), ""), "nothing is written to stderr");
    let state = bundle.state();
    assert_eq!((&state["status"], &state["ociVersion"]), (&json!("created"), &json!("1.2.0")));
    assert_eq!(state["bundle"], json!(bundle.dir.path()));
    assert_eq!(state["pid"].to_string(), fs::read_to_string(&pid_file).unwrap());
    assert_eq!(bundle.out(), "", "the program has not run");

    assert!(bundle.create().bad().contains("exists already"));
    assert!(bundle.call(&["exec", &bundle.id, "true"]).bad().contains("is created"));
    bundle.start();
    bundle.wait_for_out("up");
    assert_eq!(bundle.state()["status"], "running");
    assert!(bundle.call(&["start", &bundle.id]).bad().contains("is running"));
    assert!(bundle.call(&["delete", &bundle.id]).bad().contains("--force"));
    assert!(bundle.call(&["list", "-q"]).good().contains(&bundle.id));
    assert!(bundle.call(&["ps", &bundle.id]).good().contains("sleep 0.05"));

    bundle.call(&["kill", &bundle.id]).good();
    bundle.wait_for_status("stopped");
    assert!(bundle.call(&["kill", &bundle.id, "KILL"]).bad().contains("is stopped"));
    assert!(bundle.call(&["pause", &bundle.id]).bad().contains("is stopped"));
    bundle.call(&["delete", &bundle.id]).good();
    assert!(!bundle.cgroup("memory").exists(), "no group is left");
    for verb in ["state", "delete", "start", "kill", "pause", "resume", "ps", "events", "update"] {
        assert!(bundle.call(&[verb, &bundle.id]).bad().contains("does not exist"), "{verb}");
    }
    bundle.call(&["delete", "--force", &bundle.id]).good();
}

#[test]
fn run_gives_the_programs_code_and_leaves_nothing() {
    let bundle = Bundle::new("echo out; echo err >&2; exit 7");
    let seen = bundle.run();
    assert_eq!((seen.code, seen.out.as_str(), seen.err.as_str()), (Some(7), "out\n", "err\n"));
    assert!(!bundle.cgroup("memory").exists());
    assert_eq!(fs::read_dir(bundle.state_root()).unwrap().count(), 0);
    let killed = Bundle::new("kill -9 $$");
    // The first process of a namespace is not killed by its own.
    assert_eq!(killed.run().code, Some(0));
}

#[test]
fn signals_to_run_are_signals_to_the_program() {
    let bundle = Bundle::new("trap 'echo asked; exit 3' TERM; echo up; while :; do sleep 0.05; done");
    bundle.save();
    let out = fs::File::create(bundle.dir.path().join("out")).unwrap();
    let mut run = bundle
        .command(&["run", "--bundle", bundle.dir.path().to_str().unwrap(), &bundle.id])
        .stdout(out)
        .spawn()
        .unwrap();
    bundle.wait_for_out("up");
    let pid = rustix::process::Pid::from_raw(i32::try_from(run.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(3));
    assert!(bundle.out().contains("asked"));
}

#[test]
fn exec_is_inside_with_its_own_code_user_and_environment() {
    let bundle = Bundle::new(SLEEPER);
    bundle.create().good();
    bundle.start();
    bundle.wait_for_out("up");
    let id = bundle.id.as_str();
    assert_eq!(bundle.call(&["exec", id, "hostname"]).good(), "edged\n");
    assert_eq!(bundle.call(&["exec", id, "sh", "-c", "exit 4"]).code, Some(4));
    let seen = bundle.call(&["exec", "-u", "5:6", "-e", "A=b c", "--cwd", "/tmp", id, "sh", "-c", "id; echo $A; pwd"]);
    assert_eq!(seen.good(), "uid=5 gid=6\nb c\n/tmp\n");
    let missing = bundle.call(&["exec", id, "no-such-program"]);
    assert_eq!(missing.code, Some(127));
    assert!(missing.err.contains("executable file not found in $PATH"), "{}", missing.err);
    // Same namespaces as the first process, same groups.
    let of = |pid: &str| {
        let script =
            format!("for n in pid net ipc uts mnt cgroup; do readlink /proc/{pid}/ns/$n; done; cat /proc/{pid}/cgroup");
        bundle.call(&["exec", id, "sh", "-c", &script]).good()
    };
    assert_eq!(of("self"), of("1"));

    let process = bundle.dir.path().join("process.json");
    let json = json!({ "user": { "uid": 0, "gid": 0 }, "args": ["id", "-u"], "cwd": "/", "env": ["PATH=/bin"] });
    fs::write(&process, json.to_string()).unwrap();
    assert_eq!(bundle.call(&["exec", "--process", process.to_str().unwrap(), id]).good(), "0\n");
}

#[test]
fn a_terminal_of_exec_is_a_real_one() {
    let bundle = Bundle::new(SLEEPER);
    bundle.create().good();
    bundle.start();
    bundle.wait_for_out("up");
    let seen = bundle.call(&["exec", "-t", &bundle.id, "sh", "-c", "tty; echo end"]);
    assert!(seen.out.contains("/dev/pts/") && seen.out.contains("end"), "{seen:?}");
}

#[test]
fn the_console_socket_gets_the_master() {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    let mut bundle = Bundle::new("read line; echo got $line; tty; stty size; ls -l /dev/console");
    bundle.config["process"]["terminal"] = true.into();
    bundle.config["process"]["consoleSize"] = json!({ "height": 30, "width": 100 });
    assert!(bundle.create().bad().contains("--console-socket"));
    let path = bundle.dir.path().join("console");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    bundle.create_with(&["--console-socket", path.to_str().unwrap()]).good();
    let (stream, _) = listener.accept().unwrap();
    let (_, mut fds) = edged_sys::fdpass::recv(stream.as_fd(), &mut [0; 64]).unwrap();
    let mut master = fs::File::from(fds.pop().unwrap());
    bundle.start();
    master.write_all(b"hello\n").unwrap();
    let mut text = Vec::new();
    // A pty whose other side is closed says EIO.
    let _ = master.read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    for wanted in ["got hello", "/dev/pts/0", "30 100", "/dev/console"] {
        assert!(text.contains(wanted), "{wanted} in {text}");
    }
}

#[test]
fn pause_stops_and_resume_lets_go_on() {
    let bundle = Bundle::new("i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.01; done");
    bundle.create().good();
    bundle.start();
    bundle.wait_for_out("tick 3\n");
    bundle.call(&["pause", &bundle.id]).good();
    assert_eq!(bundle.state()["status"], "paused");
    assert!(bundle.call(&["exec", &bundle.id, "true"]).bad().contains("is paused"));
    assert!(bundle.call(&["pause", &bundle.id]).bad().contains("is paused"));
    let before = bundle.out();
    // Others run meanwhile, and would have seen it tick.
    bundle.call(&["state", &bundle.id]).good();
    assert_eq!(bundle.out(), before);
    bundle.call(&["resume", &bundle.id]).good();
    until("it goes on", || (bundle.out().len() > before.len()).then_some(()));
    // A paused one can be taken away too.
    bundle.call(&["pause", &bundle.id]).good();
    bundle.call(&["delete", "--force", &bundle.id]).good();
}

#[test]
fn limits_change_while_it_runs() {
    let mut bundle = Bundle::new(SLEEPER);
    bundle.config["linux"]["resources"]["memory"] = json!({ "limit": 50_000_000 });
    bundle.create().good();
    bundle.start();
    let id = bundle.id.as_str();
    bundle.call(&["update", "--memory", "64m", id, "--pids-limit", "30", "--cpu-quota", "20000"]).good();
    let (memory, pids, cpu) = if crate::rig::is_cgroup_v2() {
        ("memory.max", "pids.max", "cpu.max")
    } else {
        ("memory.limit_in_bytes", "pids.max", "cpu.cfs_quota_us")
    };
    let read = |controller, file: &str| fs::read_to_string(bundle.cgroup(controller).join(file)).unwrap();
    assert_eq!(read("memory", memory).trim(), (64 << 20).to_string());
    assert_eq!(read("pids", pids).trim(), "30");
    assert!(read("cpu", cpu).starts_with("20000"));
    let file = bundle.dir.path().join("resources.json");
    fs::write(&file, json!({ "pids": { "limit": 31 } }).to_string()).unwrap();
    bundle.call(&["update", "-r", file.to_str().unwrap(), id]).good();
    assert_eq!(read("pids", pids).trim(), "31");
    assert!(bundle.call(&["update", "--memory", "lots", id]).bad().contains("`lots`"));
    let stats: serde_json::Value = serde_json::from_str(&bundle.call(&["events", "--stats", id]).good()).unwrap();
    assert_eq!(stats["data"]["pids"]["limit"], 31);
    assert!(stats["data"]["memory"]["usage"]["usage"].as_u64().unwrap() > 0);
}

#[test]
fn errors_go_to_the_engines_log_in_its_form() {
    let bundle = Bundle::new("true");
    let log = bundle.dir.path().join("log");
    let log_text = log.to_str().unwrap();
    bundle.call(&["--log", log_text, "--log-format", "json", "--debug", "state", "nobody"]).bad();
    let entry: serde_json::Value = serde_json::from_str(&fs::read_to_string(&log).unwrap()).unwrap();
    assert_eq!(entry["level"], "error");
    assert!(entry["msg"].as_str().unwrap().contains("`nobody` does not exist"));
    assert!(entry["time"].as_str().unwrap().ends_with('Z'));
    assert!(bundle.call(&["--systemd-cgroup", "create", "x"]).bad().contains("cgroupfs"));
    assert!(bundle.call(&["create", "--wings", "x"]).bad().contains("--wings"));
    assert!(bundle.call(&["state", "../x"]).bad().contains("no container id"));
}

#[test]
fn a_program_that_is_not_there_fails_at_create() {
    let mut bundle = Bundle::new("");
    bundle.config["process"]["args"] = json!(["no-such-program"]);
    let seen = bundle.create();
    assert_eq!(seen.code, Some(127));
    assert!(seen.err.contains("executable file not found"), "{}", seen.err);
    assert!(!bundle.cgroup("memory").exists() && !bundle.state_root().join(&bundle.id).exists(), "nothing is left");
}

#[test]
fn descriptors_are_kept_only_when_asked() {
    let bundle = Bundle::new("ls /proc/self/fd");
    bundle.save();
    let script = "exec 3</dev/null 4</dev/null 9</dev/null; exec \"$@\"";
    let run = |options: &[&str]| {
        let inner = bundle.command(&["run"]);
        let mut command = std::process::Command::new("sh");
        command.args(["-c", script, "sh"]).arg(inner.get_program()).args(inner.get_args());
        command.args(options).args(["--bundle", bundle.dir.path().to_str().unwrap(), &bundle.id]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    // The last one is the directory that ls reads.
    assert_eq!(run(&[]), ["0", "1", "2", "3"]);
    assert_eq!(run(&["--preserve-fds", "2"]), ["0", "1", "2", "3", "4", "5"]);
}

#[test]
fn starts_at_once_do_not_disturb_each_other() {
    let bundles: Vec<_> = (0..16).map(|_| Bundle::new("exit 3")).collect();
    let runs: Vec<_> = bundles
        .iter()
        .map(|bundle| {
            bundle.save();
            bundle.command(&["run", "--bundle", bundle.dir.path().to_str().unwrap(), &bundle.id]).spawn().unwrap()
        })
        .collect();
    for mut run in runs {
        assert_eq!(run.wait().unwrap().code(), Some(3));
    }
}
