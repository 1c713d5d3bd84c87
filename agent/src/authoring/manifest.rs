//! `edgectl manifest`: from YAML, TOML or JSON to a signed envelope, and back to something one can read.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};
use edged_model::cbor;
use edged_model::envelope::{self, Kind};
use edged_model::id::Digest;
use edged_model::keys::SecretKey;
use edged_model::manifest::Manifest;
use edged_model::quantity::Span;
use edged_model::validate;

use super::{later, now, read, read_text, write_new};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Yaml,
    Toml,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum ManifestCommand {
    /// Say everything that is wrong with a manifest
    Validate { file: PathBuf },
    /// Check, pack and sign a manifest
    Sign {
        file: PathBuf,
        /// Private keys of the trust root's manifest role
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
    Inspect { file: PathBuf },
    /// Print a manifest in another notation
    Convert {
        file: PathBuf,
        #[arg(long, default_value = "yaml")]
        to: Format,
    },
    /// Print the JSON Schema of manifests
    Schema,
}

impl ManifestCommand {
    pub fn run(&self) -> Result<String> {
        match self {
            Self::Validate { file } => {
                let manifest = load(file)?;
                check(&manifest)?;
                Ok(format!(
                    "{}: generation {} with {} workloads is sound\n",
                    file.display(),
                    manifest.sequence,
                    manifest.workloads.len()
                ))
            }
            Self::Sign { file, key, output, sequence, expires } => {
                let mut value = value(file)?;
                if let Some(span) = expires {
                    let issued = now();
                    value["issued"] = issued.to_string().into();
                    value["expires"] = later(issued, *span).to_string().into();
                }
                if let Some(sequence) = sequence {
                    value["sequence"] = (*sequence).into();
                }
                let manifest = typed(value, file)?;
                check(&manifest)?;
                let output = output.clone().unwrap_or_else(|| file.with_extension("cose"));
                let digest = sign(&manifest, key, &output)?;
                Ok(format!("{}: generation {} ({})\n", output.display(), manifest.sequence, digest.short()))
            }
            Self::Inspect { file } => inspect(&read(file)?),
            Self::Convert { file, to } => {
                let value = serde_json::to_value(load(file)?)?;
                Ok(match to {
                    Format::Yaml => serde_yaml_ng::to_string(&value)?,
                    Format::Toml => toml::to_string_pretty(&value)?,
                    Format::Json => serde_json::to_string_pretty(&value)? + "\n",
                })
            }
            Self::Schema => Ok(schema()? + "\n"),
        }
    }
}

/// The JSON Schema of the manifest, from its types.
pub fn schema() -> Result<String> {
    Ok(serde_json::to_string_pretty(&schemars::schema_for!(Manifest))?)
}

/// A file in any of the three notations, by its ending.
fn value(file: &Path) -> Result<serde_json::Value> {
    let text = read_text(file)?;
    let context = || file.display().to_string();
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("toml") => toml::from_str(&text).with_context(context),
        Some("json") => serde_json::from_str(&text).with_context(context),
        _ => serde_yaml_ng::from_str(&text).with_context(context),
    }
}

fn typed(value: serde_json::Value, file: &Path) -> Result<Manifest> {
    serde_path_to_error::deserialize(value)
        .map_err(|error| anyhow::anyhow!("{}: {}", file.display(), cbor::shape_text(&error)))
}

/// Reads a manifest; what is misspelt is named with its place and the nearest known name.
pub fn load(file: &Path) -> Result<Manifest> {
    typed(value(file)?, file)
}

fn check(manifest: &Manifest) -> Result<()> {
    let problems = validate::problems(manifest);
    if problems.is_empty() {
        return Ok(());
    }
    let list: String = problems.iter().map(|problem| format!("\n  {problem}")).collect();
    bail!("{} problems:{list}", problems.len())
}

fn sign(manifest: &Manifest, keys: &[PathBuf], output: &Path) -> Result<Digest> {
    let keys = keys
        .iter()
        .map(|path| SecretKey::from_pem(&read_text(path)?).with_context(|| path.display().to_string()))
        .collect::<Result<Vec<_>>>()?;
    let bytes = envelope::sign(Kind::Manifest, cbor::encode(manifest)?, &keys)?;
    write_new(output, &bytes, 0o644, true)?;
    Ok(Digest::of(&bytes))
}

fn inspect(bytes: &[u8]) -> Result<String> {
    let opened = envelope::open(bytes, Kind::Manifest)?;
    let manifest: Manifest = cbor::decode(&opened.signed_by(&[])?.payload)?;
    let by = opened.claimed_signers().iter().map(Digest::to_string).collect::<Vec<_>>().join("\n#           ");
    let yaml = serde_yaml_ng::to_string(&serde_json::to_value(&manifest)?)?;
    Ok(format!(
        "# digest    {}\n# signed by {by}\n#           (not checked: that needs a trust root)\n{yaml}",
        opened.digest
    ))
}
