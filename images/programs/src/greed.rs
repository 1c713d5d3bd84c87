//! Takes what a kernel has only so much of: processes, inotify watches, open files, the pipe of a log.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use nix::errno::Errno;
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

/// Makes files in `dir` and watches each, and makes one inotify(7) instance after the other, until the kernel says no.
pub fn watches(dir: &str) -> ExitCode {
    let (mut instances, mut count) = (Vec::new(), 0_u64);
    let refused = loop {
        match watch_all(Path::new(dir), instances.is_empty()) {
            Ok((instance, watched)) => {
                instances.push(instance);
                count += watched;
            }
            Err(errno) => break errno,
        }
    };
    println!("watches: {} instances, {count} watches, then: {refused}", instances.len());
    end_on_sigterm();
    rest_for_ever()
}

/// The first one takes watches until there are no more.
fn watch_all(dir: &Path, is_first: bool) -> Result<(Inotify, u64), Errno> {
    let instance = Inotify::init(InitFlags::IN_CLOEXEC)?;
    let mut watched = 0;
    if !is_first {
        return Ok((instance, watched));
    }
    loop {
        let path = dir.join(watched.to_string());
        let taken = File::create(&path).is_ok() && instance.add_watch(&path, AddWatchFlags::IN_ALL_EVENTS).is_ok();
        if !taken {
            return Ok((instance, watched));
        }
        watched += 1;
    }
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
