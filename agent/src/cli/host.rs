//! How to reach an agent: its local socket, its line console, or ssh(1) to a machine that has `edgectl` itself.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use edged_model::api::{Answer, MAX_FRAME_BYTES, Request};

use super::serial;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    Unix(PathBuf),
    /// The same command is run over there.
    Ssh {
        target: String,
        port: Option<u16>,
    },
    /// A terminal with the agent's console at its other end, at this speed if one is given.
    Serial {
        tty: PathBuf,
        baud: Option<u32>,
    },
}

impl Host {
    pub fn parse(text: &str) -> Result<Self, String> {
        let bad = || format!("--host {text}: say unix:PATH, ssh://[USER@]HOST[:PORT] or serial:/dev/tty…[,BAUD]");
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        if let Some(line) = text.strip_prefix("serial:").filter(|line| !line.is_empty()) {
            let (tty, baud) = match line.rsplit_once(',') {
                Some((tty, baud)) => (tty, Some(baud.parse().map_err(|_| bad())?)),
                None => (line, None),
            };
            return Ok(Self::Serial { tty: tty.into(), baud });
        }
        // A name that begins with a dash would be an option of ssh.
        let target = text.strip_prefix("ssh://").filter(|target| !target.is_empty() && !target.starts_with('-'));
        let target = target.ok_or_else(bad)?.trim_end_matches('/');
        match target.rsplit_once(':') {
            // `[::1]`, an address without a port.
            Some((_, end)) if end.ends_with(']') => Ok(Self::Ssh { target: target.to_owned(), port: None }),
            Some((target, port)) => {
                Ok(Self::Ssh { target: target.to_owned(), port: Some(port.parse().map_err(|_| bad())?) })
            }
            None => Ok(Self::Ssh { target: target.to_owned(), port: None }),
        }
    }

    /// `words`: our own command line without the program's name, for the `edgectl` at the other end of ssh.
    pub fn connect(&self, words: impl Iterator<Item = String>) -> Result<Connection, String> {
        match self {
            Self::Unix(path) => {
                UnixStream::connect(path).map(Connection::unix).map_err(|error| unix_hint(path, &error))
            }
            Self::Serial { tty, baud } => {
                let stream = serial::connect(tty, *baud)
                    .map_err(|error| format!("{}: {error}: {}", tty.display(), serial::hint(&error)))?;
                Ok(Connection { stream: Box::new(stream), ends_with_empty_frame: true })
            }
            Self::Ssh { target, port } => {
                let mut ssh = std::process::Command::new("ssh");
                if let Some(port) = port {
                    ssh.arg("-p").arg(port.to_string());
                }
                let words: Vec<_> = words.collect();
                // A terminal over there for a command that wants one.
                if words.iter().any(|word| word == "exec") && std::io::IsTerminal::is_terminal(&io::stdin()) {
                    ssh.arg("-t");
                }
                let words = words.into_iter();
                let remote: Vec<_> = without_host(words).iter().map(|word| quoted(word)).collect();
                let error = ssh.arg("--").arg(target).arg(format!("edgectl {}", remote.join(" "))).exec();
                Err(format!("ssh: {error}: is the ssh program installed?"))
            }
        }
    }
}

fn unix_hint(path: &Path, error: &io::Error) -> String {
    let hint = match error.kind() {
        io::ErrorKind::NotFound => "is edged running? On another machine: --host ssh://HOST",
        io::ErrorKind::ConnectionRefused => "edged does not listen: is it running?",
        io::ErrorKind::PermissionDenied => "only root and the group `edged` may ask: try sudo",
        _ => "is edged running?",
    };
    format!("{}: {error}: {hint}", path.display())
}

fn without_host(words: impl Iterator<Item = String>) -> Vec<String> {
    let mut rest = Vec::new();
    let mut words = words;
    while let Some(word) = words.next() {
        if word == "--host" {
            words.next();
        } else if !word.starts_with("--host=") {
            rest.push(word);
        }
    }
    rest
}

/// ssh hands its words to a shell over there: each is quoted, so that it arrives as it was.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:@,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// One conversation: a request, then its answers.
pub struct Connection {
    stream: Box<dyn Stream>,
    /// A line has no end of its own.
    ends_with_empty_frame: bool,
}

impl Connection {
    fn unix(stream: UnixStream) -> Self {
        Self { stream: Box::new(stream), ends_with_empty_frame: false }
    }

    /// Sends the request; the answers come as they come.
    pub fn ask(&mut self, request: &Request) -> io::Result<()> {
        let bytes = serde_cbor::to_vec(request).map_err(io::Error::other)?;
        if bytes.len() > MAX_FRAME_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the request is larger than the agent accepts"));
        }
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let sent = self.stream.write_all(&[&length.to_be_bytes(), bytes.as_slice()].concat());
        match sent {
            // It was refused before it was read: the reason is in the answer.
            Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(()),
            sent => sent,
        }
    }

    /// The next answer; `None` when the other end closed.
    pub fn answer(&mut self) -> io::Result<Option<Answer>> {
        let mut length = [0; 4];
        match self.stream.read_exact(&mut length) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let length = u32::from_be_bytes(length) as usize;
        if length == 0 {
            return Ok(None);
        }
        if length > MAX_FRAME_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "what came is no answer of an agent"));
        }
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        let strange =
            |error| io::Error::new(io::ErrorKind::InvalidData, format!("an answer that cannot be read: {error}"));
        edged_model::cbor::read(&bytes).map(Some).map_err(strange)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.ends_with_empty_frame {
            // The line becomes a console again; if this is lost, silence or a key does the same.
            let _ = self.stream.write_all(&[0; 4]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        let ssh = |target: &str, port| Host::Ssh { target: target.to_owned(), port };
        assert_eq!(Host::parse("unix:/a").unwrap(), Host::Unix("/a".into()));
        assert_eq!(Host::parse("ssh://u@h").unwrap(), ssh("u@h", None));
        assert_eq!(Host::parse("ssh://u@h:2222/").unwrap(), ssh("u@h", Some(2222)));
        assert_eq!(Host::parse("ssh://[::1]").unwrap(), ssh("[::1]", None));
        let serial = |baud| Host::Serial { tty: "/dev/ttyUSB0".into(), baud };
        assert_eq!(Host::parse("serial:/dev/ttyUSB0").unwrap(), serial(None));
        assert_eq!(Host::parse("serial:/dev/ttyUSB0,115200").unwrap(), serial(Some(115_200)));
        for bad in ["", "h", "unix:", "serial:", "serial:/dev/x,fast", "ssh://", "ssh://-oProxyCommand=x", "ssh://h:x"]
        {
            assert!(Host::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn words_arrive_over_ssh_as_they_were() {
        let words = ["--host", "ssh://h", "logs", "web; rm -rf /", "--host=x", "it's", "-o", "json"].map(str::to_owned);
        let rest = without_host(words.into_iter());
        assert_eq!(rest, ["logs", "web; rm -rf /", "it's", "-o", "json"]);
        assert_eq!(quoted("web; rm -rf /"), "'web; rm -rf /'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted("-o"), "-o");
    }
}
