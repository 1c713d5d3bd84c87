//! `edgectl image`.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::content::build::{BuildSpec, build_layout};
use crate::registry::platform::architecture;

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Pack directories or a static program into an OCI layout
    Build(Build),
}

#[derive(Debug, Args)]
pub struct Build {
    /// Root directories, one layer each, lowest first; or one program, which becomes /NAME
    #[arg(required = true)]
    layers: Vec<PathBuf>,
    /// The layout's directory
    #[arg(short, long)]
    output: PathBuf,
    /// GOARCH name: amd64, arm64, arm; default: this machine's
    #[arg(long)]
    arch: Option<String>,
    /// Repeat for each word
    #[arg(long)]
    entrypoint: Vec<String>,
    #[arg(long)]
    cmd: Vec<String>,
    #[arg(long)]
    env: Vec<String>,
    #[arg(long)]
    workdir: Option<String>,
    #[arg(long)]
    user: Option<String>,
    #[arg(long)]
    stop_signal: Option<String>,
    #[arg(long, default_value = "latest")]
    tag: String,
}

impl ImageCommand {
    pub fn run(&self) -> Result<String> {
        let Self::Build(build) = self;
        let spec = BuildSpec {
            layers: build.layers.clone(),
            architecture: build.arch.clone().unwrap_or_else(|| architecture().to_owned()),
            entrypoint: build.entrypoint.clone(),
            cmd: build.cmd.clone(),
            env: build.env.clone(),
            workdir: build.workdir.clone(),
            user: build.user.clone(),
            stop_signal: build.stop_signal.clone(),
            reference: build.tag.clone(),
        };
        let digest = build_layout(&spec, &build.output)?;
        Ok(format!("oci:{}:{}\n{digest}\n", build.output.display(), build.tag))
    }
}
