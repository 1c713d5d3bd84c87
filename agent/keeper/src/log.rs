//! Short lines for people: /dev/kmsg on a device (the serial console shows them), stderr elsewhere.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

static KERNEL: AtomicBool = AtomicBool::new(false);

pub fn to_kernel(device: bool) {
    KERNEL.store(device, Ordering::Relaxed);
}

/// Writes one line. Where it cannot be written, nothing can be done about it.
pub fn line(text: &str) {
    let line = format!("edged[keeper]: {text}\n");
    if KERNEL.load(Ordering::Relaxed) {
        if let Ok(mut kmsg) = File::options().write(true).open("/dev/kmsg") {
            let _ = kmsg.write_all(line.as_bytes());
            return;
        }
    }
    let _ = std::io::stderr().write_all(line.as_bytes());
}
