//! `edgectl push`: a signed manifest to a device's own HTTPS port, or to a fleet for a device.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use edged_model::envelope::{self, Kind};

use super::read;
use crate::registry;

#[derive(Debug, Args)]
pub struct PushCommand {
    /// What `edgectl manifest sign` wrote
    file: PathBuf,
    /// https://HOST[:PORT] of a device, or of a fleet with --device or --group
    #[arg(long)]
    to: String,
    /// Leave it at the fleet for this device
    #[arg(long, conflicts_with = "group")]
    device: Option<String>,
    /// Leave it at the fleet for this group
    #[arg(long)]
    group: Option<String>,
    /// PEM file with the CA (or the certificate itself) of the other side
    #[arg(long)]
    ca: Option<PathBuf>,
    /// The fleet's operator token
    #[arg(long, env = "EDGED_TOKEN", hide_env_values = true)]
    token: Option<String>,
}

impl PushCommand {
    pub fn run(&self) -> Result<String> {
        let bytes = read(&self.file)?;
        envelope::open(&bytes, Kind::Manifest).with_context(|| self.file.display().to_string())?;
        let roots = match &self.ca {
            None => ureq::tls::RootCerts::WebPki,
            Some(path) => {
                registry::certificates(&read(path)?).with_context(|| format!("{}: no certificate", path.display()))?
            }
        };
        let path = match (&self.device, &self.group) {
            (Some(device), _) => format!("/v1/devices/{device}/manifest"),
            (None, Some(group)) => format!("/v1/groups/{group}/manifest"),
            (None, None) => "/v1/manifest".to_owned(),
        };
        let url = format!("{}{path}", self.to.trim_end_matches('/'));
        let mut request = registry::agent(roots).put(&url).header("content-type", Kind::Manifest.content_type());
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let response = request.send(bytes.as_slice()).with_context(|| url.clone())?;
        let status = response.status();
        let mut text = String::new();
        response.into_body().into_reader().take(64 << 10).read_to_string(&mut text)?;
        if status.is_success() {
            let mut told = format!("{url}: taken ({})\n", status.as_u16());
            let accepted: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            for warning in accepted["warnings"].as_array().into_iter().flatten().filter_map(|warning| warning.as_str())
            {
                told.push_str(&format!("  warning: {warning}\n"));
            }
            return Ok(told);
        }
        let problem: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        match (
            problem["detail"].as_str().or(problem["title"].as_str()),
            problem["next"].as_str().filter(|next| !next.is_empty()),
        ) {
            (Some(title), Some(next)) => bail!("{url}: refused: {title}\n  {next}"),
            (Some(title), None) => bail!("{url}: refused: {title}"),
            _ => bail!("{url}: refused with {}: {}", status.as_u16(), text.trim()),
        }
    }
}
