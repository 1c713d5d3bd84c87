//! Descriptors that come by number, through an exec: the agent's socket, the keeper's table.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::FdFlags;

/// Takes over descriptor `number`, once, at the start of the program, and marks it close-on-exec.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number < 3 {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: borrowed for one fcntl only, which says EBADF if the number is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: the number is open (just checked) and was left for us by the exec; callers take each number once, before
    // anything else of this process could have been given it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Lets `fd` live through the next exec.
pub fn leave(fd: impl AsFd) -> io::Result<()> {
    rustix::io::fcntl_setfd(fd, FdFlags::empty()).map_err(Into::into)
}
