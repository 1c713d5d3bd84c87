//! This program's own file, out of a container's reach (execveat(2), mount_setattr(2)). Between entering a container and
//! exec a process is edged, and a program `#!/proc/self/exe` would even have the kernel run edged inside: whoever then
//! opens `/proc/PID/exe` for writing would own the host's runtime (CVE-2019-5736). So it runs from a file that nobody can
//! write: on a read-only mount, immutable, with fs-verity, or from a detached read-only mount of itself, which nobody can
//! make writable again because it is mounted nowhere. A memfd copy would cost the program's size in memory.

use std::ffi::{CString, OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatVfsMountFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use crate::mount::{self, Attributes};

pub const EXE: &str = "/proc/self/exe";

/// Whether nobody can write the file that runs.
pub fn is_sealed() -> Result<bool, Errno> {
    if rustix::fs::statvfs(EXE)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Ok(true);
    }
    let attributes = rustix::fs::statx(CWD, EXE, AtFlags::empty(), StatxFlags::empty())?.stx_attributes;
    Ok(attributes.intersects(StatxAttributes::VERITY | StatxAttributes::IMMUTABLE))
}

/// A detached, read-only mount of it (Linux 5.12).
pub fn sealed() -> Result<OwnedFd, Errno> {
    let file = open(Path::new(EXE))?;
    let tree = mount::clone_tree(file.as_fd(), false)?;
    let set = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID;
    mount::set_attributes(tree.as_fd(), Attributes { set, ..Attributes::default() })?;
    Ok(tree)
}

pub fn open(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Executes `program` with our own arguments and environment, but `without` and `with` these variables; comes back only
/// with an error. Not `Command::exec`: that unblocks signals first, and one that waits would end us.
pub fn execute(program: &OwnedFd, without: &[&str], with: &[(&str, &OsStr)]) -> Errno {
    let changed =
        |name: &OsString| without.iter().any(|gone| name == *gone) || with.iter().any(|(changed, _)| name == *changed);
    let kept = std::env::vars_os().filter(|(name, _)| !changed(name));
    let new = with.iter().map(|(name, value)| (OsString::from(name), (*value).to_owned()));
    let environment = kept.chain(new).map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        name
    });
    let words = |words: &mut dyn Iterator<Item = OsString>| {
        words.map(|word| CString::new(word.into_vec())).collect::<Result<Vec<_>, _>>()
    };
    let (Ok(arguments), Ok(environment)) = (words(&mut std::env::args_os()), words(&mut { environment })) else {
        return Errno::INVAL;
    };
    let Err(errno) = nix::unistd::fexecve(program, &arguments, &environment);
    Errno::from_raw_os_error(errno as i32)
}
