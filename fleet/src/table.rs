//! What `edgefleet devices` prints: one line per device, and below it, indented, whatever is not well and why. Pure.

use edged_model::fleet::DeviceStatus;
use edged_model::quantity::{Span, Timestamp};
use edged_model::report::{Report, WorkloadReport};
use edged_model::workload::{Health, Phase};
use serde::Serialize;

const COLUMNS: usize = 6;
const HEAD: [&str; COLUMNS] = ["DEVICE", "RUNS", "WANTS", "STATE", "WORKLOADS", "SEEN"];

/// The table, as wide as its content.
pub fn devices(devices: &[DeviceStatus], now: Timestamp) -> String {
    let rows: Vec<[String; COLUMNS]> = devices.iter().map(|device| row(device, now)).collect();
    let mut widths = HEAD.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = line(&HEAD.map(str::to_owned), &widths);
    for (device, row) in devices.iter().zip(&rows) {
        text.push_str(&line(row, &widths));
        for problem in device.report.as_ref().map(|received| problems(&received.report)).unwrap_or_default() {
            text.push_str(&format!("  {problem}\n"));
        }
    }
    text
}

fn line(cells: &[String; COLUMNS], widths: &[usize; COLUMNS]) -> String {
    let padded: Vec<String> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
    format!("{}\n", padded.join("   ").trim_end())
}

/// The word that the document itself uses: `rolledBack`, `running`.
fn word(value: impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        _ => "?".to_owned(),
    }
}

fn row(device: &DeviceStatus, now: Timestamp) -> [String; COLUMNS] {
    let dash = || "-".to_owned();
    let report = device.report.as_ref().map(|received| &received.report);
    let generation = report.and_then(|report| report.generation.as_ref());
    let well = report.map(|report| {
        let well = report.workloads.values().filter(|workload| is_well(workload)).count();
        format!("{well}/{} well", report.workloads.len())
    });
    let seen = device.last_seen.map(|at| {
        let secs = u64::try_from(now.0.saturating_sub(at.0)).unwrap_or(0);
        format!("{} ago", Span::from_secs(secs).human())
    });
    let not_seen = if device.key_id.is_some() { "never" } else { "not enrolled" };
    [
        device.device.to_string(),
        generation.map_or_else(dash, |generation| generation.sequence.to_string()),
        device.manifest.as_ref().map_or_else(dash, |manifest| manifest.sequence.to_string()),
        generation.map_or_else(dash, |generation| word(generation.state)),
        well.unwrap_or_else(dash),
        seen.unwrap_or_else(|| not_seen.to_owned()),
    ]
}

/// Running and not unhealthy, or done with success.
fn is_well(workload: &WorkloadReport) -> bool {
    match workload.phase {
        Phase::Running => matches!(workload.health, Health::Healthy | Health::Unchecked),
        Phase::Completed => true,
        Phase::Pending
        | Phase::Pulling
        | Phase::Waiting
        | Phase::Starting
        | Phase::Stopping
        | Phase::Failed
        | Phase::Stopped
        | Phase::Paused => false,
    }
}

fn problems(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, workload) in report.workloads.iter().filter(|(_, workload)| !is_well(workload)) {
        let why = workload.why.as_ref().map(ToString::to_string);
        let state = match (workload.phase, workload.health) {
            (Phase::Running, health) => word(health),
            (phase, _) => word(phase),
        };
        lines.push(format!("{name}: {}", why.map_or_else(|| state.clone(), |why| format!("{state}: {why}"))));
    }
    for pull in &report.pulls {
        lines.push(format!("pulling {pull}"));
    }
    if report.pulls_left_out > 0 {
        lines.push(format!("pulling {} further images", report.pulls_left_out));
    }
    if let Some(reason) = report.generation.as_ref().and_then(|generation| generation.reason.as_ref()) {
        lines.push(format!("generation: {reason}"));
    }
    for why in report.trust.iter().flat_map(|trust| &trust.concerns) {
        lines.push(format!("trust: {why}"));
    }
    if let Some(why) = &report.upgrade {
        lines.push(format!("upgrade: {why}"));
    }
    if let Some(refused) = &report.refused {
        lines.push(format!("refused {} at {}: {}", refused.what, refused.at, refused.why));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(json: serde_json::Value) -> DeviceStatus {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn says_in_one_look_what_is_not_well_and_why() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let full = device(serde_json::json!({
            "device": "pump-1", "groups": [], "keyId": digest, "lastSeen": "1970-01-01T00:01:00Z",
            "manifest": {"scope": "device", "sequence": 8, "digest": digest, "storedAt": "1970-01-01T00:00:00Z"},
            "report": {"receivedAt": "1970-01-01T00:01:00Z", "sizeBytes": 9,
                "device": "pump-1", "bootId": "b", "number": 1, "at": "1970-01-01T00:01:00Z", "agentVersion": "1",
                "arch": "x86_64", "uptimeSecs": 60, "clockSource": "ntp",
                "generation": {"sequence": 7, "digest": digest, "state": "good"},
                "workloads": {
                    "web": {"phase": "running"},
                    "db": {"phase": "waiting", "why": {"code": "backOff", "text": "exit 1; again in 4s"}},
                },
                "pulls": [{"image": "r.example/web:2", "generation": 8, "since": "1970-01-01T00:00:09Z",
                    "done": "1Mi", "total": "2Mi"}],
                "pullsLeftOut": 3,
            },
        }));
        let new = device(serde_json::json!({"device": "pump-2", "groups": []}));
        let text = devices(&[full, new], Timestamp(65));
        let expected = "DEVICE   RUNS   WANTS   STATE   WORKLOADS   SEEN\n\
                        pump-1   7      8       good    1/2 well    5s ago\n\
                        \x20 db: waiting: exit 1; again in 4s\n\
                        \x20 pulling r.example/web:2 1Mi of 2Mi, for generation 8, since 1970-01-01T00:00:09Z\n\
                        \x20 pulling 3 further images\n\
                        pump-2   -      -       -       -           not enrolled\n";
        assert_eq!(text, expected);
    }
}
