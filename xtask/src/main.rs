//! `cargo xtask`: the one door to building, trying and testing edged.

mod apt;
mod bench;
mod build;
mod demo;
mod image;
mod samples;
mod say;
mod setup;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Builds, tries and tests edged")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a device in QEMU with registry and fleet, push a signed manifest, show what operators see
    Demo {
        #[arg(long, default_value = "x86_64")]
        arch: build::Arch,
        /// Leave everything running and print the addresses
        #[arg(long)]
        keep: bool,
    },
    /// Everything that must hold: format, lints, tests, dependencies, QEMU stories
    Test {
        /// Leave QEMU out
        #[arg(long)]
        quick: bool,
    },
    /// Build a bootable device: kernel and initramfs
    Image {
        #[arg(long, default_value = "x86_64")]
        arch: build::Arch,
    },
    /// Measure, as ratios against peers in one run
    Bench,
    /// Install what the other commands need
    Setup,
}

fn main() -> Result<()> {
    std::env::set_current_dir(build::root())?;
    match Args::parse().command {
        Command::Demo { arch, keep } => demo::run(arch, keep),
        Command::Test { quick } => test::run(quick),
        Command::Image { arch } => {
            let image = image::build(arch)?;
            say::done(&format!("{}\n{}", image.kernel.display(), image.initramfs.display()));
            Ok(())
        }
        Command::Bench => bench::run(),
        Command::Setup => setup::ensure(setup::Scope::Everything),
    }
}
