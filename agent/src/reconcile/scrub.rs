//! Bytes that nobody reads may rot unseen: all layers are read slowly, once in a period, those of the active and the last
//! good generation first. The loop says when to go on and which layer is next (`edged_plan::scrub`), a thread reads one layer
//! (`execute::scrub`), and what is damaged goes the way of every suspicion (`suspect`).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread::Thread;

use edged_model::generation::GenerationState;
use edged_model::id::Digest;
use edged_model::observed::InstanceState;
use edged_model::quantity::{Bytes, Span, Timestamp};
use edged_model::reason::{Code, Reason};
use edged_model::report::Pressure;
use edged_model::scrub::{ScrubPass, ScrubPause, ScrubRecord, ScrubStatus, ScrubUnderWay};
use edged_plan::garbage::needed_images;
use edged_plan::scrub::{self as decide, Around};

use super::{Agent, Message, clock};
use crate::config;
use crate::content::Content;
use crate::execute::scrub::{self, Meter, SAVED_EVERY_BYTES, Scrubbed, Task};
use crate::observe::pressure;
use crate::store::inline_chain;

/// A thread that could not be made is tried again after this.
const AGAIN_MS: u64 = 60_000;

/// How far it is.
pub(super) struct Scrub {
    record: ScrubRecord,
    unsaved_bytes: u64,
    reading: Option<Reading>,
    pause: Option<ScrubPause>,
    /// As of the last heartbeat.
    pressure: Option<Pressure>,
    agent_began_boot_ms: u64,
    not_before_boot_ms: u64,
}

/// The layer that a thread is at.
struct Reading {
    thread: Thread,
    meter: Arc<Meter>,
}

impl Scrub {
    pub(super) fn recall(content: &Content) -> Self {
        Self {
            record: scrub::load(content),
            unsaved_bytes: 0,
            reading: None,
            pause: None,
            pressure: None,
            agent_began_boot_ms: clock::boot_ms(),
            not_before_boot_ms: 0,
        }
    }

    fn last_began(&self) -> Option<Timestamp> {
        self.record.last.as_ref().map(|pass| pass.began)
    }
}

impl Agent {
    fn scrub_every(&self) -> Option<Span> {
        match self.config.images.scrub {
            config::Scrub::Off => None,
            config::Scrub::Every(span) => Some(span),
        }
    }

    /// After every turn of the loop: who reads makes way at once.
    pub(super) fn scrub_on(&mut self) {
        let Some(every) = self.scrub_every() else { return };
        self.scrub.pause = decide::pause(&self.around(), every);
        if let Some(reading) = &self.scrub.reading {
            if reading.meter.pause(self.scrub.pause.is_some()) {
                reading.thread.unpark();
            }
            return;
        }
        let now = self.now();
        if self.scrub.pause.is_some() || now.boot_ms < self.scrub.not_before_boot_ms {
            return;
        }
        if self.scrub.record.now.is_none() {
            if self.images.is_empty() || decide::due(self.scrub.last_began(), every, now.wall) > now.wall {
                return;
            }
            let pass = ScrubPass { began: now.wall, ..ScrubPass::default() };
            self.scrub.record.now = Some(ScrubUnderWay { pass, ..ScrubUnderWay::default() });
        }
        let (needed, rest) = self.layers_on_the_disk();
        let under_way = self.scrub.record.now.clone().unwrap_or_default();
        match decide::next_layer(&needed, &rest, under_way.at.map(|at| at.layer), &under_way.done) {
            Some(layer) => self.read_layer(layer, now.boot_ms),
            None => self.pass_is_over(under_way.pass, now.wall),
        }
    }

    /// How the machine is, at a heartbeat.
    pub(super) fn look_whether_the_scrub_presses(&mut self) {
        if self.scrub_every().is_some() && self.scrub.record.now.is_some() {
            self.scrub.pressure = pressure::read();
        }
    }

    fn around(&self) -> Around {
        let state = self.active().map(|active| active.state);
        let is_stopping = |state: &InstanceState| matches!(state, InstanceState::Stopping { .. });
        let mut instances = self.world.observed.workloads.values();
        Around {
            up_ms: clock::boot_ms().saturating_sub(self.scrub.agent_began_boot_ms),
            pulls: self.under_way.is_fetching(),
            switches: self.staging.under_way || self.under_way.change,
            on_probation: matches!(state, Some(GenerationState::Activating | GenerationState::Probation)),
            starts: !self.under_way.starts.is_empty() || instances.any(|instance| is_stopping(&instance.state)),
            checks: self.collected.under_way,
            pressure: self.scrub.pressure,
        }
    }

    /// Those that a generation needs, and the others.
    fn layers_on_the_disk(&self) -> (BTreeSet<Digest>, BTreeSet<Digest>) {
        let names = needed_images(&self.world.desired);
        let of = |is_needed: bool| {
            let images = self.images.iter().filter(|(name, _)| names.contains(name.as_str()) == is_needed);
            images.flat_map(|(_, image)| image.layers.iter().copied()).collect::<BTreeSet<_>>()
        };
        let (needed, all_others) = (of(true), of(false));
        let rest = all_others.difference(&needed).copied().collect();
        (needed, rest)
    }

    fn read_layer(&mut self, layer: Digest, now_boot_ms: u64) {
        let meter = Arc::new(Meter::default());
        let task = Task {
            layer,
            record: self.scrub.record.clone(),
            unsaved_bytes: self.scrub.unsaved_bytes,
            saved_every_bytes: SAVED_EVERY_BYTES,
            bytes_per_sec: self.config.images.scrub_rate.0,
            boot_ms: clock::boot_ms,
        };
        let (content, inbox, of_thread) = (self.start_context.content.clone(), self.inbox.clone(), Arc::clone(&meter));
        // Not one of the runtime's threads: it stays as idle as it has become.
        let thread = std::thread::Builder::new().name("scrub".to_owned()).spawn(move || {
            if let Err(error) = edged_sys::idle::lower() {
                tracing::debug!("the scrub reads like everybody else: {error}");
            }
            let scrubbed = scrub::read_layer(&content, task, &of_thread);
            // The loop has ended only when the agent ends.
            let _ = inbox.blocking_send(Message::Scrubbed(scrubbed));
        });
        match thread {
            Ok(handle) => self.scrub.reading = Some(Reading { thread: handle.thread().clone(), meter }),
            Err(error) => {
                tracing::warn!("the scrub has no thread: {error}");
                self.scrub.not_before_boot_ms = now_boot_ms.saturating_add(AGAIN_MS);
            }
        }
    }

    pub(super) fn scrubbed(&mut self, scrubbed: &Scrubbed) {
        self.scrub.reading = None;
        self.scrub.unsaved_bytes = scrubbed.unsaved_bytes;
        if let Some(now) = &mut self.scrub.record.now {
            now.at = None;
            now.done.insert(scrubbed.layer);
            now.pass.layers += 1;
            now.pass.read.0 += scrubbed.read.0;
            now.pass.protected.0 += scrubbed.protected.0;
            now.pass.damaged += u64::from(scrubbed.is_damaged);
            now.pass.unchecked += u64::from(scrubbed.is_unchecked);
        }
        // Its end is written anyway.
        if scrubbed.unsaved_bytes >= SAVED_EVERY_BYTES {
            self.save_scrub();
        }
        if scrubbed.is_damaged {
            self.scrub_found(scrubbed.layer);
        }
    }

    fn pass_is_over(&mut self, mut pass: ScrubPass, wall: Timestamp) {
        pass.ended = Some(wall);
        let why = Reason::new(Code::LayersChecked, told(&pass));
        self.scrub.record = ScrubRecord { last: Some(pass), now: None };
        self.save_scrub();
        self.tell(None, None, &why, "agent");
    }

    fn save_scrub(&mut self) {
        self.scrub.unsaved_bytes = 0;
        let (content, record) = (self.start_context.content.clone(), self.scrub.record.clone());
        let written = self.writes.submit(move |_| {
            if let Err(error) = scrub::save(&content, &record) {
                tracing::warn!("how far the scrub is: {}", inline_chain(&error));
            }
        });
        self.warn_if_busy(written);
    }

    pub(super) fn scrub_status(&self) -> ScrubStatus {
        let Some(every) = self.scrub_every() else {
            return ScrubStatus { last: self.scrub.record.last.clone(), ..ScrubStatus::default() };
        };
        let under_way = self.scrub.record.now.as_ref();
        let now = under_way.map(|now| {
            let mut pass = now.pass.clone();
            if let Some(reading) = &self.scrub.reading {
                pass.read.0 += reading.meter.read().0;
                pass.protected.0 += reading.meter.protected().0;
            }
            pass
        });
        let of_layers = under_way.map_or(0, |now| {
            let (needed, rest) = self.layers_on_the_disk();
            needed.union(&rest).chain(&now.done).collect::<BTreeSet<_>>().len() as u64
        });
        let due = decide::due(self.scrub.last_began(), every, self.now().wall);
        ScrubStatus {
            every: Some(every),
            last: self.scrub.record.last.clone(),
            paused: self.scrub.pause.filter(|_| now.is_some()),
            next: now.is_none().then_some(due),
            now,
            of_layers,
        }
    }
}

/// For the events: what a pass has found.
fn told(pass: &ScrubPass) -> String {
    let took_secs = pass.ended.map_or(0, |ended| ended.0.saturating_sub(pass.began.0));
    let took = Span::from_secs(u64::try_from(took_secs).unwrap_or(0)).human();
    let unchecked = match pass.unchecked {
        0 => String::new(),
        n => format!("; {n} of them cannot be checked (unpacked by an older edged)"),
    };
    let ScrubPass { layers, damaged, read: Bytes(read), protected: Bytes(protected), .. } = *pass;
    let (read, protected) = (Bytes(read).human(), Bytes(protected).human());
    format!(
        "a scrub of {layers} layers took {took}, {read} read, {protected} of it under fs-verity: {damaged} damaged{unchecked}"
    )
}
