//! The program file, out of a container's reach ([`edged_sys::own_program`]). Where it cannot be written anyway (a device's
//! system image is read-only; `docs/oci-runtime.md` says how on a host) this costs two system calls; else edged executes
//! itself once more from a read-only mount of its own file.

use edged_sys::own_program;
use rustix::io::Errno;

use crate::error::OciError;

/// Comes back if the file is sealed.
pub fn ensure() -> Result<(), OciError> {
    let failed = |errno: Errno| OciError::system("sealing the program file (mount_setattr, Linux 5.12)", errno);
    if own_program::is_sealed().map_err(failed)? {
        return Ok(());
    }
    let file = own_program::sealed().map_err(failed)?;
    Err(failed(own_program::execute(&file, &[], &[])))
}
