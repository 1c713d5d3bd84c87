//! Pressure stall information and memory of the machine: /proc/pressure/* (Documentation/accounting/psi.rst) and
//! /proc/meminfo (proc(5)); and what the agent takes of it.

use edged_model::api::OwnMemory;
use edged_model::quantity::Bytes;
use edged_model::report::Pressure;

/// `some avg10` of memory, cpu and io; `None` where the kernel has no PSI.
pub fn read() -> Option<Pressure> {
    let one = |what: &str| std::fs::read_to_string(format!("/proc/pressure/{what}")).ok().and_then(|t| some_avg10(&t));
    Some(Pressure { memory: one("memory")?, cpu: one("cpu")?, io: one("io")? })
}

/// `some avg10=1.53 …` as hundredths of a percent.
fn some_avg10(text: &str) -> Option<u32> {
    let line = text.lines().find(|line| line.starts_with("some "))?;
    let value = line.split_whitespace().find_map(|word| word.strip_prefix("avg10="))?;
    let (whole, part) = value.split_once('.')?;
    let whole: u32 = whole.parse().ok()?;
    let part: u32 = part.parse().ok()?;
    Some(whole * 100 + part)
}

/// What the machine has and what can still be given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub total: Bytes,
    pub available: Bytes,
}

pub fn memory() -> Option<Memory> {
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_meminfo(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim_start_matches(':').trim().strip_suffix(" kB")?.trim().parse().ok()?;
        Some(Bytes(kib << 10))
    };
    Some(Memory { total: field("MemTotal")?, available: field("MemAvailable")? })
}

/// What the group of this very process takes (cgroup-v2.rst, "Memory Interface Files"); `None` without cgroup v2.
pub fn own() -> Option<OwnMemory> {
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let group = std::path::Path::new("/sys/fs/cgroup").join(group);
    let bytes = |file: &str| std::fs::read_to_string(group.join(file)).ok()?.trim().parse().ok().map(Bytes);
    let stat = std::fs::read_to_string(group.join("memory.stat")).ok()?;
    Some(OwnMemory {
        memory: Bytes(stat.lines().find_map(|line| line.strip_prefix("anon ")?.parse().ok())?),
        memory_peak: bytes("memory.peak"),
        // The word `max` is no number.
        memory_max: bytes("memory.max"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_own_text() {
        let psi = "some avg10=1.53 avg60=0.87 avg300=0.40 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(some_avg10(psi), Some(153));
        assert_eq!(some_avg10("nonsense"), None);
        let meminfo = "MemTotal:        2048 kB\nMemFree:  1 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(parse_meminfo(meminfo), Some(Memory { total: Bytes(2048 << 10), available: Bytes(1024 << 10) }));
    }
}
