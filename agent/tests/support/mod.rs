//! What the tests of this package share.

pub mod faults;
pub mod registry;
pub mod tmpfs;

use std::path::Path;
use std::process::{Command, Output};

/// Runs a program to its end; that it failed is told with all it said.
pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

pub fn openssl(dir: &Path, arguments: &str) {
    run(Command::new("openssl").args(arguments.split(' ')).current_dir(dir));
}

/// Whether a command needs root, which unpacking does: whiteouts, owners and attributes are the kernel's to refuse.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
