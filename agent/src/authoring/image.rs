//! `edgectl image`: what is packed here, and what is asked of a device.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

use edged_model::api::Request;

use crate::cli::args::Output;
use crate::content::build::{BuildSpec, build_layout};
use crate::registry::platform::architecture;

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Pack directories or a static program into an OCI layout
    Build(Build),
    /// Take images from a stick: an OCI layout, an archive of one, or what `docker save` wrote
    Load(Load),
    /// Hold the layers on the disk against what was unpacked
    Check {
        /// Only this image, as the manifest or `edgectl images` names it
        image: Option<String>,
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
}

#[derive(Debug, Args)]
pub struct Load {
    /// Directory or archive, on the device
    path: PathBuf,
    /// Only this image of several: its name in the layout, or its digest
    #[arg(long)]
    only: Option<String>,
    /// For a manifest that names a tag: `host[:port]/repository:tag`; the image must be signed
    #[arg(long)]
    tag: Option<String>,
    #[arg(short, long, default_value = "table")]
    pub output: Output,
}

impl Load {
    /// The agent reads the path itself: it must not depend on where somebody stands.
    pub fn request(&self) -> Result<Request, String> {
        let bad = || format!("{}: not a path that can be sent", self.path.display());
        let path = std::path::absolute(&self.path).map_err(|_| bad())?;
        let path = path.to_str().ok_or_else(bad)?.to_owned();
        Ok(Request::LoadImages { path, only: self.only.clone(), tag: self.tag.clone() })
    }
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

impl Build {
    pub fn run(&self) -> Result<String> {
        let build = self;
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
