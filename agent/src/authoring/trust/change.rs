//! What becomes of the roles of a trust root: keys replaced, added, taken away, thresholds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use edged_model::id::Digest;
use edged_model::keys::{SecretKey, spki_of_pem};
use edged_model::trust::{KeyId, Role, RoleName, TrustRoot};

use super::rules;
use crate::authoring::read_text;

#[derive(Debug, Default)]
pub struct RoleChange {
    /// Instead of all that are there; empty: they stay.
    pub replace: Vec<PathBuf>,
    pub add: Vec<PathBuf>,
    pub threshold: Option<u32>,
}

#[derive(Debug, Default)]
pub struct Change {
    pub roles: BTreeMap<RoleName, RoleChange>,
    /// Key files or ids, out of every role.
    pub remove: Vec<String>,
    /// A file with the rules for images, instead of the old ones.
    pub image_policy: Option<PathBuf>,
}

impl Change {
    /// `old` with this change; version and expiry are the caller's. Private halves of new root keys become `signers`.
    pub fn applied_to(&self, old: &TrustRoot, signers: &mut Vec<SecretKey>) -> Result<TrustRoot> {
        let mut root = old.clone();
        for (name, change) in &self.roles {
            let was = old.roles.get(name);
            let mut ids = match change.replace.is_empty() {
                true => was.map(|role| role.keys.clone()).unwrap_or_default(),
                false => Vec::new(),
            };
            for path in change.replace.iter().chain(&change.add) {
                let (id, spki, private) = key(path, *name)?;
                signers.extend(private.filter(|_| *name == RoleName::Root));
                root.keys.insert(id, hex::encode(spki));
                if !ids.contains(&id) {
                    ids.push(id);
                }
            }
            let threshold = change.threshold.or(was.map(|role| role.threshold)).unwrap_or(1);
            root.roles.insert(*name, Role { keys: ids, threshold });
        }
        if let Some(path) = &self.image_policy {
            rules::read(path, &mut root)?;
        }
        for text in &self.remove {
            let id = named(text, &root)?;
            root.roles.values_mut().for_each(|role| role.keys.retain(|key| *key != id));
            // A rule that loses its last key would fall back to the role's, and believe others than it was written for.
            if let Some(rule) = root.images.iter().find(|rule| rule.keys == [id]) {
                bail!("{text} is the only key of the image rule for `{}`: give other rules too", rule.prefix);
            }
            root.images.iter_mut().for_each(|rule| rule.keys.retain(|key| *key != id));
        }
        let in_roles = root.roles.values().flat_map(|role| role.keys.clone());
        let used: Vec<KeyId> = in_roles.chain(root.images.iter().flat_map(|rule| rule.keys.clone())).collect();
        root.keys.retain(|id, _| used.contains(id));
        Ok(root)
    }
}

/// A key from its file: either half. The private half of another role's key has no business here.
pub fn key(path: &Path, role: RoleName) -> Result<(KeyId, Vec<u8>, Option<SecretKey>)> {
    let pem = read_text(path)?;
    let (spki, private) = match SecretKey::from_pem(&pem) {
        Ok(_) if role != RoleName::Root => {
            bail!("{}: a private key; give its public half (`edgectl key public`)", path.display())
        }
        Ok(secret) => (secret.public().to_spki()?, Some(secret)),
        Err(_) => (spki_of_pem(&pem).with_context(|| path.display().to_string())?, None),
    };
    Ok((Digest::of(&spki), spki, private))
}

/// The key that is meant: a file, an id, or the beginning of one.
pub fn named(text: &str, root: &TrustRoot) -> Result<KeyId> {
    if Path::new(text).exists() {
        let (id, ..) = key(Path::new(text), RoleName::Root)?;
        return match root.keys.contains_key(&id) {
            true => Ok(id),
            false => bail!("{text} (key {}) is in no role", id.short()),
        };
    }
    let wanted = text.strip_prefix(Digest::PREFIX).unwrap_or(text);
    let mut found = root.keys.keys().filter(|id| id.hex().starts_with(wanted));
    match (wanted.len() >= 8, found.next(), found.next()) {
        (true, Some(id), None) => Ok(*id),
        (true, Some(_), Some(_)) => bail!("{text} begins more than one key's id"),
        _ => bail!("{text} is neither a file nor the id of a key in a role (at least 8 digits)"),
    }
}
