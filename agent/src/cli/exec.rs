//! `edgectl exec`: asks for a command, gets its terminal or its pipes as descriptors, and copies. The agent may restart
//! meanwhile: only the exit code is lost with it.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use edged_model::api::{Answer, DETACH, ExecWish, MAX_FRAME_BYTES, Request, TerminalSize};
use edged_model::id::WorkloadName;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

use super::detach_keys::DetachKeys;
use super::exit;
use super::host::Host;
use super::table;

/// What was typed.
#[derive(Debug, clap::Args)]
pub struct ExecArgs {
    /// Give the command our standard input
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// NAME=value for the command
    #[arg(short, long)]
    env: Vec<String>,
    /// Typed in a terminal, these leave the command to itself; empty: none do
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", value_parser = DetachKeys::parse)]
    detach_keys: DetachKeys,
    workload: WorkloadName,
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl ExecArgs {
    pub fn request(&self) -> Request {
        let size = || {
            let seen = tcgetwinsize(rustix::stdio::stdin()).ok();
            seen.map_or(TerminalSize { rows: 24, columns: 80 }, |size| TerminalSize {
                rows: size.ws_row,
                columns: size.ws_col,
            })
        };
        let wish = ExecWish { command: self.command.clone(), env: self.env.clone(), terminal: self.tty.then(size) };
        Request::Exec { workload: self.workload.clone(), wish }
    }

    pub fn run(&self, host: &str) -> ExitCode {
        let path = match Host::parse(host) {
            Err(why) => return super::fail(exit::USAGE, &why),
            Ok(Host::Unix(path)) => path,
            // The same command over there; it comes back only with an error.
            Ok(ssh @ Host::Ssh { .. }) => match ssh.connect(std::env::args().skip(1)) {
                Err(why) => return super::fail(exit::UNREACHABLE, &why),
                Ok(_) => return ExitCode::FAILURE,
            },
            Ok(Host::Serial { .. }) => {
                return super::fail(
                    exit::USAGE,
                    "exec needs the local socket or ssh: a serial line carries no descriptors",
                );
            }
        };
        if self.tty && !isatty(rustix::stdio::stdin()) {
            return super::fail(exit::USAGE, "exec -t: standard input is no terminal");
        }
        let connected = UnixStream::connect(&path);
        let talked = connected.and_then(|stream| self.talk(&stream));
        match talked {
            Ok(code) => code,
            Err(error) => super::fail(exit::UNREACHABLE, &format!("{}: {error}", path.display())),
        }
    }

    fn talk(&self, mut stream: &UnixStream) -> io::Result<ExitCode> {
        let bytes = serde_cbor::to_vec(&self.request()).map_err(io::Error::other)?;
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes(), bytes.as_slice()].concat())?;
        let (answer, fds) = answer(stream)?;
        match answer {
            Answer::ExecStarted => {}
            Answer::Error(reason) => return Ok(super::fail(exit::REFUSED, &table::reason_text(&reason))),
            other => return Err(io::Error::other(format!("an answer that was not asked for: {other:?}"))),
        }
        // Before the first byte is copied: a change of size, or Ctrl-C while the terminal is not raw yet, is not lost.
        let signals = if self.tty { Some(window_changes()?) } else { None };
        let raw = if self.tty { Raw::enter() } else { Raw { before: None } };
        let keys = if self.tty { self.detach_keys.clone() } else { DetachKeys::default() };
        let is_left = copy(fds, self.interactive, signals.as_ref(), keys)?;
        drop(raw);
        if is_left {
            return self.leave(stream);
        }
        match self::answer(stream)?.0 {
            Answer::ExecEnded { code } => Ok(ExitCode::from(u8::try_from(code).unwrap_or(255))),
            Answer::Error(reason) => Ok(super::fail(exit::REFUSED, &table::reason_text(&reason))),
            other => Err(io::Error::other(format!("an answer that was not asked for: {other:?}"))),
        }
    }
}

impl ExecArgs {
    /// Says that the command goes on, and waits until the agent has heard it.
    fn leave(&self, mut stream: &UnixStream) -> io::Result<ExitCode> {
        stream.write_all(&[DETACH])?;
        match self::answer(stream) {
            // It ended at that very moment.
            Ok((Answer::ExecEnded { code }, _)) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(255))),
            _ => {
                eprintln!("\nedgectl: the command runs on in {}", self.workload);
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

/// One frame; the descriptors come with its first byte.
fn answer(stream: &UnixStream) -> io::Result<(Answer, Vec<OwnedFd>)> {
    let mut fds = Vec::new();
    let mut read = |bytes: &mut [u8]| -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            let (count, more) = edged_sys::fdpass::recv(stream.as_fd(), &mut bytes[filled..])?;
            if count == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the agent ended in the middle of its answer",
                ));
            }
            filled += count;
            fds.extend(more);
        }
        Ok(())
    };
    let mut length = [0; 4];
    read(&mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_FRAME_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "what came is no answer of an agent"));
    }
    let mut bytes = vec![0; length];
    read(&mut bytes)?;
    let answer = edged_model::cbor::read(&bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok((answer, fds))
}

/// Puts our terminal back when it is over, however that comes.
struct Raw {
    before: Option<Termios>,
}

impl Raw {
    fn enter() -> Self {
        let stdin = rustix::stdio::stdin();
        let before = tcgetattr(stdin).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
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

fn window_changes() -> io::Result<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGWINCH);
    mask.thread_block()?;
    Ok(SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

/// Copies until the command has closed its side, or the keys to leave it were typed (then true): with one descriptor a
/// terminal, else stdin, stdout, stderr.
fn copy(fds: Vec<OwnedFd>, interactive: bool, signals: Option<&SignalFd>, mut keys: DetachKeys) -> io::Result<bool> {
    let mut fds = fds.into_iter();
    let (mut input, mut outputs) = match (fds.next(), fds.next(), fds.next()) {
        (Some(master), None, None) => (Some(master.try_clone()?), vec![(master, rustix::stdio::stdout())]),
        (Some(stdin), Some(stdout), Some(stderr)) => {
            (Some(stdin), vec![(stdout, rustix::stdio::stdout()), (stderr, rustix::stdio::stderr())])
        }
        _ => return Err(io::Error::other("the agent handed over no streams")),
    };
    if !interactive {
        input = None;
    }
    let mut buffer = vec![0; 16 * 1024];
    while !outputs.is_empty() {
        let stdin = rustix::stdio::stdin();
        let mut watched: Vec<_> =
            outputs.iter().map(|(fd, _)| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)).collect();
        if input.is_some() {
            watched.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
        }
        if let Some(signals) = signals {
            watched.push(PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN));
        }
        match poll(&mut watched, None) {
            Err(Errno::INTR) => continue,
            polled => polled?,
        };
        let ready: Vec<_> = watched.iter().map(|one| !one.revents().is_empty()).collect();
        drop(watched);
        let stdin_is_ready = input.is_some() && ready[outputs.len()];
        if let Some(signals) = signals.filter(|_| *ready.last().unwrap_or(&false)) {
            while let Ok(Some(_)) = signals.read_signal() {}
            if let (Some((master, _)), Ok(size)) = (outputs.first(), tcgetwinsize(stdin)) {
                let _ = tcsetwinsize(master, size);
            }
        }
        let mut place = 0;
        outputs.retain(|(from, to)| {
            place += 1;
            !ready[place - 1] || pass(from.as_fd(), *to, &mut buffer, None).is_some()
        });
        if let Some(to) = input.as_ref().filter(|_| stdin_is_ready) {
            match pass(stdin, to.as_fd(), &mut buffer, Some(&mut keys)) {
                Some(true) => return Ok(true),
                Some(false) => {}
                // For a pipe that is the end of its input; a terminal goes on without ours.
                None => input = None,
            }
        }
    }
    Ok(false)
}

/// Passes on what is there, and says whether the keys to leave were in it; `None` at the end (for a terminal EIO,
/// pty(7)), or when nobody takes it.
fn pass(from: BorrowedFd<'_>, to: BorrowedFd<'_>, buffer: &mut [u8], keys: Option<&mut DetachKeys>) -> Option<bool> {
    match rustix::io::read(from, &mut *buffer) {
        Ok(0) => None,
        Ok(count) => {
            let (through, is_left) = match keys {
                Some(keys) => keys.pass(&buffer[..count]),
                None => (buffer[..count].to_vec(), false),
            };
            let mut rest = through.as_slice();
            while !rest.is_empty() {
                match rustix::io::write(to, rest) {
                    Ok(written) => rest = &rest[written..],
                    Err(Errno::INTR) => {}
                    Err(_) => return None,
                }
            }
            Some(is_left)
        }
        Err(Errno::INTR | Errno::AGAIN) => Some(false),
        Err(_) => None,
    }
}
