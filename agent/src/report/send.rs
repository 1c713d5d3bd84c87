//! Takes reports out of the outbox, oldest first. One that the fleet has, or will never take, is removed; any other waits.

use std::io::Read;
use std::time::Duration;

use edged_model::reason::{Code, Reason};

use super::{Endpoint, FleetLine, backoff};
use crate::store::{Store, inline_chain};

/// With an empty outbox, the line is looked at this often.
const IDLE: Duration = Duration::from_secs(60);

/// What an answer means for the report that was sent.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Taken,
    /// Sending it again cannot help.
    Never,
    NotEnrolled,
    Later,
}

fn verdict(status: u16) -> Verdict {
    match status {
        200..=299 => Verdict::Taken,
        401 | 403 | 404 => Verdict::NotEnrolled,
        // 409: the fleet has it, or a newer one. 400, 413, 422: it will not like it better tomorrow.
        400 | 409 | 413 | 415 | 422 => Verdict::Never,
        _ => Verdict::Later,
    }
}

pub fn run(line: &FleetLine, endpoint: &Endpoint, store: &Store, token: Option<String>) {
    let mut failures = 0;
    loop {
        let (number, report) = match store.oldest_report() {
            Ok(Some(waiting)) => waiting,
            Ok(None) => {
                line.wait(IDLE);
                continue;
            }
            Err(error) => {
                tracing::error!("outbox: {}", inline_chain(&error));
                line.wait(IDLE);
                continue;
            }
        };
        let url = format!("{}/devices/{}/reports", endpoint.base, line.shared.device);
        let verdict = post(endpoint, &url, "application/vnd.edged.report+cbor", &report);
        match verdict {
            Ok((Verdict::Taken | Verdict::Never, _)) => {
                failures = 0;
                line.reached((endpoint.clock)());
                if let Err(error) = store.remove_report(number) {
                    tracing::error!("outbox: {}", inline_chain(&error));
                }
                continue;
            }
            Ok((Verdict::NotEnrolled, _)) => match enroll(line, endpoint, token.as_deref()) {
                Ok(()) => continue,
                Err(why) => line.missed(why),
            },
            Ok((Verdict::Later, status)) => {
                line.missed(Reason::new(Code::FleetUnavailable, format!("the fleet answers {status}")));
            }
            Err(why) => line.missed(why),
        }
        failures += 1;
        pause(backoff(failures));
    }
}

fn pause(time: Duration) {
    #[expect(clippy::disallowed_methods, reason = "this thread only sends reports, and has to let time pass")]
    std::thread::sleep(time);
}

fn post(endpoint: &Endpoint, url: &str, content_type: &str, body: &[u8]) -> Result<(Verdict, u16), Reason> {
    let sent = endpoint.agent.post(url).header("content-type", content_type).send(body);
    let response = sent.map_err(|error| Reason::new(Code::FleetUnavailable, format!("{url}: {error}")))?;
    let status = response.status().as_u16();
    Ok((verdict(status), status))
}

/// Tells the fleet our public key, with the one-time token from the configuration.
fn enroll(line: &FleetLine, endpoint: &Endpoint, token: Option<&str>) -> Result<(), Reason> {
    let unavailable = |text: String| Reason::new(Code::FleetUnavailable, text);
    let Some(token) = token else {
        return Err(unavailable("the fleet does not know this device".to_owned())
            .next("set fleet.enroll-token in agent.toml"));
    };
    let pem = line.shared.key.public().to_pem().map_err(|error| unavailable(error.to_string()))?;
    let body = serde_json::json!({ "device": line.shared.device, "token": token, "publicKey": pem }).to_string();
    let url = format!("{}/enroll", endpoint.base);
    let sent = endpoint.agent.post(&url).header("content-type", "application/json").send(body.as_bytes());
    let response = sent.map_err(|error| unavailable(format!("{url}: {error}")))?;
    let status = response.status();
    if status.is_success() {
        line.reached((endpoint.clock)());
        return Ok(());
    }
    let mut text = String::new();
    // What it says besides is only for people.
    let _ = response.into_body().into_reader().take(2048).read_to_string(&mut text);
    Err(unavailable(format!("enrolment: the fleet answers {}: {}", status.as_u16(), text.trim()))
        .next("check fleet.enroll-token in agent.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_never_arrive_is_given_up() {
        assert_eq!(verdict(202), Verdict::Taken);
        assert_eq!(verdict(409), Verdict::Never);
        assert_eq!(verdict(500), Verdict::Later);
        assert_eq!(verdict(429), Verdict::Later);
        assert_eq!(verdict(404), Verdict::NotEnrolled);
    }
}
