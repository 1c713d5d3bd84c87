//! `linux.resources` on cgroup v2: pairs of file and text. The conversions of v1's scales are those every runtime uses.

use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::{CgroupError, make_directory, read, write_limit, write_one};

type Settings = Vec<(String, String)>;

/// Makes the directory and hands down to it the controllers that are asked for.
pub fn make(path: &Path, resources: Option<&LinuxResources>) -> Result<(), CgroupError> {
    make_directory(path)?;
    let Some(resources) = resources else { return Ok(()) };
    let mut files = settings(resources)?;
    files.extend(io_weights(resources).into_iter().flatten());
    if files.iter().all(|(file, _)| path.join(file).exists()) {
        return Ok(());
    }
    let mut above: Vec<_> =
        path.ancestors().skip(1).filter(|dir| dir.join("cgroup.subtree_control").exists()).collect();
    above.reverse();
    for dir in above {
        let available = read(dir, "cgroup.controllers").unwrap_or_default();
        let enabled = read(dir, "cgroup.subtree_control").unwrap_or_default();
        for controller in available.split_whitespace() {
            let prefix = format!("{controller}.");
            let wanted = files.iter().any(|(file, _)| file.starts_with(&prefix));
            if wanted && !enabled.split_whitespace().any(|name| name == controller) {
                write_one(dir, "cgroup.subtree_control", &format!("+{controller}"))?;
            }
        }
    }
    Ok(())
}

fn unsupported(field: &str, why: &'static str) -> CgroupError {
    CgroupError::Unsupported { field: field.to_owned(), why }
}

const V1_ONLY: &str = "cgroup v2 has no such limit";

/// A negative number takes the limit away.
fn or_max(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

/// The limit that must be above what is in use already (`checkBeforeUpdate`).
pub fn checked_limit(resources: &LinuxResources) -> Option<u64> {
    let memory = resources.memory().as_ref().filter(|memory| memory.check_before_update().unwrap_or(false))?;
    memory.limit().and_then(|limit| u64::try_from(limit).ok())
}

pub fn settings(resources: &LinuxResources) -> Result<Settings, CgroupError> {
    let mut files = Settings::new();
    if let Some(memory) = resources.memory() {
        files.extend(memory_files(memory)?);
    }
    if let Some(cpu) = resources.cpu() {
        files.extend(cpu_files(cpu)?);
    }
    if let Some(limit) = resources.pids().as_ref().map(|pids| pids.limit()).filter(|limit| *limit != 0) {
        files.push(("pids.max".to_owned(), or_max(limit)));
    }
    if let Some(io) = resources.block_io() {
        files.extend(io_files(io)?);
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        files.push((format!("hugetlb.{}.max", size_name(huge.page_size())?), huge.limit().to_string()));
    }
    if let Some(network) = resources.network() {
        let asks = network.class_id().is_some_and(|class| class != 0)
            || network.priorities().as_ref().is_some_and(|priorities| !priorities.is_empty());
        if asks {
            return Err(unsupported("network", V1_ONLY));
        }
    }
    let mut rdma: Vec<_> = resources.rdma().iter().flatten().collect();
    rdma.sort_by(|a, b| a.0.cmp(b.0));
    for (device, limits) in rdma {
        let mut line = device.clone();
        for (key, value) in [("hca_handle", limits.hca_handles()), ("hca_object", limits.hca_objects())] {
            line.push_str(&value.map_or_else(String::new, |value| format!(" {key}={value}")));
        }
        files.push(("rdma.max".to_owned(), line));
    }
    // Last: it has the last word on files of the same name.
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, text) in unified {
        let plain = file.contains('.') && !file.contains('/') && !file.starts_with("cgroup.");
        if !plain {
            return Err(unsupported(&format!("unified `{file}`"), "not a limit file of a controller"));
        }
        for line in text.lines() {
            files.push((file.clone(), line.to_owned()));
        }
    }
    Ok(files)
}

fn memory_files(memory: &LinuxMemory) -> Result<Settings, CgroupError> {
    let mut files = Settings::new();
    let kernel = memory.kernel();
    if kernel.is_some_and(|bytes| bytes > 0) || memory.kernel_tcp().is_some_and(|bytes| bytes > 0) {
        return Err(unsupported("memory.kernel", V1_ONLY));
    }
    if memory.swappiness().is_some() {
        return Err(unsupported("memory.swappiness", V1_ONLY));
    }
    // There it is always on.
    if memory.use_hierarchy() == Some(false) {
        return Err(unsupported("memory.useHierarchy", V1_ONLY));
    }
    if memory.disable_oom_killer() == Some(true) {
        return Err(unsupported("memory.disableOOMKiller", V1_ONLY));
    }
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(limit) = limit {
        files.push(("memory.max".to_owned(), or_max(limit)));
    }
    if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
        // The specification counts memory and swap together, v2 swap alone.
        let text = match (swap, limit) {
            (..0, _) => "max".to_owned(),
            (swap, Some(limit)) if limit >= 0 && swap >= limit => (swap - limit).to_string(),
            _ => return Err(unsupported("memory.swap", "it includes `limit`, which must be set and not be more")),
        };
        files.push(("memory.swap.max".to_owned(), text));
    }
    if let Some(low) = memory.reservation().filter(|low| *low != 0) {
        files.push(("memory.low".to_owned(), or_max(low)));
    }
    Ok(files)
}

fn cpu_files(cpu: &LinuxCpu) -> Result<Settings, CgroupError> {
    let mut files = Settings::new();
    if cpu.realtime_runtime().is_some_and(|us| us != 0) || cpu.realtime_period().is_some_and(|us| us != 0) {
        return Err(unsupported("cpu.realtimeRuntime", V1_ONLY));
    }
    if let Some(idle) = cpu.idle() {
        files.push(("cpu.idle".to_owned(), idle.to_string()));
    }
    // A group that is idle has no weight (EINVAL).
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0 && cpu.idle() != Some(1)) {
        files.push(("cpu.weight".to_owned(), weight_of(shares).to_string()));
    }
    if cpu.quota().is_some() || cpu.period().is_some() {
        let quota = match cpu.quota() {
            Some(quota @ 1..) => quota.to_string(),
            _ => "max".to_owned(),
        };
        let text = match cpu.period().filter(|period| *period != 0) {
            Some(period) => format!("{quota} {period}"),
            None => quota,
        };
        files.push(("cpu.max".to_owned(), text));
    }
    if let Some(burst) = cpu.burst() {
        files.push(("cpu.max.burst".to_owned(), burst.to_string()));
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            files.push((file.to_owned(), list.clone()));
        }
    }
    Ok(files)
}

/// v1's 2 to 262144 onto v2's 1 to 10000.
pub fn weight_of(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn io_files(io: &LinuxBlockIo) -> Result<Settings, CgroupError> {
    let mut files = Settings::new();
    let of_devices = io.weight_device().iter().flatten().map(|device| device.leaf_weight());
    if of_devices.chain([io.leaf_weight()]).flatten().any(|weight| weight != 0) {
        return Err(unsupported("blockIO.leafWeight", V1_ONLY));
    }
    let throttles = [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ];
    for (key, devices) in throttles {
        for device in devices.iter().flatten() {
            let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
            files.push(("io.max".to_owned(), format!("{}:{} {key}={rate}", device.major(), device.minor())));
        }
    }
    Ok(files)
}

/// One weight, as each of the two schedulers that know weights wants it: file and text.
pub type IoWeight = [(String, String); 2];

/// The scheduler BFQ takes v1's 10 to 1000 as they are, the cost model has a scale of 1 to 10000.
pub fn io_weights(resources: &LinuxResources) -> Vec<IoWeight> {
    let Some(io) = resources.block_io() else { return Vec::new() };
    let both = |whose: &str, weight: u16| {
        let weight = u64::from(weight.clamp(10, 1000));
        [("io.bfq.weight", weight), ("io.weight", 1 + (weight - 10) * 9999 / 990)]
            .map(|(file, weight)| (file.to_owned(), format!("{whose} {weight}")))
    };
    let default = io.weight().filter(|weight| *weight != 0).map(|weight| both("default", weight));
    let own = io.weight_device().iter().flatten().filter_map(|device| {
        let whose = format!("{}:{}", device.major(), device.minor());
        Some(both(&whose, device.weight().filter(|weight| *weight != 0)?))
    });
    default.into_iter().chain(own).collect()
}

/// Tells every scheduler that there is: which of them a disk has may change. One of them must take it.
pub fn weigh(path: &Path, weight: &IoWeight) -> Result<(), CgroupError> {
    let results = weight.each_ref().map(|(file, text)| write_limit(path, file, text));
    if results.iter().any(Result::is_ok) {
        return Ok(());
    }
    // Of a scheduler that is there, why it does not take it; of none, that there is none.
    let [bfq, cost] = results;
    if matches!(cost, Err(CgroupError::NoFile { .. })) { bfq } else { cost }
}

/// `2MB`, as it is in a file name.
pub(super) fn size_name(size: &str) -> Result<&str, CgroupError> {
    let fine = !size.is_empty() && size.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if fine { Ok(size) } else { Err(unsupported("hugepageLimits.pageSize", "not like `2MB`")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_told_on_both_scales() {
        let resources: LinuxResources = serde_json::from_str(
            r#"{"blockIO": {"weight": 1000, "weightDevice": [{"major": 8, "minor": 0, "weight": 10}]}}"#,
        )
        .unwrap();
        let pair = |bfq: &str, cost: &str| {
            [("io.bfq.weight".to_owned(), bfq.to_owned()), ("io.weight".to_owned(), cost.to_owned())]
        };
        assert_eq!(io_weights(&resources), [pair("default 1000", "default 10000"), pair("8:0 10", "8:0 1")]);
        assert_eq!(settings(&resources).unwrap(), []);
    }

    #[test]
    fn what_only_v1_has_is_refused_by_name() {
        for (resources, field) in [
            (r#"{"blockIO": {"leafWeight": 10}}"#, "blockIO.leafWeight"),
            (r#"{"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "leafWeight": 10}]}}"#, "blockIO.leafWeight"),
            (r#"{"memory": {"useHierarchy": false}}"#, "memory.useHierarchy"),
            (r#"{"memory": {"swappiness": 1}}"#, "memory.swappiness"),
            (r#"{"memory": {"disableOOMKiller": true}}"#, "memory.disableOOMKiller"),
            (r#"{"cpu": {"realtimeRuntime": 1}}"#, "cpu.realtimeRuntime"),
            (r#"{"network": {"classID": 1}}"#, "network"),
        ] {
            let resources: LinuxResources = serde_json::from_str(resources).unwrap();
            let refused = settings(&resources).unwrap_err().to_string();
            assert_eq!(refused, format!("linux.resources.{field}: {V1_ONLY}"));
        }
    }
}
