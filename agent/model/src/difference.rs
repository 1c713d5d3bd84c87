//! What differs between two manifests, field by field, as an operator asks before he rolls back. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_cbor::Value;

use crate::manifest::{Manifest, Secret};

/// Longer values are cut: whoever wants all of it has the manifest.
const VALUE_MAX_CHARS: usize = 200;
/// Two manifests of a megabyte each may differ in more than fits into an answer.
const DIFFERENCES_MAX: usize = 500;
/// These differ always.
const IGNORED: [&str; 2] = ["sequence", "issued"];

/// One field; `None`: it is not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Difference {
    /// `workloads.web.image`
    pub field: String,
    pub from: Option<String>,
    pub to: Option<String>,
}

/// The fields in which the two differ, in the order of their names. The values of secrets are never in it.
pub fn differences(from: &Manifest, to: &Manifest) -> Vec<Difference> {
    let (before, after) = (fields(from), fields(to));
    let mut names: Vec<&String> = before.keys().chain(after.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let all = names.into_iter().filter(|name| before.get(*name) != after.get(*name));
    let shown = |value: Option<&String>| value.map(|value| value.chars().take(VALUE_MAX_CHARS).collect());
    all.take(DIFFERENCES_MAX)
        .map(|name| Difference { field: name.clone(), from: shown(before.get(name)), to: shown(after.get(name)) })
        .collect()
}

fn fields(manifest: &Manifest) -> BTreeMap<String, String> {
    let mut manifest = manifest.clone();
    for secret in manifest.secrets.values_mut() {
        if let Secret::Value(value) = secret {
            *value = format!("(secret, {})", crate::id::Digest::of(value.as_bytes()).short());
        }
    }
    let mut fields = BTreeMap::new();
    if let Ok(value) = serde_cbor::value::to_value(&manifest) {
        collect(String::new(), &value, &mut fields);
    }
    fields.retain(|name, _| !IGNORED.contains(&name.as_str()));
    fields
}

/// As deep as the types of the manifest go.
fn collect(path: String, value: &Value, fields: &mut BTreeMap<String, String>) {
    match value {
        Value::Map(map) => {
            for (key, value) in map {
                let key = scalar(key);
                let below = if path.is_empty() { key } else { format!("{path}.{key}") };
                collect(below, value, fields);
            }
        }
        Value::Array(list) if list.iter().any(|value| matches!(value, Value::Map(_))) => {
            for (index, value) in list.iter().enumerate() {
                collect(format!("{path}[{index}]"), value, fields);
            }
        }
        Value::Array(list) => {
            fields.insert(path, format!("[{}]", list.iter().map(scalar).collect::<Vec<_>>().join(", ")));
        }
        value => {
            fields.insert(path, scalar(value));
        }
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::Text(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        Value::Bool(yes) => yes.to_string(),
        Value::Null => "null".to_owned(),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{SecretName, Sequence, WorkloadName};
    use crate::manifest::Workload;

    #[test]
    fn a_difference_names_the_field_and_no_secret() {
        let name = WorkloadName::parse("web").unwrap();
        let mut from = Manifest::empty();
        from.workloads.insert(name.clone(), Workload::of_image("r.example/web:1").into());
        let mut to = Manifest { sequence: Sequence(2), ..from.clone() };
        assert_eq!(differences(&from, &to), []);
        to.workloads.get_mut(&name).unwrap().image = "r.example/web:2".to_owned();
        to.workloads.get_mut(&name).unwrap().args = vec!["-v".to_owned()];
        to.secrets.insert(SecretName::parse("key").unwrap(), Secret::Value("hunter2".to_owned()));
        let found = differences(&from, &to);
        let image = found.iter().find(|difference| difference.field == "workloads.web.image").unwrap();
        assert_eq!((image.from.as_deref(), image.to.as_deref()), (Some("r.example/web:1"), Some("r.example/web:2")));
        let args = found.iter().find(|difference| difference.field == "workloads.web.args").unwrap();
        assert_eq!((args.from.as_deref(), args.to.as_deref()), (None, Some("[-v]")));
        assert!(found.len() == 3 && !format!("{found:?}").contains("hunter2"), "{found:?}");
    }

    #[test]
    fn two_manifests_with_nothing_in_common_fit_into_an_answer() {
        let mut to = Manifest::empty();
        for n in 0..300 {
            let mut workload = Workload::of_image(&"x".repeat(1000));
            workload.args = vec!["y".repeat(1000)];
            to.workloads.insert(WorkloadName::parse(&format!("w{n}")).unwrap(), workload.into());
        }
        let found = differences(&Manifest::empty(), &to);
        assert_eq!(found.len(), DIFFERENCES_MAX);
        assert!(serde_cbor::to_vec(&found).unwrap().len() < crate::api::MAX_FRAME_BYTES / 4);
    }
}
