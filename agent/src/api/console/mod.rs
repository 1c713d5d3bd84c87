//! The line console: the verbs of `edgectl` on a serial line, without a shell. What may be done there is configuration;
//! only reading is the default. Whatever bytes come in, a line is bounded and ends in an answer.
//!
//! ```text
//!            "edged-frames 1"                  empty frame, noise, silence
//!   lines ───────────────────────> frames ───────────────────────────────> lines
//! ```
//! Framed mode carries the requests of `edgectl --host serial:`, several one after the other.

use std::io;
use std::path::PathBuf;

use edged_model::api::{Answer, FRAMES_READY, FRAMES_WANTED, MAX_FRAME_BYTES, Request};
use edged_model::reason::{Code, Reason};
use tokio::sync::mpsc;
use tokio::time::{Duration, timeout};

mod line;
mod tty;

use super::{Call, Caller, ask, frame};
use crate::config::ConsoleMode;
use line::{Line, Typed};
use tty::Tty;

/// A line that is not there yet, or was unplugged, is tried again.
const REOPEN_PAUSE: Duration = Duration::from_secs(5);
/// A framed session that says nothing becomes a console again.
const FRAMES_IDLE: Duration = Duration::from_secs(60);
/// A frame that does not come to its end at 9600 baud in this time was cut off.
const BYTES_IDLE: Duration = Duration::from_secs(10);
/// What is typed ahead while an answer is being printed.
const TYPED_AHEAD_MAX: usize = 1024;

/// Turns a typed line into a request and the answers into text. Given by whoever knows the verbs.
pub trait Verbs: Send + Sync + 'static {
    /// How the line wants its answer shown.
    type Format: Copy + Send;
    /// `Err`: what to print instead (help, a usage error).
    fn parse(&self, line: &str) -> Result<(Request, Self::Format), String>;
    fn render(&self, answer: &Answer, format: Self::Format) -> String;
}

/// Serves the console on `tty` for ever, opening it again when it is lost.
pub async fn run(tty: PathBuf, mode: ConsoleMode, prompt: String, calls: mpsc::Sender<Call>, verbs: impl Verbs) {
    let may_write = match mode {
        ConsoleMode::Off => return,
        ConsoleMode::ReadOnly => false,
        ConsoleMode::Full => true,
    };
    let caller = Caller { name: format!("console {}", tty.display()), may_write };
    loop {
        if let Ok(tty) = Tty::open(&tty) {
            let mut console =
                Console { tty, typed: Vec::new(), prompt: &prompt, calls: &calls, caller: &caller, verbs: &verbs };
            // It ends when the line is lost; that is told by its coming back.
            let _ = console.serve().await;
        }
        tokio::time::sleep(REOPEN_PAUSE).await;
    }
}

struct Console<'a, V> {
    tty: Tty,
    /// Bytes that came and were not looked at yet.
    typed: Vec<u8>,
    prompt: &'a str,
    calls: &'a mpsc::Sender<Call>,
    caller: &'a Caller,
    verbs: &'a V,
}

impl<V: Verbs> Console<'_, V> {
    async fn serve(&mut self) -> io::Result<()> {
        let mut line = Line::default();
        self.tty.print(&format!("\n{}> ", self.prompt)).await?;
        loop {
            match line.feed(self.next_byte().await?) {
                Typed::Echo(echo) => {
                    self.tty.write(&echo).await?;
                    continue;
                }
                Typed::Again => self.tty.print("\n").await?,
                Typed::Line(text) => {
                    self.tty.print("\n").await?;
                    self.obey(text.trim()).await?;
                }
            }
            self.tty.print(&format!("{}> ", self.prompt)).await?;
        }
    }

    /// An error when the line is gone. One at a time, because what follows a line may be frames.
    async fn next_byte(&mut self) -> io::Result<u8> {
        if self.typed.is_empty() {
            self.typed = self.tty.read().await?;
        }
        if self.typed.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(self.typed.remove(0))
    }

    async fn obey(&mut self, text: &str) -> io::Result<()> {
        match text {
            // There is no session to leave: the line is always open.
            "" | "exit" | "quit" | "logout" => return Ok(()),
            FRAMES_WANTED => return self.frames().await,
            _ => {}
        }
        let (request, format) = match self.verbs.parse(text) {
            Ok(parsed) => parsed,
            Err(help) => return self.tty.print(&help).await,
        };
        if let Err(why) = self.allowed(&request) {
            let shown = self.verbs.render(&Answer::Error(why), format);
            return self.tty.print(&shown).await;
        }
        let mut answers = ask(self.calls, request, self.caller.clone());
        loop {
            tokio::select! {
                answer = answers.recv() => match answer {
                    None | Some(Answer::End) => return Ok(()),
                    Some(answer) => {
                        self.tty.print(&self.verbs.render(&answer, format)).await?;
                        if matches!(answer, Answer::Error(_)) {
                            return Ok(());
                        }
                    }
                },
                bytes = self.tty.read() => {
                    let bytes = bytes?;
                    if bytes.is_empty() {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    // `logs -f` ends with Ctrl-C, Ctrl-D or q.
                    if let Some(at) = bytes.iter().position(|byte| matches!(byte, 0x03 | 0x04 | b'q')) {
                        self.typed = bytes[at + 1..].to_vec();
                        return Ok(());
                    }
                    let room = TYPED_AHEAD_MAX.saturating_sub(self.typed.len());
                    self.typed.extend(bytes.into_iter().take(room));
                }
            }
        }
    }

    fn allowed(&self, request: &Request) -> Result<(), Reason> {
        if self.caller.may_write || request.is_read() {
            return Ok(());
        }
        let why = Reason::new(Code::NotAllowedHere, "this console only reads");
        Err(why.next("log in and use `edgectl`, or set console.mode in agent.toml to `full`"))
    }

    /// Requests and answers as frames, until an empty one. Anything unexpected leads back to lines too: a person who
    /// presses a key there gets a prompt.
    async fn frames(&mut self) -> io::Result<()> {
        self.tty.write(FRAMES_READY.as_bytes()).await?;
        while let Some(bytes) = self.frame().await? {
            let asked = frame::request(&bytes).map_err(|error| error.reason());
            let asked = asked.and_then(|request| self.allowed(&request).map(|()| request));
            let request = match asked {
                Ok(request) => request,
                Err(why) => {
                    self.tty.write(&frame::of_answer(&Answer::Error(why))?).await?;
                    continue;
                }
            };
            let mut answers = ask(self.calls, request, self.caller.clone());
            loop {
                tokio::select! {
                    answer = answers.recv() => {
                        let answer = answer.unwrap_or(Answer::End);
                        self.tty.write(&frame::of_answer(&answer)?).await?;
                        if matches!(answer, Answer::End | Answer::Error(_)) {
                            break;
                        }
                    }
                    // Whoever speaks now has gone and come again, or wants no more.
                    bytes = self.tty.read() => {
                        bytes?;
                        return self.tty.write(&[0; 4]).await;
                    }
                }
            }
        }
        self.tty.write(&[0; 4]).await
    }

    /// The next frame; `None` when the session is over: an empty frame, one too large (noise), or silence.
    async fn frame(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = std::mem::take(&mut self.typed);
        loop {
            let promised = bytes.first_chunk::<4>().map(|length| u32::from_be_bytes(*length) as usize);
            match promised {
                Some(0) => {
                    self.typed = bytes.split_off(4);
                    return Ok(None);
                }
                Some(promised) if promised > MAX_FRAME_BYTES => return Ok(None),
                Some(promised) if bytes.len() >= 4 + promised => {
                    self.typed = bytes.split_off(4 + promised);
                    return Ok(Some(bytes.split_off(4)));
                }
                _ => {}
            }
            let patience = if bytes.is_empty() { FRAMES_IDLE } else { BYTES_IDLE };
            match timeout(patience, self.tty.read()).await {
                Err(_silence) => return Ok(None),
                Ok(more) => match more? {
                    more if more.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
                    more => bytes.extend(more),
                },
            }
        }
    }
}
