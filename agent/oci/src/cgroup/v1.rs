//! `linux.resources` on cgroup v1: triples of controller, file and text.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::{ALWAYS_V1, CgroupError, has_swap, read, write_limit, write_one};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    pub controller: &'static str,
    pub file: String,
    pub text: String,
    /// Of swap: a machine that has none needs no such limit, and its kernel may have no such file.
    pub is_of_swap: bool,
    /// Refused because of what another file says now: written again after the others.
    pub order: Order,
}

/// memory.limit_in_bytes may not exceed memory.memsw.limit_in_bytes, whichever is written first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Once,
    RetryWith(&'static str),
}

fn set(controller: &'static str, file: &str, text: impl ToString) -> Setting {
    Setting { controller, file: file.to_owned(), text: text.to_string(), is_of_swap: false, order: Order::Once }
}

/// The controllers that the resources need, and those every container has.
pub fn controllers(resources: Option<&LinuxResources>) -> Result<Vec<&'static str>, CgroupError> {
    let mut wanted = ALWAYS_V1.to_vec();
    if let Some(resources) = resources {
        for setting in settings(resources)? {
            if !wanted.contains(&setting.controller) {
                wanted.push(setting.controller);
            }
        }
    }
    Ok(wanted)
}

/// The hierarchies (as `/proc/self/cgroup` lists them) that have one of `wanted`.
pub fn hierarchies(cgroup: &str, wanted: &[&str]) -> Vec<String> {
    let mut names: Vec<_> = cgroup
        .lines()
        .filter_map(|line| line.split(':').nth(1))
        .filter(|names| names.split(',').any(|name| wanted.contains(&name)))
        .map(str::to_owned)
        .collect();
    names.sort();
    names
}

pub fn directory<'h>(hierarchies: &'h [(String, PathBuf)], controller: &str) -> Result<&'h Path, CgroupError> {
    let found = hierarchies.iter().find(|(name, _)| name.split(',').any(|one| one == controller));
    found.map(|(_, path)| path.as_path()).ok_or_else(|| CgroupError::NoController { controller: controller.to_owned() })
}

pub fn apply(path: &Path, setting: &Setting) -> Result<(), CgroupError> {
    if setting.is_of_swap && !path.join(&setting.file).exists() && !has_swap() {
        return Ok(());
    }
    match write_limit(path, &setting.file, &setting.text) {
        // Since Linux 5.0 only the scheduler BFQ knows weights, under a name of its own.
        Err(CgroupError::NoFile { .. }) if setting.file == "blkio.weight" => {
            write_limit(path, "blkio.bfq.weight", &setting.text)
        }
        Err(CgroupError::NoFile { .. }) if setting.file == "blkio.weight_device" => {
            write_limit(path, "blkio.bfq.weight_device", &setting.text)
        }
        Err(first) => match setting.order {
            // The other limit is in the way: it is raised, or lowered, by the setting that follows this one.
            Order::RetryWith(other) if path.join(other).exists() => {
                write_one(path, other, &setting.text)?;
                write_one(path, &setting.file, &setting.text)
            }
            _ => Err(first),
        },
        done => done,
    }
}

/// A new cpuset is empty, and nobody can enter it: it takes what the parents have, from the top.
pub fn inherit_cpuset(path: &Path) -> Result<(), CgroupError> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let empty = |dir: &&Path| read(dir, file).is_some_and(|text| text.trim().is_empty());
        let mut missing: Vec<_> = path.ancestors().take_while(|dir| empty(dir)).collect();
        missing.reverse();
        for dir in missing {
            let above = dir.parent().and_then(|parent| read(parent, file)).unwrap_or_default();
            write_one(dir, file, above.trim())?;
        }
    }
    Ok(())
}

pub fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, CgroupError> {
    let mut all = Vec::new();
    if let Some(memory) = resources.memory() {
        all.extend(memory_settings(memory));
    }
    if let Some(cpu) = resources.cpu() {
        all.extend(cpu_settings(cpu));
    }
    if let Some(limit) = resources.pids().as_ref().map(|pids| pids.limit()).filter(|limit| *limit != 0) {
        let text = if limit < 0 { "max".to_owned() } else { limit.to_string() };
        all.push(set("pids", "pids.max", text));
    }
    if let Some(io) = resources.block_io() {
        all.extend(io_settings(io));
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        let size = super::v2::size_name(huge.page_size())?;
        all.push(set("hugetlb", &format!("hugetlb.{size}.limit_in_bytes"), huge.limit()));
    }
    if let Some(network) = resources.network() {
        if let Some(class) = network.class_id().filter(|class| *class != 0) {
            all.push(set("net_cls", "net_cls.classid", class));
        }
        for priority in network.priorities().iter().flatten() {
            let line = format!("{} {}", priority.name(), priority.priority());
            all.push(set("net_prio", "net_prio.ifpriomap", line));
        }
    }
    for (device, limits) in resources.rdma().iter().flatten() {
        let mut line = device.clone();
        for (key, value) in [("hca_handle", limits.hca_handles()), ("hca_object", limits.hca_objects())] {
            line.push_str(&value.map_or_else(String::new, |value| format!(" {key}={value}")));
        }
        all.push(set("rdma", "rdma.max", line));
    }
    if resources.unified().as_ref().is_some_and(|unified| !unified.is_empty()) {
        let why = "this host has cgroup v1";
        return Err(CgroupError::Unsupported { field: "unified".to_owned(), why });
    }
    Ok(all)
}

fn memory_settings(memory: &LinuxMemory) -> Vec<Setting> {
    let mut all = Vec::new();
    let memsw = "memory.memsw.limit_in_bytes";
    if let Some(limit) = memory.limit().filter(|limit| *limit != 0) {
        let order = Order::RetryWith(memsw);
        all.push(Setting { order, ..set("memory", "memory.limit_in_bytes", limit) });
    }
    if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
        all.push(Setting { is_of_swap: true, ..set("memory", memsw, swap) });
    }
    if let Some(low) = memory.reservation().filter(|low| *low != 0) {
        all.push(set("memory", "memory.soft_limit_in_bytes", low));
    }
    let kernel = memory.kernel();
    if let Some(kernel) = kernel.filter(|bytes| *bytes > 0) {
        all.push(set("memory", "memory.kmem.limit_in_bytes", kernel));
    }
    if let Some(tcp) = memory.kernel_tcp().filter(|bytes| *bytes > 0) {
        all.push(set("memory", "memory.kmem.tcp.limit_in_bytes", tcp));
    }
    if let Some(swappiness) = memory.swappiness() {
        all.push(set("memory", "memory.swappiness", swappiness));
    }
    if let Some(whole_tree) = memory.use_hierarchy() {
        // The kernel refuses what it cannot do any more.
        all.push(set("memory", "memory.use_hierarchy", u8::from(whole_tree)));
    }
    if memory.disable_oom_killer() == Some(true) {
        all.push(set("memory", "memory.oom_control", 1));
    }
    all
}

fn cpu_settings(cpu: &LinuxCpu) -> Vec<Setting> {
    let mut all = Vec::new();
    if let Some(idle) = cpu.idle() {
        all.push(set("cpu", "cpu.idle", idle));
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0 && cpu.idle() != Some(1)) {
        all.push(set("cpu", "cpu.shares", shares));
    }
    if let Some(period) = cpu.period().filter(|period| *period != 0) {
        all.push(set("cpu", "cpu.cfs_period_us", period));
    }
    if let Some(quota) = cpu.quota().filter(|quota| *quota != 0) {
        all.push(set("cpu", "cpu.cfs_quota_us", quota));
    }
    if let Some(burst) = cpu.burst() {
        all.push(set("cpu", "cpu.cfs_burst_us", burst));
    }
    if let Some(period) = cpu.realtime_period().filter(|period| *period != 0) {
        all.push(set("cpu", "cpu.rt_period_us", period));
    }
    if let Some(runtime) = cpu.realtime_runtime().filter(|runtime| *runtime != 0) {
        all.push(set("cpu", "cpu.rt_runtime_us", runtime));
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            all.push(set("cpuset", file, list));
        }
    }
    all
}

fn io_settings(io: &LinuxBlockIo) -> Vec<Setting> {
    let mut all = Vec::new();
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        all.push(set("blkio", "blkio.weight", weight));
    }
    if let Some(weight) = io.leaf_weight().filter(|weight| *weight != 0) {
        all.push(set("blkio", "blkio.leaf_weight", weight));
    }
    for device in io.weight_device().iter().flatten() {
        let place = format!("{}:{}", device.major(), device.minor());
        if let Some(weight) = device.weight() {
            all.push(set("blkio", "blkio.weight_device", format!("{place} {weight}")));
        }
        if let Some(weight) = device.leaf_weight() {
            all.push(set("blkio", "blkio.leaf_weight_device", format!("{place} {weight}")));
        }
    }
    let throttles = [
        ("blkio.throttle.read_bps_device", io.throttle_read_bps_device()),
        ("blkio.throttle.write_bps_device", io.throttle_write_bps_device()),
        ("blkio.throttle.read_iops_device", io.throttle_read_iops_device()),
        ("blkio.throttle.write_iops_device", io.throttle_write_iops_device()),
    ];
    for (file, devices) in throttles {
        for device in devices.iter().flatten() {
            all.push(set("blkio", file, format!("{}:{} {}", device.major(), device.minor(), device.rate())));
        }
    }
    all
}
