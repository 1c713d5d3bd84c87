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
    /// A layer on the disk is not what was unpacked.
    LayerDamaged,
    LayersChecked,
    /// The day's mobile data are used.
    DataBudget,
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
    LimitsChanged,
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
    Upgrade,
    UpgradeRefused,
    /// A newer edged fell again and again, and the one before runs again.
    UpgradeReturned,
    /// A newer edged runs, and the one before is kept until it has proved itself.
    UpgradeOnTrial,
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
    /// All workloads, their images and perhaps their volumes go.
    OperatorReset,
    /// Its signature does not name what the trust root's rule asks for.
    ImageWrongIdentity,
    /// A document in force will expire soon.
    Expiring,
    /// A manifest's `issued` is in the future, or after the end of the trust root.
    NotYetIssued,
    /// A manifest's sequence leaves out so many that few could follow it.
    SequenceLeaps,
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
        Self { code, text: shown(text.into()), next: String::new() }
    }

    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = shown(next.into());
        self
    }
}

/// A sentence is shown on terminals and kept in the store: names in it come from outside, and whatever they hold, it stays
/// without control characters and within bounds.
fn shown(text: String) -> String {
    const MAX: usize = 2_000;
    let is_obeyed = |c: char| c.is_control() && c != '\n';
    if text.len() <= MAX && !text.contains(is_obeyed) {
        return text;
    }
    let mut short: String = text.chars().take(MAX).map(|c| if is_obeyed(c) { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(MAX).is_some() {
        short.push('…');
    }
    short
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_from_outside_makes_no_wild_and_no_endless_sentence() {
        let why = Reason::new(Code::Malformed, format!("`\u{1b}[2J{}`", "x".repeat(5_000))).next("look\r\nthere");
        assert!(why.text.starts_with("`\u{fffd}[2Jxxx") && why.text.ends_with('…'), "{}", why.text);
        assert_eq!(why.text.chars().count(), 2_001);
        assert_eq!(why.next, "look\u{fffd}\nthere");
        assert_eq!(Reason::new(Code::Boot, "plain").text, "plain");
    }
}
