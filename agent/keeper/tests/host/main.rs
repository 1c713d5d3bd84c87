//! A real keeper with real children, as root: namespaces, mounts, cgroups in a subtree of its own. This binary plays
//! all roles. As the keeper it runs `edged_keeper::run`; as the agent it hands its end of the keeper's socket to the
//! test and stays alive; otherwise it is the test, which then speaks the protocol itself and may kill the agent.

#![forbid(unsafe_code)]

mod agent_life;
mod containers;
mod launches;
mod many;
mod rig;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

type Story = (&'static str, fn());

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.first().map(String::as_str) {
        Some("agent") => return rig::play_agent(&words[1]),
        Some(edged_keeper::SET_ASIDE) => {
            return edged_keeper::set_aside(&std::env::args_os().skip(2).collect::<Vec<_>>());
        }
        Some(edged_keeper::REHEARSE) => return edged_keeper::rehearse(),
        Some("keeper") => return rig::play_keeper(&words[1]),
        _ => {}
    }
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: these tests need root");
        return ExitCode::SUCCESS;
    }
    let filter: Vec<_> = words.iter().filter(|word| !word.starts_with('-')).collect();
    let stories = [launches::STORIES, many::STORIES, containers::STORIES, agent_life::STORIES].concat();
    let (mut passed, mut failed) = (0, Vec::new());
    for (name, story) in stories {
        if !filter.is_empty() && !filter.iter().any(|wanted| name.contains(wanted.as_str())) {
            continue;
        }
        match catch_unwind(AssertUnwindSafe(story)) {
            Ok(()) => {
                println!("test {name} ... ok");
                passed += 1;
            }
            Err(_) => {
                println!("test {name} ... FAILED");
                failed.push(name);
            }
        }
    }
    println!("\n{passed} passed; {} failed {failed:?}", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
