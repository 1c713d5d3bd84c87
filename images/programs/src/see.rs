//! What the world looks like from inside.

use std::fmt::Write;
use std::fs;

/// Every second one line: the groups of a cgroup directory, and how many processes each has.
pub fn groups(dir: &str) -> ! {
    crate::end_on_sigterm();
    loop {
        let mut names: Vec<String> = fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let pids = fs::read_to_string(entry.path().join("pids.current")).ok()?;
                Some(format!("{} {}", entry.file_name().to_string_lossy(), pids.trim()))
            })
            .collect();
        names.sort();
        println!("groups: {}.", names.join(", "));
        crate::rest(std::time::Duration::from_secs(1));
    }
}

/// Its walls, its ids, its rights, its namespaces, one per line.
pub fn limits() -> String {
    let mut text = String::new();
    for file in ["memory.max", "memory.swap.max", "cpu.max", "pids.max"] {
        let value = fs::read_to_string(format!("/sys/fs/cgroup/{file}")).unwrap_or_else(|error| error.to_string());
        let _ = writeln!(text, "{file}={}", value.trim());
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines() {
        if ["CapEff", "CapBnd", "NoNewPrivs", "Seccomp:", "NSpid", "Uid"].iter().any(|key| line.starts_with(key)) {
            let _ = writeln!(text, "{}", line.replace('\t', " "));
        }
    }
    for name in ["pid", "mnt", "net", "uts", "ipc", "cgroup", "user"] {
        if let Ok(link) = fs::read_link(format!("/proc/self/ns/{name}")) {
            let _ = writeln!(text, "ns={}", link.display());
        }
    }
    let _ = writeln!(text, "pid={}", std::process::id());
    let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let _ = writeln!(text, "hostname={}", hostname.trim());
    let interfaces = fs::read_dir("/sys/class/net").map_or(0, |entries| entries.count());
    let _ = writeln!(text, "interfaces={interfaces}");
    text
}
