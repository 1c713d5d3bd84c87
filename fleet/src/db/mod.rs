//! What the fleet endpoint remembers, behind a trait so that another database can take SQLite's place. Every method is
//! one transaction and blocks: callers stand on a thread that may wait. Times are passed in; nothing is verified here.

pub mod sqlite;

use edged_model::fleet::{Enrolled, ManifestSummary};
use edged_model::id::{DeviceId, Digest, GroupName, Sequence};
use edged_model::quantity::Timestamp;

/// Whose manifest it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Scope {
    Device(DeviceId),
    Group(GroupName),
}

impl Scope {
    /// The word in the database and in answers: `device` is implied by where it is asked.
    pub fn label(&self) -> String {
        match self {
            Self::Device(_) => "device".to_owned(),
            Self::Group(group) => format!("group:{group}"),
        }
    }
}

/// A signed manifest as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredManifest {
    pub summary: ManifestSummary,
    pub envelope: Vec<u8>,
}

/// What a device's poll has to look at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// The device's own manifest, else that of its group with the highest sequence.
    pub manifest: Option<StoredManifest>,
    pub groups: Vec<GroupName>,
}

/// A device's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRow {
    pub device: DeviceId,
    pub groups: Vec<GroupName>,
    pub key_id: Option<Digest>,
    pub enrolled_at: Option<Timestamp>,
    /// Last enrolment or signed report: proved.
    pub last_seen: Option<Timestamp>,
    /// Last time somebody asked for its manifest: anyone may.
    pub last_poll: Option<Timestamp>,
    pub manifest: Option<ManifestSummary>,
    pub last_report: Option<ReportRow>,
}

/// A report that was verified before it came here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportRow {
    pub number: u64,
    pub received_at: Timestamp,
    pub envelope: Vec<u8>,
    /// The payload as JSON, so that a later version still shows it as it was.
    pub json: String,
}

/// A token as stored: its hash only, so that a copy of the database enrols nobody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    pub hash: Digest,
    pub device: Option<DeviceId>,
    pub groups: Option<Vec<GroupName>>,
    pub expires: Timestamp,
}

/// What a device asks for, its key already parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrollment {
    pub device: DeviceId,
    pub token_hash: Digest,
    pub key_id: Digest,
    pub public_key_pem: String,
    pub groups: Vec<GroupName>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnrollOutcome {
    Created(Enrolled),
    /// The same device with the same key and token came again: its answer was lost.
    Already(Enrolled),
    /// The token is unknown, used by another, bound to another device or expired. Not told apart to strangers.
    TokenRefused,
    /// The device has another key.
    OtherKey {
        enrolled: Digest,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportOutcome {
    Stored,
    /// Its number is not above the last one.
    Replayed {
        last: u64,
    },
    NotEnrolled,
}

/// Why the database could not answer.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    #[error("database: {doing}")]
    Sqlite {
        doing: &'static str,
        #[source]
        source: rusqlite::Error,
    },
    #[error("database {path} has format {found}; this program knows formats up to {known}")]
    NewerFormat { path: std::path::PathBuf, found: u32, known: u32 },
    #[error("database: {what} `{text}` is not what was once stored")]
    Damaged { what: &'static str, text: String },
    #[error("cannot use {path}")]
    Directory {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// The fleet's memory. A method that returned `Ok` is on the disk.
pub trait Db: Send + Sync {
    /// Stores the envelope and returns the sequence that was stored for this scope before.
    fn put_manifest(&self, scope: &Scope, manifest: &NewManifest) -> Result<Option<Sequence>, DbError>;
    fn wanted(&self, device: &DeviceId) -> Result<Wanted, DbError>;
    /// Keeps a trust root under its version.
    fn put_trust_root(&self, root: &NewTrustRoot) -> Result<(), DbError>;
    /// The highest version; 0: there is none.
    fn newest_trust_root(&self) -> Result<u64, DbError>;
    /// That of this version, or the next one above where it was left out.
    fn trust_root(&self, version: u64) -> Result<Option<Vec<u8>>, DbError>;
    fn add_token(&self, token: &TokenRow) -> Result<(), DbError>;
    fn enroll(&self, request: &Enrollment, now: Timestamp) -> Result<EnrollOutcome, DbError>;
    /// Forgets a device's key, so that it may enrol with another one. Its reports and manifest stay.
    fn forget_key(&self, device: &DeviceId) -> Result<bool, DbError>;
    fn set_groups(&self, device: &DeviceId, groups: &[GroupName]) -> Result<bool, DbError>;
    /// The PEM of the device's key.
    fn device_key(&self, device: &DeviceId) -> Result<Option<String>, DbError>;
    fn add_report(&self, device: &DeviceId, report: &ReportRow) -> Result<ReportOutcome, DbError>;
    /// Notes a poll. Written at most twice a minute, and only for devices that enrolled.
    fn polled(&self, device: &DeviceId, now: Timestamp) -> Result<(), DbError>;
    /// All devices by name, after `after`, at most `limit`.
    fn devices(&self, after: Option<&DeviceId>, limit: u32) -> Result<Vec<DeviceRow>, DbError>;
    fn device(&self, device: &DeviceId) -> Result<Option<DeviceRow>, DbError>;
    /// Newest first.
    fn reports(&self, device: &DeviceId, limit: u32) -> Result<Vec<ReportRow>, DbError>;
}

/// A trust root that is to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTrustRoot {
    pub version: u64,
    pub digest: Digest,
    pub envelope: Vec<u8>,
    pub now: Timestamp,
}

/// A manifest that is to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewManifest {
    pub sequence: Sequence,
    pub digest: Digest,
    pub envelope: Vec<u8>,
    pub now: Timestamp,
}
