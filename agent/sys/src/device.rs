//! The machine itself: its watchdog, its modules, its clock, for PID 1; and its network interfaces.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use nix::time::{ClockId, clock_gettime, clock_settime};
use rustix::io::Errno;
use rustix::ioctl::{Setter, Updater, ioctl};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

nix::ioctl_readwrite!(watchdog_settimeout, b'W', 6, libc::c_int);
nix::ioctl_read!(watchdog_gettimeout, b'W', 7, libc::c_int);

/// A hardware or software watchdog (Documentation/watchdog/watchdog-api.rst). Dropping it leaves it running: a machine
/// whose PID 1 is gone shall reset.
#[derive(Debug)]
pub struct Watchdog {
    device: File,
    timeout_secs: i32,
}

impl Watchdog {
    /// Opens `path`, which starts the timer. A driver that keeps its own timeout is taken as it is.
    pub fn open(path: &Path, timeout_secs: i32) -> io::Result<Self> {
        let device = File::options().write(true).open(path)?;
        let mut seconds = timeout_secs;
        // SAFETY: WDIOC_SETTIMEOUT reads and writes one int, which lives across the call.
        let result = unsafe { watchdog_settimeout(device.as_raw_fd(), &raw mut seconds) };
        match result {
            Ok(_) => Ok(Self { device, timeout_secs: seconds }),
            Err(nix::errno::Errno::ENOTTY | nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::EINVAL) => {
                // SAFETY: WDIOC_GETTIMEOUT writes one int, which lives across the call.
                let asked = unsafe { watchdog_gettimeout(device.as_raw_fd(), &raw mut seconds) };
                Ok(Self { device, timeout_secs: if asked.is_ok() { seconds } else { timeout_secs } })
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// What the driver really does, which may not be what was asked for.
    pub fn timeout_secs(&self) -> i32 {
        self.timeout_secs
    }

    /// "All is well."
    pub fn pet(&self) -> io::Result<()> {
        rustix::io::write(&self.device, b"1").map(drop).map_err(Into::into)
    }

    /// Stops it (the "magic close"), for an orderly power-off.
    pub fn disarm(self) -> io::Result<()> {
        rustix::io::write(&self.device, b"V").map(drop).map_err(Into::into)
    }
}

/// `MODULE_INIT_COMPRESSED_FILE` (linux/module.h, Linux 5.17): the kernel unpacks `.ko.xz` itself.
const INIT_COMPRESSED_FILE: libc::c_int = 4;

/// Loads a module (finit_module(2)). One that is loaded already is fine.
pub fn load_module(path: &Path, parameters: &CStr) -> io::Result<()> {
    let file = File::open(path)?;
    let compressed = path.extension().is_some_and(|extension| extension != "ko");
    let flags = if compressed { INIT_COMPRESSED_FILE } else { 0 };
    match rustix::system::finit_module(&file, parameters, flags) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// CLOCK_BOOTTIME in milliseconds (clock_gettime(2)).
pub fn boot_ms() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        let (secs, nanos) = (u64::try_from(time.tv_sec()).unwrap_or(0), u64::try_from(time.tv_nsec()).unwrap_or(0));
        secs * 1000 + nanos / 1_000_000
    })
}

/// CLOCK_REALTIME in seconds.
#[expect(clippy::useless_conversion, reason = "time_t may have 32 bits on armv7")]
pub fn wall_seconds() -> i64 {
    clock_gettime(ClockId::CLOCK_REALTIME).map_or(0, |time| time.tv_sec().into())
}

/// Sets the wall clock to `unix_seconds` if it is behind. Returns whether it was.
pub fn raise_clock(unix_seconds: i64) -> io::Result<bool> {
    raise_clock_ms(unix_seconds.saturating_mul(1000))
}

/// The same, to the millisecond.
#[expect(clippy::useless_conversion, reason = "time_t and long may have 32 bits on armv7")]
pub fn raise_clock_ms(unix_ms: i64) -> io::Result<bool> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
    let now_ms = i64::from(now.tv_sec()).saturating_mul(1000).saturating_add(i64::from(now.tv_nsec()) / 1_000_000);
    if now_ms >= unix_ms {
        return Ok(false);
    }
    let seconds = unix_ms.div_euclid(1000).try_into().map_err(io::Error::other)?;
    let nanos = (unix_ms.rem_euclid(1000) * 1_000_000).try_into().map_err(io::Error::other)?;
    clock_settime(ClockId::CLOCK_REALTIME, nix::sys::time::TimeSpec::new(seconds, nanos))?;
    Ok(true)
}

const GET_FLAGS: rustix::ioctl::Opcode = libc::SIOCGIFFLAGS as rustix::ioctl::Opcode;
const SET_FLAGS: rustix::ioctl::Opcode = libc::SIOCSIFFLAGS as rustix::ioctl::Opcode;

/// Brings a network interface up in the caller's network namespace (netdevice(7)). `socket`: any socket. System calls and
/// nothing else: a thread that shares its memory with others that do not know of it may call it.
pub fn interface_up(socket: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    // SAFETY: `ifreq` is plain old data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::INVAL.into());
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    // SAFETY: what this number reads and writes is one `ifreq`.
    let get = unsafe { Updater::<GET_FLAGS, _>::new(&mut request) };
    // SAFETY: the kernel reads the name and writes the flags, and keeps no pointer.
    unsafe { ioctl(socket, get) }?;
    // SAFETY: SIOCGIFFLAGS has just filled this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: what this number reads is one `ifreq`.
    let set = unsafe { Setter::<SET_FLAGS, _>::new(request) };
    // SAFETY: the kernel reads it during the call.
    unsafe { ioctl(socket, set) }?;
    Ok(())
}

/// The same of a new network namespace's loopback, with a socket that takes no protocol of the kernel's.
pub(crate) fn loopback_up() -> Result<(), Errno> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    interface_up(socket.as_fd(), "lo").map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_ahead_stays() {
        assert!(!raise_clock(0).unwrap());
    }
}
