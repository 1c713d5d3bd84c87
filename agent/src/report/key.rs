//! The device's own key: made at the first start, kept for good. Its public half is what the fleet knows the device by.

use std::io;
use std::path::{Path, PathBuf};

use edged_model::keys::{KeyError, SecretKey};

use crate::store::{StoreError, keep};

#[derive(Debug, thiserror::Error)]
pub enum DeviceKeyError {
    #[error("the device key {path} cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the device key {path} cannot be moved out of the way")]
    SetAside {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("no random numbers for a device key: {why}")]
    Random { why: String },
    #[error("a new device key")]
    Encode(#[from] KeyError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Reads the key, or makes one (Ed25519, PKCS#8 PEM, 0600, on the disk when this returns). A file that is no key is set
/// aside and not overwritten: the device runs on, and its enrolment can still be saved by hand.
pub fn load_or_make(path: &Path) -> Result<SecretKey, DeviceKeyError> {
    match std::fs::read_to_string(path) {
        Ok(pem) => match SecretKey::from_pem(&pem) {
            Ok(key) => return Ok(key),
            Err(_) => set_aside(path)?,
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // Not text at all.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => set_aside(path)?,
        Err(source) => return Err(DeviceKeyError::Read { path: path.to_owned(), source }),
    }
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| DeviceKeyError::Random { why: error.to_string() })?;
    let key = SecretKey::from_seed(&seed);
    keep::durable(path, key.to_pem()?.as_bytes(), 0o600)?;
    Ok(key)
}

fn set_aside(path: &Path) -> Result<(), DeviceKeyError> {
    let aside = path.with_extension("key.damaged");
    tracing::error!(path = %path.display(), aside = %aside.display(), "the device key is damaged; a new one is made, and the fleet must enrol it");
    std::fs::rename(path, aside).map_err(|source| DeviceKeyError::SetAside { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn it_is_made_once_and_a_damaged_one_is_kept_aside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keep/device.key");
        let key = load_or_make(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(load_or_make(&path).unwrap().public(), key.public());

        for damage in [&b"-----BEGIN"[..], b"\xff\xfe"] {
            std::fs::write(&path, damage).unwrap();
            let new = load_or_make(&path).unwrap();
            assert_ne!(new.public(), key.public());
            assert_eq!(std::fs::read(directory.path().join("keep/device.key.damaged")).unwrap(), damage);
        }
    }
}
