//! The verbs on the line console: the same definition, parsed from a typed line.

use clap::{CommandFactory, FromArgMatches};
use edged_model::api::{Answer, Request};

use super::args::{Args, Verb};
use super::{Show, render, table};
use crate::api::console::Verbs;
use crate::authoring::image::ImageCommand;

/// Verbs that work on files of the workstation: on a serial line they would be the device's own files.
const ELSEWHERE: [&str; 5] = ["key", "trust", "manifest", "push", "apply"];

/// `edgectl`'s verbs.
pub struct ConsoleVerbs;

impl Verbs for ConsoleVerbs {
    type Format = Show;

    fn parse(&self, line: &str) -> Result<(Request, Show), String> {
        let words = line.split_whitespace();
        let skipped = usize::from(line.split_whitespace().next() == Some("edgectl"));
        let matches = definition().try_get_matches_from(std::iter::once("").chain(words.skip(skipped)));
        let args = matches.and_then(|matches| Args::from_arg_matches(&matches)).map_err(|error| error.to_string())?;
        if is_elsewhere(&args.verb) {
            let why = match args.verb {
                Verb::Exec(_) => "this console gives no terminal away: use edgectl over SSH or from your workstation",
                _ => "this verb works with files: use edgectl on your workstation",
            };
            return Err(format!("{why}\n"));
        }
        Ok((args.verb.request().map_err(|text| text + "\n")?, args.verb.show()))
    }

    fn render(&self, answer: &Answer, show: Show) -> String {
        render(answer, show, table::Style { color: false, raw_logs: false })
    }
}

/// What `help` shows here: the verbs that work here, 80 columns wide.
fn definition() -> clap::Command {
    let mut command = Args::command().no_binary_name(false).bin_name("").term_width(80);
    command = command.mut_arg("host", |arg| arg.hide(true)).after_help("Ctrl-C or q ends what goes on.");
    for name in ELSEWHERE {
        command = command.mut_subcommand(name, |verb| verb.hide(true));
    }
    command
}

fn is_elsewhere(verb: &Verb) -> bool {
    match verb {
        Verb::Key(_) | Verb::Trust(_) | Verb::Manifest(_) | Verb::Image(ImageCommand::Build(_)) | Verb::Push(_) => true,
        Verb::Apply { .. } | Verb::Exec(_) => true,
        Verb::Status { .. }
        | Verb::Ps { .. }
        | Verb::Inspect { .. }
        | Verb::Logs { .. }
        | Verb::Events { .. }
        | Verb::Start { .. }
        | Verb::Stop { .. }
        | Verb::Restart { .. }
        | Verb::Pause { .. }
        | Verb::Resume { .. }
        | Verb::Generations { .. }
        | Verb::Df { .. }
        | Verb::Images { .. }
        | Verb::Volumes { .. }
        | Verb::Image(ImageCommand::Load(_) | ImageCommand::Check { .. })
        | Verb::Prune { .. }
        | Verb::Reset { .. }
        | Verb::Diff { .. }
        | Verb::Rollback { .. }
        | Verb::Retry { .. }
        | Verb::Activate { .. }
        | Verb::Version { .. }
        | Verb::Reboot
        | Verb::Upgrade { .. }
        | Verb::Poweroff => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_lines_are_edgectls_own() {
        assert_eq!(ConsoleVerbs.parse("status").unwrap().0, Request::Status);
        assert_eq!(ConsoleVerbs.parse("edgectl ps").unwrap().0, Request::Status);
        let help = ConsoleVerbs.parse("help").unwrap_err();
        assert!(help.contains("status") && help.contains("Ctrl-C"), "{help}");
        assert!(!help.contains("manifest validate") && !help.contains("--host"), "{help}");
        for name in ELSEWHERE {
            assert!(!help.lines().any(|line| line.trim_start().starts_with(&format!("{name} "))), "{name}: {help}");
        }
        assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
        assert!(ConsoleVerbs.parse("key generate --out x").is_err());
        assert!(ConsoleVerbs.parse("apply /etc/passwd").is_err());
        assert!(ConsoleVerbs.parse("\u{1b}[A").is_err());
    }
}
