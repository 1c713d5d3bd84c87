//! The verbs on the line console: the same definition, parsed from a typed line.

use clap::Parser;
use edged_model::api::{Answer, Request};

use super::args::{Args, Output, Verb};
use super::{render, table};
use crate::api::console::{Format, Verbs};

/// `edgectl`'s verbs.
pub struct ConsoleVerbs;

impl Verbs for ConsoleVerbs {
    fn parse(&self, line: &str) -> Result<(Request, Format), String> {
        let words = line.split_whitespace().filter(|word| *word != "edgectl");
        let args = Args::try_parse_from(["edgectl"].into_iter().chain(words)).map_err(|error| error.to_string())?;
        // A file name typed on a serial line would be one of the device's own files.
        if matches!(args.verb, Verb::Apply { .. }) {
            return Err("a manifest cannot be typed: push it\n".to_owned());
        }
        let only_workloads = matches!(args.verb, Verb::Ps { .. });
        let json = args.verb.output() == Output::Json;
        Ok((args.verb.request().map_err(|text| text + "\n")?, Format { json, only_workloads }))
    }

    fn render(&self, answer: &Answer, format: Format) -> String {
        let style = table::Style { color: false };
        match answer {
            Answer::End => String::new(),
            Answer::Error(reason) => format!("{reason}\n"),
            Answer::Status(status) if format.only_workloads && !format.json => table::workloads(status, style),
            answer if format.json => render(answer, Output::Json, &Verb::Status { output: Output::Json }),
            answer => table::answer(answer, style),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_lines_are_edgectls_own() {
        assert_eq!(ConsoleVerbs.parse("status").unwrap().0, Request::Status);
        assert_eq!(ConsoleVerbs.parse("edgectl ps").unwrap().0, Request::Status);
        assert!(ConsoleVerbs.parse("help").unwrap_err().contains("status"));
        assert!(ConsoleVerbs.parse("key generate --out x").is_err());
        assert!(ConsoleVerbs.parse("apply /etc/passwd").is_err());
        assert!(ConsoleVerbs.parse("\u{1b}[A").is_err());
    }
}
