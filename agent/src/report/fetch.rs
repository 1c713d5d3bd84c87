//! Asks the fleet for a manifest: with the ETag of the last one, and willing to wait for a newer. What comes is handed on
//! unread; whether it is to be believed is for others to say.

use std::time::Duration;

use edged_model::cbor::MAX_DOCUMENT_BYTES;
use edged_model::id::Digest;
use edged_model::reason::{Code, Reason};
use tokio::sync::{mpsc, oneshot};
use ureq::http::{HeaderMap, StatusCode};

use super::{Endpoint, FleetLine, Offer, Refused, random, refusal, retry};
use crate::config::Fleet;

/// The agent answers an offer sooner than this or not at all.
const BUSY_PAUSE_FAILURES: u32 = 2;
/// Beyond the time that the fleet may wait, an answer may take this long.
const ANSWER_MARGIN: Duration = Duration::from_secs(30);

enum Fetched {
    New { envelope: Vec<u8>, etag: Option<String>, has_waited: bool },
    Nothing { has_waited: bool },
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
    while !offers.is_closed() {
        let has_waited = match fetch(line, endpoint, config, etag.as_deref()) {
            Ok(Fetched::New { envelope, etag: new, has_waited }) => {
                line.reached((endpoint.clock)());
                if !offer(offers, envelope) {
                    // It was not looked at: ask for it again.
                    pause(retry::pause(BUSY_PAUSE_FAILURES, None, random()));
                    continue;
                }
                etag = new;
                has_waited
            }
            Ok(Fetched::Nothing { has_waited }) => {
                line.reached((endpoint.clock)());
                has_waited
            }
            Err(refused) => {
                failures += 1;
                line.missed(refused.reason);
                pause(retry::pause(failures, refused.retry_after_secs, random()));
                continue;
            }
        };
        failures = 0;
        // An endpoint that does not long-poll answers at once: then the pause is ours to keep.
        if !has_waited {
            pause(config.poll_interval.duration());
        }
    }
}

/// Whether the agent has judged it, one way or the other.
fn offer(offers: &mpsc::Sender<Offer>, envelope: Vec<u8>) -> bool {
    let (reply, verdict) = oneshot::channel();
    if offers.blocking_send(Offer { envelope, by: "fleet".to_owned(), reply }).is_err() {
        return false;
    }
    match verdict.blocking_recv() {
        Ok(Ok(_)) => true,
        Ok(Err(reason)) => reason.code != Code::Busy,
        Err(_) => false,
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
    let has_waited = has_waited(response.headers());
    match response.status() {
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
            Ok(Fetched::New { envelope, etag, has_waited })
        }
        // 404: there is none for us yet.
        StatusCode::NOT_MODIFIED | StatusCode::NO_CONTENT | StatusCode::NOT_FOUND => {
            Ok(Fetched::Nothing { has_waited })
        }
        _ => Err(refusal(&url, response)),
    }
}
