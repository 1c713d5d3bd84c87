//! Workloads that behave badly on purpose, and one that behaves well: for the tests and the demo. One static program;
//! the first word says how.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const USAGE: &str = "usage: sample exit CODE | crash | hang | hog [MIB] | spin | fork | limits | log N | http PORT [sick-after N]";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["exit", code] => ExitCode::from(code.parse::<u8>().unwrap_or(1)),
        ["crash"] => {
            println!("crash: about to fail");
            ExitCode::from(3)
        }
        ["hang"] => {
            println!("hang: waiting for ever");
            loop {
                std::thread::park();
            }
        }
        ["hog"] => hog(usize::MAX),
        ["hog", mib] => hog(mib.parse().unwrap_or(usize::MAX)),
        ["spin"] => spin(),
        ["fork"] => fork(),
        ["limits"] => limits(),
        ["log", lines] => log(lines.parse().unwrap_or(10)),
        ["http", port] => http(port, u64::MAX),
        ["http", port, "sick-after", requests] => http(port, requests.parse().unwrap_or(0)),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
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
    loop {
        std::thread::park();
    }
}

/// Takes all the CPU time it gets, and says every ten seconds how much that was.
fn spin() -> ExitCode {
    let mut turns = 0_u64;
    let mut said = Instant::now();
    loop {
        turns = std::hint::black_box(turns.wrapping_add(1));
        if turns % (1 << 20) == 0 && said.elapsed() > Duration::from_secs(10) {
            println!("spin: {turns} turns");
            said = Instant::now();
        }
    }
}

/// Starts itself again and again until something stops it.
fn fork() -> ExitCode {
    let mut children = Vec::new();
    loop {
        match std::process::Command::new("/proc/self/exe").arg("hang").stdout(std::process::Stdio::null()).spawn() {
            Ok(child) => children.push(child),
            Err(error) => {
                println!("fork: stopped at {} children: {error}", children.len());
                loop {
                    std::thread::park();
                }
            }
        }
    }
}

/// What the kernel says of this container: its walls, its ids, its namespaces.
fn limits() -> ExitCode {
    for file in ["memory.max", "memory.swap.max", "cpu.max", "pids.max"] {
        let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).unwrap_or_else(|error| error.to_string());
        println!("{file}={}", text.trim());
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines() {
        if ["CapEff", "CapBnd", "NoNewPrivs", "Seccomp:", "NSpid", "Uid"].iter().any(|key| line.starts_with(key)) {
            println!("{}", line.replace('\t', " "));
        }
    }
    println!("pid={}", std::process::id());
    println!("hostname={}", std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim());
    let interfaces = std::fs::read_dir("/sys/class/net").map_or(0, |entries| entries.count());
    println!("interfaces={interfaces}");
    ExitCode::SUCCESS
}

fn log(lines: u64) -> ExitCode {
    let out = std::io::stdout();
    for line in 0..lines {
        if writeln!(out.lock(), "line {line}").is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Answers 200, and 503 once it has had `sick_after` requests.
fn http(port: &str, sick_after: u64) -> ExitCode {
    let listener = match TcpListener::bind(format!("0.0.0.0:{port}")) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("http: port {port}: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("http: listening on {port}");
    for (number, stream) in listener.incoming().enumerate() {
        let Ok(mut stream) = stream else { continue };
        let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
        let _ = stream.read(&mut [0; 2048]);
        let status = if number as u64 >= sick_after { "503 Service Unavailable" } else { "200 OK" };
        let _ = write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 6\r\nconnection: close\r\n\r\nhello\n");
    }
    ExitCode::SUCCESS
}
