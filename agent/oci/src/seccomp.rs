//! `linux.seccomp` of the runtime-spec as BPF (seccomp(2), config-linux.md). Per architecture one binary search over the
//! numbers of system calls; a call with conditions on its arguments has its rules checked in their order. An
//! architecture that is not listed ends the process, as does every filter in use today. x32 calls (`__X32_SYSCALL_BIT`)
//! get the default action.
//!
//! The agent's own filter is a list of the system calls a workload may make (`config/seccomp.json`). Whatever is not on
//! it does not exist: it answers ENOSYS, which every libc takes as "an older kernel" and falls back from. Compiled once.

mod bpf;
mod names;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};

use bpf::{Condition, Decision, Test};

/// Why a filter cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SeccompError {
    #[error("the profile is not an OCI seccomp profile: {why}")]
    NotAProfile { why: String },
    #[error("linux.seccomp uses {what}, which this runtime does not do")]
    Unsupported { what: String },
    #[error("the seccomp filter has {instructions} instructions; the kernel takes {}", bpf::MAX_INSTRUCTIONS)]
    TooLarge { instructions: usize },
}

const DEFAULT_PROFILE: &str = include_str!("../../../config/seccomp.json");

/// The default profile as BPF for this machine.
pub fn default_filter() -> Result<&'static [u8], SeccompError> {
    static FILTER: OnceLock<Result<Vec<u8>, SeccompError>> = OnceLock::new();
    let filter = FILTER.get_or_init(|| {
        let profile: LinuxSeccomp = serde_json::from_str(DEFAULT_PROFILE)
            .map_err(|error| SeccompError::NotAProfile { why: error.to_string() })?;
        compile(&profile)
    });
    filter.as_deref().map_err(Clone::clone)
}

/// What one architecture calls its system calls.
struct Abi {
    /// AUDIT_ARCH_* (linux/audit.h).
    audit: u32,
    names: names::Table,
}

fn abi(arch: Arch) -> Option<Abi> {
    let (audit, names) = match arch {
        Arch::ScmpArchX86_64 => (0xc000_003e, names::x86_64()),
        Arch::ScmpArchX86 => (0x4000_0003, names::x86()),
        Arch::ScmpArchAarch64 => (0xc000_00b7, names::aarch64()),
        Arch::ScmpArchArm => (0x4000_0028, names::arm()),
        _ => return None,
    };
    Some(Abi { audit, names })
}

const NATIVE: Arch = if cfg!(target_arch = "x86_64") {
    Arch::ScmpArchX86_64
} else if cfg!(target_arch = "aarch64") {
    Arch::ScmpArchAarch64
} else if cfg!(target_arch = "arm") {
    Arch::ScmpArchArm
} else {
    Arch::ScmpArchNative
};

/// SECCOMP_FILTER_FLAG_* of the profile's `flags` (linux/seccomp.h).
pub fn flags(profile: &LinuxSeccomp) -> u32 {
    profile.flags().iter().flatten().fold(0, |all, flag| {
        all | match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 1,
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => 2,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 4,
            // The kernel refuses it where there is no listener; it would mean nothing there.
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if !asks_a_listener(profile) => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 32,
        }
    })
}

/// Whether it leaves the decision about some call to a listener (seccomp_unotify(2)).
pub fn asks_a_listener(profile: &LinuxSeccomp) -> bool {
    let notify = LinuxSeccompAction::ScmpActNotify;
    profile.default_action() == notify || profile.syscalls().iter().flatten().any(|group| group.action() == notify)
}

/// What can be told before anything is made: the filter's descriptor must reach the listener through the filter.
pub fn check(profile: &LinuxSeccomp) -> Result<(), SeccompError> {
    let refused = |what: &str| Err(SeccompError::Unsupported { what: what.to_owned() });
    let notify = LinuxSeccompAction::ScmpActNotify;
    let groups = || profile.syscalls().iter().flatten();
    if profile.default_action() == notify {
        return refused(
            "SCMP_ACT_NOTIFY as the default action (nobody could answer for the call that makes the listener known)",
        );
    }
    if groups().any(|group| group.action() == notify && group.names().iter().any(|name| name == "sendmsg")) {
        return refused("SCMP_ACT_NOTIFY for sendmsg (with which the listener is made known)");
    }
    if asks_a_listener(profile) && profile.listener_path().is_none() {
        return refused("SCMP_ACT_NOTIFY without a listenerPath");
    }
    Ok(())
}

/// A profile as an array of `struct sock_filter`.
pub fn compile(profile: &LinuxSeccomp) -> Result<Vec<u8>, SeccompError> {
    check(profile)?;
    let default = action(profile.default_action(), profile.default_errno_ret());
    let mut arches = vec![NATIVE];
    for arch in profile.architectures().iter().flatten() {
        if !arches.contains(arch) {
            arches.push(*arch);
        }
    }
    let mut parts = Vec::new();
    for arch in arches {
        // A name of another machine's family cannot occur here, and x32 is always the default action.
        let Some(abi) = abi(arch) else { continue };
        parts.push((abi.audit, calls(profile, &abi, default)?));
    }
    let program = bpf::assemble(&parts, default);
    if program.len() > bpf::MAX_INSTRUCTIONS {
        return Err(SeccompError::TooLarge { instructions: program.len() });
    }
    Ok(program.into_iter().flat_map(bpf::Instruction::to_bytes).collect())
}

/// Every system call for which something else than the default holds. A rule without conditions wins over those with.
fn calls(profile: &LinuxSeccomp, abi: &Abi, default: u32) -> Result<BTreeMap<u32, Decision>, SeccompError> {
    let mut calls: BTreeMap<u32, Decision> = BTreeMap::new();
    for group in profile.syscalls().iter().flatten() {
        let verdict = action(group.action(), group.errno_ret());
        if verdict == default {
            continue;
        }
        let rules = rules(group.args().iter().flatten())?;
        for name in group.names() {
            // A name that this kernel's architecture does not have can be called by nobody.
            let Some(number) = names::number(abi.names, name) else { continue };
            let decision = calls.entry(number).or_insert_with(|| Decision::Rules(Vec::new()));
            match decision {
                Decision::Return(_) => {}
                _ if rules.is_empty() => *decision = Decision::Return(verdict),
                Decision::Rules(known) => known.extend(rules.iter().map(|rule| (rule.clone(), verdict))),
            }
        }
    }
    Ok(calls)
}

/// All conditions of one entry must hold, but several on the same argument are alternatives (as every runtime reads
/// them).
fn rules<'a>(args: impl Iterator<Item = &'a LinuxSeccompArg>) -> Result<Vec<Vec<Condition>>, SeccompError> {
    let conditions = args.map(condition).collect::<Result<Vec<_>, _>>()?;
    let places: BTreeSet<u8> = conditions.iter().map(|condition| condition.argument).collect();
    Ok(match conditions.len() {
        0 => Vec::new(),
        count if count == places.len() => vec![conditions],
        _ => conditions.into_iter().map(|condition| vec![condition]).collect(),
    })
}

fn condition(arg: &LinuxSeccompArg) -> Result<Condition, SeccompError> {
    let argument = u8::try_from(arg.index()).ok().filter(|index| *index < 6);
    let argument = argument.ok_or_else(|| SeccompError::Unsupported { what: format!("argument {}", arg.index()) })?;
    let value = arg.value();
    let test = match arg.op() {
        LinuxSeccompOperator::ScmpCmpEq => Test::Equal(value),
        LinuxSeccompOperator::ScmpCmpNe => Test::NotEqual(value),
        LinuxSeccompOperator::ScmpCmpLt => Test::Less(value),
        LinuxSeccompOperator::ScmpCmpLe => Test::LessOrEqual(value),
        LinuxSeccompOperator::ScmpCmpGe => Test::GreaterOrEqual(value),
        LinuxSeccompOperator::ScmpCmpGt => Test::Greater(value),
        LinuxSeccompOperator::ScmpCmpMaskedEq => Test::Masked { mask: value, value: arg.value_two().unwrap_or(0) },
    };
    Ok(Condition { argument, test })
}

/// SECCOMP_RET_* with its data (linux/seccomp.h).
fn action(action: LinuxSeccompAction, number: Option<u32>) -> u32 {
    const EPERM: u32 = 1;
    let data = number.unwrap_or(EPERM) & 0xffff;
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => 0,
        LinuxSeccompAction::ScmpActKillProcess => 0x8000_0000,
        LinuxSeccompAction::ScmpActTrap => 0x0003_0000,
        LinuxSeccompAction::ScmpActErrno => 0x0005_0000 | data,
        LinuxSeccompAction::ScmpActTrace => 0x7ff0_0000 | data,
        LinuxSeccompAction::ScmpActLog => 0x7ffc_0000,
        LinuxSeccompAction::ScmpActAllow => 0x7fff_0000,
        LinuxSeccompAction::ScmpActNotify => 0x7fc0_0000,
    }
}

#[cfg(test)]
mod tests;
