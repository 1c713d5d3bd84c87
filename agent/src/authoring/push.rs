//! `edgectl push`: a signed manifest to a device's own HTTPS port, or to a fleet for a device; a trust root to either.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use edged_model::cbor;
use edged_model::envelope::{self, Kind};
use edged_model::fleet::{Accepted, Problem, TrustStored, TrustTaken};
use edged_model::id::{DeviceId, GroupName};
use edged_model::manifest::Manifest;
use edged_model::trust::TrustRoot;

use super::read;
use crate::registry::{self, Floor};

#[derive(Debug, Args)]
pub struct PushCommand {
    /// What `edgectl manifest sign` wrote, or a newer trust root
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
    /// A manifest that its receiver would refuse is not sent at all.
    fn is_for(&self, manifest: &Manifest) -> Result<()> {
        let name = |id: Option<&str>| id.unwrap_or("nobody").to_owned();
        let device = manifest.device.as_ref().map(DeviceId::as_str);
        let group = manifest.group.as_ref().map(GroupName::as_str);
        match (&self.device, &self.group) {
            (Some(asked), _) if group.is_none() && device != Some(asked) => {
                bail!("is for device {}, not for {asked}", name(device))
            }
            (None, Some(asked)) if group != Some(asked) => bail!("is for group {}, not for {asked}", name(group)),
            _ => Ok(()),
        }
    }

    pub fn run(&self) -> Result<String> {
        let bytes = read(&self.file)?;
        let context = || self.file.display().to_string();
        let is_root = envelope::open(&bytes, Kind::TrustRoot).is_ok();
        let kind = if is_root { Kind::TrustRoot } else { Kind::Manifest };
        if !is_root {
            let opened = envelope::open(&bytes, Kind::Manifest).with_context(context)?;
            let manifest: Manifest = cbor::decode(&opened.signed_by(&[])?.payload).with_context(context)?;
            self.is_for(&manifest).with_context(context)?;
        } else if self.device.is_some() || self.group.is_some() {
            bail!("{}: a trust root is for every device: push it without --device and --group", self.file.display());
        }
        if !self.to.starts_with("https://") {
            bail!("{}: only https:// is spoken, so that the token stays between the two", self.to);
        }
        let roots = match &self.ca {
            None => registry::web_roots(),
            Some(path) => {
                registry::certificates(&read(path)?).with_context(|| format!("{}: no certificate", path.display()))?
            }
        };
        let path = match (&self.device, &self.group) {
            _ if is_root => format!("/v1/trust/{}", root_version(&bytes).with_context(context)?),
            (Some(device), _) => format!("/v1/devices/{device}/manifest"),
            (None, Some(group)) => format!("/v1/groups/{group}/manifest"),
            (None, None) => "/v1/manifest".to_owned(),
        };
        let url = format!("{}{path}", self.to.trim_end_matches('/'));
        let mut request =
            registry::agent(roots, &Floor::default())?.put(&url).header("content-type", kind.content_type());
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let response = request.send(bytes.as_slice()).with_context(|| url.clone())?;
        let status = response.status();
        let mut text = String::new();
        response.into_body().into_reader().take(64 << 10).read_to_string(&mut text)?;
        if status.is_success() {
            return Ok(taken(&url, &text));
        }
        // The other side's own words; an endpoint that only stores bytes has none of ours.
        match serde_json::from_str::<Problem>(&text) {
            Ok(Problem { detail, next: Some(next), .. }) => bail!("{url}: refused: {detail}\n  {next}"),
            Ok(Problem { detail, next: None, .. }) => bail!("{url}: refused: {detail}"),
            Err(_) => bail!("{url}: refused with {status}: {}", text.trim()),
        }
    }
}

fn root_version(bytes: &[u8]) -> Result<u64> {
    let opened = envelope::open(bytes, Kind::TrustRoot)?;
    let root: TrustRoot = cbor::decode(&opened.signed_by(&[])?.payload)?;
    Ok(root.version)
}

/// What became of it: an endpoint that only stores bytes says nothing more than that it took them.
fn taken(url: &str, text: &str) -> String {
    if let Ok(TrustTaken { trust_root }) = serde_json::from_str(text) {
        return format!("{url}: trust root version {trust_root} is in force\n");
    }
    if let Ok(TrustStored { version, digest, warnings }) = serde_json::from_str(text) {
        let mut said = format!("{url}: trust root version {version} is there for devices ({})\n", digest.short());
        warnings.iter().for_each(|warning| said.push_str(&format!("  warning: {warning}\n")));
        return said;
    }
    let Ok(accepted) = serde_json::from_str::<Accepted>(text) else { return format!("{url}: taken\n") };
    let mut said = format!("{url}: generation {} taken ({})\n", accepted.sequence, accepted.digest.short());
    for warning in &accepted.warnings {
        said.push_str(&format!("  warning: {warning}\n"));
    }
    said
}
