use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Output, Stdio};

use edged_model::api::{Answer, MAX_FRAME_BYTES, Request};
use edged_model::reason::Code;

use crate::rig::{DEADLINE, Device, command, edgectl, wait_for};

fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn connect(device: &Device) -> UnixStream {
    let stream = UnixStream::connect(device.socket()).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// The next answer, or `None` at the end.
fn answer(stream: &mut UnixStream) -> Option<Answer> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let mut bytes = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut bytes).unwrap();
    Some(serde_cbor::from_slice(&bytes).unwrap())
}

fn refused(stream: &mut UnixStream) -> Code {
    match answer(stream) {
        Some(Answer::Error(reason)) => reason.code,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

fn frame(request: &Request) -> Vec<u8> {
    let bytes = serde_cbor::to_vec(request).unwrap();
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes.as_slice()].concat()
}

fn still_answers(device: &Device) {
    assert_eq!(said(&device.edgectl(&["version"])).0, 0);
}

#[test]
fn verbs_print_what_the_agent_says() {
    let device = Device::start();
    assert_eq!(said(&device.edgectl(&["version"])), (0, "agent 1.2.3\nkeeper 1.2.2\narch riscv\n".into(), "".into()));
    let (code, out, _) = said(&device.edgectl(&["status"]));
    assert_eq!(code, 4, "a device that is not well");
    assert!(out.contains("web ended with exit code 3\n  -> `edgectl logs web`\n"), "{out}");
    let (code, out, _) = said(&device.edgectl(&["ps"]));
    assert_eq!((code, out.lines().next()), (0, Some("NAME  STATE   UP  RESTARTS  MEMORY  CPU")));
    let uid = nix::unistd::geteuid();
    assert_eq!(said(&device.edgectl(&["restart", "web"])).1, format!("web by operator uid={uid}\n"));
}

#[test]
fn json_and_yaml_are_for_programs() {
    let device = Device::start();
    let json = |words: &[&str]| -> serde_json::Value { serde_json::from_slice(&device.edgectl(words).stdout).unwrap() };
    assert_eq!(json(&["version", "-o", "json"])["agent"], "1.2.3");
    assert_eq!(json(&["status", "-o", "json"])["device"], "pump-17");
    assert_eq!(json(&["ps", "-o", "json"])[0]["name"], "web");
    assert_eq!(json(&["events", "-o", "json"])["number"], 7);
    let lines = said(&device.edgectl(&["logs", "web", "-o", "json"])).1;
    assert_eq!(lines.lines().count(), 3, "a line each: {lines}");
    assert!(said(&device.edgectl(&["version", "-o", "yaml"])).1.contains("agent: 1.2.3\n"));
    assert!(said(&device.edgectl(&["logs", "web", "-o", "yaml"])).1.starts_with("---\n"));
}

#[test]
fn exit_codes_tell_who_refused() {
    let device = Device::start();
    let (code, _, err) = said(&device.edgectl(&["inspect", "wep"]));
    assert_eq!((code, err.as_str()), (1, "edgectl: there is no workload wep\n  -> did you mean web?\n"));
    assert_eq!(said(&device.edgectl(&["restart"])).0, 2);
    assert_eq!(said(&device.edgectl(&["restart", "../x"])).0, 2);
    assert_eq!(said(&edgectl("web.example", &["status"])).0, 2);
    let (code, _, err) = said(&edgectl("unix:/nonexistent/agent.sock", &["status"]));
    assert!(code == 3 && err.contains("is edged running?"), "{err}");
    // The loop dropped the call.
    let (code, _, err) = said(&device.edgectl(&["generations"]));
    assert!(code == 1 && err.contains("without an answer"), "{err}");
}

#[test]
fn an_agent_that_dies_in_the_middle_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let dying = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = [0; 64];
        let _ = stream.read(&mut bytes).unwrap();
    });
    let (code, _, err) = said(&edgectl(&format!("unix:{}", path.display()), &["status"]));
    dying.join().unwrap();
    assert!(code == 3 && err.contains("in the middle"), "{code} {err}");
}

#[test]
fn a_manifest_of_full_size_goes_through() {
    let device = Device::start();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![0xff; 1 << 20]).unwrap();
    let (code, out, err) = said(&device.edgectl(&["apply", file.path().to_str().unwrap()]));
    assert_eq!((code, out.as_str(), err.as_str()), (0, "1048576 bytes\n", ""));
}

#[test]
fn garbage_is_refused_and_the_next_client_served() {
    let device = Device::start();
    let mut stream = connect(&device);
    stream.write_all(&[0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff]).unwrap();
    assert_eq!(refused(&mut stream), Code::Malformed);

    let mut stream = connect(&device);
    stream.write_all(&u32::try_from(MAX_FRAME_BYTES + 1).unwrap().to_be_bytes()).unwrap();
    assert_eq!(refused(&mut stream), Code::TooLarge);

    // Text of another protocol reads as a length of more than a gigabyte.
    let mut stream = connect(&device);
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(refused(&mut stream), Code::TooLarge);

    let mut stream = connect(&device);
    let whole = frame(&Request::Status);
    stream.write_all(&whole[..whole.len() - 2]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(refused(&mut stream), Code::Malformed);

    drop(connect(&device));
    // A map nested 100,000 deep.
    let mut stream = connect(&device);
    let deep = vec![0x81; 100_000];
    stream.write_all(&[&100_000_u32.to_be_bytes(), deep.as_slice()].concat()).unwrap();
    assert_eq!(refused(&mut stream), Code::Malformed);
    still_answers(&device);
}

#[test]
fn a_client_too_many_is_told_so_at_once() {
    let device = Device::start();
    // Whoever came before has left when this is answered.
    still_answers(&device);
    // Half a frame each: they hold their places.
    let mut clients: Vec<_> = (0..40).map(|_| connect(&device)).collect();
    for client in &mut clients[..edged::api::CLIENTS_MAX] {
        client.write_all(&[0, 0]).unwrap();
    }
    for client in &mut clients[edged::api::CLIENTS_MAX..] {
        assert_eq!(refused(client), Code::Busy);
    }
    let (code, _, err) = said(&device.edgectl(&["status"]));
    assert!(code == 1 && err.contains("32 clients"), "{err}");
    drop(clients);
    wait_for("a free place", || device.edgectl(&["version"]).status.success());
}

#[test]
fn a_full_queue_answers_busy() {
    let device = Device::that_hangs(1);
    // The connection that found the socket open took no place in the queue: it said nothing.
    let mut first = connect(&device);
    first.write_all(&frame(&Request::Status)).unwrap();
    wait_for("the queue to fill", || device.calls.capacity() == 0);
    let (code, _, err) = said(&device.edgectl(&["status"]));
    assert!(code == 1 && err.contains("try again"), "{err}");
}

#[test]
fn following_goes_on_until_the_reader_leaves() {
    let device = Device::start();
    let host = format!("unix:{}", device.socket().display());
    let mut child = command(&host, &["logs", "-f", "web"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for n in 0..50 {
        assert!(lines.next().unwrap().unwrap().contains(&format!("line {n} ")));
    }
    // As `| head` does.
    drop(lines);
    assert!(child.wait().unwrap().success());
    still_answers(&device);
}

#[test]
fn a_reader_that_does_not_read_holds_nobody_up() {
    let device = Device::start();
    let mut stuck = connect(&device);
    let workload = edged_model::id::WorkloadName::parse("web").unwrap();
    stuck.write_all(&frame(&Request::Logs { workload, follow: true, tail: None })).unwrap();
    for _ in 0..5 {
        still_answers(&device);
    }
}

#[test]
fn strangers_are_refused_by_name() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not root: nobody else to be");
        return;
    }
    let device = Device::start();
    let mode = std::fs::metadata(device.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    // Somebody opens the file system's door: the second one, SO_PEERCRED, still holds.
    std::fs::set_permissions(device.socket(), std::fs::Permissions::from_mode(0o666)).unwrap();
    std::fs::set_permissions(device.socket().parent().unwrap(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let host = format!("unix:{}", device.socket().display());
    // The program itself may lie where only root can read.
    let copy = tempfile::tempdir().unwrap();
    std::fs::set_permissions(copy.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = copy.path().join("edgectl");
    std::fs::copy(env!("CARGO_BIN_EXE_edgectl"), &program).unwrap();
    let output = std::process::Command::new(&program)
        .args(["--host", &host, "status"])
        .current_dir("/")
        .uid(65_534)
        .gid(65_534)
        .output()
        .unwrap();
    let (code, _, err) = said(&output);
    assert!(code == 1 && err.contains("uid 65534 may not talk to the agent"), "{code} {err}");
}

#[test]
fn a_socket_left_behind_is_replaced_and_a_living_one_is_not() {
    let device = Device::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let listen = |path: &std::path::Path| {
        let (calls, _receiver) = tokio::sync::mpsc::channel(1);
        runtime.block_on(async { edged::api::listen(path, edged::api::peer::Allowed::default(), calls) })
    };
    assert_eq!(listen(&device.socket()).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    let left = tempfile::tempdir().unwrap();
    let path = left.path().join("agent.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    listen(&path).unwrap();
}

/// ssh itself is not ours to test: what stands for it does with its words what sshd does, it gives them to a shell.
#[test]
fn the_same_words_arrive_at_the_other_end_of_ssh() {
    let device = Device::start();
    let dir = tempfile::tempdir().unwrap();
    let ssh = dir.path().join("ssh");
    let script =
        "#!/bin/sh\nwhile [ \"$1\" != -- ]; do shift; done\nshift; echo \"to $1\" >&2; shift\nexec sh -c \"$*\"\n";
    std::fs::write(&ssh, script).unwrap();
    std::fs::set_permissions(&ssh, std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_edgectl")).parent().unwrap();
    let path = format!("{}:{}:{}", dir.path().display(), program.display(), std::env::var("PATH").unwrap());
    let mut command = command("ssh://ops@pump-17:2222", &["version", "-o", "json"]);
    let output = command.env("PATH", path).env("EDGED_HOST", format!("unix:{}", device.socket().display())).output();
    let (code, out, err) = said(&output.unwrap());
    assert!(code == 0 && out.contains("\"agent\": \"1.2.3\"") && err == "to ops@pump-17\n", "{code} {out} {err}");
}
