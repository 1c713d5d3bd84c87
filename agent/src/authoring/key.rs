//! `edgectl key`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use edged_model::keys::{PublicKey, SecretKey};

use super::{read_text, write_new};

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make an Ed25519 key: OUT (PKCS#8 PEM, 0600) and OUT with .pub (SPKI PEM)
    Generate {
        #[arg(long)]
        out: PathBuf,
        /// Write over a key that is there. What it signed cannot be signed again
        #[arg(long)]
        force: bool,
    },
    /// Print the public half of a key (SPKI PEM)
    Public {
        key: PathBuf,
        /// Print its id, as trust roots name it, instead
        #[arg(long)]
        id: bool,
    },
}

impl KeyCommand {
    pub fn run(&self) -> Result<String> {
        match self {
            Self::Generate { out, force } => generate(out, *force),
            Self::Public { key, id } => {
                let pem = read_text(key)?;
                let public = match SecretKey::from_pem(&pem) {
                    Ok(secret) => secret.public(),
                    Err(_) => PublicKey::from_pem(&pem).with_context(|| key.display().to_string())?,
                };
                Ok(if *id { format!("{}\n", public.id()?) } else { public.to_pem()? })
            }
        }
    }
}

fn generate(out: &Path, force: bool) -> Result<String> {
    let public = out.with_extension("pub");
    if public == out {
        bail!("{}: the public half will have this name; give the private one another", out.display());
    }
    // Looked at before either is written, so that a refusal leaves no half pair behind.
    if let Some(there) = [out, &public].into_iter().find(|path| !force && path.exists()) {
        bail!("{} is there already; --force writes over it", there.display());
    }
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).context("no randomness")?;
    let key = SecretKey::from_seed(&seed);
    write_new(out, key.to_pem()?.as_bytes(), 0o600, force)?;
    write_new(&public, key.public().to_pem()?.as_bytes(), 0o644, force)?;
    Ok(format!("{}\n{}\nkey id {}\n", out.display(), public.display(), key.public().id()?))
}
