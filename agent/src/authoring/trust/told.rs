//! A trust root in words: what it says, what it changes, who has signed and who has not. Pure.

use std::fmt::Write;

use anyhow::Result;
use edged_model::envelope::{self, Kind, Unverified};
use edged_model::id::Digest;
use edged_model::trust::{ImageRule, KeyId, Require, RoleName, TrustRoot};

use crate::verify::trust::{self as check, Tally};

fn short(ids: &[KeyId]) -> String {
    ids.iter().map(Digest::short).collect::<Vec<_>>().join(" ")
}

fn word(name: RoleName) -> String {
    format!("{name:?}").to_lowercase()
}

pub fn contents(opened: &Unverified, root: &TrustRoot) -> String {
    let mut text = format!("version {}\nexpires {}\n", root.version, root.expires);
    for (name, role) in &root.roles {
        let _ = writeln!(text, "{:<9} {} of {}: {}", word(*name), role.threshold, role.keys.len(), short(&role.keys));
    }
    for rule in &root.images {
        let _ = writeln!(text, "images    {}", rule_text(rule));
    }
    for id in root.keys.keys() {
        let _ = writeln!(text, "key       {id}");
    }
    let _ = writeln!(text, "signed by {}", short(&opened.claimed_signers()));
    text
}

/// One rule in one line.
fn rule_text(rule: &ImageRule) -> String {
    let ImageRule { prefix, require, keys, threshold, identity, annotations } = rule;
    let mut text = if prefix.is_empty() { "any".to_owned() } else { prefix.clone() };
    if *require == Require::Digest {
        return text + ": a digest in the manifest is enough";
    }
    match (keys.is_empty(), threshold) {
        (true, None) => text.push_str(": signed by image keys"),
        (true, Some(threshold)) => text.push_str(&format!(": signed by {threshold} of the image keys")),
        (false, threshold) => {
            text.push_str(&format!(": signed by {} of {}", threshold.unwrap_or(1), short(keys)));
        }
    }
    if let Some(identity) = identity {
        text.push_str(&format!(" for {identity}"));
    }
    annotations.iter().for_each(|(key, value)| text.push_str(&format!(" with {key}={value}")));
    text
}

/// What is different in `new`.
pub fn changes(old: &TrustRoot, new: &TrustRoot) -> String {
    let mut text = format!("after version {}\n", old.version);
    for name in RoleName::ALL {
        let (Some(was), Some(is)) = (old.roles.get(&name), new.roles.get(&name)) else { continue };
        let not_in = |those: &[KeyId], these: &[KeyId]| -> Vec<KeyId> {
            those.iter().filter(|id| !these.contains(id)).copied().collect()
        };
        for (sign, ids) in [("-", not_in(&was.keys, &is.keys)), ("+", not_in(&is.keys, &was.keys))] {
            for id in ids {
                let _ = writeln!(text, "{sign} {} key {id}", word(name));
            }
        }
        if was.threshold != is.threshold {
            let _ = writeln!(text, "  {} threshold {} -> {}", word(name), was.threshold, is.threshold);
        }
    }
    for (sign, these, those) in [("-", old, new), ("+", new, old)] {
        for rule in these.images.iter().filter(|rule| !those.images.contains(rule)) {
            let _ = writeln!(text, "{sign} images {}", rule_text(rule));
        }
    }
    let _ = writeln!(text, "  expires {} -> {}", old.expires, new.expires);
    text
}

/// Whether its own keys have signed enough.
pub fn state(bytes: &[u8], root: &TrustRoot) -> Result<String> {
    Ok(missing(&check::tally(&envelope::open_draft(bytes, Kind::TrustRoot)?, root)?))
}

/// Who has signed for a root's role, and who could.
pub fn missing(tally: &Tally) -> String {
    let Tally { version, threshold, signed, missing } = tally;
    let mut text = format!("root keys of version {version}: {} of {threshold} needed have signed", signed.len());
    if !signed.is_empty() {
        let _ = write!(text, " ({})", short(signed));
    }
    let still = (*threshold as usize).saturating_sub(signed.len());
    if still > 0 {
        let _ = write!(text, "; {still} missing of {}", short(missing));
    }
    text + "\n"
}
