//! How to reach an agent: its local socket, or ssh(1) to a machine that has `edgectl` itself.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use edged_model::api::{Answer, MAX_FRAME_BYTES, Request};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    Unix(PathBuf),
    /// The same command is run over there.
    Ssh(String),
}

impl Host {
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        match text.strip_prefix("ssh://") {
            // A name that begins with a dash would be an option of ssh.
            Some(host) if !host.is_empty() && !host.starts_with('-') => Ok(Self::Ssh(host.to_owned())),
            _ => Err(format!("--host {text}: say unix:PATH or ssh://[USER@]HOST")),
        }
    }

    pub fn connect(&self) -> Result<Connection, String> {
        match self {
            Self::Unix(path) => UnixStream::connect(path).map(|stream| Connection { stream }).map_err(|error| {
                let hint = match error.kind() {
                    io::ErrorKind::NotFound => "is edged running? (`systemctl status edged`)",
                    io::ErrorKind::PermissionDenied => "only root and the group `edged` may ask",
                    _ => "is edged running?",
                };
                format!("{}: {error}: {hint}", path.display())
            }),
            Self::Ssh(host) => {
                let mut words = std::env::args().skip(1).peekable();
                let mut rest = Vec::new();
                while let Some(word) = words.next() {
                    if word == "--host" {
                        words.next();
                    } else if !word.starts_with("--host=") {
                        rest.push(word);
                    }
                }
                let error = std::process::Command::new("ssh").arg(host).arg("--").arg("edgectl").args(rest).exec();
                Err(format!("ssh: {error}"))
            }
        }
    }
}

pub struct Connection {
    stream: UnixStream,
}

impl Connection {
    /// Sends the request; the answers come as they come.
    pub fn ask(&mut self, request: &Request) -> io::Result<impl Iterator<Item = io::Result<Answer>> + '_> {
        let bytes = serde_cbor::to_vec(request).map_err(io::Error::other)?;
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.stream.write_all(&length.to_be_bytes())?;
        self.stream.write_all(&bytes)?;
        Ok(std::iter::from_fn(move || self.answer().transpose()))
    }

    fn answer(&mut self) -> io::Result<Option<Answer>> {
        let mut length = [0; 4];
        match self.stream.read_exact(&mut length) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let length = u32::from_be_bytes(length) as usize;
        if length > MAX_FRAME_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer too large"));
        }
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        serde_cbor::from_slice(&bytes).map(Some).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        assert_eq!(Host::parse("unix:/a").unwrap(), Host::Unix("/a".into()));
        assert_eq!(Host::parse("ssh://u@h").unwrap(), Host::Ssh("u@h".to_owned()));
        for bad in ["", "h", "ssh://", "ssh://-oProxyCommand=x"] {
            assert!(Host::parse(bad).is_err(), "{bad}");
        }
    }
}
