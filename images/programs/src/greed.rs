//! Takes what a kernel has only so much of: processes, inotify watches, open files, the pipe of a log.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::Signal;

use crate::{blocked, end_on_sigterm, rest_for_ever};

/// Starts copies of itself that do the same and end, for ever: whoever kills them one by one finds that each has a
/// successor already. Nobody of them listens to SIGTERM.
pub fn breed() -> ExitCode {
    blocked(&[Signal::SIGTERM, Signal::SIGINT]);
    let is_first = std::process::id() == 1;
    if is_first {
        println!("breed: begins");
    }
    loop {
        let children: Vec<Child> = (0..2).filter_map(|_| start().ok()).collect();
        if !is_first && !children.is_empty() {
            // Whoever is process 1 here reaps them.
            return ExitCode::SUCCESS;
        }
        for mut child in children {
            let _ = child.wait();
        }
        reap_orphans();
    }
}

fn start() -> std::io::Result<Child> {
    Command::new("/proc/self/exe").arg("breed").stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}

fn reap_orphans() {
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            return;
        }
    }
}

/// Makes one inotify(7) instance after the other until the kernel says no; then files in `dir`, and watches each, until it
/// says no or its memory is used up.
pub fn watches(dir: &str) -> ExitCode {
    let mut instances = Vec::new();
    let refused = loop {
        match Inotify::init(InitFlags::IN_CLOEXEC) {
            Ok(instance) => instances.push(instance),
            Err(errno) => break errno,
        }
    };
    println!("watches: {} instances, then: {refused}", instances.len());
    let Some(first) = instances.first() else { return ExitCode::FAILURE };
    let mut watched = 0_u64;
    while watch(first, &Path::new(dir).join(watched.to_string())) {
        watched += 1;
    }
    println!("watches: {watched} watches");
    end_on_sigterm();
    rest_for_ever()
}

fn watch(instance: &Inotify, path: &Path) -> bool {
    File::create(path).is_ok() && instance.add_watch(path, AddWatchFlags::IN_ALL_EVENTS).is_ok()
}

/// Opens files until the kernel says no, then has children do the same: the limit of one process is not that of all.
pub fn files() -> ExitCode {
    let mut open: Vec<OwnedFd> = Vec::new();
    let refused = loop {
        match File::open("/proc/self/exe") {
            Ok(file) => open.push(file.into()),
            Err(error) => break error,
        }
    };
    println!("files: {} open, then: {refused}", open.len());
    // One more generation at a time, each with as many.
    drop(open.pop());
    drop(open.pop());
    let next = Command::new("/proc/self/exe").arg("files").spawn();
    if let Err(error) = &next {
        println!("files: no more processes: {error}");
    }
    rest_for_ever()
}

/// As many lines to stdout as go through, a pipe full at a time.
pub fn flood() -> ExitCode {
    let lines: Vec<u8> =
        (0..2048).flat_map(|line| format!("a line of a flood, number {line}\n").into_bytes()).collect();
    let mut out = std::io::stdout().lock();
    loop {
        if out.write_all(&lines).is_err() {
            return ExitCode::FAILURE;
        }
    }
}
