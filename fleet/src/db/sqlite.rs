//! The fleet's memory in one SQLite file: write-ahead log, `synchronous=FULL`, so that what was acknowledged survives a
//! power cut (sqlite.org/pragma.html). One connection behind a lock: writes are short, and SQLite has one writer anyway.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use edged_model::fleet::{Enrolled, ManifestSummary};
use edged_model::id::{DeviceId, GroupName, Sequence};
use edged_model::quantity::Timestamp;
use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, TransactionBehavior, params};

use super::{
    Db, DbError, DeviceRow, EnrollOutcome, Enrollment, NewManifest, NewTrustRoot, ReportOutcome, ReportRow, Scope,
    StoredManifest, TokenRow, Wanted,
};

/// The format this program writes, in `user_version`.
const FORMAT: u32 = 2;
/// From each format to the next, in turn.
const STEPS: [&str; 1] = [include_str!("step2.sql")];
/// Reports kept of one device: a week of one every ten minutes.
const REPORTS_KEPT: u32 = 1000;
/// A poll is written down when the last one noted is this old.
const POLL_NOTED_EVERY_SECS: i64 = 30;

pub struct Sqlite {
    connection: Mutex<Connection>,
}

/// Names the step that failed, so that an error says more than SQLite does.
trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, DbError>;
}

impl<T> Doing<T> for Result<T, rusqlite::Error> {
    fn doing(self, doing: &'static str) -> Result<T, DbError> {
        self.map_err(|source| DbError::Sqlite { doing, source })
    }
}

impl Sqlite {
    /// Opens or makes `fleet.db` in `directory`.
    pub fn open(directory: &Path) -> Result<Self, DbError> {
        // Manifests may carry secrets: a directory made here is for its owner alone.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|source| DbError::Directory { path: directory.to_owned(), source })?;
        let path = directory.join("fleet.db");
        let mut connection = Connection::open(&path).doing("open")?;
        connection.busy_timeout(std::time::Duration::from_secs(10)).doing("set the busy timeout")?;
        connection.pragma_update(None, "journal_mode", "WAL").doing("switch to the write-ahead log")?;
        connection.pragma_update(None, "synchronous", "FULL").doing("ask for full synchronisation")?;
        let found: u32 =
            connection.pragma_query_value(None, "user_version", |row| row.get(0)).doing("read the format")?;
        match found {
            FORMAT => {}
            0..FORMAT => {
                let transaction =
                    connection.transaction_with_behavior(TransactionBehavior::Immediate).doing("begin")?;
                if found == 0 {
                    transaction.execute_batch(include_str!("schema.sql")).doing("make the tables")?;
                }
                for step in STEPS.iter().skip((found as usize).saturating_sub(1)) {
                    transaction.execute_batch(step).doing("bring the tables to this format")?;
                }
                transaction.pragma_update(None, "user_version", FORMAT).doing("write the format")?;
                transaction.commit().doing("commit the tables")?;
            }
            _ => return Err(DbError::NewerFormat { path, found, known: FORMAT }),
        }
        Ok(Self { connection: Mutex::new(connection) })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic cannot leave a half-done transaction behind: it was rolled back when its guard was dropped.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` in one transaction that is on the disk when this returns `Ok`.
    fn write<T>(&self, work: impl FnOnce(&Transaction<'_>) -> Result<T, DbError>) -> Result<T, DbError> {
        let mut connection = self.lock();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).doing("begin")?;
        let value = work(&transaction)?;
        transaction.commit().doing("commit")?;
        Ok(value)
    }
}

fn signed(number: u64) -> i64 {
    i64::from_ne_bytes(number.to_ne_bytes())
}

fn unsigned(number: i64) -> u64 {
    u64::from_ne_bytes(number.to_ne_bytes())
}

fn scope_key(scope: &Scope) -> (&'static str, &str) {
    match scope {
        Scope::Device(device) => ("device", device.as_str()),
        Scope::Group(group) => ("group", group.as_str()),
    }
}

fn join_groups(groups: &[GroupName]) -> String {
    groups.iter().map(GroupName::as_str).collect::<Vec<_>>().join(",")
}

fn split_groups(text: &str) -> Result<Vec<GroupName>, DbError> {
    text.split(',').filter(|name| !name.is_empty()).map(|name| parse("group", name)).collect()
}

fn parse<T: std::str::FromStr>(what: &'static str, text: &str) -> Result<T, DbError> {
    text.parse().map_err(|_| DbError::Damaged { what, text: text.chars().take(80).collect() })
}

fn read_manifest(connection: &Connection, scope: &Scope) -> Result<Option<StoredManifest>, DbError> {
    let (kind, name) = scope_key(scope);
    let row = connection
        .prepare_cached("SELECT sequence, digest, envelope, stored_at FROM manifests WHERE kind = ?1 AND name = ?2")
        .and_then(|mut statement| {
            statement
                .query_row(params![kind, name], |row| {
                    Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?, row.get::<_, Vec<u8>>(2)?, row.get(3)?))
                })
                .optional()
        })
        .doing("read a manifest")?;
    let Some((sequence, digest, envelope, stored_at)) = row else { return Ok(None) };
    let summary = ManifestSummary {
        scope: scope.label(),
        sequence: Sequence(unsigned(sequence)),
        digest: parse("digest", &digest)?,
        stored_at: Timestamp(stored_at),
    };
    Ok(Some(StoredManifest { summary, envelope }))
}

/// The device's own, else the highest sequence among its groups (the first by name if two have the same).
fn choose_manifest(
    connection: &Connection,
    device: &DeviceId,
    groups: &[GroupName],
) -> Result<Option<StoredManifest>, DbError> {
    if let Some(own) = read_manifest(connection, &Scope::Device(device.clone()))? {
        return Ok(Some(own));
    }
    let mut best: Option<StoredManifest> = None;
    for group in groups {
        let Some(next) = read_manifest(connection, &Scope::Group(group.clone()))? else { continue };
        let higher = match &best {
            Some(best) => next.summary.sequence > best.summary.sequence,
            None => true,
        };
        if higher {
            best = Some(next);
        }
    }
    Ok(best)
}

fn read_groups(connection: &Connection, device: &DeviceId) -> Result<Vec<GroupName>, DbError> {
    let text: Option<String> = connection
        .query_row("SELECT groups FROM devices WHERE id = ?1", [device.as_str()], |row| row.get(0))
        .optional()
        .doing("read a device's groups")?;
    split_groups(&text.unwrap_or_default())
}

fn read_reports(connection: &Connection, device: &DeviceId, limit: u32) -> Result<Vec<ReportRow>, DbError> {
    let from_row = |row: &Row<'_>| {
        Ok(ReportRow {
            number: unsigned(row.get(0)?),
            received_at: Timestamp(row.get(1)?),
            envelope: row.get(2)?,
            json: row.get(3)?,
        })
    };
    connection
        .prepare_cached(
            "SELECT number, received_at, envelope, json FROM reports WHERE device = ?1 ORDER BY row DESC LIMIT ?2",
        )
        .and_then(|mut statement| statement.query_map(params![device.as_str(), limit], from_row)?.collect())
        .doing("read reports")
}

fn read_device(connection: &Connection, device: &DeviceId) -> Result<Option<DeviceRow>, DbError> {
    type Columns = (Option<String>, String, Option<i64>, Option<i64>, i64);
    let row: Option<Columns> = connection
        .query_row(
            "SELECT key_id, groups, enrolled_at, last_seen, last_poll FROM devices WHERE id = ?1",
            [device.as_str()],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?)),
        )
        .optional()
        .doing("read a device")?;
    let known = row.is_some();
    let (key_id, groups, enrolled_at, last_seen, last_poll) = row.unwrap_or_default();
    let groups = split_groups(&groups)?;
    let manifest = choose_manifest(connection, device, &groups)?.map(|stored| stored.summary);
    if !known && manifest.is_none() {
        return Ok(None);
    }
    Ok(Some(DeviceRow {
        device: device.clone(),
        key_id: key_id.map(|id| parse("key id", &id)).transpose()?,
        enrolled_at: enrolled_at.map(Timestamp),
        last_seen: last_seen.map(Timestamp),
        last_poll: (last_poll > 0).then_some(Timestamp(last_poll)),
        last_report: read_reports(connection, device, 1)?.into_iter().next(),
        groups,
        manifest,
    }))
}

/// Whether this token lets this device in; `None` if not. The value says who used it before.
fn check_token(
    transaction: &Transaction<'_>,
    request: &Enrollment,
    now: Timestamp,
) -> Result<Option<(TokenRow, Option<String>)>, DbError> {
    type Columns = (Option<String>, Option<String>, i64, Option<String>);
    let row: Option<Columns> = transaction
        .query_row(
            "SELECT device, groups, expires, used_by FROM tokens WHERE hash = ?1",
            [request.token_hash.to_string()],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
        )
        .optional()
        .doing("read a token")?;
    let Some((device, groups, expires, used_by)) = row else { return Ok(None) };
    let id = request.device.as_str();
    let for_other = device.as_deref().is_some_and(|bound| bound != id);
    let used_by_other = used_by.as_deref().is_some_and(|user| user != id);
    let too_late = used_by.is_none() && now.0 > expires;
    if for_other || used_by_other || too_late {
        return Ok(None);
    }
    let token = TokenRow {
        hash: request.token_hash,
        device: device.as_deref().map(|text| parse("device", text)).transpose()?,
        groups: groups.as_deref().map(split_groups).transpose()?,
        expires: Timestamp(expires),
    };
    Ok(Some((token, used_by)))
}

impl Db for Sqlite {
    fn put_manifest(&self, scope: &Scope, manifest: &NewManifest) -> Result<Option<Sequence>, DbError> {
        let (kind, name) = scope_key(scope);
        self.write(|transaction| {
            let before: Option<i64> = transaction
                .query_row("SELECT sequence FROM manifests WHERE kind = ?1 AND name = ?2", params![kind, name], |row| {
                    row.get(0)
                })
                .optional()
                .doing("read the manifest before")?;
            transaction
                .execute(
                    "INSERT INTO manifests (kind, name, sequence, digest, envelope, stored_at)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                     ON CONFLICT (kind, name) DO UPDATE SET sequence = excluded.sequence, digest = excluded.digest,
                         envelope = excluded.envelope, stored_at = excluded.stored_at",
                    params![
                        kind,
                        name,
                        signed(manifest.sequence.0),
                        manifest.digest.to_string(),
                        manifest.envelope,
                        manifest.now.0
                    ],
                )
                .doing("store a manifest")?;
            Ok(before.map(|sequence| Sequence(unsigned(sequence))))
        })
    }

    fn wanted(&self, device: &DeviceId) -> Result<Wanted, DbError> {
        let connection = self.lock();
        let groups = read_groups(&connection, device)?;
        Ok(Wanted { manifest: choose_manifest(&connection, device, &groups)?, groups })
    }

    fn newest_trust_root(&self) -> Result<u64, DbError> {
        let newest = self
            .lock()
            .query_row("SELECT coalesce(max(version), 0) FROM trust_roots", [], |row| row.get(0))
            .doing("read the newest trust root")?;
        Ok(unsigned(newest))
    }

    fn put_trust_root(&self, root: &NewTrustRoot) -> Result<(), DbError> {
        self.write(|transaction| {
            transaction
                .execute(
                    "INSERT INTO trust_roots (version, digest, envelope, stored_at) VALUES (?1, ?2, ?3, ?4)
                     ON CONFLICT (version) DO UPDATE SET digest = excluded.digest, envelope = excluded.envelope,
                         stored_at = excluded.stored_at",
                    params![signed(root.version), root.digest.to_string(), root.envelope, root.now.0],
                )
                .doing("store a trust root")?;
            Ok(())
        })
    }

    fn trust_root(&self, version: u64) -> Result<Option<Vec<u8>>, DbError> {
        self.lock()
            .query_row(
                "SELECT envelope FROM trust_roots WHERE version >= ?1 ORDER BY version LIMIT 1",
                [signed(version)],
                |row| row.get(0),
            )
            .optional()
            .doing("read a trust root")
    }

    fn add_token(&self, token: &TokenRow) -> Result<(), DbError> {
        self.write(|transaction| {
            transaction
                .execute(
                    "INSERT INTO tokens (hash, device, groups, expires) VALUES (?1, ?2, ?3, ?4)",
                    params![
                        token.hash.to_string(),
                        token.device.as_ref().map(DeviceId::as_str),
                        token.groups.as_deref().map(join_groups),
                        token.expires.0
                    ],
                )
                .doing("store a token")?;
            Ok(())
        })
    }

    fn enroll(&self, request: &Enrollment, now: Timestamp) -> Result<EnrollOutcome, DbError> {
        self.write(|transaction| {
            let Some((token, used_by)) = check_token(transaction, request, now)? else {
                return Ok(EnrollOutcome::TokenRefused);
            };
            let device = request.device.as_str();
            let before = read_device(transaction, &request.device)?;
            let enrolled = |groups: Vec<GroupName>, since: Timestamp| Enrolled {
                device: request.device.clone(),
                key_id: request.key_id,
                groups,
                since,
            };
            match before.as_ref().and_then(|row| row.key_id.map(|key| (key, row))) {
                Some((key, row)) if key == request.key_id => {
                    let since = row.enrolled_at.unwrap_or(now);
                    return Ok(EnrollOutcome::Already(enrolled(row.groups.clone(), since)));
                }
                Some((key, _)) => return Ok(EnrollOutcome::OtherKey { enrolled: key }),
                // The key was forgotten since: a used token does not open the door a second time.
                None if used_by.is_some() => return Ok(EnrollOutcome::TokenRefused),
                None => {}
            }
            let groups = token.groups.unwrap_or_else(|| request.groups.clone());
            transaction
                .execute(
                    "INSERT INTO devices (id, key_id, key_pem, groups, enrolled_at, last_seen)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?5)
                     ON CONFLICT (id) DO UPDATE SET key_id = excluded.key_id, key_pem = excluded.key_pem,
                         groups = excluded.groups, enrolled_at = excluded.enrolled_at,
                         last_seen = excluded.last_seen, last_number = 0",
                    params![device, request.key_id.to_string(), request.public_key_pem, join_groups(&groups), now.0],
                )
                .doing("store a device")?;
            transaction
                .execute(
                    "UPDATE tokens SET used_by = ?2 WHERE hash = ?1",
                    params![request.token_hash.to_string(), device],
                )
                .doing("mark a token as used")?;
            Ok(EnrollOutcome::Created(enrolled(groups, now)))
        })
    }

    fn forget_key(&self, device: &DeviceId) -> Result<bool, DbError> {
        self.write(|transaction| {
            let changed = transaction
                .execute("UPDATE devices SET key_id = NULL, key_pem = NULL WHERE id = ?1", [device.as_str()])
                .doing("forget a key")?;
            Ok(changed > 0)
        })
    }

    fn set_groups(&self, device: &DeviceId, groups: &[GroupName]) -> Result<bool, DbError> {
        self.write(|transaction| {
            let changed = transaction
                .execute("UPDATE devices SET groups = ?2 WHERE id = ?1", params![device.as_str(), join_groups(groups)])
                .doing("set a device's groups")?;
            Ok(changed > 0)
        })
    }

    fn device_key(&self, device: &DeviceId) -> Result<Option<String>, DbError> {
        let key: Option<Option<String>> = self
            .lock()
            .query_row("SELECT key_pem FROM devices WHERE id = ?1", [device.as_str()], |row| row.get(0))
            .optional()
            .doing("read a device's key")?;
        Ok(key.flatten())
    }

    fn add_report(&self, device: &DeviceId, report: &ReportRow) -> Result<ReportOutcome, DbError> {
        self.write(|transaction| {
            let last: Option<i64> = transaction
                .query_row(
                    "SELECT last_number FROM devices WHERE id = ?1 AND key_id IS NOT NULL",
                    [device.as_str()],
                    |row| row.get(0),
                )
                .optional()
                .doing("read the last report's number")?;
            let Some(last) = last.map(unsigned) else { return Ok(ReportOutcome::NotEnrolled) };
            if report.number <= last {
                return Ok(ReportOutcome::Replayed { last });
            }
            transaction
                .execute(
                    "UPDATE devices SET last_number = ?2, last_seen = ?3 WHERE id = ?1",
                    params![device.as_str(), signed(report.number), report.received_at.0],
                )
                .doing("note a report's number")?;
            transaction
                .execute(
                    "INSERT INTO reports (device, number, received_at, envelope, json) VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![device.as_str(), signed(report.number), report.received_at.0, report.envelope, report.json],
                )
                .doing("store a report")?;
            transaction
                .execute(
                    "DELETE FROM reports WHERE device = ?1 AND row <=
                         (SELECT row FROM reports WHERE device = ?1 ORDER BY row DESC LIMIT 1 OFFSET ?2)",
                    params![device.as_str(), REPORTS_KEPT],
                )
                .doing("drop old reports")?;
            Ok(ReportOutcome::Stored)
        })
    }

    fn polled(&self, device: &DeviceId, now: Timestamp) -> Result<(), DbError> {
        self.lock()
            .execute(
                "UPDATE devices SET last_poll = ?2 WHERE id = ?1 AND last_poll < ?2 - ?3",
                params![device.as_str(), now.0, POLL_NOTED_EVERY_SECS],
            )
            .doing("note a poll")?;
        Ok(())
    }

    fn devices(&self, after: Option<&DeviceId>, limit: u32) -> Result<Vec<DeviceRow>, DbError> {
        let connection = self.lock();
        let names: Vec<String> = connection
            .prepare_cached(
                "SELECT id FROM (SELECT id FROM devices UNION SELECT name FROM manifests WHERE kind = 'device')
                 WHERE id > ?1 ORDER BY id LIMIT ?2",
            )
            .and_then(|mut statement| {
                statement.query_map(params![after.map_or("", DeviceId::as_str), limit], |row| row.get(0))?.collect()
            })
            .doing("list devices")?;
        let mut rows = Vec::with_capacity(names.len());
        for name in names {
            rows.extend(read_device(&connection, &parse("device", &name)?)?);
        }
        Ok(rows)
    }

    fn device(&self, device: &DeviceId) -> Result<Option<DeviceRow>, DbError> {
        read_device(&self.lock(), device)
    }

    fn reports(&self, device: &DeviceId, limit: u32) -> Result<Vec<ReportRow>, DbError> {
        read_reports(&self.lock(), device, limit)
    }
}
