use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use edged::api::console;
use edged::cli::console::ConsoleVerbs;
use edged::config::ConsoleMode;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};

use crate::rig::{DEADLINE, Device, edgectl, wait_for};

/// A pseudo-terminal: the master is the far end of the line.
struct Pty {
    master: File,
    path: PathBuf,
    /// Without an open slave the master would read errors.
    _slave: File,
}

impl Pty {
    fn new() -> Self {
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = PathBuf::from(ptsname_r(&master).unwrap());
        let flags = OFlag::O_NOCTTY.bits();
        let slave = File::options().read(true).write(true).custom_flags(flags).open(&path).unwrap();
        let master = master.as_fd().try_clone_to_owned().unwrap();
        Self { master: File::from(master), path, _slave: slave }
    }
}

/// Reads what is there, waiting a little for it.
fn some(mut file: &File) -> Vec<u8> {
    let _ = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], PollTimeout::from(50_u8));
    let mut bytes = vec![0; 4096];
    let count = file.read(&mut bytes).unwrap_or(0);
    bytes.truncate(count);
    bytes
}

fn send(mut file: &File, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let _ = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLOUT)], PollTimeout::from(50_u8));
        if let Ok(count) = file.write(bytes) {
            bytes = &bytes[count..];
        }
    }
}

/// A person at the far end.
struct Person {
    pty: Pty,
    seen: String,
    _device: Device,
}

impl Person {
    fn at_console(mode: ConsoleMode) -> Self {
        let (device, pty) = (Device::start(), Pty::new());
        serve(&device, &pty.path, mode);
        let mut person = Self { pty, seen: String::new(), _device: device };
        person.reads("edged pump-17> ");
        person
    }

    fn types(&self, bytes: &[u8]) {
        send(&self.pty.master, bytes);
    }

    /// Everything up to and including `word`.
    fn reads(&mut self, word: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(at) = self.seen.find(word) {
                let rest = self.seen.split_off(at + word.len());
                return std::mem::replace(&mut self.seen, rest);
            }
            assert!(Instant::now() < deadline, "no {word:?} in {:?}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&some(&self.pty.master)));
        }
    }

    /// Types a line and reads until the next prompt.
    fn asks(&mut self, line: &str) -> String {
        self.types(format!("{line}\r").as_bytes());
        self.reads("edged pump-17> ")
    }
}

fn serve(device: &Device, tty: &Path, mode: ConsoleMode) {
    let (tty, calls) = (tty.to_owned(), device.calls.clone());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(console::run(tty, mode, "edged pump-17".to_owned(), calls, ConsoleVerbs));
    });
}

#[test]
fn a_technician_looks_and_may_not_touch() {
    let mut person = Person::at_console(ConsoleMode::ReadOnly);
    let shown = person.asks("status");
    assert!(
        shown.contains("pump-17  NOT WELL: it has no manifest yet") || shown.contains("NOT WELL: web failed"),
        "{shown}"
    );
    assert!(shown.contains("\r\n  -> `edgectl logs web`\r\n"), "{shown:?}");
    assert!(!shown.replace("\r\n", "").contains('\n'), "each line goes back to the left edge: {shown:?}");
    let refused = person.asks("restart web");
    assert!(refused.contains("this console only reads") && refused.contains("console.mode"), "{refused}");
    assert!(person.asks("help").contains("status"));
    assert!(person.asks("nonsense").contains("unrecognized subcommand"));
    assert!(person.asks("version -o json").contains("\"agent\": \"1.2.3\""));
    assert!(person.asks("inspect wep").contains("did you mean web?"));
    assert!(person.asks("push x --to https://fleet.example").contains("workstation"));
    assert_eq!(person.asks("exit"), "exit\r\nedged pump-17> ");
    assert_eq!(person.asks(""), "\r\nedged pump-17> ");
}

#[test]
fn a_full_console_may_write() {
    let mut person = Person::at_console(ConsoleMode::Full);
    assert!(person.asks("restart web").contains("web by console /dev/pts/"));
}

#[test]
fn following_ends_with_a_key_and_what_is_printed_is_harmless() {
    for key in [&b"\x03"[..], b"q", b"\x04"] {
        let mut person = Person::at_console(ConsoleMode::ReadOnly);
        person.types(b"logs -f web\r");
        let shown = person.reads("line 40 ");
        assert!(!shown.contains('\u{1b}'), "{shown:?}");
        person.types(key);
        person.reads("edged pump-17> ");
        assert!(person.asks("version").contains("agent 1.2.3"));
    }
}

#[test]
fn noise_and_endless_lines_are_survived() {
    let mut person = Person::at_console(ConsoleMode::ReadOnly);
    let noise: Vec<u8> = (0..20_000_u32).map(|n| ((n * n) >> 3).to_le_bytes()[0]).collect();
    // Nobody reads the echo meanwhile would stop the line: read it as it comes.
    for chunk in noise.chunks(256).chain(vec![b'x'; 20_000].chunks(256)) {
        person.types(chunk);
        person.seen.push_str(&String::from_utf8_lossy(&some(&person.pty.master)));
    }
    person.types(b"\x03\x03\r");
    wait_for("the prompt", || {
        person.types(b"\x15version\r");
        person.seen.push_str(&String::from_utf8_lossy(&some(&person.pty.master)));
        person.seen.contains("agent 1.2.3")
    });
}

/// Two pseudo-terminals and what carries the bytes between their far ends: a cable.
fn cable(device: &Device, mode: ConsoleMode) -> (PathBuf, Arc<Mutex<bool>>) {
    let (near, far) = (Pty::new(), Pty::new());
    serve(device, &far.path, mode);
    let path = near.path.clone();
    let cut = Arc::new(Mutex::new(false));
    let is_cut = Arc::clone(&cut);
    std::thread::spawn(move || {
        while !*is_cut.lock().unwrap() {
            let mut fds = [
                PollFd::new(near.master.as_fd(), PollFlags::POLLIN),
                PollFd::new(far.master.as_fd(), PollFlags::POLLIN),
            ];
            let _ = poll(&mut fds, PollTimeout::from(20_u8));
            for (from, to) in [(&near.master, &far.master), (&far.master, &near.master)] {
                let mut bytes = [0; 4096];
                let mut from = from;
                if let Ok(count) = from.read(&mut bytes) {
                    send(to, &bytes[..count]);
                }
            }
        }
    });
    (path, cut)
}

#[test]
fn edgectl_speaks_over_a_serial_line() {
    let device = Device::start();
    let (tty, cut) = cable(&device, ConsoleMode::ReadOnly);
    let host = format!("serial:{}", tty.display());
    for _ in 0..3 {
        let output = edgectl(&host, &["version"]);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "agent 1.2.3\nkeeper 1.2.2\narch riscv\n", "{err}");
    }
    assert_eq!(edgectl(&host, &["status", "-o", "json"]).status.code(), Some(4));
    let output = edgectl(&host, &["restart", "web"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("this console only reads"));
    // One that is killed while it follows leaves the line talking; the next one gets through all the same.
    let mut child =
        crate::rig::command(&host, &["logs", "-f", "web"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut some = [0; 64];
    out.read_exact(&mut some).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let output = edgectl(&host, &["version"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    *cut.lock().unwrap() = true;
}

#[test]
fn a_line_without_a_console_is_told() {
    let pty = Pty::new();
    let output = edgectl(&format!("serial:{}", pty.path.display()), &["version"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("console.tty"), "{output:?}");
    let output = edgectl("serial:/dev/null", &["version"]);
    assert_eq!(output.status.code(), Some(3));
    let output = edgectl(&format!("serial:{},12345", pty.path.display()), &["version"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("known speeds"), "{output:?}");
}
