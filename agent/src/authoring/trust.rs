//! `edgectl trust`: trust roots. The signers may be different people: `init` makes and signs with the root keys at hand,
//! `sign` adds one signature, `rotate` makes the next version, `verify` checks a step as a device would.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use edged_model::cbor;
use edged_model::envelope::{self, Kind};
use edged_model::id::Digest;
use edged_model::keys::{SecretKey, spki_of_pem};
use edged_model::quantity::Span;
use edged_model::trust::{KeyId, Role, RoleName, TrustRoot};

use super::{later, now, read, read_text, write_new};
use crate::verify::trust as check;

#[derive(Debug, Subcommand)]
pub enum TrustCommand {
    /// Make the first trust root
    Init(Contents),
    /// Make the next version of a trust root, signed by old and new root keys
    Rotate {
        /// The trust root that is in force
        #[arg(long)]
        from: PathBuf,
        /// Private root keys of the old root
        #[arg(long, required = true)]
        old_root_key: Vec<PathBuf>,
        #[command(flatten)]
        contents: Contents,
    },
    /// Add a signature with one more root key
    Sign {
        file: PathBuf,
        #[arg(long)]
        key: PathBuf,
        #[arg(short, long)]
        output: PathBuf,
    },
    /// Show what a trust root says
    Inspect { file: PathBuf },
    /// Check a trust root, alone or as the successor of another
    Verify {
        file: PathBuf,
        #[arg(long)]
        from: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub struct Contents {
    /// Private root keys; their public halves become the root role
    #[arg(long, required = true)]
    root_key: Vec<PathBuf>,
    /// Public keys that may sign manifests
    #[arg(long, required = true)]
    manifest_key: Vec<PathBuf>,
    /// Public keys that may sign images
    #[arg(long, required = true)]
    image_key: Vec<PathBuf>,
    #[arg(long, default_value_t = 1)]
    root_threshold: u32,
    #[arg(long, default_value_t = 1)]
    manifest_threshold: u32,
    #[arg(long, default_value_t = 1)]
    image_threshold: u32,
    /// How long it may be rotated from, e.g. 3years
    #[arg(long, default_value = "10years")]
    expires: Span,
    #[arg(short, long)]
    output: PathBuf,
    #[arg(long)]
    force: bool,
}

impl TrustCommand {
    pub fn run(&self) -> Result<String> {
        match self {
            Self::Init(contents) => contents.write(1, Vec::new()),
            Self::Rotate { from, old_root_key, contents } => {
                let old = check::factory(&read(from)?).map_err(anyhow::Error::msg)?;
                contents.write(old.version + 1, secrets(old_root_key)?)
            }
            Self::Sign { file, key, output } => {
                let more = envelope::add_signature(&read(file)?, Kind::TrustRoot, &secret(key)?)?;
                write_new(output, &more, 0o644, true)?;
                Ok(format!("{}\n", output.display()))
            }
            Self::Inspect { file } => inspect(&read(file)?),
            Self::Verify { file, from: None } => {
                let root = check::factory(&read(file)?).map_err(anyhow::Error::msg)?;
                Ok(format!("trust root version {} is sound\n", root.version))
            }
            Self::Verify { file, from: Some(from) } => {
                let old = check::factory(&read(from)?).map_err(anyhow::Error::msg)?;
                let new = check::rotate(&old, &read(file)?, now()).map_err(anyhow::Error::msg)?;
                Ok(format!("a device with version {} takes version {}\n", old.version, new.version))
            }
        }
    }
}

fn secret(path: &Path) -> Result<SecretKey> {
    SecretKey::from_pem(&read_text(path)?).with_context(|| path.display().to_string())
}

fn secrets(paths: &[PathBuf]) -> Result<Vec<SecretKey>> {
    paths.iter().map(|path| secret(path)).collect()
}

impl Contents {
    fn write(&self, version: u64, old: Vec<SecretKey>) -> Result<String> {
        let mut keys: BTreeMap<KeyId, String> = BTreeMap::new();
        let mut add = |spki: Vec<u8>| {
            let id = Digest::of(&spki);
            keys.insert(id, hex::encode(spki));
            id
        };
        let roots = secrets(&self.root_key)?;
        let root_ids = roots.iter().map(|key| Ok(add(key.public().to_spki()?))).collect::<Result<Vec<_>>>()?;
        let mut public = |paths: &[PathBuf]| {
            let one = |path: &PathBuf| {
                let pem = read_text(path)?;
                Ok(add(spki_of_pem(&pem).with_context(|| path.display().to_string())?))
            };
            paths.iter().map(one).collect::<Result<Vec<_>>>()
        };
        let role = |keys, threshold| Role { keys, threshold };
        let roles = BTreeMap::from([
            (RoleName::Root, role(root_ids, self.root_threshold)),
            (RoleName::Manifest, role(public(&self.manifest_key)?, self.manifest_threshold)),
            (RoleName::Image, role(public(&self.image_key)?, self.image_threshold)),
        ]);
        let root = TrustRoot { version, expires: later(now(), self.expires), keys, roles };
        let mut signers = roots;
        signers.extend(old);
        let bytes = envelope::sign(Kind::TrustRoot, cbor::encode(&root)?, &signers)?;
        write_new(&self.output, &bytes, 0o644, self.force)?;
        Ok(format!("{}: trust root version {version}, expires {}\n", self.output.display(), root.expires))
    }
}

fn inspect(bytes: &[u8]) -> Result<String> {
    let opened = envelope::open(bytes, Kind::TrustRoot)?;
    let root: TrustRoot = cbor::decode(&opened.signed_by(&[])?.payload)?;
    let mut text = format!("version {}\nexpires {}\n", root.version, root.expires);
    for (name, role) in &root.roles {
        let keys = role.keys.iter().map(Digest::short).collect::<Vec<_>>().join(" ");
        text.push_str(&format!(
            "{:<9} {} of {}: {keys}\n",
            format!("{name:?}").to_lowercase(),
            role.threshold,
            role.keys.len()
        ));
    }
    let by = opened.claimed_signers().iter().map(Digest::short).collect::<Vec<_>>().join(" ");
    text.push_str(&format!("signed by {by}\n"));
    if let Err(why) = check::factory(bytes) {
        bail!("{text}not sound: {why}");
    }
    Ok(text)
}
