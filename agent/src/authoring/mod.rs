//! Keys, trust roots, manifests and images, made and signed on a workstation. Each verb returns what it has to say; only
//! `edgectl` prints.

/// Images.
pub mod image;
/// Keys.
pub mod key;
/// Manifests.
pub mod manifest;
/// To a device or a fleet.
pub mod push;
/// Trust roots.
pub mod trust;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use edged_model::quantity::{Span, Timestamp};

/// Writes a file that is not there yet, or any with `force`.
fn write_new(path: &Path, bytes: &[u8], mode: u32, force: bool) -> Result<()> {
    let mut options = File::options();
    options.write(true).mode(mode);
    if force {
        options.create(true).truncate(true)
    } else {
        options.create_new(true)
    };
    match options.open(path) {
        Ok(mut file) => file.write_all(bytes).with_context(|| path.display().to_string()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            bail!("{} is there already; --force writes over it", path.display())
        }
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| path.display().to_string())
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// The workstation's own clock: only for the dates that are written into what is signed.
fn now() -> Timestamp {
    Timestamp(crate::reconcile::clock::unix_ms() / 1000)
}

fn later(from: Timestamp, span: Span) -> Timestamp {
    Timestamp(from.0.saturating_add(i64::try_from(span.ms / 1000).unwrap_or(i64::MAX / 2)))
}
