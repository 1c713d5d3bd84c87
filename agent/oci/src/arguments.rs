//! The command line of an OCI runtime, as engines write it: global options, a verb, the verb's options before or after
//! the container's id. Read by hand: it costs microseconds at every start.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use crate::error::OciError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Help,
    Version,
    Create,
    Run,
    Start,
    Exec,
    State,
    List,
    Ps,
    Events,
    Features,
    Spec,
    Kill,
    Delete,
    Pause,
    Resume,
    Update,
}

/// Options before the verb.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Global {
    pub root: PathBuf,
    pub log: Option<PathBuf>,
    pub log_json: bool,
    pub debug: bool,
}

impl Default for Global {
    fn default() -> Self {
        Self { root: PathBuf::from("/run/edged-oci"), log: None, log_json: false, debug: false }
    }
}

impl Global {
    /// As far as they can be read: for telling that the rest cannot.
    pub fn of(words: &[OsString]) -> Self {
        let mut global = Self::default();
        let mut words = words.iter().map(|word| word.to_string_lossy().into_owned());
        while let Some(word) = words.next() {
            let (name, value) = split(&word);
            match name.trim_start_matches('-') {
                "log" => global.log = value.or_else(|| words.next()).map(PathBuf::from),
                "log-format" => global.log_json = value.or_else(|| words.next()).as_deref() == Some("json"),
                _ => {}
            }
        }
        global
    }
}

#[derive(Debug, PartialEq, Eq)]
pub struct Parsed {
    pub global: Global,
    pub verb: Verb,
    options: BTreeMap<&'static str, Vec<String>>,
    /// The id, and what follows it.
    pub words: Vec<String>,
}

impl Parsed {
    pub fn has(&self, name: &str) -> bool {
        self.options.contains_key(name)
    }

    /// The last one given.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.options.get(name).and_then(|values| values.last()).map(String::as_str)
    }

    pub fn values(&self, name: &str) -> impl Iterator<Item = &str> {
        self.options.get(name).into_iter().flatten().map(String::as_str)
    }

    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.value(name).filter(|value| !value.is_empty()).map(PathBuf::from)
    }

    pub fn number<N: std::str::FromStr>(&self, name: &'static str) -> Result<Option<N>, OciError> {
        let Some(text) = self.value(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| OciError::Usage { text: format!("--{name}: `{text}` is not a number") })
    }

    pub fn id(&self) -> Result<&str, OciError> {
        self.words
            .first()
            .map(String::as_str)
            .ok_or_else(|| OciError::Usage { text: "the container's id is missing".to_owned() })
    }
}

/// Long name, letter, whether it takes a value, what for.
type Choice = (&'static str, Option<char>, bool, &'static str);

struct Form {
    name: &'static str,
    verb: Verb,
    usage: &'static str,
    about: &'static str,
    /// How many words, at least and at most; `exec` has the program's words after them.
    words: (usize, usize),
    options: &'static [Choice],
}

const GLOBAL: &[Choice] = &[
    ("root", None, true, "where the state of containers is (default /run/edged-oci)"),
    ("log", None, true, "write errors there too"),
    ("log-format", None, true, "text or json"),
    ("debug", None, false, "accepted; errors are always told in full"),
    ("cgroup-manager", None, true, "cgroupfs; systemd is refused"),
    ("systemd-cgroup", None, false, "refused: cgroups are made directly"),
    ("rootless", None, true, "false or auto; true is refused"),
];

const NEW: &[Choice] = &[
    ("bundle", Some('b'), true, "directory with config.json (default: this one)"),
    ("console-socket", None, true, "socket that gets the terminal's master"),
    ("pid-file", None, true, "file that gets the process id"),
    ("preserve-fds", None, true, "give this many more descriptors, from 3 on, to the program"),
    ("no-new-keyring", None, false, "keep the session keyring"),
    ("no-pivot", None, false, "refused: chroot is no wall"),
    ("detach", Some('d'), false, "run: do not wait for the end"),
    ("keep", None, false, "run: do not delete at the end"),
];

const EXEC: &[Choice] = &[
    ("process", Some('p'), true, "file with the process object"),
    ("console-socket", None, true, "socket that gets the terminal's master"),
    ("pid-file", None, true, "file that gets the process id"),
    ("preserve-fds", None, true, "give this many more descriptors, from 3 on, to the program"),
    ("tty", Some('t'), false, "with a terminal"),
    ("detach", Some('d'), false, "do not wait for the end"),
    ("env", Some('e'), true, "one more NAME=value"),
    ("cwd", None, true, "working directory"),
    ("user", Some('u'), true, "UID[:GID]"),
    ("additional-gids", Some('g'), true, "one more group"),
    ("cap", Some('c'), true, "one more capability"),
    ("no-new-privs", None, false, "set no_new_privs"),
    ("process-label", None, true, "SELinux context"),
    ("apparmor", None, true, "AppArmor profile"),
    ("ignore-paused", None, false, "also while the container is paused"),
];

const UPDATE: &[Choice] = &[
    ("resources", Some('r'), true, "file with the resources object; - for standard input"),
    ("memory", None, true, "bytes, or like 64m"),
    ("memory-reservation", None, true, "bytes"),
    ("memory-swap", None, true, "memory and swap together; -1: no limit"),
    ("kernel-memory", None, true, "cgroup v1 only"),
    ("kernel-memory-tcp", None, true, "cgroup v1 only"),
    ("cpu-period", None, true, "microseconds"),
    ("cpu-quota", None, true, "microseconds in a period"),
    ("cpu-burst", None, true, "microseconds"),
    ("cpu-share", None, true, "weight, 2 to 262144"),
    ("cpu-rt-period", None, true, "cgroup v1 only"),
    ("cpu-rt-runtime", None, true, "cgroup v1 only"),
    ("cpu-idle", None, true, "1: only when nobody else runs"),
    ("cpuset-cpus", None, true, "like 0-2,4"),
    ("cpuset-mems", None, true, "like 0"),
    ("blkio-weight", None, true, "10 to 1000"),
    ("pids-limit", None, true, "-1: no limit"),
];

const FORMS: &[Form] = &[
    Form {
        name: "create",
        verb: Verb::Create,
        usage: "[options] ID",
        about: "set a container up",
        words: (1, 1),
        options: NEW,
    },
    Form {
        name: "run",
        verb: Verb::Run,
        usage: "[options] ID",
        about: "create, start, wait, delete",
        words: (1, 1),
        options: NEW,
    },
    Form { name: "start", verb: Verb::Start, usage: "ID", about: "run its program", words: (1, 1), options: &[] },
    Form {
        name: "exec",
        verb: Verb::Exec,
        usage: "[options] ID [COMMAND...]",
        about: "run one more program in it",
        words: (1, usize::MAX),
        options: EXEC,
    },
    Form { name: "state", verb: Verb::State, usage: "ID", about: "what it is now", words: (1, 1), options: &[] },
    Form {
        name: "list",
        verb: Verb::List,
        usage: "",
        about: "all containers",
        words: (0, 0),
        options: &[("format", Some('f'), true, "table or json"), ("quiet", Some('q'), false, "ids only")],
    },
    Form {
        name: "ps",
        verb: Verb::Ps,
        usage: "ID",
        about: "its processes",
        words: (1, usize::MAX),
        options: &[("format", Some('f'), true, "table or json")],
    },
    Form {
        name: "events",
        verb: Verb::Events,
        usage: "ID",
        about: "its figures, again and again",
        words: (1, 1),
        options: &[("interval", None, true, "like 5s"), ("stats", None, false, "once")],
    },
    Form { name: "features", verb: Verb::Features, usage: "", about: "what this does", words: (0, 0), options: &[] },
    Form {
        name: "spec",
        verb: Verb::Spec,
        usage: "",
        about: "write a config.json to begin with",
        words: (0, 0),
        options: &[("bundle", Some('b'), true, "where to")],
    },
    Form {
        name: "kill",
        verb: Verb::Kill,
        usage: "[--all] ID [SIGNAL]",
        about: "send a signal (default TERM)",
        words: (1, 2),
        options: &[("all", Some('a'), false, "to every process in it")],
    },
    Form {
        name: "delete",
        verb: Verb::Delete,
        usage: "[--force] ID",
        about: "take it away",
        words: (1, 1),
        options: &[("force", Some('f'), false, "kill it first; missing is no error")],
    },
    Form { name: "pause", verb: Verb::Pause, usage: "ID", about: "freeze it", words: (1, 1), options: &[] },
    Form { name: "resume", verb: Verb::Resume, usage: "ID", about: "let it go on", words: (1, 1), options: &[] },
    Form {
        name: "update",
        verb: Verb::Update,
        usage: "[options] ID",
        about: "change its limits",
        words: (1, 1),
        options: UPDATE,
    },
];

fn split(word: &str) -> (&str, Option<String>) {
    match word.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (word, None),
    }
}

fn usage(text: String) -> OciError {
    OciError::Usage { text }
}

pub fn parse(words: &[OsString]) -> Result<Parsed, OciError> {
    let text = |word: &OsString| {
        word.to_str().map(str::to_owned).ok_or_else(|| usage(format!("`{}` is not UTF-8", word.to_string_lossy())))
    };
    let words = words.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    let mut words = words.into_iter().peekable();
    let mut global = Global::default();
    while let Some(word) = words.next_if(|word| word.starts_with('-')) {
        match word.as_str() {
            "-h" | "--help" => return Ok(plain(global, Verb::Help)),
            "-v" | "--version" => return Ok(plain(global, Verb::Version)),
            _ => set_global(&mut global, &word, &mut words)?,
        }
    }
    let Some(name) = words.next() else { return Ok(plain(global, Verb::Help)) };
    if name == "help" {
        return Ok(Parsed { words: words.collect(), ..plain(global, Verb::Help) });
    }
    let form = FORMS.iter().find(|form| form.name == name).ok_or_else(|| usage(format!("no command `{name}`")))?;
    let mut parsed = plain(global, form.verb);
    while let Some(word) = words.next() {
        let program_follows = form.verb == Verb::Exec && !parsed.words.is_empty();
        if word == "--" {
            parsed.words.extend(words.by_ref());
        } else if matches!(word.as_str(), "-h" | "--help") {
            return Ok(Parsed { words: vec![name], ..plain(parsed.global, Verb::Help) });
        } else if word.len() > 1 && word.starts_with('-') {
            take(form, &mut parsed, &word, &mut words)?;
        } else if program_follows {
            parsed.words.push(word);
            // Its options are its own.
            parsed.words.extend(words.by_ref());
        } else {
            parsed.words.push(word);
        }
    }
    let (least, most) = form.words;
    if parsed.words.len() < least || parsed.words.len() > most {
        return Err(usage(format!("edged oci {name} {}", form.usage)));
    }
    Ok(parsed)
}

fn plain(global: Global, verb: Verb) -> Parsed {
    Parsed { global, verb, options: BTreeMap::new(), words: Vec::new() }
}

fn value(name: &str, given: Option<String>, words: &mut dyn Iterator<Item = String>) -> Result<String, OciError> {
    given.or_else(|| words.next()).ok_or_else(|| usage(format!("{name} takes a value")))
}

fn set_global(global: &mut Global, word: &str, words: &mut dyn Iterator<Item = String>) -> Result<(), OciError> {
    let (name, given) = split(word);
    match name {
        "--root" => global.root = PathBuf::from(value(name, given, words)?),
        "--log" => global.log = Some(value(name, given, words)?).filter(|path| !path.is_empty()).map(PathBuf::from),
        "--log-format" => match value(name, given, words)?.as_str() {
            "json" => global.log_json = true,
            "text" | "" => global.log_json = false,
            other => return Err(usage(format!("--log-format: `{other}` is neither text nor json"))),
        },
        "--debug" => global.debug = given.is_none_or(|given| given == "true"),
        "--cgroup-manager" => {
            if value(name, given, words)? != "cgroupfs" {
                return Err(OciError::Refused("--cgroup-manager", "only cgroupfs is; cgroups are made directly"));
            }
        }
        "--systemd-cgroup" => {
            let why = "cgroups are made directly; start the engine with the cgroupfs manager";
            return Err(OciError::Refused("--systemd-cgroup", why));
        }
        "--rootless" => {
            if value(name, given, words)? == "true" {
                return Err(OciError::Refused("--rootless=true", "this runtime needs root"));
            }
        }
        _ => return Err(usage(format!("no global option `{name}`"))),
    }
    Ok(())
}

fn take(form: &Form, parsed: &mut Parsed, word: &str, words: &mut dyn Iterator<Item = String>) -> Result<(), OciError> {
    let unknown = |name: &str| usage(format!("`{}` has no option `{name}`", form.name));
    let mut put = |name: &'static str, value: String| parsed.options.entry(name).or_default().push(value);
    if let Some(long) = word.strip_prefix("--") {
        let (name, given) = split(long);
        let choice = form.options.iter().find(|choice| choice.0 == name).ok_or_else(|| unknown(word))?;
        if choice.2 {
            put(choice.0, value(word, given, words)?);
        } else if given.as_deref() != Some("false") {
            put(choice.0, String::new());
        }
        return Ok(());
    }
    // `-itd`, `-u 5`, `-u5`, `-u=5`.
    let mut letters = word.chars().skip(1);
    while let Some(letter) = letters.next() {
        let choice = form.options.iter().find(|choice| choice.1 == Some(letter)).ok_or_else(|| unknown(word))?;
        if choice.2 {
            let rest: String = letters.by_ref().collect();
            let given = Some(rest.strip_prefix('=').unwrap_or(&rest).to_owned()).filter(|rest| !rest.is_empty());
            put(choice.0, value(word, given, words)?);
        } else {
            put(choice.0, String::new());
        }
    }
    Ok(())
}

pub fn help(verb: Option<&str>) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let mut list = |options: &[Choice]| {
        for (name, letter, takes, about) in options {
            let letter = letter.map_or_else(|| "    ".to_owned(), |letter| format!("-{letter}, "));
            let value = if *takes { " VALUE" } else { "" };
            let _ = writeln!(text, "  {letter}--{name}{value:<8}  {about}");
        }
    };
    if let Some(form) = FORMS.iter().find(|form| Some(form.name) == verb) {
        list(form.options);
        return format!("edged oci {} {}\n{}\n\n{text}", form.name, form.usage, form.about);
    }
    list(GLOBAL);
    let mut verbs = String::new();
    for form in FORMS {
        let _ = writeln!(verbs, "  {:<10}{:<28}{}", form.name, form.usage, form.about);
    }
    format!("edged oci [global options] COMMAND\nRuns containers as the OCI runtime-spec says.\n\n{verbs}\n{text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Result<Parsed, OciError> {
        parse(&line.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn options_may_stand_on_both_sides_of_the_id() {
        for line in [
            "--root /r --log=/l --log-format json --debug create --bundle /b --pid-file=/p web",
            "--root /r --log=/l --log-format json --debug create web --bundle /b --pid-file=/p",
        ] {
            let parsed = of(line).unwrap();
            assert_eq!((parsed.verb, parsed.id().unwrap()), (Verb::Create, "web"));
            assert_eq!((parsed.value("bundle"), parsed.value("pid-file")), (Some("/b"), Some("/p")));
            assert_eq!(parsed.global.root.to_str(), Some("/r"));
            assert!(parsed.global.log_json && parsed.global.debug);
        }
    }

    #[test]
    fn the_program_of_exec_keeps_its_options() {
        let parsed = of("exec -t -u5:6 --env A=b web -d ls -l --all").unwrap();
        assert!(parsed.has("tty") && parsed.has("detach"));
        assert_eq!((parsed.value("user"), parsed.value("env")), (Some("5:6"), Some("A=b")));
        assert_eq!(parsed.words, ["web", "ls", "-l", "--all"]);
        assert_eq!(of("exec web -- -odd").unwrap().words, ["web", "-odd"]);
    }

    #[test]
    fn letters_may_stand_together_and_signals_are_words() {
        assert!(of("exec -td web sh").unwrap().has("detach"));
        assert_eq!(of("kill web SIGTERM").unwrap().words, ["web", "SIGTERM"]);
        assert!(of("delete web -f").unwrap().has("force"));
    }

    #[test]
    fn what_is_not_understood_is_told() {
        assert!(matches!(of("--systemd-cgroup create web"), Err(OciError::Refused(..))));
        for line in
            ["create", "create a b", "fly web", "create --wings web", "--wings create web", "create web --bundle"]
        {
            assert!(matches!(of(line), Err(OciError::Usage { .. })), "{line}");
        }
    }
}
