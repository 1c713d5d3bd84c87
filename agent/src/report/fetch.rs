//! Asks the fleet for a manifest: with the ETag of the last one, and willing to wait for a newer. What comes is handed on
//! unread; whether it is to be believed is for others to say.

use std::time::Duration;

use edged_model::cbor::MAX_DOCUMENT_BYTES;
use edged_model::id::Digest;
use edged_model::quantity::Timestamp;
use edged_model::reason::{Code, Reason};
use tokio::sync::{mpsc, oneshot};
use ureq::http::{HeaderMap, StatusCode};

use super::roots::{self, Roots};
use super::{Endpoint, FleetLine, Offer, Refused, is_a_page, page, random, refusal, retry};
use crate::config::Fleet;

/// The agent answers an offer sooner than this or not at all.
const BUSY_PAUSE_FAILURES: u32 = 2;
/// Beyond the time that the fleet may wait, an answer may take this long.
const ANSWER_MARGIN: Duration = Duration::from_secs(30);

/// A manifest that was refused as not yet issued is asked for again when the clock has gone on by so much.
const NOT_YET_SECS: i64 = 3_600;

struct Fetched {
    /// One that is not known yet, and its ETag.
    new: Option<(Vec<u8>, Option<String>)>,
    has_waited: bool,
    /// The newest trust root that the endpoint has, if it says so.
    trust_root: Option<u64>,
}

/// What became of an offer.
pub(super) enum Verdict {
    Taken,
    Refused(Reason),
    /// The agent had no time for it, or is ending.
    NotLookedAt,
}

/// Polls until nobody listens to `offers` any more. `known`: the manifest that the device has already.
pub(super) fn run(
    line: &FleetLine,
    endpoint: &Endpoint,
    config: &Fleet,
    known: Option<Digest>,
    offers: &mpsc::Sender<Offer>,
) {
    // Our own fleet's ETag is the digest; another's differs, and then the manifest comes once more than needed.
    let mut etag = known.map(|digest| format!("\"{digest}\""));
    let mut failures = 0;
    let mut roots = Roots::default();
    // By the clock, which was wrong if it leaps.
    let mut refused_at: Option<Timestamp> = None;
    while !offers.is_closed() {
        if refused_at.is_some_and(|at| (endpoint.clock)().0.saturating_sub(at.0) >= NOT_YET_SECS) {
            (refused_at, etag) = (None, None);
        }
        let fetched = match fetch(line, endpoint, config, etag.as_deref()) {
            Ok(fetched) => fetched,
            Err(refused) => {
                failures += 1;
                line.missed(refused.reason);
                pause(retry::pause(failures, refused.retry_after_secs, random()));
                continue;
            }
        };
        failures = 0;
        line.reached((endpoint.clock)());
        // Before the manifest, which may be signed by keys that only the newer root knows.
        roots.catch_up_if_due(line, endpoint, offers, fetched.trust_root);
        if let Some((envelope, new)) = fetched.new {
            let offered_at = (endpoint.clock)();
            let mut verdict = offer(offers, vec![envelope.clone()]);
            if matches!(&verdict, Verdict::Refused(why) if roots::may_help(why))
                && roots.catch_up(line, endpoint, offers)
            {
                verdict = offer(offers, vec![envelope]);
            }
            if matches!(verdict, Verdict::NotLookedAt) {
                // Ask for it again.
                pause(retry::pause(BUSY_PAUSE_FAILURES, None, random()));
                continue;
            }
            refused_at = not_yet(&verdict).then_some(offered_at);
            etag = new;
        }
        // An endpoint that does not long-poll answers at once: then the pause is ours to keep.
        if !fetched.has_waited {
            pause(config.poll_interval.duration());
        }
    }
}

/// A refusal that passes by itself, when the device learns the time.
fn not_yet(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Refused(why) if why.code == Code::NotYetIssued)
}

/// Hands a document on, or trust roots in turn, and waits for the verdict.
pub(super) fn offer(offers: &mpsc::Sender<Offer>, mut envelopes: Vec<Vec<u8>>) -> Verdict {
    let (reply, verdict) = oneshot::channel();
    if envelopes.is_empty() {
        return Verdict::NotLookedAt;
    }
    let chain = envelopes.split_off(1);
    let Some(envelope) = envelopes.pop() else { return Verdict::NotLookedAt };
    if offers.blocking_send(Offer { envelope, chain, by: "fleet".to_owned(), reply }).is_err() {
        return Verdict::NotLookedAt;
    }
    match verdict.blocking_recv() {
        Ok(Ok(_)) => Verdict::Taken,
        Ok(Err(reason)) if reason.code == Code::Busy => Verdict::NotLookedAt,
        Ok(Err(reason)) => Verdict::Refused(reason),
        Err(_) => Verdict::NotLookedAt,
    }
}

fn pause(time: Duration) {
    #[expect(clippy::disallowed_methods, reason = "this thread only polls, and has to let time pass")]
    std::thread::sleep(time);
}

/// RFC 7240, section 3: the endpoint says so when it honoured `Prefer: wait`.
fn has_waited(headers: &HeaderMap) -> bool {
    let applied = headers.get("preference-applied").and_then(|value| value.to_str().ok());
    applied.is_some_and(|value| value.split([',', ';']).any(|part| part.trim().starts_with("wait")))
}

fn fetch(line: &FleetLine, endpoint: &Endpoint, config: &Fleet, etag: Option<&str>) -> Result<Fetched, Refused> {
    let url = format!("{}/devices/{}/manifest", endpoint.base, line.shared.device);
    let broken = |text: String| Refused::by_line(format!("{url}: {text}"));
    let wait = config.poll_wait.duration();
    let mut request = endpoint.agent.get(&url).header("prefer", format!("wait={}", wait.as_secs()));
    if let Some(etag) = etag {
        request = request.header("if-none-match", etag);
    }
    let response = request
        .config()
        .timeout_recv_response(Some(wait + ANSWER_MARGIN))
        .build()
        .call()
        .map_err(|error| broken(error.to_string()))?;
    let (has_waited, trust_root) = (has_waited(response.headers()), roots::newest(response.headers()));
    match response.status() {
        StatusCode::OK | StatusCode::NOT_FOUND if is_a_page(&response) => Err(page(&url)),
        StatusCode::OK => {
            let etag = response.headers().get("etag").and_then(|tag| tag.to_str().ok()).map(str::to_owned);
            let mut body = response.into_body();
            let limit = MAX_DOCUMENT_BYTES as u64;
            let envelope = body.with_config().limit(limit).read_to_vec().map_err(|error| match error {
                ureq::Error::BodyExceedsLimit(_) => Refused {
                    reason: Reason::new(Code::TooLarge, format!("{url}: the manifest is larger than {limit} bytes")),
                    retry_after_secs: None,
                },
                error => broken(error.to_string()),
            })?;
            Ok(Fetched { new: Some((envelope, etag)), has_waited, trust_root })
        }
        // 404: there is none for us yet.
        StatusCode::NOT_MODIFIED | StatusCode::NO_CONTENT | StatusCode::NOT_FOUND => {
            Ok(Fetched { new: None, has_waited, trust_root })
        }
        _ => Err(refusal(&url, response)),
    }
}
