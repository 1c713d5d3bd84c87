//! Short lines for people: /dev/kmsg on a device (the serial console shows them), stderr elsewhere.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

static KERNEL: AtomicBool = AtomicBool::new(false);

/// That of errors (syslog(2)), so that a console can leave out warnings (`loglevel=4`): what the kernel tells of each
/// process that it kills for its memory is one, several kilobytes long, and while a serial line takes them nothing runs.
const LEVEL: &str = "<3>";

pub fn to_kernel(device: bool) {
    KERNEL.store(device, Ordering::Relaxed);
}

/// Writes one line. Where it cannot be written, nothing can be done about it.
pub fn line(text: &str) {
    let line = format!("edged[keeper]: {text}\n");
    if KERNEL.load(Ordering::Relaxed)
        && let Ok(mut kmsg) = File::options().write(true).open("/dev/kmsg")
    {
        let _ = kmsg.write_all(format!("{LEVEL}{line}").as_bytes());
        return;
    }
    let _ = std::io::stderr().write_all(line.as_bytes());
}
