//! What `edgefleet devices` prints: one line per device, and below it, indented, whatever is not well and why. Pure.

use edged_model::fleet::DeviceStatus;
use edged_model::quantity::{Span, Timestamp};
use edged_model::report::Report;
use edged_model::workload::{Health, Phase, WorkloadWord as _};

const HEAD: [&str; 6] = ["DEVICE", "RUNS", "WANTS", "STATE", "WORKLOADS", "SEEN"];

/// The table, as wide as its content.
pub fn devices(devices: &[DeviceStatus], now: Timestamp) -> String {
    let rows: Vec<[String; 6]> = devices.iter().map(|device| row(device, now)).collect();
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
