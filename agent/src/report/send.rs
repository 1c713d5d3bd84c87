//! Takes reports out of the outbox, oldest first, then the routine one that never was in it. One that the fleet has, or
//! will never take, is removed; any other waits, and with it all that came later: the fleet takes them in their order.

use std::time::Duration;

use edged_model::envelope::Kind;
use edged_model::reason::Reason;
use edged_model::report::Report;

use super::retry::{self, Verdict};
use super::{Endpoint, FleetLine, Refused, enroll, is_a_page, page, random, refusal};
use crate::crash_point;
use crate::store::{Store, inline_chain};

/// With an empty outbox, it is looked at this often.
const IDLE: Duration = Duration::from_secs(60);

enum Sent {
    Taken,
    /// Not now; the reason and when to come again.
    Kept(Refused),
    /// Sending it again cannot help.
    Dropped(Reason),
}

/// Sends for ever.
pub(super) fn run(line: &FleetLine, endpoint: &Endpoint, store: &Store, token: Option<&str>) {
    let mut failures = 0;
    loop {
        let next = store.oldest_report().map(|oldest| match oldest {
            Some((place, report)) => Some((Some(place), report)),
            None => line.routine().clone().map(|report| (None, report)),
        });
        let (place, report) = match next {
            Ok(Some(next)) => next,
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
        let sent = send(line, endpoint, &report, token);
        if let Sent::Dropped(why) = &sent {
            tracing::warn!(%why, "a report is given up");
        }
        match &sent {
            Sent::Taken | Sent::Dropped(_) => {
                crash_point::pass("report-taken");
                failures = 0;
                line.reached((endpoint.clock)());
                let removed = match (place, &sent) {
                    (Some(place), Sent::Taken) => store.report_arrived(place, dropped_in(&report)),
                    (Some(place), _) => store.remove_report(place),
                    (None, Sent::Taken) => store.dropped_told(dropped_in(&report)),
                    (None, _) => Ok(()),
                };
                line.is_through(&report);
                if let Err(error) = removed {
                    tracing::error!("outbox: {}", inline_chain(&error));
                    line.wait(IDLE);
                }
            }
            Sent::Kept(refused) => {
                failures += 1;
                line.missed(refused.reason.clone());
                pause(retry::pause(failures, refused.retry_after_secs, random()));
            }
        }
    }
}

/// How many dropped reports this one tells of.
fn dropped_in(report: &[u8]) -> u64 {
    let payload = edged_model::envelope::payload1(report).unwrap_or_default();
    edged_model::cbor::read::<Report>(&payload).map_or(0, |report| report.dropped)
}

fn pause(time: Duration) {
    #[expect(clippy::disallowed_methods, reason = "this thread only sends reports, and has to let time pass")]
    std::thread::sleep(time);
}

/// One try. A fleet that does not know us is told who we are, and asked once more.
fn send(line: &FleetLine, endpoint: &Endpoint, report: &[u8], token: Option<&str>) -> Sent {
    match post(line, endpoint, report) {
        Ok(()) => Sent::Taken,
        Err((Verdict::NotEnrolled, refused)) => match (enroll::enroll(line, endpoint, token), token) {
            (Ok(()), _) => match post(line, endpoint, report) {
                Ok(()) => Sent::Taken,
                Err((_, refused)) => Sent::Kept(refused),
            },
            // Without a token nothing was tried: what the fleet said tells more.
            (Err(why), None) => Sent::Kept(Refused { reason: refused.reason.next(why.next), ..refused }),
            (Err(why), Some(_)) => Sent::Kept(Refused { reason: why, ..refused }),
        },
        Err((Verdict::Never, refused)) => Sent::Dropped(refused.reason),
        Err((Verdict::Taken | Verdict::Later, refused)) => Sent::Kept(refused),
    }
}

fn post(line: &FleetLine, endpoint: &Endpoint, report: &[u8]) -> Result<(), (Verdict, Refused)> {
    let url = format!("{}/devices/{}/reports", endpoint.base, line.shared.device);
    let sent = endpoint.agent.post(&url).header("content-type", Kind::Report.content_type()).send(report);
    let response = sent.map_err(|error| (Verdict::Later, Refused::by_line(format!("{url}: {error}"))))?;
    match retry::verdict(response.status().as_u16()) {
        Verdict::Taken | Verdict::Never if is_a_page(&response) => Err((Verdict::Later, page(&url))),
        Verdict::Taken => Ok(()),
        other => Err((other, refusal(&url, response))),
    }
}
