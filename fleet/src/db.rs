//! What is kept: devices and their keys, one-time tokens, the newest manifest of each device and group, reports. SQLite
//! with WAL and `synchronous=FULL`: what was answered with success survives a power cut.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use edged_model::id::Digest;
use rusqlite::{Connection, OptionalExtension, params};

/// Reports kept of one device.
const REPORTS_MAX: u32 = 200;

#[derive(Debug, thiserror::Error)]
pub enum DbError {
    #[error("the database")]
    Sqlite(#[from] rusqlite::Error),
    #[error("no randomness")]
    Random,
}

pub struct Db {
    connection: Mutex<Connection>,
}

/// Whom a manifest is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selector<'n> {
    Device(&'n str),
    Group(&'n str),
}

impl Selector<'_> {
    fn key(self) -> String {
        match self {
            Self::Device(name) => format!("device/{name}"),
            Self::Group(name) => format!("group/{name}"),
        }
    }
}

/// One line of the list of devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRow {
    pub id: String,
    pub group: Option<String>,
    pub last_seen: Option<i64>,
    pub last_report: Option<Vec<u8>>,
}

/// What became of an enrolment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enrolled {
    New,
    Again,
    /// The device has another key already.
    OtherKey,
    BadToken,
}

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS devices (id TEXT PRIMARY KEY, key BLOB NOT NULL, grp TEXT, last_seen INTEGER, last_number INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE IF NOT EXISTS tokens (hash BLOB PRIMARY KEY, grp TEXT);
    CREATE TABLE IF NOT EXISTS manifests (selector TEXT PRIMARY KEY, digest TEXT NOT NULL, envelope BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS reports (device TEXT NOT NULL, number INTEGER NOT NULL, at INTEGER NOT NULL, envelope BLOB NOT NULL, PRIMARY KEY (device, number));
    CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value BLOB NOT NULL);
";

impl Db {
    pub fn open(dir: &Path) -> Result<Self, DbError> {
        let connection = Connection::open(dir.join("fleet.sqlite"))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.execute_batch(SCHEMA)?;
        Ok(Self { connection: Mutex::new(connection) })
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new one-time token for an enrolment, optionally into a group.
    pub fn create_token(&self, group: Option<&str>) -> Result<String, DbError> {
        let token = random_token()?;
        let hash = Digest::of(token.as_bytes());
        self.connection().execute("INSERT INTO tokens (hash, grp) VALUES (?1, ?2)", params![hash.bytes(), group])?;
        Ok(token)
    }

    /// The operator's token: made at the first start, its hash is kept.
    pub fn operator_token(&self) -> Result<Option<String>, DbError> {
        let known = self.setting("operator-token")?;
        if known.is_some() {
            return Ok(None);
        }
        let token = random_token()?;
        self.set_operator_token(&token)?;
        Ok(Some(token))
    }

    pub fn set_operator_token(&self, token: &str) -> Result<(), DbError> {
        let hash = Digest::of(token.as_bytes());
        self.connection().execute(
            "INSERT INTO settings (name, value) VALUES ('operator-token', ?1) ON CONFLICT (name) DO UPDATE SET value = ?1",
            params![hash.bytes()],
        )?;
        Ok(())
    }

    /// Compared by hash: how long it takes says nothing about the token.
    pub fn is_operator(&self, token: &str) -> Result<bool, DbError> {
        Ok(self.setting("operator-token")?.as_deref() == Some(Digest::of(token.as_bytes()).bytes()))
    }

    fn setting(&self, name: &str) -> Result<Option<Vec<u8>>, DbError> {
        let value = self.connection().query_row("SELECT value FROM settings WHERE name = ?1", [name], |row| row.get(0));
        Ok(value.optional()?)
    }

    pub fn enroll(&self, device: &str, key: &[u8], token: &str) -> Result<Enrolled, DbError> {
        let mut connection = self.connection();
        let transaction = connection.transaction()?;
        let known: Option<Vec<u8>> =
            transaction.query_row("SELECT key FROM devices WHERE id = ?1", [device], |row| row.get(0)).optional()?;
        match known {
            Some(known) if known == key => return Ok(Enrolled::Again),
            Some(_) => return Ok(Enrolled::OtherKey),
            None => {}
        }
        let hash = Digest::of(token.as_bytes());
        let group: Option<Option<String>> = transaction
            .query_row("DELETE FROM tokens WHERE hash = ?1 RETURNING grp", [hash.bytes()], |row| row.get(0))
            .optional()?;
        let Some(group) = group else { return Ok(Enrolled::BadToken) };
        transaction.execute("INSERT INTO devices (id, key, grp) VALUES (?1, ?2, ?3)", params![device, key, group])?;
        transaction.commit()?;
        Ok(Enrolled::New)
    }

    pub fn device_key(&self, device: &str) -> Result<Option<Vec<u8>>, DbError> {
        let key = self.connection().query_row("SELECT key FROM devices WHERE id = ?1", [device], |row| row.get(0));
        Ok(key.optional()?)
    }

    pub fn put_manifest(&self, selector: Selector<'_>, envelope: &[u8]) -> Result<Digest, DbError> {
        let digest = Digest::of(envelope);
        self.connection().execute(
            "INSERT INTO manifests (selector, digest, envelope) VALUES (?1, ?2, ?3)
             ON CONFLICT (selector) DO UPDATE SET digest = ?2, envelope = ?3",
            params![selector.key(), digest.to_string(), envelope],
        )?;
        Ok(digest)
    }

    /// What a device shall run: its own manifest, else its group's.
    pub fn manifest_for(&self, device: &str) -> Result<Option<(String, Vec<u8>)>, DbError> {
        let connection = self.connection();
        let group: Option<Option<String>> =
            connection.query_row("SELECT grp FROM devices WHERE id = ?1", [device], |row| row.get(0)).optional()?;
        let selectors = [Some(Selector::Device(device).key()), group.flatten().map(|group| Selector::Group(&group).key())];
        for selector in selectors.into_iter().flatten() {
            let found = connection.query_row(
                "SELECT digest, envelope FROM manifests WHERE selector = ?1",
                [selector],
                |row| Ok((row.get(0)?, row.get(1)?)),
            );
            if let Some(found) = found.optional()? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Takes a report; false for a number that is not above the last one's.
    pub fn put_report(&self, device: &str, number: u64, at: i64, envelope: &[u8]) -> Result<bool, DbError> {
        let mut connection = self.connection();
        let transaction = connection.transaction()?;
        let number = i64::try_from(number).unwrap_or(i64::MAX);
        let risen = transaction.execute(
            "UPDATE devices SET last_number = ?2, last_seen = ?3 WHERE id = ?1 AND last_number < ?2",
            params![device, number, at],
        )?;
        if risen == 0 {
            return Ok(false);
        }
        transaction.execute(
            "INSERT INTO reports (device, number, at, envelope) VALUES (?1, ?2, ?3, ?4)",
            params![device, number, at, envelope],
        )?;
        transaction.execute(
            "DELETE FROM reports WHERE device = ?1 AND number NOT IN
             (SELECT number FROM reports WHERE device = ?1 ORDER BY number DESC LIMIT ?2)",
            params![device, REPORTS_MAX],
        )?;
        transaction.commit()?;
        Ok(true)
    }

    pub fn reports(&self, device: &str, limit: u32) -> Result<Vec<Vec<u8>>, DbError> {
        let connection = self.connection();
        let mut statement =
            connection.prepare("SELECT envelope FROM reports WHERE device = ?1 ORDER BY number DESC LIMIT ?2")?;
        let rows = statement.query_map(params![device, limit], |row| row.get(0))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    pub fn devices(&self) -> Result<Vec<DeviceRow>, DbError> {
        let connection = self.connection();
        let mut statement = connection.prepare(
            "SELECT id, grp, last_seen, (SELECT envelope FROM reports WHERE device = id ORDER BY number DESC LIMIT 1)
             FROM devices ORDER BY id",
        )?;
        let row = |row: &rusqlite::Row<'_>| {
            Ok(DeviceRow { id: row.get(0)?, group: row.get(1)?, last_seen: row.get(2)?, last_report: row.get(3)? })
        };
        Ok(statement.query_map([], row)?.collect::<Result<_, _>>()?)
    }
}

fn random_token() -> Result<String, DbError> {
    let mut bytes = [0; 24];
    getrandom::fill(&mut bytes).map_err(|_| DbError::Random)?;
    Ok(hex::encode(bytes))
}
