//! Keys, trust roots, manifests and images, made and signed on a workstation. Each verb returns what it has to say; only
//! `edgectl` prints.

/// Images.
pub mod image;
/// Keys.
pub mod key;
/// Manifests.
pub mod manifest;
/// YAML, TOML and JSON.
mod notation;
/// To a device or a fleet.
pub mod push;
/// Trust roots.
pub mod trust;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use edged_model::quantity::{Span, Timestamp};

/// Writes a file that is not there yet, or any with `force`. It is there whole or not at all, and never with more rights
/// than `mode` gives, whatever the file before it had.
fn write_new(path: &Path, bytes: &[u8], mode: u32, force: bool) -> Result<()> {
    let context = || path.display().to_string();
    let mut name = path.file_name().with_context(|| format!("{} is no file name", path.display()))?.to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let target = if force { path.with_file_name(name) } else { path.to_owned() };
    let mut file = match File::options().write(true).create_new(true).mode(mode).open(&target) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            bail!("{} is there already; --force writes over it", target.display())
        }
        Err(error) => return Err(error).with_context(context),
    };
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    let written = written.and_then(|()| if force { std::fs::rename(&target, path) } else { Ok(()) });
    if let Err(error) = written {
        // Half a file helps nobody; if it cannot be taken away either, the first error is the one to tell.
        let _ = std::fs::remove_file(&target);
        return Err(error).with_context(context);
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| path.display().to_string())
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// The workstation's own clock: only for the dates that are written into what is signed.
#[expect(clippy::disallowed_methods, reason = "no agent's clock, and reconcile is the agent's")]
fn now() -> Timestamp {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since_1970.as_secs()).unwrap_or(i64::MAX))
}

fn later(from: Timestamp, span: Span) -> Timestamp {
    Timestamp(from.0.saturating_add(i64::try_from(span.ms / 1000).unwrap_or(i64::MAX / 2)))
}

#[cfg(test)]
mod tests;
