//! Everything that can go wrong, in words that name the object; said once, on stderr and in the engine's log.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use edged_sys::child::Stage;
use edged_sys::hook::HookError;
use edged_sys::spawn::{Failure, SpawnError};
use rustix::io::Errno;

use crate::arguments::Global;
use crate::cgroup::CgroupError;
use crate::kernel;
use crate::seccomp::SeccompError;
use crate::spec::SpecError;

#[derive(Debug, thiserror::Error)]
pub enum OciError {
    #[error("{text} (see `edged oci help`)")]
    Usage { text: String },
    #[error("container `{id}` does not exist")]
    NoSuchContainer { id: String },
    #[error("container `{id}` exists already")]
    Exists { id: String },
    #[error("`{id}` is no container id: letters, digits, `_`, `+`, `-` and `.`, at most 1024")]
    BadId { id: String },
    #[error("container `{id}` is {is}; {verb} needs it {wanted}")]
    WrongState { id: String, is: &'static str, verb: &'static str, wanted: &'static str },
    #[error("{}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{what}")]
    System {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("{}: {place}: {why}", path.display())]
    Config { path: PathBuf, place: String, why: String },
    #[error("{}", .0)]
    Spec(#[from] SpecError),
    #[error("{}", .0)]
    Seccomp(#[from] SeccompError),
    #[error(transparent)]
    Kernel(#[from] kernel::Lacks),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error("{}", describe(.failure))]
    Step { failure: Failure },
    #[error("the container's process ended while it was set up")]
    Vanished,
    #[error("`{0}` is not supported: {1}")]
    Refused(&'static str, &'static str),
    #[error("descriptor {number} of --preserve-fds {count} is not open")]
    NoPreservedFd { number: u32, count: u32 },
    #[error("the state has {bytes} bytes; hooks take {most}")]
    StateTooLarge { bytes: usize, most: usize },
}

impl OciError {
    pub fn file(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::File { path: path.to_owned(), source }
    }

    pub fn system(what: &str, error: impl Into<io::Error>) -> Self {
        Self::System { what: what.to_owned(), source: error.into() }
    }

    /// 127 for a program that is not there, 126 for one that cannot be run, as a shell has it; else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Step { failure } if failure.stage == Stage::Exec => match failure.errno {
                libc_errno::ENOENT => 127,
                _ => 126,
            },
            _ => 1,
        }
    }
}

mod libc_errno {
    pub const ENOENT: i32 = 2;
}

fn describe(failure: &Failure) -> String {
    let errno = Errno::from_raw_os_error(failure.errno);
    let place = failure.place();
    let text = io::Error::from(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let hint = match (failure.stage, errno) {
        (Stage::Exec, Errno::NOENT) => return format!("{place}: executable file not found in $PATH: {text}"),
        (Stage::TimeNamespace, Errno::INVAL) => "; does the kernel have CONFIG_TIME_NS?",
        (Stage::NetworkNamespace, Errno::INVAL) => "; does the kernel have CONFIG_NET_NS?",
        (Stage::CgroupNamespace, Errno::INVAL) => "; does the kernel have CONFIG_CGROUPS?",
        (Stage::Seccomp, Errno::INVAL | Errno::NOSYS) => "; does the kernel have CONFIG_SECCOMP_FILTER?",
        (Stage::Mounts, Errno::NODEV) => return format!("{place}: {text}; {}", unknown_filesystem(&failure.what)),
        (Stage::Label, Errno::NOENT) => "; no such profile is loaded, or the container has no /proc",
        (Stage::Label, Errno::INVAL) => "; the security module does not know this label",
        (Stage::Label, Errno::PERM | Errno::ACCESS) => "; the security module does not allow the change to this label",
        (Stage::Sysctls, Errno::NOENT) => "; the kernel does not have this parameter",
        (Stage::StartContainerHooks | Stage::CreateContainerHooks, Errno::CANCELED) => "; the hook failed",
        (Stage::Limits | Stage::OomScore, Errno::PERM | Errno::ACCESS) => "; it takes CAP_SYS_RESOURCE",
        _ => "",
    };
    format!("{place}: {text}{hint}")
}

/// What failed begins with the file system's type.
fn unknown_filesystem(what: &str) -> String {
    let fstype = what.split(' ').next().unwrap_or(what);
    let option = kernel::option_of_filesystem(fstype).map_or_else(String::new, |option| format!(" ({option})"));
    format!("the kernel does not have this file system{option}")
}

/// An error with all its causes on one line.
fn chain(error: &OciError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Writes to stderr and, where the engine named one, to its log in the form it asked for.
pub fn report(global: &Global, error: &OciError) {
    warn_as(global, "error", &chain(error));
}

/// What does not stop the command.
pub fn warn(global: &Global, text: &str) {
    warn_as(global, "warning", text);
}

fn warn_as(global: &Global, level: &str, text: &str) {
    let entry = if global.log_json {
        let time = crate::state::rfc3339(crate::state::now());
        serde_json::json!({ "level": level, "msg": text, "time": time }).to_string()
    } else {
        format!("level={level} msg={text:?}")
    };
    if let Some(path) = &global.log {
        let log = std::fs::File::options().create(true).append(true).open(path);
        let written = log.and_then(|mut log| writeln!(log, "{entry}"));
        if written.is_err() {
            eprintln!("edged-oci: cannot write to {}", path.display());
        }
    }
    eprintln!("edged-oci: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_that_is_not_there_is_told_with_its_option() {
        let failed = |what: &str| {
            describe(&Failure { stage: Stage::Mounts, errno: Errno::NODEV.raw_os_error(), what: what.to_owned() })
        };
        assert_eq!(
            failed("mqueue at /dev/mqueue"),
            "mounts (mqueue at /dev/mqueue): No such device; the kernel does not have this file system \
             (CONFIG_POSIX_MQUEUE)"
        );
        assert!(failed("zonefs /dev/x at /z").ends_with("does not have this file system"));
    }
}
