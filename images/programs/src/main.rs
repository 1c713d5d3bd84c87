//! Workloads that behave badly on purpose, and some that tell what they see. The first argument says which; the README
//! beside this lists them. Small, static, and alone in its image.

#![forbid(unsafe_code)]

mod greed;
mod see;
mod serve;

use std::fs::OpenOptions;
use std::io::Write;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};

const USAGE: &str = "usage: sample exit CODE | crash [SECONDS] | abort | hang | ignore-term | hog [MIB] | spin | fork \
                     | breed | watches DIR | files | orphan | groups DIR | limits | log LINES [PER_SECOND] | flood | disk PATH \
                     | http PORT [sick-after REQUESTS]";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["exit", code] => ExitCode::from(code.parse::<u8>().unwrap_or(1)),
        ["crash"] => crash(0),
        ["crash", seconds] => crash(seconds.parse().unwrap_or(0)),
        ["abort"] => std::process::abort(),
        ["hang"] => {
            end_on_sigterm();
            println!("hang: waiting for ever");
            rest_for_ever()
        }
        ["ignore-term"] => ignore_term(),
        ["hog"] => hog(usize::MAX),
        ["hog", mib] => hog(mib.parse().unwrap_or(usize::MAX)),
        ["spin"] => spin(),
        ["fork"] => fork(),
        ["breed"] => greed::breed(),
        ["watches", dir] => greed::watches(dir),
        ["files"] => greed::files(),
        ["flood"] => greed::flood(),
        ["orphan"] => orphan(),
        ["groups", dir] => see::groups(dir),
        ["limits"] => {
            print!("{}", see::limits());
            ExitCode::SUCCESS
        }
        ["log", lines] => log(lines.parse().unwrap_or(10), None),
        ["log", lines, per_second] => log(lines.parse().unwrap_or(u64::MAX), per_second.parse().ok()),
        ["disk", path] => disk(path),
        ["http", port] => {
            end_on_sigterm();
            serve::http(port, u64::MAX)
        }
        ["http", port, "sick-after", requests] => {
            end_on_sigterm();
            serve::http(port, requests.parse().unwrap_or(0))
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "doing nothing for a while is what these programs are for")]
fn rest(time: Duration) {
    std::thread::sleep(time);
}

fn rest_for_ever() -> ! {
    loop {
        std::thread::park();
    }
}

fn crash(seconds: u64) -> ExitCode {
    rest(Duration::from_secs(seconds));
    println!("crash: about to fail");
    ExitCode::from(3)
}

fn ignore_term() -> ! {
    // Blocked and never looked at.
    blocked(&[Signal::SIGTERM, Signal::SIGINT]);
    println!("ignore-term: not listening");
    rest_for_ever()
}

/// As PID 1 of its namespace a program gets no signal it has not asked for, so SIGTERM would do nothing: a thread
/// waits for it and ends the program. The signal is blocked first, in every thread there will be.
fn end_on_sigterm() {
    let Some(set) = blocked(&[Signal::SIGTERM]) else { return };
    std::thread::spawn(move || {
        if set.wait().is_ok() {
            println!("ending on SIGTERM");
            #[expect(clippy::disallowed_methods, reason = "main is busy and holds nothing that must be put away")]
            std::process::exit(0);
        }
    });
}

/// Blocks signals in this thread and those it will start.
fn blocked(signals: &[Signal]) -> Option<SigSet> {
    let set: SigSet = signals.iter().copied().collect();
    match set.thread_block() {
        Ok(()) => Some(set),
        Err(errno) => {
            eprintln!("cannot block {signals:?}: {errno}");
            None
        }
    }
}

/// Takes memory until there is none, touching every page.
fn hog(mib: usize) -> ExitCode {
    let mut held = Vec::new();
    for taken in 0..mib {
        held.push(vec![1_u8; 1 << 20]);
        println!("hog: {} MiB", taken + 1);
    }
    println!("hog: content with {} MiB", held.len());
    end_on_sigterm();
    rest_for_ever()
}

/// Takes all the CPU time it gets, and says every ten seconds how much that was.
fn spin() -> ExitCode {
    end_on_sigterm();
    let mut turns = 0_u64;
    let mut said = Instant::now();
    loop {
        turns = std::hint::black_box(turns.wrapping_add(1));
        if turns.is_multiple_of(1 << 20) && said.elapsed() > Duration::from_secs(10) {
            println!("spin: {turns} turns");
            said = Instant::now();
        }
    }
}

/// Starts copies of itself until something stops it; tells how many it got, and holds on to them.
fn fork() -> ExitCode {
    let mut children = Vec::new();
    loop {
        // The last ones get no thread of their own any more and say so, behind what is said here.
        match Command::new("/proc/self/exe").arg("hang").stdout(Stdio::null()).stderr(Stdio::null()).spawn() {
            Ok(child) => children.push(child),
            Err(error) => {
                println!("fork: stopped at {} children: {error}", children.len());
                rest_for_ever();
            }
        }
    }
}

/// Ends while its child lives on: somebody else must reap that one.
fn orphan() -> ExitCode {
    match Command::new("/proc/self/exe").args(["crash", "1"]).spawn() {
        Ok(child) => {
            println!("orphan: leaving {} behind", child.id());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("orphan: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Numbered lines, so that a gap can be seen; all at once, or so many in a second.
fn log(lines: u64, per_second: Option<u64>) -> ExitCode {
    let out = std::io::stdout();
    for line in 0..lines {
        if writeln!(out.lock(), "line {line}").is_err() {
            return ExitCode::FAILURE;
        }
        if let Some(rate) = per_second {
            rest(Duration::from_micros(1_000_000 / rate.max(1)));
        }
    }
    ExitCode::SUCCESS
}

/// Writes until there is no room, and says how far it came.
fn disk(path: &str) -> ExitCode {
    let block = vec![0x5a; 1 << 20];
    let mut written = 0_u64;
    let error = match OpenOptions::new().create(true).append(true).open(path) {
        Err(error) => error,
        Ok(mut file) => loop {
            match file.write_all(&block).and_then(|()| file.sync_data()) {
                Ok(()) => written += 1,
                Err(error) => break error,
            }
        },
    };
    println!("disk: {written} MiB, then: {error}");
    end_on_sigterm();
    rest_for_ever()
}
