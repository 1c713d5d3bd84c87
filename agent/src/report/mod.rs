//! Stage: what leaves the device, and what the fleet has for it. Reports are signed and wait in the outbox; manifests
//! are fetched and handed on unread. A fleet that is slow, wrong or gone costs nothing but its own thread's time.

/// Status to report: pure.
mod collect;
/// Manifests from the fleet.
mod fetch;
/// Manifests from a peer: the agent's own HTTPS port.
pub mod push;
/// Reports to the fleet.
mod send;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use edged_model::api::{FleetStatus, Status};
use edged_model::cbor;
use edged_model::envelope::{self, Kind};
use edged_model::id::DeviceId;
use edged_model::keys::SecretKey;
use edged_model::quantity::{Span, Timestamp};
use edged_model::reason::{Code, Reason};
use tokio::sync::mpsc;

use crate::config::Fleet;
use crate::registry;
use crate::store::{Store, inline_chain};

/// However much changes, reports are no closer than this.
const LEAST_PAUSE_MS: u64 = 2_000;

#[derive(Default)]
struct Contact {
    last: Option<Timestamp>,
    problem: Option<Reason>,
}

/// The line to the fleet, as the agent's loop holds it. Cheap to clone.
#[derive(Clone)]
pub struct FleetLine {
    shared: Arc<Shared>,
}

struct Shared {
    key: SecretKey,
    device: DeviceId,
    arch: &'static str,
    changed: AtomicBool,
    last_boot_ms: AtomicU64,
    contact: Mutex<Contact>,
    /// Wakes the sender when there is something in the outbox.
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
    pub fn new(key: SecretKey, device: DeviceId) -> Self {
        let shared = Shared {
            key,
            device,
            arch: std::env::consts::ARCH,
            changed: AtomicBool::new(true),
            last_boot_ms: AtomicU64::new(0),
            contact: Mutex::default(),
            waiting: Mutex::new(true),
            wake: Condvar::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Starts the threads that speak with the fleet. `offers` gets every manifest that is new to us.
    pub fn start(
        &self,
        config: &Fleet,
        store: &Store,
        offers: mpsc::Sender<Vec<u8>>,
        clock: fn() -> Timestamp,
    ) -> Result<(), Reason> {
        let Some(url) = &config.url else { return Ok(()) };
        let bad = |text: String| Reason::new(Code::FleetUnavailable, text);
        let roots = match &config.ca {
            None => ureq::tls::RootCerts::WebPki,
            Some(path) => {
                let pem = std::fs::read(path).map_err(|error| bad(format!("fleet.ca {}: {error}", path.display())))?;
                registry::certificates(&pem).ok_or_else(|| bad(format!("fleet.ca {}: no certificate", path.display())))?
            }
        };
        let base = format!("{}/v1", url.trim_end_matches('/'));
        let endpoint = || Endpoint { agent: registry::agent(roots.clone()), base: base.clone(), clock };
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(|error| bad(error.to_string()))
        };
        let (line, sender, store) = (self.clone(), endpoint(), store.clone());
        let token = config.enroll_token.clone();
        spawn("reports", Box::new(move || send::run(&line, &sender, &store, token)))?;
        let (line, fetcher, config) = (self.clone(), endpoint(), config.clone());
        spawn("manifests", Box::new(move || fetch::run(&line, &fetcher, &config, &offers)))?;
        Ok(())
    }

    /// Something changed that the fleet shall know.
    pub fn changed(&self) {
        self.shared.changed.store(true, Ordering::Relaxed);
    }

    pub fn is_due(&self, now_boot_ms: u64, interval: Span) -> bool {
        let since = now_boot_ms.saturating_sub(self.shared.last_boot_ms.load(Ordering::Relaxed));
        let changed = self.shared.changed.load(Ordering::Relaxed);
        let is_due = (changed && since >= LEAST_PAUSE_MS) || since >= interval.ms;
        if is_due {
            self.shared.changed.store(false, Ordering::Relaxed);
            self.shared.last_boot_ms.store(now_boot_ms, Ordering::Relaxed);
        }
        is_due
    }

    /// Signs a report and puts it into the outbox. Blocking.
    pub fn put(&self, store: &Store, status: &Status) -> Result<(), String> {
        let number = store.next_report_number().map_err(|error| inline_chain(&error))?;
        let dropped = store.dropped_reports().map_err(|error| inline_chain(&error))?;
        let report = collect::report(status, self.shared.arch, number, dropped);
        let payload = cbor::encode(&report).map_err(|error| error.to_string())?;
        let signed = envelope::sign1(Kind::Report, payload, &self.shared.key).map_err(|error| error.to_string())?;
        store.push_report(&signed).map_err(|error| inline_chain(&error))?;
        *self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.wake.notify_all();
        Ok(())
    }

    pub fn status(&self, url: Option<String>, waiting_reports: u64) -> FleetStatus {
        let contact = self.shared.contact.lock().unwrap_or_else(PoisonError::into_inner);
        FleetStatus { url, last_contact: contact.last, waiting_reports, problem: contact.problem.clone() }
    }

    fn reached(&self, at: Timestamp) {
        let mut contact = self.shared.contact.lock().unwrap_or_else(PoisonError::into_inner);
        *contact = Contact { last: Some(at), problem: None };
    }

    fn missed(&self, problem: Reason) {
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

/// The pause before the n-th try in a row: doubling, bounded, with jitter.
fn backoff(failures: u32) -> Duration {
    let mut random = [0; 2];
    // Without randomness the devices of a fleet are only not spread.
    let _ = getrandom::fill(&mut random);
    let base = 500_u64 << failures.min(9);
    Duration::from_millis(base.min(120_000) + u64::from(u16::from_le_bytes(random)) % base.max(1) / 2)
}

/// The device's own key, made at the first start and kept.
pub fn device_key(path: &Path) -> Result<SecretKey, crate::store::StoreError> {
    if let Some(key) = std::fs::read_to_string(path).ok().and_then(|pem| SecretKey::from_pem(&pem).ok()) {
        return Ok(key);
    }
    let error = |text: String| crate::store::StoreError::File { path: path.to_owned(), source: std::io::Error::other(text) };
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|e| error(e.to_string()))?;
    let key = SecretKey::from_seed(&seed);
    let pem = key.to_pem().map_err(|e| error(e.to_string()))?;
    crate::store::keep::durable(path, pem.as_bytes(), 0o600)?;
    Ok(key)
}
