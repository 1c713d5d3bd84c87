//! `config.json` of a bundle, read once. Whatever is in it, the answer is a specification or an error with its place.

use std::path::Path;

use oci_spec::runtime::Spec;

use crate::error::OciError;

/// Far more than any engine writes; what is larger is not read.
pub const MAX_BYTES: u64 = 4 << 20;

/// What engines write fits, so that it is read at once.
const USUAL_BYTES: usize = 16 << 10;

pub fn load(bundle: &Path) -> Result<(Spec, Vec<u8>, Vec<String>), OciError> {
    let path = bundle.join("config.json");
    let bytes = read(&path)?;
    let (spec, warnings) = parse(&bytes).map_err(|(place, why)| OciError::Config { path, place, why })?;
    Ok((spec, bytes, warnings))
}

pub fn read(path: &Path) -> Result<Vec<u8>, OciError> {
    use std::io::Read;
    let mut bytes = Vec::with_capacity(USUAL_BYTES);
    let file = std::fs::File::open(path).map_err(OciError::file(path))?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(OciError::file(path))?;
    if bytes.len() as u64 > MAX_BYTES {
        let why = format!("it has more than {MAX_BYTES} bytes");
        return Err(OciError::Config { path: path.to_owned(), place: "size".to_owned(), why });
    }
    Ok(bytes)
}

/// The specification and what was left out of it; or the place and the reason why it is none.
///
/// A capability that this program does not know is left out with a warning, as the specification asks; so that this
/// costs nothing where all are known, the document is read a second time, as plain JSON, only when the first failed.
pub fn parse(bytes: &[u8]) -> Result<(Spec, Vec<String>), (String, String)> {
    let error = match serde_json::from_slice(bytes) {
        Ok(spec) => return Ok((spec, Vec::new())),
        Err(error) => error,
    };
    let mut document: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|error| ("not JSON".to_owned(), error.to_string()))?;
    let warnings = leave_out_capabilities(&mut document);
    if warnings.is_empty() {
        return Err((place(&error, bytes), error.to_string()));
    }
    // Read from text again: its places are those of a document without the unknown names.
    let text = document.to_string();
    match serde_json::from_slice(text.as_bytes()) {
        Ok(spec) => Ok((spec, warnings)),
        Err(error) => Err((place(&error, text.as_bytes()), error.to_string())),
    }
}

/// The text before an error's position: what engines write has no line breaks, and a column says little.
fn place(error: &serde_json::Error, bytes: &[u8]) -> String {
    const SHOWN: usize = 40;
    let line = bytes.split(|byte| *byte == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    let end = error.column().min(line.len());
    let shown = &line[end.saturating_sub(SHOWN)..end];
    format!("after `{}`", String::from_utf8_lossy(shown).trim())
}

/// Any other document of the specification: a process, resources.
pub fn parse_as<T: serde::de::DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, OciError> {
    serde_json::from_slice(bytes).map_err(|error| OciError::Config {
        path: path.to_owned(),
        place: place(&error, bytes),
        why: error.to_string(),
    })
}

fn leave_out_capabilities(document: &mut serde_json::Value) -> Vec<String> {
    let mut warnings = Vec::new();
    let Some(sets) = document.pointer_mut("/process/capabilities").and_then(|sets| sets.as_object_mut()) else {
        return warnings;
    };
    for (set, names) in sets {
        let Some(names) = names.as_array_mut() else { continue };
        names.retain(|name| {
            let Some(text) = name.as_str() else { return true };
            let known = text.starts_with("CAP_") && crate::caps::bit(text).is_some();
            if !known {
                warnings.push(format!("process.capabilities.{set}: `{text}` is not known here and left out"));
            }
            known
        });
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SMALL: &str = r#"{"ociVersion":"1.2.0","process":{"user":{"uid":0,"gid":0},"cwd":"/","args":["sh"],
        "capabilities":{"bounding":["CAP_KILL","CAP_FLY"]}},"root":{"path":"rootfs"},"linux":{"namespaces":[]}}"#;

    #[test]
    fn an_unknown_capability_is_left_out_with_a_warning() {
        let (spec, warnings) = parse(SMALL.as_bytes()).unwrap();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("CAP_FLY"));
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.capabilities().as_ref().unwrap().bounding().as_ref().unwrap().len(), 1);
    }

    #[test]
    fn the_place_of_an_error_is_told() {
        let (place, _) = parse(br#"{"ociVersion":"1.2.0","process":{"user":{"uid":"x"},"cwd":"/"}}"#).unwrap_err();
        assert!(place.contains("uid"), "{place}");
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            "[a-zA-Z_/.:=0-9]{0,12}".prop_map(Into::into),
            prop::sample::select(&["/", "rbind", "proc", "CAP_KILL", "SCMP_ACT_ALLOW", "pid", "mount", "read"][..])
                .prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 48, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Into::into),
                prop::collection::hash_map(prop::sample::select(KEYS), inner, 0..6)
                    .prop_map(|map| map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
            ]
        })
    }

    const KEYS: &[&str] = &[
        "ociVersion",
        "process",
        "root",
        "path",
        "mounts",
        "linux",
        "hooks",
        "args",
        "cwd",
        "user",
        "uid",
        "gid",
        "namespaces",
        "type",
        "destination",
        "options",
        "source",
        "resources",
        "memory",
        "limit",
        "seccomp",
        "defaultAction",
        "syscalls",
        "names",
        "action",
        "devices",
        "sysctl",
        "rlimits",
        "timeOffsets",
        "uidMappings",
        "scheduler",
        "policy",
        "ioPriority",
        "personality",
        "rootfsPropagation",
        "capabilities",
        "bounding",
        "hard",
        "soft",
        "prestart",
        "timeout",
        "major",
        "minor",
        "cgroupsPath",
        "annotations",
        "hostname",
    ];

    /// All that is done with a document before anything is made.
    fn digest(bytes: &[u8]) {
        let Ok((spec, _)) = parse(bytes) else { return };
        let place = crate::spec::tests::place();
        let _ = crate::spec::translate(&spec, place);
        let linux = spec.linux().as_ref();
        if let Some(seccomp) = linux.and_then(|linux| linux.seccomp().as_ref()) {
            let _ = crate::seccomp::compile(seccomp);
        }
        if let Some(resources) = linux.and_then(|linux| linux.resources().as_ref()) {
            let _ = crate::cgroup::v1::settings(resources);
            let _ = crate::cgroup::v2::settings(resources);
            let _ = crate::cgroup::devices::rules(resources);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            digest(&bytes);
        }

        #[test]
        fn any_json_gives_an_answer(value in json()) {
            digest(value.to_string().as_bytes());
        }

        /// A good document with one branch replaced by anything gets further than pure chance does.
        #[test]
        fn any_branch_gives_an_answer(key in prop::sample::select(KEYS), deep in any::<bool>(), value in json()) {
            let mut document: serde_json::Value = serde_json::from_slice(&crate::query::template()).unwrap();
            for branch in ["process", "linux", "root"] {
                if let (true, Some(map)) = (deep, document.get_mut(branch).and_then(|at| at.as_object_mut())) {
                    map.insert(key.to_owned(), value.clone());
                }
            }
            document.as_object_mut().unwrap().insert(key.to_owned(), value);
            digest(document.to_string().as_bytes());
        }

        #[test]
        fn any_flipped_byte_gives_an_answer(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = crate::query::template();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            digest(&bytes);
        }
    }
}
