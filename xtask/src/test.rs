//! `cargo xtask test`: everything that must hold, in one summary.

use std::process::Command;
use std::time::Instant;

use anyhow::Result;

use crate::build::{self, Arch, cargo};
use crate::setup::{self, Scope};
use crate::{demo, samples, say};

struct Summary {
    lines: Vec<(String, bool, u64)>,
}

impl Summary {
    fn stage(&mut self, name: &str, work: impl FnOnce() -> Result<bool>) {
        say::step(name);
        let begin = Instant::now();
        let passed = match work() {
            Ok(passed) => passed,
            Err(error) => {
                println!("{error:#}");
                false
            }
        };
        self.lines.push((name.to_owned(), passed, begin.elapsed().as_secs()));
    }
}

fn succeeds(command: &mut Command) -> Result<bool> {
    Ok(command.status()?.success())
}

pub fn run(quick: bool) -> Result<()> {
    setup::ensure(if quick { Scope::Host } else { Scope::Everything })?;
    let mut summary = Summary { lines: Vec::new() };
    summary.stage("format", || succeeds(cargo().args(["fmt", "--all", "--check"])));
    summary.stage("clippy", || {
        succeeds(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
    });
    let cosign = samples::cosign();
    summary.stage("unit, property and host tests", || {
        let mut tests = cargo();
        tests.args(["test", "--quiet", "--workspace"]);
        if let Ok(cosign) = &cosign {
            tests.env("EDGED_COSIGN", cosign);
        }
        succeeds(&mut tests)
    });
    summary.stage("dependencies (cargo deny)", deny);
    if !quick {
        for arch in [Arch::X86_64, Arch::Aarch64] {
            summary.stage(&format!("stories in QEMU, {}", arch.name()), || stories(arch));
        }
    }
    println!();
    for (name, passed, seconds) in &summary.lines {
        println!("{:<6} {name} ({seconds} s)", if *passed { "ok" } else { "FAILED" });
    }
    let failed = summary.lines.iter().filter(|(_, passed, _)| !passed).count();
    println!("\n{} passed, {failed} failed", summary.lines.len() - failed);
    anyhow::ensure!(failed == 0, "{failed} stages failed");
    Ok(())
}

/// Licences, sources and duplicate crates by `deny.toml`; advisories as well where their database can be reached.
fn deny() -> Result<bool> {
    if !succeeds(cargo().args(["deny", "--version"])).unwrap_or(false) {
        say::step("installing cargo-deny");
        if !succeeds(cargo().args(["install", "--quiet", "--locked", "cargo-deny"]))? {
            return Ok(false);
        }
    }
    let advisories = cargo().args(["deny", "--log-level", "error", "fetch", "db"]).output();
    let mut checks = vec!["deny", "--log-level", "error", "check", "bans", "licenses", "sources"];
    if advisories.is_ok_and(|output| output.status.success()) {
        checks.push("advisories");
    } else {
        println!("the advisory database cannot be reached: advisories are not checked");
    }
    succeeds(cargo().args(checks))
}

fn stories(arch: Arch) -> Result<bool> {
    let artifacts = demo::artifacts(arch)?;
    let file = build::root().join("target/image/artifacts.json");
    let name = artifacts.arch.clone();
    std::fs::write(&file, serde_json::json!({ name: artifacts.to_json() }).to_string())?;
    let mut tests = cargo();
    tests.args(["test", "--quiet", "-p", "edged-qemu", "--", "--ignored", "--test-threads=1", "--nocapture"]);
    succeeds(tests.env("EDGED_ARTIFACTS", &file).env("EDGED_ARCH", arch.name()))
}
