//! Every *why* of edged: a code for programs, a sentence for people, and what to do next. The same words appear in
//! `edgectl`, in the report and in the log, because all three print a [`Reason`] and nothing else.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A stable code. New ones are added, old ones never change their meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Code {
    // A document was refused.
    NotCbor,
    NotSigned,
    UnknownSigner,
    BadSignature,
    TooLarge,
    TooDeep,
    DuplicateKey,
    Malformed,
    UnknownField,
    WrongDevice,
    SequenceSeen,
    Expired,
    TrustRollback,
    ThresholdNotMet,
    // A manifest is well formed but cannot be done.
    InvalidManifest,
    MissingLimit,
    QuotaDoesNotFit,
    DiskDoesNotFit,
    NotAllowedHere,
    // An image could not be had.
    ImageNotFound,
    ImageUnauthorized,
    ImageUnsigned,
    ImageWrongKey,
    DigestMismatch,
    RegistryUnavailable,
    RegistryRefused,
    ImageUnusable,
    LayerRefused,
    ImageReady,
    // A workload.
    Started,
    Exited,
    Signalled,
    OutOfMemory,
    StartFailed,
    Unhealthy,
    BecameHealthy,
    BackOff,
    WaitingForDependency,
    WaitingForImage,
    WaitingForTurn,
    /// A window, a lock, a boot, or an operator's word.
    WaitingForMoment,
    OperatorStopped,
    OperatorRestarted,
    SpecChanged,
    NotInManifest,
    PolicyNever,
    // A generation.
    Verified,
    Activated,
    BecameGood,
    ProbationFailed,
    RolledBack,
    Superseded,
    NoSuchGeneration,
    OperatorRollback,
    OperatorRetry,
    OperatorActivate,
    // The device.
    AgentRestarted,
    Boot,
    StoreRebuilt,
    DiskFull,
    Pruned,
    ClockMoved,
    FleetUnavailable,
    Network,
    Busy,
    NoSuchWorkload,
    NotRunning,
    OperatorCommand,
    OperatorPaused,
    OperatorResumed,
    /// Its signature does not name what the trust root's rule asks for.
    ImageWrongIdentity,
    /// A document in force will expire soon.
    Expiring,
}

/// Why something is as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reason {
    pub code: Code,
    /// One sentence with the object and the numbers in it.
    pub text: String,
    /// What the reader can do about it; empty when nothing is asked.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub next: String,
}

impl Reason {
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into(), next: String::new() }
    }

    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = next.into();
        self
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        if !self.next.is_empty() {
            write!(f, " ({})", self.next)?;
        }
        Ok(())
    }
}
