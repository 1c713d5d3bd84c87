//! `linux.resources.devices`: the list as the specification has it, and after it what every container may use: the
//! default devices, its terminals, and making nodes, which without a rule for opening them are of no use.

use edged_sys::device_filter::DeviceRule;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use super::CgroupError;

/// Major and minor (`None`: all).
const ALWAYS: [(u32, Option<u32>); 8] =
    [(1, Some(3)), (1, Some(5)), (1, Some(7)), (1, Some(8)), (1, Some(9)), (5, Some(0)), (5, Some(2)), (136, None)];

pub fn rules(resources: &LinuxResources) -> Result<Vec<DeviceRule>, CgroupError> {
    let given = resources.devices().iter().flatten().map(rule).collect::<Result<Vec<_>, _>>()?;
    if given.is_empty() || allow_all(&given) {
        return Ok(Vec::new());
    }
    let one = |kind, major, minor| DeviceRule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        read: true,
        write: true,
        mknod: true,
    };
    let nodes = ['c', 'b'].map(|kind| DeviceRule { read: false, write: false, ..one(kind, None, None) });
    let always = ALWAYS.iter().map(|(major, minor)| one('c', Some(*major), *minor));
    Ok(given.into_iter().chain(nodes).chain(always).collect())
}

/// No rule at all, or a last one that allows everything.
pub fn allow_all(rules: &[DeviceRule]) -> bool {
    rules.last().is_none_or(|last| {
        last.allow
            && last.kind.is_none()
            && last.major.is_none()
            && last.minor.is_none()
            && last.read
            && last.write
            && last.mknod
    })
}

fn rule(rule: &LinuxDeviceCgroup) -> Result<DeviceRule, CgroupError> {
    let bad = |why| CgroupError::Unsupported { field: "devices".to_owned(), why };
    let kind = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some('b'),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some('c'),
        Some(LinuxDeviceType::P) => return Err(bad("a FIFO is no device of a cgroup")),
    };
    let number = |number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(number) => u32::try_from(number).map(Some).map_err(|_| bad("a device number is not negative")),
    };
    let access = rule.access().as_deref().filter(|access| !access.is_empty()).unwrap_or("rwm");
    if access.chars().any(|letter| !"rwm".contains(letter)) {
        return Err(bad("access is made of r, w and m"));
    }
    Ok(DeviceRule {
        allow: rule.allow(),
        kind,
        major: number(rule.major())?,
        minor: number(rule.minor())?,
        read: access.contains('r'),
        write: access.contains('w'),
        mknod: access.contains('m'),
    })
}

/// The same for cgroup v1: file and line (Documentation/admin-guide/cgroup-v1/devices.rst).
pub fn v1_lines(rules: &[DeviceRule]) -> Vec<(&'static str, String)> {
    let line = |rule: &DeviceRule| {
        let number = |number: Option<u32>| number.map_or_else(|| "*".to_owned(), |number| number.to_string());
        let access = [(rule.read, 'r'), (rule.write, 'w'), (rule.mknod, 'm')];
        let access: String = access.iter().filter(|(given, _)| *given).map(|(_, letter)| letter).collect();
        (rule.kind, format!("{}:{} {access}", number(rule.major), number(rule.minor)))
    };
    let mut lines = Vec::new();
    for rule in rules {
        let file = if rule.allow { "devices.allow" } else { "devices.deny" };
        match line(rule) {
            (Some(kind), rest) => lines.push((file, format!("{kind} {rest}"))),
            // `a` would forget numbers and access.
            (None, rest) if rest != "*:* rwm" => {
                lines.extend(['c', 'b'].map(|kind| (file, format!("{kind} {rest}"))));
            }
            (None, _) => lines.push((file, "a".to_owned())),
        }
    }
    lines
}
