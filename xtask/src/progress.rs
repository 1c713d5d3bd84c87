//! What is going on, on the terminal: one line per step, with the time since the start.

use std::process::Command;
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use edged_qemu::process::line;

fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// Says what begins now.
pub fn step(text: &str) {
    eprintln!("[{:>6.1} s] {text}", start().elapsed().as_secs_f64());
}

/// Runs a command whose own output is the progress.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", line(command)))?;
    ensure!(status.success(), "{} ended with {status}", line(command));
    Ok(())
}
