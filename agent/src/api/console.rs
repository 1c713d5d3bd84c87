//! The line console: the verbs of `edgectl` on a serial line, without a shell. What may be done there is configuration;
//! only reading is the default. Whatever bytes come in, a line is bounded and ends in an answer.

use std::io;
use std::path::{Path, PathBuf};

use edged_model::api::Answer;
use edged_model::reason::{Code, Reason};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::mpsc;

use super::{Call, Caller, ask};
use crate::config::ConsoleMode;

/// A typed line is never longer.
const LINE_MAX_BYTES: u64 = 1024;

/// Turns a typed line into a request and the answers into text. Given by whoever knows the verbs.
pub trait Verbs: Send + 'static {
    /// `Err`: what to print instead (help, a usage error).
    fn parse(&self, line: &str) -> Result<(edged_model::api::Request, Format), String>;
    fn render(&self, answer: &Answer, format: Format) -> String;
}

/// How an answer is to be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    pub json: bool,
    /// `ps` shows of a status the table alone.
    pub only_workloads: bool,
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
        // A line that is not there yet, or was unplugged, is tried again.
        let _ = serve(&tty, &prompt, &calls, &caller, &verbs).await;
        tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    }
}

async fn serve(
    tty: &Path,
    prompt: &str,
    calls: &mpsc::Sender<Call>,
    caller: &Caller,
    verbs: &impl Verbs,
) -> io::Result<()> {
    let mut options = tokio::fs::OpenOptions::new();
    options.read(true).write(true);
    let mut lines = BufReader::new(options.open(tty).await?);
    let mut out = options.open(tty).await?;
    loop {
        out.write_all(format!("\r\n{prompt}> ").as_bytes()).await?;
        out.flush().await?;
        let mut line = Vec::new();
        let count = (&mut lines).take(LINE_MAX_BYTES).read_until(b'\n', &mut line).await?;
        if count == 0 {
            return Ok(());
        }
        let text = printable(&line);
        if text.is_empty() {
            continue;
        }
        let shown = match verbs.parse(&text) {
            Err(help) => help,
            Ok((request, _)) if !caller.may_write && !request.is_read() => {
                let why = Reason::new(Code::NotAllowedHere, "this console only reads")
                    .next("set console.mode in agent.toml to `full`");
                why.to_string()
            }
            Ok((request, format)) => {
                let mut answers = ask(calls, request, caller.clone());
                while let Some(answer) = answers.recv().await {
                    let text = verbs.render(&answer, format);
                    out.write_all(text.replace('\n', "\r\n").as_bytes()).await?;
                    if matches!(answer, Answer::End | Answer::Error(_)) {
                        break;
                    }
                }
                String::new()
            }
        };
        out.write_all(shown.replace('\n', "\r\n").as_bytes()).await?;
    }
}

/// What of a line was meant: no control bytes, no more than a line.
fn printable(line: &[u8]) -> String {
    String::from_utf8_lossy(line).chars().filter(|c| !c.is_control()).collect::<String>().trim().to_owned()
}
