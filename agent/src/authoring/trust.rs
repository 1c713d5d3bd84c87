//! `edgectl trust`: trust roots. The signers may be different people with keys that never meet: `init` and `rotate` make a
//! document from public keys and sign with whatever private ones are at hand, `sign` adds signatures later and elsewhere,
//! `combine` brings copies together, `verify` says as a device would whether it is enough, and whose signature is missing.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use edged_model::cbor;
use edged_model::envelope::{self, Kind, Unverified};
use edged_model::keys::SecretKey;
use edged_model::quantity::Span;
use edged_model::trust::{RoleName, TrustRoot};

use super::{later, now, read, read_text, write_new};
use crate::verify::trust as check;
use change::{Change, RoleChange};

/// What becomes of the roles.
mod change;
/// What images must have.
mod rules;
/// What is said of a root.
mod told;

#[derive(Debug, Subcommand)]
pub enum TrustCommand {
    /// Make the first trust root
    Init(Init),
    /// Make the next version: what is not named stays as it is
    Rotate(Rotate),
    /// Add signatures to a trust root
    Sign {
        file: PathBuf,
        /// Private root keys, of this root or of the one before
        #[arg(long, required = true)]
        key: Vec<PathBuf>,
        /// Default: FILE itself
        #[arg(short, long)]
        output: Option<PathBuf>,
    },
    /// Bring copies that different people signed together
    Combine {
        #[arg(required = true)]
        files: Vec<PathBuf>,
        #[arg(short, long)]
        output: PathBuf,
    },
    /// Show what a trust root says and who has signed it
    Inspect {
        file: PathBuf,
        /// And what it changes in this one
        #[arg(long)]
        from: Option<PathBuf>,
    },
    /// Check trust roots as a device would, each as the successor of the one before
    Verify {
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The one that devices have
        #[arg(long)]
        from: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub struct Init {
    /// Root keys: private ones sign at once, public ones later (`trust sign`)
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
    #[command(flatten)]
    written: Written,
}

#[derive(Debug, Args)]
pub struct Rotate {
    /// The trust root that is in force
    #[arg(long)]
    from: PathBuf,
    /// Private root keys that sign at once, of the old root or the new
    #[arg(long, alias = "old-root-key")]
    key: Vec<PathBuf>,
    /// Root keys instead of the old ones; private ones sign at once
    #[arg(long, conflicts_with = "add_root_key")]
    root_key: Vec<PathBuf>,
    /// Public keys that may sign manifests, instead of the old ones
    #[arg(long, conflicts_with = "add_manifest_key")]
    manifest_key: Vec<PathBuf>,
    /// Public keys that may sign images, instead of the old ones
    #[arg(long, conflicts_with = "add_image_key")]
    image_key: Vec<PathBuf>,
    /// One more root key
    #[arg(long)]
    add_root_key: Vec<PathBuf>,
    /// One more manifest key
    #[arg(long)]
    add_manifest_key: Vec<PathBuf>,
    /// One more image key
    #[arg(long)]
    add_image_key: Vec<PathBuf>,
    /// A key file, or a key's id: out of every role
    #[arg(long)]
    remove_key: Vec<String>,
    #[arg(long)]
    root_threshold: Option<u32>,
    #[arg(long)]
    manifest_threshold: Option<u32>,
    #[arg(long)]
    image_threshold: Option<u32>,
    #[command(flatten)]
    written: Written,
}

#[derive(Debug, Args)]
struct Written {
    /// Rules for images by the beginning of their names (YAML, TOML or JSON), instead of the old ones
    #[arg(long)]
    image_policy: Option<PathBuf>,
    /// How long manifests are believed under it, e.g. 3years; later it can only be rotated from
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
            Self::Init(init) => init.run(),
            Self::Rotate(rotate) => rotate.run(),
            Self::Sign { file, key, output } => {
                let mut bytes = read(file)?;
                let (_, root) = draft(file, &bytes)?;
                for key in secrets(key)? {
                    bytes = envelope::add_signature(&bytes, Kind::TrustRoot, &key)?;
                }
                let output = output.as_ref().unwrap_or(file);
                write_new(output, &bytes, 0o644, true)?;
                Ok(format!(
                    "{}: trust root version {}\n{}",
                    output.display(),
                    root.version,
                    told::state(&bytes, &root)?
                ))
            }
            Self::Combine { files, output } => combine(files, output),
            Self::Inspect { file, from } => {
                let bytes = read(file)?;
                let (opened, root) = draft(file, &bytes)?;
                let mut text = told::contents(&opened, &root);
                if let Some(from) = from {
                    text.push_str(&told::changes(&draft(from, &read(from)?)?.1, &root));
                }
                if let Err(why) = check::sound(&root) {
                    bail!("{text}not sound: {why}");
                }
                text.push_str(&told::state(&bytes, &root)?);
                Ok(text)
            }
            Self::Verify { files, from } => verify(files, from.as_deref()),
        }
    }
}

impl Init {
    fn run(&self) -> Result<String> {
        let replaced = |keys: &[PathBuf], threshold| RoleChange {
            replace: keys.to_vec(),
            threshold: Some(threshold),
            ..RoleChange::default()
        };
        let roles = [
            (RoleName::Root, replaced(&self.root_key, self.root_threshold)),
            (RoleName::Manifest, replaced(&self.manifest_key, self.manifest_threshold)),
            (RoleName::Image, replaced(&self.image_key, self.image_threshold)),
        ];
        self.written.write(&TrustRoot::none(), Change { roles: roles.into(), ..Change::default() }, Vec::new())
    }
}

impl Rotate {
    fn run(&self) -> Result<String> {
        let old = check::factory(&read(&self.from)?)
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("{} is what the next one follows from", self.from.display()))?;
        let change = |replace: &[PathBuf], add: &[PathBuf], threshold| RoleChange {
            replace: replace.to_vec(),
            add: add.to_vec(),
            threshold,
        };
        let roles = [
            (RoleName::Root, change(&self.root_key, &self.add_root_key, self.root_threshold)),
            (RoleName::Manifest, change(&self.manifest_key, &self.add_manifest_key, self.manifest_threshold)),
            (RoleName::Image, change(&self.image_key, &self.add_image_key, self.image_threshold)),
        ];
        let change = Change { roles: roles.into(), remove: self.remove_key.clone(), ..Change::default() };
        self.written.write(&old, change, secrets(&self.key)?)
    }
}

impl Written {
    /// The next version after `old`, signed with `signers` and with those of its root keys whose private half was given.
    fn write(&self, old: &TrustRoot, mut change: Change, mut signers: Vec<SecretKey>) -> Result<String> {
        change.image_policy.clone_from(&self.image_policy);
        let mut root = change.applied_to(old, &mut signers)?;
        root.version = old.version.checked_add(1).context("there is no higher version")?;
        root.expires = later(now(), self.expires);
        check::sound(&root).map_err(anyhow::Error::msg)?;
        let bytes = envelope::sign(Kind::TrustRoot, cbor::encode(&root)?, &once(signers)?)?;
        write_new(&self.output, &bytes, 0o644, self.force)?;
        let mut text =
            format!("{}: trust root version {}, expires {}\n", self.output.display(), root.version, root.expires);
        if old.version > 0 {
            text.push_str(&told::missing(&check::tally(&envelope::open_draft(&bytes, Kind::TrustRoot)?, old)?));
        }
        text.push_str(&told::state(&bytes, &root)?);
        Ok(text)
    }
}

/// Each key once.
fn once(signers: Vec<SecretKey>) -> Result<Vec<SecretKey>> {
    let mut kept: Vec<SecretKey> = Vec::new();
    for key in signers {
        if kept.iter().all(|other| other.public() != key.public()) {
            kept.push(key);
        }
    }
    Ok(kept)
}

/// A trust root that need not be signed enough yet.
fn draft(file: &Path, bytes: &[u8]) -> Result<(Unverified, TrustRoot)> {
    check::draft(bytes).map_err(anyhow::Error::msg).with_context(|| file.display().to_string())
}

fn combine(files: &[PathBuf], output: &Path) -> Result<String> {
    let mut combined: Option<Vec<u8>> = None;
    for file in files {
        let bytes = read(file)?;
        draft(file, &bytes)?;
        combined = Some(match combined {
            None => bytes,
            Some(first) => envelope::combine(&first, &bytes, Kind::TrustRoot)
                .with_context(|| format!("{} and {}", files[0].display(), file.display()))?,
        });
    }
    let bytes = combined.context("no file")?;
    let (_, root) = draft(output, &bytes)?;
    write_new(output, &bytes, 0o644, true)?;
    Ok(format!("{}: trust root version {}\n{}", output.display(), root.version, told::state(&bytes, &root)?))
}

/// All of `files` in turn. Without `from` the first is the one to begin with.
fn verify(files: &[PathBuf], from: Option<&Path>) -> Result<String> {
    let begin = from.unwrap_or(&files[0]);
    let bytes = read(begin)?;
    let mut root = believed(begin, &bytes, None)?;
    if from.is_none() && files.len() == 1 {
        return Ok(format!("trust root version {} is sound\n", root.version));
    }
    let (begins_with, mut envelopes) = (root.clone(), Vec::new());
    for file in &files[usize::from(from.is_none())..] {
        let bytes = read(file)?;
        root = believed(file, &bytes, Some(&root))?;
        envelopes.push(bytes);
    }
    // As a device does it: in one go, where only the last has to be in force.
    let reached = check::chain(&begins_with, envelopes.iter().map(Vec::as_slice), now());
    match (reached.root, reached.refused) {
        (Some(new), None) => {
            Ok(format!("a device with version {} takes version {}\n", begins_with.version, new.version))
        }
        (_, Some(why)) => Err(anyhow::Error::msg(why)),
        (None, None) => bail!("nothing to check"),
    }
}

/// A root that stands on its own keys and follows from `old`; else who has yet to sign.
fn believed(file: &Path, bytes: &[u8], old: Option<&TrustRoot>) -> Result<TrustRoot> {
    let (opened, root) = draft(file, bytes)?;
    let told = match old {
        None => check::factory(bytes),
        Some(old) => check::successor(old, bytes),
    };
    match told {
        Ok(root) => Ok(root),
        Err(why) => {
            let mut text = format!("{}: {why}", file.display());
            if check::sound(&root).is_ok() {
                for by in old.into_iter().chain([&root]) {
                    let missing = told::missing(&check::tally(&opened, by)?);
                    text.push_str(&missing.lines().map(|line| format!("\n  {line}")).collect::<String>());
                }
            }
            bail!(text)
        }
    }
}

fn secret(path: &Path) -> Result<SecretKey> {
    SecretKey::from_pem(&read_text(path)?).with_context(|| path.display().to_string())
}

fn secrets(paths: &[PathBuf]) -> Result<Vec<SecretKey>> {
    paths.iter().map(|path| secret(path)).collect()
}
