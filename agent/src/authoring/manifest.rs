//! `edgectl manifest`: from YAML, TOML or JSON to a signed envelope, and back to something one can read.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use edged_model::cbor;
use edged_model::envelope::{self, Kind};
use edged_model::id::{DeviceId, Digest, Sequence};
use edged_model::keys::SecretKey;
use edged_model::manifest::Manifest;
use edged_model::quantity::{Span, Timestamp};
use edged_model::validate;
use serde_json::Value;

use super::notation::{Notation, typed};
use super::{later, now, read, read_text, write_new};
use crate::verify::{self, DeviceFacts};

/// A workstation's clock may be this much ahead of the devices'.
const AHEAD_MAX: Span = Span::from_secs(86_400);

#[derive(Debug, Subcommand)]
pub enum ManifestCommand {
    /// Say everything that is wrong with a manifest
    Validate { file: PathBuf },
    /// Check, pack and sign a manifest
    Sign {
        file: PathBuf,
        /// Private keys of the trust root's manifest role; once for each
        #[arg(long, required = true)]
        key: Vec<PathBuf>,
        /// Default: FILE with .cose
        #[arg(short, long)]
        output: Option<PathBuf>,
        /// Instead of the file's own
        #[arg(long)]
        sequence: Option<u64>,
        /// Issued now, and expires after this time, e.g. 30days
        #[arg(long)]
        expires: Option<Span>,
    },
    /// Show a signed manifest
    Inspect {
        file: PathBuf,
        /// Check it too, as a device with this trust root would
        #[arg(long)]
        trust: Option<PathBuf>,
    },
    /// Print a manifest in another notation
    Convert {
        file: PathBuf,
        #[arg(long, default_value = "yaml")]
        to: Notation,
    },
    /// Print the JSON Schema of manifests
    Schema,
}

impl ManifestCommand {
    pub fn run(&self) -> Result<String> {
        match self {
            Self::Validate { file } => {
                let manifest = load(file)?;
                check(&manifest, file)?;
                let (sequence, count) = (manifest.sequence, manifest.workloads.len());
                Ok(format!("{}: generation {sequence} with {count} workloads is sound\n", file.display()))
            }
            Self::Sign { file, key, output, sequence, expires } => {
                let manifest = dated(file, sequence.map(Sequence), *expires, now())?;
                check(&manifest, file)?;
                in_time(&manifest, now()).with_context(|| file.display().to_string())?;
                let output = output.clone().unwrap_or_else(|| file.with_extension("cose"));
                if output == *file {
                    bail!(
                        "{}: the signed file would take the place of its source; name another with -o",
                        file.display()
                    );
                }
                let digest = sign(&manifest, key, &output)?;
                let (sequence, until) = (manifest.sequence, manifest.expires);
                Ok(format!("{}: generation {sequence} ({}), expires {until}\n", output.display(), digest.short()))
            }
            Self::Inspect { file, trust } => inspect(&read(file)?, trust.as_deref()),
            Self::Convert { file, to } => to.write(&serde_json::to_value(load(file)?)?),
            Self::Schema => Ok(schema()? + "\n"),
        }
    }
}

/// The JSON Schema of the manifest, from its types.
pub fn schema() -> Result<String> {
    Ok(serde_json::to_string_pretty(&schemars::schema_for!(Manifest))?)
}

fn value(file: &Path) -> Result<Value> {
    let value = Notation::of(file).read(&read_text(file)?).with_context(|| file.display().to_string())?;
    if !value.is_object() {
        bail!("{}: not a manifest: it has no `apiVersion:` and no `workloads:`", file.display());
    }
    Ok(value)
}

/// Reads a manifest; whatever is misspelt is named with its place and the nearest known name.
pub fn load(file: &Path) -> Result<Manifest> {
    of_value(value(file)?, file)
}

fn of_value(value: Value, file: &Path) -> Result<Manifest> {
    typed(value).map_err(|problems| listed(file, &problems))
}

fn listed(file: &Path, problems: &[String]) -> anyhow::Error {
    let count = match problems.len() {
        1 => "1 problem".to_owned(),
        n => format!("{n} problems"),
    };
    let list: String = problems.iter().map(|problem| format!("\n  {problem}")).collect();
    anyhow::anyhow!("{}: {count}:{list}", file.display())
}

fn check(manifest: &Manifest, file: &Path) -> Result<()> {
    let problems: Vec<String> = validate::problems(manifest).iter().map(ToString::to_string).collect();
    if problems.is_empty() { Ok(()) } else { Err(listed(file, &problems)) }
}

/// The manifest with the sequence and the dates of this signing. One without `issued` is issued now.
fn dated(file: &Path, sequence: Option<Sequence>, expires: Option<Span>, now: Timestamp) -> Result<Manifest> {
    let mut value = value(file)?;
    if let Some(fields) = value.as_object_mut() {
        if let Some(span) = expires {
            fields.insert("issued".to_owned(), now.to_string().into());
            fields.insert("expires".to_owned(), later(now, span).to_string().into());
        }
        fields.entry("issued").or_insert_with(|| now.to_string().into());
        if let Some(sequence) = sequence {
            fields.insert("sequence".to_owned(), sequence.0.into());
        }
    }
    of_value(value, file)
}

/// What every device would refuse, or would regret: its time floor follows `issued`, and never goes back.
fn in_time(manifest: &Manifest, now: Timestamp) -> Result<()> {
    if manifest.expires <= now {
        bail!("expires: {} is over (it is {now}); sign with `--expires 30days`", manifest.expires);
    }
    if manifest.issued > later(now, AHEAD_MAX) {
        bail!("issued: {} is in the future (it is {now}), and devices would set their time by it", manifest.issued);
    }
    Ok(())
}

fn sign(manifest: &Manifest, keys: &[PathBuf], output: &Path) -> Result<Digest> {
    let keys = keys
        .iter()
        .map(|path| SecretKey::from_pem(&read_text(path)?).with_context(|| path.display().to_string()))
        .collect::<Result<Vec<_>>>()?;
    let bytes = envelope::sign(Kind::Manifest, cbor::encode(manifest)?, &keys)?;
    if bytes.len() > cbor::MAX_DOCUMENT_BYTES {
        bail!("the signed manifest has {} bytes; devices take {}", bytes.len(), cbor::MAX_DOCUMENT_BYTES);
    }
    write_new(output, &bytes, 0o644, true)?;
    Ok(Digest::of(&bytes))
}

fn inspect(bytes: &[u8], trust: Option<&Path>) -> Result<String> {
    let opened = envelope::open(bytes, Kind::Manifest)?;
    let manifest: Manifest = cbor::decode(&opened.signed_by(&[])?.payload)?;
    let believed = match trust {
        None => "not checked (--trust checks it)".to_owned(),
        Some(path) => believed(bytes, &manifest, path)?,
    };
    let by = opened.claimed_signers().iter().map(Digest::to_string).collect::<Vec<_>>().join("\n#           ");
    let yaml = Notation::Yaml.write(&serde_json::to_value(&manifest)?)?;
    Ok(format!("# digest    {}\n# signed by {by}\n#           {believed}\n{yaml}", opened.digest))
}

/// What the device that it names would say, if this were its first manifest.
fn believed(bytes: &[u8], manifest: &Manifest, trust: &Path) -> Result<String> {
    let root = verify::trust::factory(&read(trust)?).map_err(anyhow::Error::msg)?;
    let facts = DeviceFacts {
        id: manifest.device.clone().map_or_else(|| DeviceId::parse("any"), Ok)?,
        groups: manifest.group.clone().into_iter().collect(),
        highest_sequence: Sequence(0),
        newest_digest: None,
        now: now(),
        knows_time: true,
    };
    verify::manifest(bytes, &root, &facts).map_err(anyhow::Error::msg)?;
    Ok(format!("believed by trust root version {}", root.version))
}
