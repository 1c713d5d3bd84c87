//! Stage: what leaves the device, and what the fleet has for it. Reports are signed and wait in the outbox; manifests
//! are fetched and handed on unread. A fleet that is slow, wrong or gone costs nothing but its own thread's time.

/// The certificate of the push port.
mod certificate;
/// Status to report: pure.
mod collect;
/// Who we are, told to the fleet.
mod enroll;
/// Manifests from the fleet.
mod fetch;
/// The device's own key.
pub mod key;
/// When a change is told: pure.
mod pace;
/// Manifests from a peer: the agent's own HTTPS port.
pub mod push;
/// Pauses and verdicts: pure.
mod retry;
/// Trust roots from the fleet.
mod roots;
/// Reports to the fleet.
mod send;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use edged_model::api::{FleetStatus, Status};
use edged_model::cbor;
use edged_model::envelope::{self, Kind};
use edged_model::fleet::Problem;
use edged_model::id::{DeviceId, Digest, GroupName, Sequence};
use edged_model::keys::SecretKey;
use edged_model::quantity::{Span, Timestamp};
use edged_model::reason::{Code, Reason};
use tokio::sync::{mpsc, oneshot};
use ureq::http::Response;

pub use self::pace::News;
use self::pace::Pace;
use crate::config::Fleet;
use crate::crash_point;
use crate::registry::{self, Floor, retry_after};
use crate::store::{Durability, Store, inline_chain};

/// An error document is read no further than this.
const PROBLEM_MAX_BYTES: u64 = 16 << 10;

/// What an offered document has become, once that is on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    Generation(Sequence),
    /// The version that is in force now.
    TrustRoot(u64),
}

impl std::fmt::Display for Taken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Generation(sequence) => write!(f, "generation {sequence}"),
            Self::TrustRoot(version) => write!(f, "trust root version {version} is in force"),
        }
    }
}

/// A signed manifest or trust root on its way to the agent's loop, and where its verdict goes.
pub struct Offer {
    pub envelope: Vec<u8>,
    /// Trust roots that follow it, each signed by the one before. None after a manifest.
    pub chain: Vec<Vec<u8>>,
    /// `fleet`, or `push from <address>`.
    pub by: String,
    pub reply: oneshot::Sender<Result<Taken, Reason>>,
}

#[derive(Default)]
struct Contact {
    last: Option<Timestamp>,
    problem: Option<Reason>,
}

/// Why there is a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Something is not as the last one said.
    Change,
    /// The last one is old.
    Routine,
}

/// The line to the fleet, as the agent's loop holds it. Cheap to clone.
#[derive(Clone)]
pub struct FleetLine {
    shared: Arc<Shared>,
}

struct Shared {
    key: SecretKey,
    device: DeviceId,
    groups: Vec<GroupName>,
    arch: &'static str,
    pace: Mutex<Pace>,
    contact: Mutex<Contact>,
    failures: AtomicU64,
    /// Version of the trust root in force.
    root_version: AtomicU64,
    /// A report that nothing but the time called for. It is kept here alone, for flash wears with each write; one that the
    /// fleet did not take by the time of the next goes to the outbox.
    routine: Mutex<Option<Vec<u8>>>,
    /// Wakes the sender when there is something to send.
    waiting: Mutex<bool>,
    wake: Condvar,
}

/// What the threads need.
struct Endpoint {
    agent: ureq::Agent,
    base: String,
    clock: fn() -> Timestamp,
}

impl FleetLine {
    pub fn new(key: SecretKey, device: DeviceId, groups: Vec<GroupName>) -> Self {
        let mut pace = Pace::default();
        // Nobody has heard of this boot yet.
        pace.changed(News::Fresh);
        let shared = Shared {
            key,
            device,
            groups,
            arch: std::env::consts::ARCH,
            pace: Mutex::new(pace),
            contact: Mutex::default(),
            failures: AtomicU64::new(0),
            root_version: AtomicU64::new(0),
            routine: Mutex::default(),
            waiting: Mutex::new(true),
            wake: Condvar::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Starts the threads that speak with the fleet. `offers` gets every manifest that is not `known`, the newest that
    /// the device has already.
    pub fn start(
        &self,
        config: &Fleet,
        store: &Store,
        known: Option<Digest>,
        offers: mpsc::Sender<Offer>,
        clock: fn() -> Timestamp,
        floor: &Floor,
    ) -> Result<(), Reason> {
        let Some(url) = &config.url else { return Ok(()) };
        let bad = |text: String| Reason::new(Code::FleetUnavailable, text);
        let roots = match &config.ca {
            None => registry::web_roots(),
            Some(path) => {
                let pem = std::fs::read(path).map_err(|error| bad(format!("fleet.ca {}: {error}", path.display())))?;
                registry::certificates(&pem)
                    .ok_or_else(|| bad(format!("fleet.ca {}: no certificate", path.display())))?
            }
        };
        let base = format!("{}/v1", url.trim_end_matches('/'));
        let endpoint = || {
            let agent = registry::agent(roots.clone(), floor).map_err(|error| bad(inline_chain(&error)))?;
            Ok(Endpoint { agent, base: base.clone(), clock })
        };
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(|error| bad(error.to_string()))
        };
        let (line, sender, store) = (self.clone(), endpoint()?, store.clone());
        let token = config.enroll_token.clone();
        spawn("reports", Box::new(move || send::run(&line, &sender, &store, token.as_deref())))?;
        let (line, fetcher, config) = (self.clone(), endpoint()?, config.clone());
        spawn("manifests", Box::new(move || fetch::run(&line, &fetcher, &config, known, &offers)))?;
        Ok(())
    }

    /// Something changed that the fleet shall know.
    pub fn changed(&self, news: News) {
        self.pace().changed(news);
    }

    /// This one is in force now.
    pub fn trusts(&self, root_version: u64) {
        self.shared.root_version.store(root_version, Ordering::Relaxed);
    }

    fn root_version(&self) -> u64 {
        self.shared.root_version.load(Ordering::Relaxed)
    }

    /// When the next report is due, as things are.
    pub fn due_at_boot_ms(&self, interval: Span) -> u64 {
        self.pace().due_at_boot_ms(interval.ms)
    }

    /// What is to be told now, if anything: whoever asks puts it.
    pub fn due(&self, now_boot_ms: u64, interval: Span) -> Option<Due> {
        self.pace().tell(now_boot_ms, interval.ms)
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.shared.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Signs a report and has it sent. What tells of a change is on the disk when this comes back. Blocking.
    pub fn put(&self, store: &Store, status: &Status, due: Due) -> Result<(), String> {
        let number = store.next_report_number().map_err(|error| inline_chain(&error))?;
        crash_point::pass("report-numbered");
        let dropped = store.dropped_reports().map_err(|error| inline_chain(&error))?;
        let report = collect::report(status, self.shared.arch, number, dropped);
        let payload = cbor::encode(&report).map_err(|error| error.to_string())?;
        let signed = envelope::sign1(Kind::Report, payload, &self.shared.key).map_err(|error| error.to_string())?;
        let late = self.routine().take();
        let waiting = store.waiting_reports().map_err(|error| inline_chain(&error))?;
        if due == Due::Routine && late.is_none() && waiting == 0 {
            *self.routine() = Some(signed);
        } else {
            // In the order of their numbers, else the fleet takes the second for an old one.
            for report in late.iter().chain([&signed]) {
                store.push_report(report, Durability::Now).map_err(|error| inline_chain(&error))?;
            }
            crash_point::pass("report-waiting");
        }
        *self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.wake.notify_all();
        Ok(())
    }

    pub fn status(&self, url: Option<String>, store: &Store) -> FleetStatus {
        let contact = self.shared.contact.lock().unwrap_or_else(PoisonError::into_inner);
        FleetStatus {
            url,
            last_contact: contact.last,
            waiting_reports: store.waiting_reports().unwrap_or(0) + u64::from(self.routine().is_some()),
            dropped_untold: store.untold_dropped().unwrap_or(0),
            problem: contact.problem.clone(),
        }
    }

    /// Requests that failed since this agent runs.
    pub fn failures(&self) -> u64 {
        self.shared.failures.load(Ordering::Relaxed)
    }

    fn routine(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.shared.routine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Need not be sent any more.
    fn is_through(&self, report: &[u8]) {
        let mut routine = self.routine();
        if routine.as_deref() == Some(report) {
            *routine = None;
        }
    }

    fn reached(&self, at: Timestamp) {
        let mut contact = self.shared.contact.lock().unwrap_or_else(PoisonError::into_inner);
        *contact = Contact { last: Some(at), problem: None };
    }

    fn missed(&self, problem: Reason) {
        self.shared.failures.fetch_add(1, Ordering::Relaxed);
        self.shared.contact.lock().unwrap_or_else(PoisonError::into_inner).problem = Some(problem);
    }

    /// Waits until a report was put, or for `at_most`.
    fn wait(&self, at_most: Duration) {
        let waiting = self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut waiting, _) = self
            .shared
            .wake
            .wait_timeout_while(waiting, at_most, |waiting| !*waiting)
            .unwrap_or_else(PoisonError::into_inner);
        *waiting = false;
    }
}

/// What spreads the devices of a fleet. Without randomness they are only not spread.
fn random() -> u16 {
    let mut bytes = [0; 2];
    let _ = getrandom::fill(&mut bytes);
    u16::from_le_bytes(bytes)
}

/// The fleet did not do what was asked.
struct Refused {
    reason: Reason,
    retry_after_secs: Option<u64>,
}

impl Refused {
    /// There was no answer.
    fn by_line(text: String) -> Self {
        Self { reason: Reason::new(Code::FleetUnavailable, text), retry_after_secs: None }
    }
}

/// A page for people is no fleet's answer, whatever its status: something on the way (a captive portal, a proxy) gave it,
/// and what was sent has not arrived.
fn is_a_page<B>(response: &Response<B>) -> bool {
    let kind = response.headers().get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("text/html") || kind.eq_ignore_ascii_case("application/xhtml+xml")
}

fn page(url: &str) -> Refused {
    let text = format!("{url}: a web page answers and not the fleet");
    let next = "a captive portal or a proxy stands between: log this network in, or go around it";
    Refused { reason: Reason::new(Code::FleetUnavailable, text).next(next), retry_after_secs: None }
}

/// An answer that is none of those hoped for, with the fleet's own words where it has some (RFC 9457).
fn refusal(url: &str, response: Response<ureq::Body>) -> Refused {
    let status = response.status();
    let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    // Without a `Date` beside it a date is not obeyed: this room has no clock to hold it against.
    let retry_after = header("retry-after").and_then(|value| retry_after::pause(value, header("date"), None));
    let retry_after_secs = retry_after.map(|pause| pause.as_secs());
    let mut body = response.into_body();
    // The words are for people: when they do not come, the status says enough.
    let bytes = body.with_config().limit(PROBLEM_MAX_BYTES).read_to_vec().unwrap_or_default();
    let (detail, next) = match serde_json::from_slice::<Problem>(&bytes) {
        Ok(problem) => (format!(": {}", problem.detail), problem.next.unwrap_or_default()),
        Err(_) => (String::new(), String::new()),
    };
    let text = format!("{url}: the fleet answers {}{detail}", status.as_u16());
    Refused { reason: Reason::new(Code::FleetUnavailable, text).next(next), retry_after_secs }
}

#[cfg(test)]
mod tests;
