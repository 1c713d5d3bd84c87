//! `--image-policy FILE`: the rules of a trust root for images, as people write them, with keys by file or id.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use edged_model::trust::{ImageRule, KeyId, Require, RoleName, TrustRoot};
use serde::{Deserialize, Serialize};

use super::change::{key, named};
use crate::authoring::notation::{Notation, typed};
use crate::authoring::read_text;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    rules: Vec<Rule>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    prefix: String,
    require: Require,
    #[serde(default)]
    keys: Vec<String>,
    #[serde(default)]
    threshold: Option<u32>,
    #[serde(default)]
    identity: Option<String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// Reads the rules into `root`, with the keys that they bring. Key files are found from where the file lies.
pub fn read(path: &Path, root: &mut TrustRoot) -> Result<()> {
    let value = Notation::of(path).read(&read_text(path)?).with_context(|| path.display().to_string())?;
    let file: File = match typed(value) {
        Ok(file) => file,
        Err(told) => bail!("{}: {}", path.display(), told.join("; ")),
    };
    let beside = path.parent().unwrap_or(Path::new(""));
    root.images.clear();
    for Rule { prefix, require, keys, threshold, identity, annotations } in file.rules {
        let keys = keys.iter().map(|text| one(text, beside, root)).collect::<Result<Vec<KeyId>>>()?;
        root.images.push(ImageRule { prefix, require, keys, threshold, identity, annotations });
    }
    Ok(())
}

fn one(text: &str, beside: &Path, root: &mut TrustRoot) -> Result<KeyId> {
    let file = beside.join(text);
    if !file.exists() {
        return named(text, root);
    }
    let (id, spki, _) = key(&file, RoleName::Image)?;
    root.keys.insert(id, hex::encode(spki));
    Ok(id)
}
