//! Asks the fleet for a manifest: with the ETag of the last one, and willing to wait for a newer. What comes is handed on
//! unread; whether it is to be believed is for others to say.

use std::io::Read;
use std::time::Duration;

use edged_model::cbor::MAX_DOCUMENT_BYTES;
use edged_model::reason::{Code, Reason};
use tokio::sync::mpsc;
use ureq::http::StatusCode;

use super::{Endpoint, FleetLine, backoff};
use crate::config::Fleet;

enum Fetched {
    New(Vec<u8>, Option<String>),
    Nothing,
}

pub fn run(line: &FleetLine, endpoint: &Endpoint, config: &Fleet, offers: &mpsc::Sender<Vec<u8>>) {
    let mut etag = None;
    let mut failures = 0;
    loop {
        let asked = std::time::Instant::now();
        match fetch(line, endpoint, config, etag.as_deref()) {
            Ok(Fetched::New(bytes, tag)) => {
                failures = 0;
                line.reached((endpoint.clock)());
                etag = tag;
                if offers.blocking_send(bytes).is_err() {
                    return;
                }
            }
            Ok(Fetched::Nothing) => {
                failures = 0;
                line.reached((endpoint.clock)());
            }
            Err(why) => {
                failures += 1;
                line.missed(why);
                pause(backoff(failures));
                continue;
            }
        }
        // An endpoint that does not long-poll answers at once: then we keep the pause.
        let passed = asked.elapsed();
        if passed < Duration::from_secs(1) {
            pause(config.poll_interval.duration().saturating_sub(passed));
        }
    }
}

fn pause(time: Duration) {
    #[expect(clippy::disallowed_methods, reason = "this thread only polls, and has to let time pass")]
    std::thread::sleep(time);
}

fn fetch(line: &FleetLine, endpoint: &Endpoint, config: &Fleet, etag: Option<&str>) -> Result<Fetched, Reason> {
    let unavailable = |text: String| Reason::new(Code::FleetUnavailable, text);
    let url = format!("{}/devices/{}/manifest", endpoint.base, line.shared.device);
    let wait = config.poll_wait.duration();
    let mut request = endpoint.agent.get(&url).header("prefer", format!("wait={}", wait.as_secs()));
    if let Some(etag) = etag {
        request = request.header("if-none-match", etag);
    }
    let answer_within = wait + Duration::from_secs(30);
    let response = request
        .config()
        .timeout_recv_response(Some(answer_within))
        .build()
        .call()
        .map_err(|error| unavailable(format!("{url}: {error}")))?;
    match response.status() {
        StatusCode::OK => {
            let tag = response.headers().get("etag").and_then(|tag| tag.to_str().ok()).map(str::to_owned);
            let mut bytes = Vec::new();
            let limit = MAX_DOCUMENT_BYTES as u64 + 1;
            let mut body = response.into_body().into_reader().take(limit);
            body.read_to_end(&mut bytes).map_err(|error| unavailable(format!("{url}: {error}")))?;
            Ok(Fetched::New(bytes, tag))
        }
        // 404: there is none for us yet.
        StatusCode::NOT_MODIFIED | StatusCode::NO_CONTENT | StatusCode::NOT_FOUND => Ok(Fetched::Nothing),
        status => Err(unavailable(format!("{url}: the fleet answers {}", status.as_u16()))),
    }
}
