//! The program file, out of a container's reach. Between entering a container and exec this process is edged, and a
//! program `#!/proc/self/exe` would even have the kernel run edged inside: whoever then opens `/proc/PID/exe` for writing
//! would own the host's runtime (CVE-2019-5736). So the file must be one that nobody can write: on a read-only mount, or
//! immutable, or with fs-verity. Where it is (a device's system image is read-only; `docs/oci-runtime.md` says how on a
//! host) this costs two system calls. Where it is not, edged executes itself once more from a detached, read-only mount
//! of its own file, which nobody can make writable again because it is mounted nowhere.

use std::ffi::{CString, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;

use edged_sys::mount::{self, Attributes};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatVfsMountFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use crate::error::OciError;

const EXE: &str = "/proc/self/exe";

/// MOUNT_ATTR_RDONLY and MOUNT_ATTR_NOSUID (linux/mount.h).
const READ_ONLY: u64 = 1 | 2;

/// Comes back if the file is sealed.
pub fn ensure() -> Result<(), OciError> {
    let failed = |errno: Errno| OciError::system("sealing the program file (mount_setattr, Linux 5.12)", errno);
    if is_sealed().map_err(failed)? {
        return Ok(());
    }
    let file = rustix::fs::open(EXE, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let tree = mount::clone_tree(file.as_fd(), false).map_err(failed)?;
    mount::set_attributes(tree.as_fd(), Attributes { set: READ_ONLY, ..Attributes::default() }).map_err(failed)?;
    let text = |word: OsString| CString::new(word.into_vec()).map_err(|_| failed(Errno::INVAL));
    let words = std::env::args_os().map(text).collect::<Result<Vec<_>, _>>()?;
    let environment = std::env::vars_os()
        .map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            text(name)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let Err(errno) = nix::unistd::fexecve(&tree, &words, &environment);
    Err(failed(Errno::from_raw_os_error(errno as i32)))
}

fn is_sealed() -> Result<bool, Errno> {
    if rustix::fs::statvfs(EXE)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Ok(true);
    }
    let attributes = rustix::fs::statx(CWD, EXE, AtFlags::empty(), StatxFlags::empty())?.stx_attributes;
    Ok(attributes.intersects(StatxAttributes::VERITY | StatxAttributes::IMMUTABLE))
}
