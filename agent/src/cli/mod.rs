//! What `edgectl` is: one definition of the verbs, used by the program and by the line console.

/// The verbs and their options.
pub mod args;
/// The verbs on the line console.
pub mod console;
/// How to reach an agent.
pub mod host;
/// Answers as text for people.
pub mod table;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use edged_model::api::{Answer, Request};
use edged_model::reason::Reason;

use args::{Args, Output, Verb};
use host::Host;

/// The exit codes of `edgectl` (docs/edgectl.md).
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
        Verb::Image(command) => finish(command.run()),
        Verb::Push(command) => finish(command.run()),
        verb => {
            let output = verb.output();
            let request = match verb.request() {
                Ok(request) => request,
                Err(text) => {
                    eprintln!("edgectl: {text}");
                    return ExitCode::from(exit::USAGE);
                }
            };
            ask(&args.host, &request, output, &verb)
        }
    }
}

/// Prints what an offline verb says.
fn finish(result: anyhow::Result<String>) -> ExitCode {
    match result {
        Ok(text) => {
            print(&text);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("edgectl: {error:#}");
            ExitCode::from(exit::REFUSED)
        }
    }
}

fn ask(host: &str, request: &Request, output: Output, verb: &Verb) -> ExitCode {
    let connected = Host::parse(host).and_then(|host| host.connect());
    let mut connection = match connected {
        Ok(connection) => connection,
        Err(why) => {
            eprintln!("edgectl: {why}");
            return ExitCode::from(exit::UNREACHABLE);
        }
    };
    let mut code = ExitCode::SUCCESS;
    let answers = match connection.ask(request) {
        Ok(answers) => answers,
        Err(error) => {
            eprintln!("edgectl: {host}: {error}");
            return ExitCode::from(exit::UNREACHABLE);
        }
    };
    for answer in answers {
        match answer {
            Ok(Answer::End) => return code,
            Ok(Answer::Error(reason)) => {
                eprintln!("edgectl: {}", reason_text(&reason));
                return ExitCode::from(exit::REFUSED);
            }
            Ok(answer) => {
                if let (Answer::Status(status), Verb::Status { .. }) = (&answer, verb) {
                    if table::verdict(status).is_err() {
                        code = ExitCode::from(exit::NOT_WELL);
                    }
                }
                print(&render(&answer, output, verb));
            }
            Err(error) => {
                eprintln!("edgectl: {host}: {error}");
                return ExitCode::from(exit::UNREACHABLE);
            }
        }
    }
    code
}

fn reason_text(reason: &Reason) -> String {
    match reason.next.as_str() {
        "" => reason.text.clone(),
        next => format!("{}\n  {next}", reason.text),
    }
}

fn render(answer: &Answer, output: Output, verb: &Verb) -> String {
    match output {
        Output::Table => {
            let color = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            let style = table::Style { color };
            match (answer, verb) {
                (Answer::Status(status), Verb::Ps { .. }) => table::workloads(status, style),
                _ => table::answer(answer, style),
            }
        }
        // The inner value alone: programs ask for a status, not for an answer that is one.
        Output::Json => inner(answer, |value| serde_json::to_string_pretty(&value).unwrap_or_default() + "\n"),
        Output::Yaml => inner(answer, |value| serde_yaml_ng::to_string(&value).unwrap_or_default()),
    }
}

fn inner(answer: &Answer, write: impl Fn(serde_json::Value) -> String) -> String {
    match serde_json::to_value(answer) {
        Ok(serde_json::Value::Object(map)) if map.len() == 1 => map.into_iter().map(|(_, value)| write(value)).collect(),
        Ok(value) => write(value),
        Err(_) => String::new(),
    }
}

/// A reader that has gone (`edgectl logs | head`) is no error of ours.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
