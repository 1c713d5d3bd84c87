//! The same quotas on cgroup v1 through cgroups-rs, one group in each of three hierarchies.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use cgroups_rs::cpu::CpuController;
use cgroups_rs::memory::MemController;
use cgroups_rs::pid::PidController;
use cgroups_rs::{Controller, MaxValue};
use edged_model::api::Throttled;

use super::{CPU_PERIOD_US, CgroupError, Limits, Usage, keyed, read_number, read_pair};

#[derive(Debug, Clone)]
pub struct Group {
    memory: PathBuf,
    cpu: PathBuf,
    pids: PathBuf,
}

impl Group {
    pub fn new(controllers: &[(&'static str, PathBuf)], name: &str) -> Self {
        let path = |wanted: &str| {
            let found = controllers.iter().find(|(controller, _)| *controller == wanted);
            found.map(|(_, path)| path.join(name)).unwrap_or_default()
        };
        Self { memory: path("memory"), cpu: path("cpu"), pids: path("pids") }
    }

    pub fn paths(&self) -> [PathBuf; 3] {
        [self.memory.clone(), self.cpu.clone(), self.pids.clone()]
    }

    pub fn memory_path(&self) -> &Path {
        &self.memory
    }

    pub fn create(&self, name: &str, limits: &Limits) -> Result<(), CgroupError> {
        for path in self.paths() {
            std::fs::create_dir_all(&path).map_err(|source| CgroupError::File { path, source })?;
        }
        self.lift_cpu_limit()?;
        self.set(name, limits)
    }

    pub fn resize(&self, limits: &Limits) -> Result<(), CgroupError> {
        let name = self.memory.file_name().unwrap_or_default().to_string_lossy();
        let result = self.set(&name, limits).and_then(|()| self.limit_cpu(limits.cpu_milli));
        // The kernel takes back what it can, and then says EBUSY.
        let limit_bytes = limits.memory_bytes;
        match read_number(&self.memory, "memory.usage_in_bytes") {
            Some(in_use_bytes) if result.is_err() && in_use_bytes > limit_bytes => {
                Err(CgroupError::MemoryInUse { in_use_bytes, limit_bytes })
            }
            _ => result,
        }
    }

    fn set(&self, name: &str, limits: &Limits) -> Result<(), CgroupError> {
        let at = |what: &str| {
            let what = format!("{what} of `{name}`");
            move |source| CgroupError::V1 { what, source }
        };
        let limit = i64::try_from(limits.memory_bytes).unwrap_or(i64::MAX);
        let memory = MemController::new(self.memory.clone(), false);
        // Memory with swap is never less than memory. Kernels without swap accounting have no such file.
        let with_swap = read_number(&self.memory, "memory.memsw.limit_in_bytes");
        let grows = with_swap.is_some_and(|before| before < limits.memory_bytes);
        if grows {
            memory.set_memswap_limit(limit).map_err(at("swap limit"))?;
        }
        memory.set_limit(limit).map_err(at("memory limit"))?;
        if with_swap.is_some() && !grows {
            memory.set_memswap_limit(limit).map_err(at("swap limit"))?;
        }
        self.weigh(limits.cpu_milli)?;
        let pids = PidController::new(self.pids.clone(), false);
        let max = i64::try_from(limits.pids).unwrap_or(i64::MAX);
        pids.set_pid_max(MaxValue::Value(max)).map_err(at("pids limit"))
    }

    pub fn procs(&self) -> Result<Vec<OwnedFd>, CgroupError> {
        let open = |dir: &PathBuf| {
            let path = dir.join("cgroup.procs");
            let file = std::fs::File::options().write(true).open(&path);
            file.map(OwnedFd::from).map_err(|source| CgroupError::File { path, source })
        };
        self.paths().iter().map(open).collect()
    }

    pub fn usage(&self) -> Usage {
        let memory = MemController::new(self.memory.clone(), false);
        let oom = std::fs::read_to_string(memory.path().join("memory.oom_control")).unwrap_or_default();
        // The cpu hierarchy counts no time unless cpuacct is mounted with it.
        let cpu_ns = read_number(&self.cpu, "cpuacct.usage").unwrap_or(0);
        Usage {
            memory_bytes: read_number(&self.memory, "memory.usage_in_bytes").unwrap_or(0),
            memory_peak_bytes: read_number(&self.memory, "memory.max_usage_in_bytes"),
            cpu_us: cpu_ns / 1000,
            pids: PidController::new(self.pids.clone(), false).get_pid_current().unwrap_or(0),
            oom_kills: keyed(&oom, "oom_kill").unwrap_or(0),
        }
    }

    pub fn throttled(&self) -> Option<Throttled> {
        super::throttled(&self.cpu, "throttled_time", 1_000_000)
    }

    pub fn reset_peak(&self) {
        // Without it the peak is that of all runs: a larger number, not a wrong one.
        let _ = MemController::new(self.memory.clone(), false).reset_max_usage();
    }

    pub fn limits(&self) -> Vec<(String, String)> {
        let files = [
            (&self.memory, "memory.limit_in_bytes"),
            (&self.cpu, "cpu.cfs_quota_us"),
            (&self.cpu, "cpu.cfs_period_us"),
            (&self.cpu, "cpu.shares"),
            (&self.pids, "pids.max"),
        ];
        files.iter().filter_map(|(dir, file)| read_pair(dir, file)).collect()
    }

    pub fn limit_cpu(&self, cpu_milli: u64) -> Result<(), CgroupError> {
        let cpu = CpuController::new(self.cpu.clone(), false);
        let quota_us = i64::try_from((cpu_milli * CPU_PERIOD_US / 1000).max(1000)).unwrap_or(i64::MAX);
        let set = cpu.set_cfs_quota_and_period(Some(quota_us), Some(CPU_PERIOD_US));
        set.map_err(|source| CgroupError::V1 { what: "CPU limit".to_owned(), source })
    }

    /// As `cpu.weight` of v2: a whole core has the kernel's own choice, and it takes no less than 2.
    pub fn weigh(&self, cpu_milli: u64) -> Result<(), CgroupError> {
        let cpu = CpuController::new(self.cpu.clone(), false);
        let set = cpu.set_shares((cpu_milli * 1024 / 1000).max(2));
        set.map_err(|source| CgroupError::V1 { what: "CPU shares".to_owned(), source })
    }

    pub fn lift_cpu_limit(&self) -> Result<(), CgroupError> {
        let cpu = CpuController::new(self.cpu.clone(), false);
        cpu.set_cfs_quota(-1).map_err(|source| CgroupError::V1 { what: "CPU limit".to_owned(), source })
    }

    /// v1 has no kill file: each process is signalled, and again until none is left or nothing changes.
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        for _ in 0..100 {
            let path = self.pids.join("cgroup.procs");
            let text = match std::fs::read_to_string(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
                read => read.map_err(|source| CgroupError::File { path, source })?,
            };
            let pids: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
            if pids.is_empty() {
                return Ok(());
            }
            for pid in pids {
                // A pid that is gone by now is what was wanted.
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            }
        }
        Ok(())
    }
}
