//! The verbs and their options: one definition for the program, its help and the console.

use clap::{Parser, Subcommand, ValueEnum};
use edged_model::api::Request;
use edged_model::id::{Sequence, WorkloadName};

use super::Show;
use super::exec::ExecArgs;
use crate::authoring::{
    image::{ImageCommand, Load},
    key::KeyCommand,
    manifest::ManifestCommand,
    push::PushCommand,
    trust::TrustCommand,
};

/// Where the agent of this machine listens.
pub const DEFAULT_HOST: &str = "unix:/run/edged/agent.sock";

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the agent, or a check, refused; the reason is on stderr
  2  the command line makes no sense
  3  the agent cannot be reached; stderr says what to look at
  4  status: the device answers, and something on it is not well";

const RESET: &str = "\
Stop all workloads and take them, their logs, their images and the stored manifests away, with --volumes their data too.

The trust root and its version, the highest sequence, the time floor, the device's key and its story stay: the next manifest \
must have a higher sequence than any before.";

#[derive(Debug, Parser)]
#[command(
    name = "edgectl",
    version,
    about = "Asks and tells an edged device",
    max_term_width = 80,
    after_help = EXIT_CODES
)]
pub struct Args {
    /// The device: unix:PATH, ssh://[USER@]HOST[:PORT] or serial:TTY[,BAUD]
    #[arg(long, global = true, env = "EDGED_HOST", default_value = DEFAULT_HOST)]
    pub host: String,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Output {
    #[default]
    Table,
    Json,
    Yaml,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Is the device well, what runs, what does not and why
    Status {
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// The workloads
    Ps {
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// All about one workload
    Inspect {
        workload: WorkloadName,
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// What a workload printed
    Logs {
        workload: WorkloadName,
        /// Go on with what it prints from now on
        #[arg(short, long)]
        follow: bool,
        /// How many lines back
        #[arg(long)]
        tail: Option<u32>,
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// What happened, and why
    Events {
        workload: Option<WorkloadName>,
        #[arg(short, long)]
        follow: bool,
        #[arg(long)]
        tail: Option<u32>,
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// Start a workload that was stopped; forget its back-off
    Start { workload: WorkloadName },
    /// Stop a workload until it is started again
    Stop { workload: WorkloadName },
    /// Stop a workload and start it again
    Restart { workload: WorkloadName },
    /// Freeze a workload where it is, until it is resumed, stopped or restarted
    Pause { workload: WorkloadName },
    /// Let a paused workload go on
    Resume { workload: WorkloadName },
    /// Run a command in a workload that runs; its exit code is ours
    Exec(ExecArgs),
    /// The manifests this device has had
    Generations {
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// What takes the disk, and what keeps it there
    Df {
        /// Each layer, copy and document of an image, and why it stays or goes
        #[arg(short, long)]
        verbose: bool,
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// The images on the disk and on their way, and who uses them
    Images {
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// The named volumes, and who uses them
    Volumes {
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// Take away the images that no generation needs
    Prune {
        /// Only say what would go
        #[arg(long)]
        dry_run: bool,
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// Stop all workloads and take them, their logs and their images away
    #[command(long_about = RESET)]
    Reset {
        /// What shall go; there is no other reset
        #[arg(long, required = true)]
        workloads: bool,
        /// The named volumes too, with all that is in them
        #[arg(long)]
        volumes: bool,
        /// Yes, for good
        #[arg(long)]
        yes: bool,
    },
    /// What differs between two of them
    Diff {
        from: u64,
        to: u64,
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// Go back to an earlier manifest; without a number to the one before the present one
    Rollback { sequence: Option<u64> },
    /// Try a manifest once more that failed here; without a number the newest such
    Retry { sequence: Option<u64> },
    /// Let the manifest that is on its way take over without waiting for its window, lock or boot
    Activate { sequence: Option<u64> },
    /// Give a signed manifest to the agent
    Apply { file: std::path::PathBuf },
    /// Versions of agent and keeper
    Version {
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// Run the newer edged that was put in the place of the running one; workloads run on
    Upgrade {
        /// Also if that program was taken before and its agents fell
        #[arg(long)]
        again: bool,
    },
    /// Stop all workloads in order and start the device anew
    Reboot,
    /// Stop all workloads in order and switch the device off
    Poweroff,
    /// Make keys
    #[command(subcommand)]
    Key(KeyCommand),
    /// Make and look at trust roots
    #[command(subcommand)]
    Trust(TrustCommand),
    /// Check, sign and look at manifests
    #[command(subcommand)]
    Manifest(ManifestCommand),
    /// Pack images; bring them to a device; check them there
    #[command(subcommand)]
    Image(ImageCommand),
    /// Push a signed manifest to a device or a fleet
    Push(PushCommand),
}

impl Verb {
    /// How its answers are shown.
    pub fn show(&self) -> Show {
        Show {
            output: self.output(),
            only_workloads: matches!(self, Self::Ps { .. }),
            verbose: matches!(self, Self::Df { verbose: true, .. }),
        }
    }

    fn output(&self) -> Output {
        match self {
            Self::Status { output }
            | Self::Ps { output }
            | Self::Inspect { output, .. }
            | Self::Logs { output, .. }
            | Self::Events { output, .. }
            | Self::Generations { output }
            | Self::Df { output, .. }
            | Self::Images { output }
            | Self::Volumes { output }
            | Self::Image(ImageCommand::Load(Load { output, .. }) | ImageCommand::Check { output, .. })
            | Self::Prune { output, .. }
            | Self::Diff { output, .. }
            | Self::Version { output } => *output,
            _ => Output::Table,
        }
    }

    /// What to ask the agent; `Err` for a verb that asks nobody.
    pub fn request(&self) -> Result<Request, String> {
        Ok(match self {
            Self::Status { .. } | Self::Ps { .. } => Request::Status,
            Self::Inspect { workload, .. } => Request::Inspect { workload: workload.clone() },
            Self::Logs { workload, follow, tail, .. } => {
                Request::Logs { workload: workload.clone(), follow: *follow, tail: *tail }
            }
            Self::Events { workload, follow, tail, .. } => {
                Request::Events { follow: *follow, workload: workload.clone(), tail: *tail }
            }
            Self::Start { workload } => Request::Start { workload: workload.clone() },
            Self::Stop { workload } => Request::Stop { workload: workload.clone() },
            Self::Restart { workload } => Request::Restart { workload: workload.clone() },
            Self::Pause { workload } => Request::Pause { workload: workload.clone() },
            Self::Resume { workload } => Request::Resume { workload: workload.clone() },
            Self::Exec(exec) => exec.request(),
            Self::Generations { .. } => Request::Generations,
            Self::Df { .. } => Request::Df,
            Self::Images { .. } => Request::Images,
            Self::Volumes { .. } => Request::Volumes,
            Self::Image(ImageCommand::Load(load)) => load.request()?,
            Self::Image(ImageCommand::Check { image, .. }) => Request::CheckImages { image: image.clone() },
            Self::Prune { dry_run, .. } => Request::Prune { dry_run: *dry_run },
            Self::Reset { yes: false, volumes, .. } => {
                let data = if *volumes { "the data in their volumes" } else { "not their volumes" };
                return Err(format!(
                    "this takes all workloads away for good, their images and {data}: say it with --yes"
                ));
            }
            Self::Reset { volumes, .. } => Request::ResetWorkloads { volumes: *volumes },
            Self::Diff { from, to, .. } => Request::Diff { from: Sequence(*from), to: Sequence(*to) },
            Self::Rollback { sequence } => Request::Rollback { to: sequence.map(Sequence) },
            Self::Retry { sequence } => Request::Retry { sequence: sequence.map(Sequence) },
            Self::Activate { sequence } => Request::Activate { sequence: sequence.map(Sequence) },
            Self::Apply { file } => {
                let envelope = std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
                Request::Apply { envelope }
            }
            Self::Version { .. } => Request::Version,
            Self::Reboot => Request::Reboot,
            Self::Upgrade { again: false } => Request::Upgrade,
            Self::Upgrade { again: true } => Request::UpgradeAgain,
            Self::Poweroff => Request::PowerOff,
            Self::Key(_) | Self::Trust(_) | Self::Manifest(_) | Self::Image(ImageCommand::Build(_)) | Self::Push(_) => {
                return Err("this verb works on a workstation, not on a device".to_owned());
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }
}
