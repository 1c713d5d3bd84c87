//! The workstation's end of a serial line: raw, at the asked speed, and brought into framed mode whatever state the
//! console at the other end is in.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use edged_model::api::{FRAMES_READY, FRAMES_WANTED};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::termios::{ControlModes, OptionalActions, tcgetattr, tcsetattr};

/// How long one try to reach framed mode waits for the console's word.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// The first try may end a framed session that somebody left open, the second then meets a console.
const TRIES: u32 = 3;
/// A line that falls silent in the middle of an answer. `logs -f` may be silent for as long as it likes: see `read`.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// A line in framed mode.
pub struct Line {
    file: File,
}

pub fn connect(tty: &Path, baud: Option<u32>) -> io::Result<Line> {
    let flags = OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(tty)?;
    let mut settings = tcgetattr(&file)?;
    settings.make_raw();
    settings.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
    if let Some(baud) = baud {
        settings.set_speed(known(baud)?)?;
    }
    tcsetattr(&file, OptionalActions::Now, &settings)?;
    let mut line = Line { file };
    for _ in 0..TRIES {
        // Ctrl-C ends what runs there, the return ends what was typed there.
        line.write_all(format!("\x03\r{FRAMES_WANTED}\r").as_bytes())?;
        if line.hears(FRAMES_READY.as_bytes(), Instant::now() + HANDSHAKE)? {
            return Ok(line);
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

pub fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::TimedOut => {
            "no console of edged answers there: is it on (`console.tty` in agent.toml), and is the speed right?"
        }
        io::ErrorKind::PermissionDenied => "are you in the group that owns it (often `dialout`)?",
        io::ErrorKind::NotFound => "is the adapter plugged in?",
        io::ErrorKind::InvalidInput => "9600, 19200, 38400, 57600, 115200, 230400, 460800 and 921600 are known speeds",
        _ => "is it a terminal?",
    }
}

fn known(baud: u32) -> io::Result<u32> {
    match baud {
        9_600 | 19_200 | 38_400 | 57_600 | 115_200 | 230_400 | 460_800 | 921_600 => Ok(baud),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a speed of {baud}"))),
    }
}

impl Line {
    fn wait(&self, what: PollFlags, timeout: PollTimeout) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.file.as_fd(), what)];
        match poll(&mut fds, timeout) {
            Err(nix::errno::Errno::EINTR) => Ok(false),
            ready => Ok(ready? > 0),
        }
    }

    /// Reads on until `word` has come. Everything before it (a prompt, an echo, noise) is thrown away.
    fn hears(&mut self, word: &[u8], deadline: Instant) -> io::Result<bool> {
        let mut matched = 0;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(left) = PollTimeout::try_from(left) else { return Ok(false) };
            if left == PollTimeout::ZERO {
                return Ok(false);
            }
            if !self.wait(PollFlags::POLLIN, left)? {
                continue;
            }
            // One byte at a time: what follows the word is a frame's.
            let mut byte = [0];
            match self.file.read(&mut byte) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                read => {
                    if read? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
            }
            // The word begins with the only carriage return that a line feed and its second byte can follow.
            matched = match byte[0] {
                b if b == word[matched] => matched + 1,
                b if b == word[0] => 1,
                _ => 0,
            };
            if matched == word.len() {
                return Ok(true);
            }
        }
    }
}

impl Read for Line {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            self.wait(PollFlags::POLLIN, PollTimeout::NONE)?;
            match self.file.read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
        }
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let deadline = Instant::now() + WRITE_PATIENCE;
        loop {
            let left = PollTimeout::try_from(deadline.saturating_duration_since(Instant::now()));
            self.wait(PollFlags::POLLOUT, left.unwrap_or(PollTimeout::ZERO))?;
            match self.file.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
