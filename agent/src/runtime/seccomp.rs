//! The default filter: a list of the system calls a workload may make (`config/seccomp.json`, in the form of the OCI
//! runtime-spec's `linux.seccomp`). Whatever is not on it does not exist: it answers ENOSYS, which every libc takes as
//! "an older kernel" and falls back from. Compiled once.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::OnceLock;

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompOperator};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Why a filter cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SeccompError {
    #[error("the profile is not an OCI seccomp profile: {why}")]
    NotAProfile { why: String },
    #[error("the profile uses {what}, which this filter does not have")]
    Unsupported { what: String },
    #[error("the filter does not compile: {why}")]
    Compile { why: String },
}

const DEFAULT_PROFILE: &str = include_str!("../../../config/seccomp.json");

/// The default profile as BPF for this machine. Empty where the compiler does not know the architecture (32-bit ARM):
/// there, workloads run without a filter, and `docs/security.md` says so.
pub fn default_filter() -> Result<&'static [u8], SeccompError> {
    static FILTER: OnceLock<Result<Vec<u8>, SeccompError>> = OnceLock::new();
    let filter = FILTER.get_or_init(|| {
        let profile: LinuxSeccomp = serde_json::from_str(DEFAULT_PROFILE)
            .map_err(|error| SeccompError::NotAProfile { why: error.to_string() })?;
        compile(&profile)
    });
    filter.as_deref().map_err(Clone::clone)
}

/// A profile as an array of `struct sock_filter`.
pub fn compile(profile: &LinuxSeccomp) -> Result<Vec<u8>, SeccompError> {
    let Ok(arch) = TargetArch::try_from(std::env::consts::ARCH) else { return Ok(Vec::new()) };
    let errno = profile.default_errno_ret().unwrap_or(libc_errno::EPERM);
    let default = match profile.default_action() {
        LinuxSeccompAction::ScmpActErrno => SeccompAction::Errno(errno),
        LinuxSeccompAction::ScmpActAllow => SeccompAction::Allow,
        LinuxSeccompAction::ScmpActKillProcess => SeccompAction::KillProcess,
        other => return Err(SeccompError::Unsupported { what: format!("the default action {other:?}") }),
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for group in profile.syscalls().iter().flatten() {
        if group.action() != LinuxSeccompAction::ScmpActAllow {
            return Err(SeccompError::Unsupported { what: format!("the action {:?}", group.action()) });
        }
        let conditions = group.args().iter().flatten().map(condition).collect::<Result<Vec<_>, _>>()?;
        for name in group.names() {
            // Names of other architectures are on the list too.
            let Some(number) = number(name) else { continue };
            let rule = rules.entry(i64::from(number.id())).or_default();
            if !conditions.is_empty() {
                let compiled = SeccompRule::new(conditions.clone())
                    .map_err(|error| SeccompError::Compile { why: error.to_string() })?;
                rule.push(compiled);
            }
        }
    }
    let failed = |error: seccompiler::BackendError| SeccompError::Compile { why: error.to_string() };
    let filter = SeccompFilter::new(rules, default, SeccompAction::Allow, arch).map_err(failed)?;
    let program: BpfProgram = filter.try_into().map_err(failed)?;
    Ok(program.iter().flat_map(instruction).collect())
}

/// The number of a system call on this machine. The table calls the 64-bit ARM one `fstatat`, which the kernel and
/// every profile call `newfstatat` (asm-generic/unistd.h).
fn number(name: &str) -> Option<syscalls::Sysno> {
    let other_name = if name == "newfstatat" { "fstatat" } else { name };
    syscalls::Sysno::from_str(name).or_else(|_| syscalls::Sysno::from_str(other_name)).ok()
}

fn condition(arg: &oci_spec::runtime::LinuxSeccompArg) -> Result<SeccompCondition, SeccompError> {
    let index =
        u8::try_from(arg.index()).map_err(|_| SeccompError::Unsupported { what: "that argument".to_owned() })?;
    let (operator, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpEq => (SeccompCmpOp::Eq, arg.value()),
        LinuxSeccompOperator::ScmpCmpNe => (SeccompCmpOp::Ne, arg.value()),
        LinuxSeccompOperator::ScmpCmpMaskedEq => (SeccompCmpOp::MaskedEq(arg.value()), arg.value_two().unwrap_or(0)),
        other => return Err(SeccompError::Unsupported { what: format!("the operator {other:?}") }),
    };
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, operator, value)
        .map_err(|error| SeccompError::Compile { why: error.to_string() })
}

/// `struct sock_filter` (linux/filter.h) as the kernel reads it.
fn instruction(filter: &seccompiler::sock_filter) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..2].copy_from_slice(&filter.code.to_ne_bytes());
    bytes[2] = filter.jt;
    bytes[3] = filter.jf;
    bytes[4..].copy_from_slice(&filter.k.to_ne_bytes());
    bytes
}

mod libc_errno {
    pub const EPERM: u32 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_profile_compiles_within_the_kernels_bound() {
        let filter = default_filter().unwrap();
        assert_eq!(filter.len() % 8, 0);
        // BPF_MAXINSNS (linux/bpf_common.h).
        assert!(!filter.is_empty() && filter.len() / 8 <= 4096, "{} instructions", filter.len() / 8);
    }

    /// Names that every 64-bit machine has: one that is missing in the table would not exist for any workload.
    #[test]
    fn what_every_program_calls_is_known_by_name() {
        for name in ["newfstatat", "fstat", "statx", "openat", "read", "mmap", "mprotect", "futex", "fcntl", "lseek"] {
            assert!(number(name).is_some(), "{name}");
        }
    }

    #[test]
    fn what_leads_out_is_not_on_the_list() {
        let profile: LinuxSeccomp = serde_json::from_str(DEFAULT_PROFILE).unwrap();
        let allowed: Vec<_> =
            profile.syscalls().iter().flatten().flat_map(|group| group.names().iter().map(String::as_str)).collect();
        for name in [
            "mount",
            "umount2",
            "pivot_root",
            "unshare",
            "setns",
            "bpf",
            "ptrace",
            "kexec_load",
            "init_module",
            "finit_module",
            "keyctl",
            "add_key",
            "request_key",
            "open_by_handle_at",
            "reboot",
            "swapon",
            "clone3",
            "io_uring_setup",
            "userfaultfd",
            "perf_event_open",
            "move_mount",
            "fsopen",
            "open_tree",
            "mount_setattr",
        ] {
            assert!(!allowed.contains(&name), "{name}");
        }
    }
}
