//! A serial line: say, and wait for an answer. A thread of its own empties the socket, so that QEMU never waits for us.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::wait;

/// Lines of the past that an error shows.
const CONTEXT_LINES: usize = 40;

#[derive(Debug, Default)]
struct Heard {
    text: String,
    is_over: bool,
}

/// One end of a line; the other is in the device.
#[derive(Debug)]
pub struct Line {
    name: &'static str,
    socket: UnixStream,
    heard: Arc<(Mutex<Heard>, Condvar)>,
    /// What has been waited for and found lies before this.
    cursor: usize,
}

impl Line {
    /// Connects to the socket that QEMU makes at `path`.
    pub fn connect(name: &'static str, path: &Path, within: Duration) -> Result<Self> {
        let socket = wait::until(name, within, || Ok(Some(UnixStream::connect(path)?)))?;
        let heard = Arc::new((Mutex::new(Heard::default()), Condvar::new()));
        let (mut reader, shared) = (socket.try_clone()?, Arc::clone(&heard));
        std::thread::Builder::new().name(name.to_owned()).spawn(move || listen(&mut reader, &shared))?;
        Ok(Self { name, socket, heard, cursor: 0 })
    }

    /// Types a line.
    pub fn say(&mut self, line: &str) -> Result<()> {
        self.socket.write_all(format!("{line}\n").as_bytes()).with_context(|| format!("{}: cannot write", self.name))
    }

    /// Waits until `text` has come, after what was waited for before; gives back all from there to the end of the line
    /// it stands in.
    pub fn wait_for(&mut self, text: &str, within: Duration) -> Result<String> {
        self.wait_for_any(&[text], within).map(|(_, seen)| seen)
    }

    /// The same for the first of several; which one, and the text.
    pub fn wait_for_any(&mut self, texts: &[&str], within: Duration) -> Result<(usize, String)> {
        let deadline = Instant::now() + within;
        let (mutex, condition) = &*self.heard;
        let mut heard = mutex.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let new = &heard.text[self.cursor..];
            let first = texts.iter().enumerate().filter_map(|(i, t)| new.find(t).map(|at| (at + t.len(), i))).min();
            if let Some((end, index)) = first {
                let end = new[end..].find('\n').map_or(new.len(), |more| end + more);
                let seen = new[..end].to_owned();
                self.cursor += end;
                return Ok((index, seen));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if heard.is_over || left.is_zero() {
                let why = if heard.is_over { "the machine ended".to_owned() } else { format!("not within {within:?}") };
                bail!("{}: waited for {texts:?}, {why}; the last lines:\n{}", self.name, tail(&heard.text));
            }
            heard = condition.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Types `line` and gives back what comes until `prompt` stands there again.
    pub fn ask(&mut self, line: &str, prompt: &str, within: Duration) -> Result<String> {
        self.skip();
        self.say(line)?;
        let answer = self.wait_for(prompt, within)?;
        let lines = answer.trim_end_matches(prompt).lines().map(|l| l.trim_end_matches('\r'));
        // The first line is the echo of what was typed.
        Ok(lines.skip_while(|l| l.trim_start_matches(prompt).trim() == line).collect::<Vec<_>>().join("\n"))
    }

    /// Lets go of the line: somebody else may connect to the socket.
    pub fn hang_up(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Forgets what has come so far: the next wait is for something new.
    pub fn skip(&mut self) {
        self.cursor = self.heard.0.lock().unwrap_or_else(PoisonError::into_inner).text.len();
    }

    /// Everything heard since the machine was switched on.
    pub fn history(&self) -> String {
        self.heard.0.lock().unwrap_or_else(PoisonError::into_inner).text.clone()
    }

    /// The last lines, for an error message.
    pub fn tail(&self) -> String {
        tail(&self.history())
    }
}

fn listen(socket: &mut UnixStream, shared: &(Mutex<Heard>, Condvar)) {
    let mut pending = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = socket.read(&mut buffer).unwrap_or(0);
        pending.extend_from_slice(&buffer[..count]);
        let mut heard = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A character may be cut in two by the buffer's end: the rest of it waits for the next read.
        let whole = match std::str::from_utf8(&pending) {
            Err(error) if error.error_len().is_none() && count > 0 => error.valid_up_to(),
            _ => pending.len(),
        };
        let rest = pending.split_off(whole);
        heard.text.push_str(&String::from_utf8_lossy(&pending));
        pending = rest;
        heard.is_over = count == 0;
        let over = heard.is_over;
        drop(heard);
        shared.1.notify_all();
        if over {
            return;
        }
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(CONTEXT_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Line, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let heard = Arc::new((Mutex::new(Heard::default()), Condvar::new()));
        let (mut reader, shared) = (ours.try_clone().unwrap(), Arc::clone(&heard));
        std::thread::spawn(move || listen(&mut reader, &shared));
        (Line { name: "test", socket: ours, heard, cursor: 0 }, theirs)
    }

    #[test]
    fn waits_take_up_where_the_last_one_ended() {
        let (mut line, mut far) = pair();
        far.write_all(b"one ready\r\ntwo ready\r\n").unwrap();
        assert!(line.wait_for("ready", wait::LONG).unwrap().contains("one"));
        assert!(line.wait_for("ready", wait::LONG).unwrap().contains("two"));
        drop(far);
        let error = line.wait_for("ready", wait::LONG).unwrap_err().to_string();
        assert!(error.contains("the machine ended"), "{error}");
    }

    #[test]
    fn a_question_gives_the_answer_without_echo_and_prompt() {
        let (mut line, mut far) = pair();
        let answer = std::thread::spawn(move || {
            let mut typed = [0; 7];
            far.read_exact(&mut typed).unwrap();
            far.write_all(b"status\r\nall well\r\nedged> ").unwrap();
            far
        });
        assert_eq!(line.ask("status", "edged> ", wait::LONG).unwrap(), "all well");
        drop(answer.join().unwrap());
    }
}
