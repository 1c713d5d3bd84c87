//! A thread that takes only what nobody else wants: of the disk by its I/O class (ioprio_set(2); it counts where the
//! scheduler of the block device has classes, bfq and mq-deadline), of the processors by its niceness (setpriority(2), which
//! on Linux is a thread's). Not `SCHED_IDLE`: a thread that never runs would hold for ever what others wait for, such as the
//! lock of a directory.

use std::io;

/// `IOPRIO_WHO_PROCESS`; with 0, the calling thread.
const WHO_PROCESS: libc::c_int = 1;
/// `IOPRIO_CLASS_IDLE`, which has no levels, above `IOPRIO_CLASS_SHIFT`.
const IDLE: libc::c_int = 3 << 13;
const LAST: libc::c_int = 19;

/// Makes the calling thread such a one. There is no way back.
pub fn lower() -> io::Result<()> {
    // SAFETY: takes three integers and touches no memory of this process.
    let set = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, IDLE) };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    rustix::process::setpriority_process(None, LAST)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_thread_that_becomes_idle_and_no_other() {
        // SAFETY: takes two integers and touches no memory of this process.
        let class = || unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, 0) } >> 13;
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = (class(), nice());
        let inside = std::thread::spawn(move || {
            lower().unwrap();
            (class(), nice())
        });
        assert_eq!(inside.join().unwrap(), (3, 19));
        assert_eq!((class(), nice()), before);
    }
}
