//! The commands of the README. Each fetches what it lacks, says what it is doing, and fails with what is missing.

#![forbid(unsafe_code)]

/// Figures, and ratios against peers.
mod bench;
/// Packages of other architectures and newer releases, without touching the system's own package database.
mod debian;
/// From a clean checkout to a device that shows its status.
mod demo;
/// Which libraries a program needs.
mod elf;
/// Kernel, initramfs: what a device boots.
mod image;
/// Debian's kernel, and the modules a device needs.
mod kernel;
/// OCI layouts.
mod oci;
/// What is going on, on the terminal.
mod progress;
/// What each command needs from the machine it runs on.
mod setup;
/// Everything that must hold, in one summary.
mod test;
/// Static binaries for other machines.
mod toolchain;
/// The workload images of `images/`.
mod workloads;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use edged_qemu::arch::Arch;
use edged_qemu::filesystem::Filesystem;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Builds, shows and tests edged")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boots a device in QEMU with registry and fleet server beside it, and shows it at work
    Demo {
        #[arg(long, default_value = "x86_64")]
        arch: Arch,
        /// Leaves everything running and prints the addresses
        #[arg(long)]
        keep: bool,
    },
    /// Runs every check: format, lints, unit, property and host tests, licences, and the device in QEMU
    Test {
        /// Without QEMU
        #[arg(long)]
        quick: bool,
        /// The long stories too
        #[arg(long)]
        soak: bool,
    },
    /// Builds a bootable device into target/firmware/
    Image {
        #[arg(long, default_value = "x86_64")]
        arch: Arch,
        /// What the data disk is formatted as: ext4, or f2fs with a kernel that has it
        #[arg(long, default_value = "ext4")]
        data_type: Filesystem,
        /// Takes this program for `edged` instead of building it
        #[arg(long)]
        edged: Option<PathBuf>,
        /// Built as the tests build it: quicker, larger
        #[arg(long)]
        quick: bool,
    },
    /// Builds the workload images of images/ into .cache/images/
    Workloads {
        #[arg(long, default_value = "x86_64")]
        arch: Arch,
    },
    /// Prints figures; all of them, or those named
    Bench { what: Vec<bench::Bench> },
    /// Installs or fetches what the other commands need
    Setup,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Demo { arch, keep } => demo::run(arch, keep),
        Command::Test { quick, soak } => test::run(&test::Options { quick, soak }),
        Command::Image { arch, data_type, edged, quick } => image::run(arch, data_type, quick, edged.as_deref()),
        Command::Workloads { arch } => workloads::run(arch),
        Command::Bench { what } => bench::run(&what),
        Command::Setup => setup::everything(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
