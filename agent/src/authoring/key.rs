//! `edgectl key`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Subcommand;
use edged_model::keys::{PublicKey, SecretKey};

use super::{read_text, write_new};

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make an Ed25519 key: OUT (PKCS#8 PEM, 0600) and OUT with .pub (SPKI PEM)
    Generate {
        #[arg(long)]
        out: PathBuf,
        #[arg(long)]
        force: bool,
    },
    /// Print the public half and the id of a key
    Public { key: PathBuf },
}

impl KeyCommand {
    pub fn run(&self) -> Result<String> {
        match self {
            Self::Generate { out, force } => {
                let mut seed = [0; 32];
                getrandom::fill(&mut seed).context("no randomness")?;
                let key = SecretKey::from_seed(&seed);
                let public = out.with_extension("pub");
                write_new(out, key.to_pem()?.as_bytes(), 0o600, *force)?;
                write_new(&public, key.public().to_pem()?.as_bytes(), 0o644, *force)?;
                Ok(format!("{}\n{}\nkey id {}\n", out.display(), public.display(), key.public().id()?))
            }
            Self::Public { key } => {
                let pem = read_text(key)?;
                let public = match SecretKey::from_pem(&pem) {
                    Ok(secret) => secret.public(),
                    Err(_) => PublicKey::from_pem(&pem).with_context(|| key.display().to_string())?,
                };
                Ok(format!("{}key id {}\n", public.to_pem()?, public.id()?))
            }
        }
    }
}
