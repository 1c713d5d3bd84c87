//! What `edgectl` is: one definition of the verbs, used by the program and by the line console.

/// The verbs and their options.
pub mod args;
/// The verbs on the line console.
pub mod console;
/// The keys that leave a command to itself.
mod detach_keys;
/// A command in a workload, with our terminal.
pub mod exec;
/// How to reach an agent.
pub mod host;
/// The workstation's end of a serial line.
mod serial;
/// Answers as text for people.
pub mod table;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use edged_model::api::{Answer, Request};
use edged_model::quantity::Bytes;

use crate::authoring::image::ImageCommand;
use args::{Args, Output, Verb};
use host::Host;

/// The exit codes of `edgectl`; 0 is success. `edgectl --help` prints them.
pub mod exit {
    /// The agent, or a check, refused; the reason was printed.
    pub const REFUSED: u8 = 1;
    /// The command line makes no sense (clap's own code).
    pub const USAGE: u8 = 2;
    /// The agent cannot be reached.
    pub const UNREACHABLE: u8 = 3;
    /// `status`: the device can be reached, and something on it is not well.
    pub const NOT_WELL: u8 = 4;
}

/// The whole program.
pub fn run() -> ExitCode {
    let args = Args::parse();
    match args.verb {
        Verb::Key(command) => finish(command.run()),
        Verb::Trust(command) => finish(command.run()),
        Verb::Manifest(command) => finish(command.run()),
        Verb::Image(ImageCommand::Build(build)) => finish(build.run()),
        Verb::Push(command) => finish(command.run()),
        Verb::Exec(exec) => exec.run(&args.host),
        verb => match verb.request() {
            Ok(request) => ask(&args.host, &request, verb.show()),
            Err(text) => fail(exit::USAGE, &text),
        },
    }
}

/// Prints what an offline verb says.
fn finish(result: anyhow::Result<String>) -> ExitCode {
    match result {
        Ok(text) => {
            // A reader that has gone is no error of ours.
            let _ = print(&text);
            ExitCode::SUCCESS
        }
        Err(error) => fail(exit::REFUSED, &format!("{error:#}")),
    }
}

fn ask(host: &str, request: &Request, show: Show) -> ExitCode {
    let words = std::env::args().skip(1);
    let mut connection = match Host::parse(host) {
        Err(why) => return fail(exit::USAGE, &why),
        Ok(parsed) => match parsed.connect(words) {
            Err(why) => return fail(exit::UNREACHABLE, &why),
            Ok(connection) => connection,
        },
    };
    if let Err(error) = connection.ask(request) {
        return fail(exit::UNREACHABLE, &format!("{host}: {error}"));
    }
    let color = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let style = table::Style { color, raw_logs: !std::io::stdout().is_terminal() };
    let mut code = ExitCode::SUCCESS;
    loop {
        match connection.answer() {
            Ok(Some(Answer::End)) => return code,
            Ok(Some(Answer::Progress { done, total })) => progress(done, total),
            Ok(Some(Answer::Error(reason))) => return fail(exit::REFUSED, &table::reason_text(&reason)),
            Ok(Some(answer)) => {
                if let Answer::Checked(layers) = &answer
                    && layers.iter().any(|layer| !layer.damage.is_empty())
                {
                    code = ExitCode::from(exit::REFUSED);
                }
                if let (Answer::Status(status), false) = (&answer, show.only_workloads)
                    && table::verdict(status).is_err()
                {
                    code = ExitCode::from(exit::NOT_WELL);
                }
                if print(&render(&answer, show, style)).is_err() {
                    return code;
                }
            }
            Ok(None) => {
                return fail(
                    exit::UNREACHABLE,
                    &format!("{host}: the agent ended in the middle of its answer: try again"),
                );
            }
            Err(error) => return fail(exit::UNREACHABLE, &format!("{host}: {error}")),
        }
    }
}

/// One line that is written over, for people only.
fn progress(done: Bytes, total: Bytes) {
    let mut out = std::io::stderr().lock();
    if out.is_terminal() {
        let end = if done == total { "\r\x1b[K" } else { "" };
        // A terminal that has gone is no error of ours.
        let _ = write!(out, "\r\x1b[K{} of {}{end}", done.human(), total.human());
        let _ = out.flush();
    }
}

fn fail(code: u8, text: &str) -> ExitCode {
    eprintln!("edgectl: {text}");
    ExitCode::from(code)
}

/// How the answers to one verb are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Show {
    pub output: Output,
    /// `ps` shows of a status the workloads alone.
    pub only_workloads: bool,
    /// `df -v`: what does not fit on a screen too.
    pub verbose: bool,
}

/// One answer as text. Pure.
pub fn render(answer: &Answer, show: Show, style: table::Style) -> String {
    match (show.output, answer) {
        (_, Answer::End | Answer::Progress { .. }) => String::new(),
        (Output::Table, Answer::Status(status)) if show.only_workloads => table::workloads(status, style),
        (Output::Table, Answer::Df(used)) => table::disk::used(used, show.verbose),
        (Output::Table, _) | (_, Answer::Error(_)) => table::answer(answer, style),
        // What comes bit by bit is a line each, so that a program need not wait for the end of a list.
        (Output::Json, Answer::Log(_) | Answer::Event(_)) => {
            serde_json::to_string(&inner(answer, show)).unwrap_or_default() + "\n"
        }
        (Output::Yaml, Answer::Log(_) | Answer::Event(_)) => {
            format!("---\n{}", serde_yaml_ng::to_string(&inner(answer, show)).unwrap_or_default())
        }
        (Output::Json, _) => serde_json::to_string_pretty(&inner(answer, show)).unwrap_or_default() + "\n",
        (Output::Yaml, _) => serde_yaml_ng::to_string(&inner(answer, show)).unwrap_or_default(),
    }
}

/// The inner value alone: programs ask for a status, not for an answer that is one.
fn inner(answer: &Answer, show: Show) -> serde_json::Value {
    let whole = match (serde_json::to_value(answer).unwrap_or_default(), answer) {
        (whole, Answer::End) => whole,
        (serde_json::Value::Object(map), _) => map.into_iter().next().map(|(_, value)| value).unwrap_or_default(),
        (whole, _) => whole,
    };
    match whole {
        serde_json::Value::Object(mut map) if show.only_workloads => map.remove("workloads").unwrap_or_default(),
        whole => whole,
    }
}

/// A reader that has gone (`edgectl logs | head`) ends us, and is no error of ours.
fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
