//! Newer trust roots from the fleet: `GET /v1/trust/{version}`, one after the other from the version after ours, until there
//! is none. They are handed on unread, all in one go: on the way from the first to the last each is only looked at by the
//! one before it. Asked for when the fleet says that it has a newer one, when a manifest is signed by somebody unknown, and
//! now and then of an endpoint that says nothing.

use edged_model::cbor::{self, MAX_DOCUMENT_BYTES};
use edged_model::envelope::{self, Kind};
use edged_model::fleet::TRUST_HEADER;
use edged_model::id::Digest;
use edged_model::quantity::Timestamp;
use edged_model::reason::{Code, Reason};
use edged_model::trust::TrustRoot;
use tokio::sync::mpsc;
use ureq::http::{HeaderMap, StatusCode};

use super::fetch::{Verdict, offer};
use super::{Endpoint, FleetLine, Offer};

/// Of an endpoint that does not say which version it has.
const EVERY_SECS: i64 = 3_600;
/// In one go; a device that is further behind takes them in several.
const ROOTS_MAX: usize = 64;
const BYTES_MAX: usize = 2 << 20;

#[derive(Debug, Default)]
pub(super) struct Roots {
    asked_at: Option<Timestamp>,
    /// The version that the fleet spoke of when it was asked last.
    spoken_of: Option<u64>,
    /// What was offered last: not again while it leads nowhere.
    offered: Option<Digest>,
}

/// The newest version that the endpoint has, if it says so.
pub(super) fn newest(headers: &HeaderMap) -> Option<u64> {
    headers.get(TRUST_HEADER)?.to_str().ok()?.trim().parse().ok()
}

/// A manifest that a newer trust root may make good.
pub(super) fn may_help(reason: &Reason) -> bool {
    matches!(reason.code, Code::UnknownSigner | Code::ThresholdNotMet | Code::Expired)
}

impl Roots {
    fn is_due(&self, spoken_of: Option<u64>, ours: u64, now: Timestamp) -> bool {
        let is_old = self.asked_at.is_none_or(|at| !(0..EVERY_SECS).contains(&now.0.saturating_sub(at.0)));
        match spoken_of {
            Some(theirs) => theirs > ours && (is_old || self.spoken_of != spoken_of),
            None => is_old,
        }
    }

    pub fn catch_up_if_due(
        &mut self,
        line: &FleetLine,
        endpoint: &Endpoint,
        offers: &mpsc::Sender<Offer>,
        spoken_of: Option<u64>,
    ) {
        if self.is_due(spoken_of, line.root_version(), (endpoint.clock)()) {
            self.spoken_of = spoken_of;
            self.catch_up(line, endpoint, offers);
        }
    }

    /// Whether another root is in force now.
    pub fn catch_up(&mut self, line: &FleetLine, endpoint: &Endpoint, offers: &mpsc::Sender<Offer>) -> bool {
        let before = line.root_version();
        self.asked_at = Some((endpoint.clock)());
        let envelopes = fetch_after(endpoint, before);
        let last = envelopes.last().map(|envelope| Digest::of(envelope));
        if last.is_none() || last == self.offered {
            return false;
        }
        match offer(offers, envelopes) {
            Verdict::Taken | Verdict::Refused(_) => self.offered = last,
            Verdict::NotLookedAt => {}
        }
        line.root_version() > before
    }
}

/// What the fleet has above `version`. A link that breaks ends the list: the next time goes on from there.
fn fetch_after(endpoint: &Endpoint, mut version: u64) -> Vec<Vec<u8>> {
    let (mut envelopes, mut bytes) = (Vec::new(), 0);
    while envelopes.len() < ROOTS_MAX && bytes < BYTES_MAX {
        let Some(next) = version.checked_add(1) else { break };
        let url = format!("{}/trust/{next}", endpoint.base);
        let envelope = match fetch_one(endpoint, &url) {
            Ok(Some(envelope)) => envelope,
            Ok(None) => break,
            Err(error) => {
                tracing::info!("{url}: {error}");
                break;
            }
        };
        // Only to know what to ask for next. What cannot be read is handed on all the same, to be refused by name.
        let claimed = claimed_version(&envelope);
        bytes += envelope.len();
        envelopes.push(envelope);
        match claimed {
            Some(claimed) if claimed >= next => version = claimed,
            _ => break,
        }
    }
    envelopes
}

fn fetch_one(endpoint: &Endpoint, url: &str) -> Result<Option<Vec<u8>>, ureq::Error> {
    let response = endpoint.agent.get(url).call()?;
    if response.status() != StatusCode::OK {
        return Ok(None);
    }
    response.into_body().with_config().limit(MAX_DOCUMENT_BYTES as u64).read_to_vec().map(Some)
}

fn claimed_version(envelope: &[u8]) -> Option<u64> {
    let opened = envelope::open(envelope, Kind::TrustRoot).ok()?;
    let root: TrustRoot = cbor::decode(&opened.signed_by(&[]).ok()?.payload).ok()?;
    Some(root.version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asked_when_there_is_a_reason_and_not_at_each_poll() {
        let now = Timestamp(1_000_000);
        let mut roots = Roots::default();
        assert!(roots.is_due(None, 1, now), "never asked");
        assert!(!roots.is_due(Some(1), 1, now), "the fleet has none that is newer");
        assert!(roots.is_due(Some(2), 1, now));
        (roots.asked_at, roots.spoken_of) = (Some(now), Some(2));
        assert!(!roots.is_due(None, 1, now));
        assert!(!roots.is_due(Some(2), 1, now), "it was asked for, and led nowhere");
        assert!(roots.is_due(Some(3), 1, now));
        let later = Timestamp(now.0 + EVERY_SECS);
        assert!(roots.is_due(None, 1, later) && roots.is_due(Some(2), 1, later));
        assert!(roots.is_due(None, 1, Timestamp(0)), "a clock that fell back stops nothing");
    }
}
