//! `events`: figures of a container in the form that engines read.

use std::path::Path;

use serde::Serialize;

use super::{Groups, read, read_number, v1};

#[derive(Debug, Default, Serialize)]
pub struct Stats {
    pub cpu: Cpu,
    pub memory: Memory,
    pub pids: Pids,
}

#[derive(Debug, Default, Serialize)]
pub struct Cpu {
    pub usage: CpuUsage,
    pub throttling: Throttling,
}

/// Nanoseconds.
#[derive(Debug, Default, Serialize)]
pub struct CpuUsage {
    pub total: u64,
    pub kernel: u64,
    pub user: u64,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Throttling {
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_time: u64,
}

#[derive(Debug, Default, Serialize)]
pub struct Memory {
    pub usage: MemoryUsage,
    pub swap: MemoryUsage,
}

#[derive(Debug, Default, Serialize)]
pub struct MemoryUsage {
    pub limit: u64,
    pub usage: u64,
    pub max: u64,
    pub failcnt: u64,
}

#[derive(Debug, Default, Serialize)]
pub struct Pids {
    pub current: u64,
    pub limit: u64,
}

fn keyed(text: Option<&str>, key: &str) -> u64 {
    let found = text.unwrap_or_default().lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    found.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

pub fn of(groups: &Groups) -> Stats {
    match groups {
        Groups::V2 { path } => of_v2(path),
        Groups::V1 { hierarchies } => {
            let directory = |controller| v1::directory(hierarchies, controller).unwrap_or(Path::new("/nonexistent"));
            of_v1(directory("cpu"), directory("memory"), directory("pids"))
        }
    }
}

fn of_v2(path: &Path) -> Stats {
    let number = |file| read_number(path, file).unwrap_or(0);
    let stat = read(path, "cpu.stat");
    let us = |key| keyed(stat.as_deref(), key) * 1000;
    let events = read(path, "memory.events");
    Stats {
        cpu: Cpu {
            usage: CpuUsage { total: us("usage_usec"), kernel: us("system_usec"), user: us("user_usec") },
            throttling: Throttling {
                periods: keyed(stat.as_deref(), "nr_periods"),
                throttled_periods: keyed(stat.as_deref(), "nr_throttled"),
                throttled_time: us("throttled_usec"),
            },
        },
        memory: Memory {
            usage: MemoryUsage {
                limit: number("memory.max"),
                usage: number("memory.current"),
                max: number("memory.peak"),
                failcnt: keyed(events.as_deref(), "max"),
            },
            swap: MemoryUsage {
                limit: number("memory.swap.max"),
                usage: number("memory.swap.current"),
                max: number("memory.swap.peak"),
                failcnt: 0,
            },
        },
        pids: Pids { current: number("pids.current"), limit: number("pids.max") },
    }
}

fn of_v1(cpu: &Path, memory: &Path, pids: &Path) -> Stats {
    let number = |path: &Path, file: &str| read_number(path, file).unwrap_or(0);
    let stat = read(cpu, "cpu.stat");
    let usage = |prefix: &str| MemoryUsage {
        limit: number(memory, &format!("{prefix}.limit_in_bytes")),
        usage: number(memory, &format!("{prefix}.usage_in_bytes")),
        max: number(memory, &format!("{prefix}.max_usage_in_bytes")),
        failcnt: number(memory, &format!("{prefix}.failcnt")),
    };
    Stats {
        cpu: Cpu {
            usage: CpuUsage { total: number(cpu, "cpuacct.usage"), ..CpuUsage::default() },
            throttling: Throttling {
                periods: keyed(stat.as_deref(), "nr_periods"),
                throttled_periods: keyed(stat.as_deref(), "nr_throttled"),
                throttled_time: keyed(stat.as_deref(), "throttled_time"),
            },
        },
        memory: Memory { usage: usage("memory"), swap: usage("memory.memsw") },
        pids: Pids { current: number(pids, "pids.current"), limit: number(pids, "pids.max") },
    }
}
