//! The terminal of a program: its master is given to an engine, or relayed to the terminal we have ourselves.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

use crate::error::OciError;
use crate::wait::{self, Signals};

/// Sends the master to whoever listens at `socket` (runtimes agree on one message with one descriptor).
pub fn give_away(socket: &Path, master: &OwnedFd) -> Result<(), OciError> {
    let stream = std::os::unix::net::UnixStream::connect(socket).map_err(OciError::file(socket))?;
    edged_sys::fdpass::send(stream.as_fd(), b"/dev/ptmx", &[master.as_fd()]).map_err(OciError::file(socket))
}

/// Puts our terminal back when it is over, however that comes.
struct Raw {
    before: Option<Termios>,
}

impl Raw {
    fn enter() -> Self {
        let stdin = rustix::stdio::stdin();
        let before = if isatty(stdin) { tcgetattr(stdin).ok() } else { None };
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            // A terminal that cannot be raw is still one.
            let _ = tcsetattr(stdin, OptionalActions::Now, &raw);
        }
        Self { before }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, before);
        }
    }
}

/// Copies between our standard streams and `master` until the program has ended and its last word was written.
pub fn relay(master: BorrowedFd<'_>, signals: &Signals, program: BorrowedFd<'_>, pid: i32) -> Result<u8, OciError> {
    let failed = |errno: Errno| OciError::system("the terminal", errno);
    let _raw = Raw::enter();
    follow_size(master);
    let mut buffer = vec![0; 16 * 1024];
    let mut input = true;
    let mut code = None;
    loop {
        let stdin_events = if input { PollFlags::IN } else { PollFlags::empty() };
        let mut watched = [
            PollFd::from_borrowed_fd(master, PollFlags::IN),
            PollFd::from_borrowed_fd(signals.file.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(rustix::stdio::stdin(), stdin_events),
        ];
        match poll(&mut watched, None) {
            Err(Errno::INTR) => continue,
            polled => polled.map_err(failed)?,
        };
        let [from_program, from_signals, from_us] = [0, 1, 2].map(|place: usize| watched[place].revents());
        if from_signals.intersects(PollFlags::IN) {
            match signals.pass_on(program)? {
                Some(Signal::SIGWINCH) => follow_size(master),
                Some(Signal::SIGCHLD) if code.is_none() => code = wait::ended(pid)?,
                _ => {}
            }
        }
        if !from_program.is_empty() {
            match rustix::io::read(master, &mut buffer) {
                // EIO: the last one who had the other side has closed it (pty(7)).
                Ok(0) | Err(Errno::IO) => break,
                Ok(count) => write_all(rustix::stdio::stdout(), &buffer[..count]).map_err(failed)?,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => return Err(failed(errno)),
            }
        } else if code.is_some() {
            // It has ended, and what it left in the background has nothing to say now.
            break;
        }
        if input && !from_us.is_empty() {
            match rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
                Ok(0) | Err(Errno::IO) => input = false,
                Ok(count) => write_all(master, &buffer[..count]).map_err(failed)?,
                Err(_) => {}
            }
        }
    }
    match code {
        Some(code) => Ok(code),
        None => signals.wait_for(pid, program),
    }
}

fn follow_size(master: BorrowedFd<'_>) {
    let stdin = rustix::stdio::stdin();
    if let (true, Ok(size)) = (isatty(stdin), tcgetwinsize(stdin)) {
        // The program keeps the size it has.
        let _ = tcsetwinsize(master, size);
    }
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut room = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
                let _ = poll(&mut room, None);
            }
            written => bytes = &bytes[written?..],
        }
    }
    Ok(())
}
