//! `update`: new limits for a container that runs, by flags or by a `resources` object.

use std::io::Read;
use std::path::Path;

use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value};

use crate::arguments::Parsed;
use crate::bundle;
use crate::error::OciError;
use crate::state::{self, Status};

/// Flag, object and field of `resources`, and whether the value is in bytes.
const NUMBERS: [(&str, &str, &str, bool); 14] = [
    ("memory", "memory", "limit", true),
    ("memory-reservation", "memory", "reservation", true),
    ("memory-swap", "memory", "swap", true),
    ("kernel-memory", "memory", "kernel", true),
    ("kernel-memory-tcp", "memory", "kernelTCP", true),
    ("cpu-period", "cpu", "period", false),
    ("cpu-quota", "cpu", "quota", false),
    ("cpu-burst", "cpu", "burst", false),
    ("cpu-share", "cpu", "shares", false),
    ("cpu-rt-period", "cpu", "realtimePeriod", false),
    ("cpu-rt-runtime", "cpu", "realtimeRuntime", false),
    ("cpu-idle", "cpu", "idle", false),
    ("pids-limit", "pids", "limit", false),
    ("blkio-weight", "blockIO", "weight", false),
];

pub fn update(parsed: &Parsed) -> Result<(), OciError> {
    let (home, record) = state::find(&parsed.global.root, parsed.id()?)?;
    let status = home.status(&record);
    if status == Status::Stopped {
        let wanted = "running, created or paused";
        return Err(OciError::WrongState { id: home.id, is: status.text(), verb: "update", wanted });
    }
    let resources = match parsed.value("resources") {
        Some("-") => {
            let mut bytes = Vec::new();
            let stdin = std::io::stdin().lock().take(bundle::MAX_BYTES).read_to_end(&mut bytes);
            stdin.map_err(OciError::file(Path::new("-")))?;
            bundle::parse_as(Path::new("-"), &bytes)?
        }
        Some(path) => bundle::parse_as(Path::new(path), &bundle::read(Path::new(path))?)?,
        None => from_flags(parsed)?,
    };
    Ok(record.groups.set(&resources, resources.devices().is_some())?)
}

fn from_flags(parsed: &Parsed) -> Result<LinuxResources, OciError> {
    let mut objects: Map<String, Value> = Map::new();
    let mut put = |object: &str, field: &str, value: Value| {
        let entry = objects.entry(object.to_owned()).or_insert_with(|| Value::Object(Map::new()));
        if let Some(fields) = entry.as_object_mut() {
            fields.insert(field.to_owned(), value);
        }
    };
    for (flag, object, field, bytes) in NUMBERS {
        if let Some(text) = parsed.value(flag) {
            let number = if bytes { bytes_of(text) } else { text.parse().ok() };
            let number = number.ok_or_else(|| OciError::Usage { text: format!("--{flag}: `{text}` is no number") })?;
            put(object, field, number.into());
        }
    }
    for (flag, field) in [("cpuset-cpus", "cpus"), ("cpuset-mems", "mems")] {
        if let Some(text) = parsed.value(flag) {
            put("cpu", field, text.into());
        }
    }
    serde_json::from_value(Value::Object(objects)).map_err(|error| OciError::Usage { text: error.to_string() })
}

/// `1000`, `64k`, `64m`, `1g`, `64MiB`; -1 for none.
fn bytes_of(text: &str) -> Option<i64> {
    let lower = text.to_lowercase();
    let digits = lower.find(|letter: char| !letter.is_ascii_digit() && letter != '-').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = match unit.trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    number.parse::<i64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("0", 0), ("-1", -1), ("64k", 65_536), ("1M", 1 << 20), ("2GiB", 2 << 30), ("5b", 5)] {
            assert_eq!(bytes_of(text), Some(bytes), "{text}");
        }
        for text in ["", "k", "1x", "9999999999999g", "1.5m"] {
            assert_eq!(bytes_of(text), None, "{text}");
        }
    }

    #[test]
    fn flags_become_resources() {
        let words = "update --memory 64m --cpu-quota 50000 --pids-limit 7 --cpuset-cpus 0 web";
        let parsed = crate::arguments::parse(&words.split(' ').map(Into::into).collect::<Vec<_>>()).unwrap();
        let resources = from_flags(&parsed).unwrap();
        let files = crate::cgroup::v2::settings(&resources).unwrap();
        let text = |file: &str| files.iter().find(|(name, _)| name == file).map(|(_, text)| text.as_str());
        assert_eq!(text("memory.max"), Some("67108864"));
        assert_eq!(text("cpu.max"), Some("50000"));
        assert_eq!((text("pids.max"), text("cpuset.cpus")), (Some("7"), Some("0")));
    }
}
