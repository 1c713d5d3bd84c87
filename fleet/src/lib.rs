//! The fleet endpoint: it holds signed manifests until devices fetch them and takes their signed reports.
//!
//! ```text
//! operator ── PUT manifest ──> http ──> db (SQLite) ──> http ── long-poll ──> device
//! operator <── GET devices ─── http <── db <── devices (checks) <── POST report ── device
//! ```
//!
//! Nobody has to trust it: devices trust the signatures on what it hands out, and reports are signed by devices. It
//! refuses what is not an envelope at all, so that a mistake is seen by who made it and not days later on a device.

#![forbid(unsafe_code)]

/// What is remembered, and where.
pub mod db;
/// Documents that come in: parsed, checked, turned into rows.
pub mod devices;
/// Addresses, headers and status codes.
pub mod http;
/// Errors as RFC 9457 problems.
pub mod problem;
/// The table that people read.
pub mod table;
/// Certificates, handshakes, connections.
pub mod tls;

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use edged_model::id::Digest;
use edged_model::quantity::Timestamp;
use tokio::sync::{broadcast, watch};

use crate::db::sqlite::Sqlite;
use crate::db::{Db, DbError, Scope};

/// News kept for a waiting poll that is slow to look; who misses some looks at the database again.
const NEWS_KEPT: usize = 256;

/// Why the endpoint cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Db(#[from] DbError),
    #[error("cannot use operator token file {path}")]
    TokenFile {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("operator token in {path} has {found} characters; at least {least} are asked")]
    TokenTooShort { path: PathBuf, found: usize, least: usize },
}

/// The endpoint without its socket. Time is a function so that tests can turn the clock.
pub struct App {
    pub db: Arc<dyn Db>,
    pub(crate) news: broadcast::Sender<Scope>,
    /// A trust root was stored: every device that waits is told.
    pub(crate) trust_news: watch::Sender<()>,
    pub(crate) operator_token: Digest,
    pub(crate) clock: fn() -> Timestamp,
}

impl App {
    /// Opens or makes the data directory. Without a token file one is made in it on first start, so that the operator's
    /// side is never open to everybody.
    pub fn open(data: &Path, operator_token_file: Option<&Path>, clock: fn() -> Timestamp) -> Result<Self, OpenError> {
        let db = Sqlite::open(data)?;
        let path = operator_token_file.map_or_else(|| data.join("operator.token"), Path::to_owned);
        let fault = |source| OpenError::TokenFile { path: path.clone(), source };
        if operator_token_file.is_none() && !path.exists() {
            write_secret(&path, &new_token().map_err(fault)?).map_err(fault)?;
        }
        let token = std::fs::read_to_string(&path).map_err(fault)?;
        let token = token.trim();
        const LEAST: usize = 16;
        if token.len() < LEAST {
            return Err(OpenError::TokenTooShort { path, found: token.len(), least: LEAST });
        }
        let operator_token = Digest::of(token.as_bytes());
        Ok(Self {
            db: Arc::new(db),
            news: broadcast::Sender::new(NEWS_KEPT),
            trust_news: watch::Sender::new(()),
            operator_token,
            clock,
        })
    }
}

/// The system's clock.
#[allow(clippy::disallowed_methods, reason = "a server stamps what arrives; no other line reads the clock")]
pub fn system_clock() -> Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// 192 random bits, in hexadecimal.
pub fn new_token() -> std::io::Result<String> {
    let mut bytes = [0_u8; 24];
    getrandom::fill(&mut bytes).map_err(|error| std::io::Error::other(error.to_string()))?;
    Ok(hex::encode(bytes))
}

fn write_secret(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{text}")?;
    file.sync_all()
}
