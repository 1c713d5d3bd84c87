//! What time it is, as far as it can be known. Three lower bounds: when this program was built, the newest document that
//! was verified, and the clock of the last hour that edged ran. SNTP moves the clock forward, never back and never the floor:
//! nobody signs it. On a host the clock is the host's; there the agent only reckons with what it heard.
//!
//! ```text
//!   sntp ──> behind? ──> a device: keeper sets the clock      now = max(clock + reckoned, floor)
//!                        a host: reckoned                      each hour: floor <- now
//! ```

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use edged_model::quantity::{Span, Timestamp};
use edged_model::reason::{Code, Reason};
use tokio::sync::mpsc;

use super::{Agent, Message, clock};
use crate::config::Time;
use crate::network::sntp::{self, Heard, NobodyAnswers};
use crate::store::inline_chain;

/// The floor follows the clock this often: at most this much is forgotten in a power cut, for 24 small writes a day.
pub(super) const FLOOR_EVERY_SECS: i64 = 3_600;
/// Into the store this often, on a device.
const STORED_EVERY_SECS: i64 = 86_400;
/// A difference that the way of the answer may have made.
const EXACT_MS: i64 = 500;
/// A difference that is worth a line of the story.
const TOLD_MS: i64 = 5_000;
/// The first try; each further one waits twice as long, until the interval is reached.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// New servers that wait for the thread: only the last ones count, and more than a few leases at once are none.
const SERVERS_DEPTH: usize = 4;

/// What is known of the time beyond the clock.
#[derive(Debug, Default)]
pub(super) struct Reckoning {
    /// Milliseconds that the clock is behind and could or may not be set.
    ahead_ms: i64,
    /// Somebody outside has said what time it is, since this start.
    heard: bool,
    told_ahead: bool,
    /// What the store has.
    stored: Timestamp,
}

/// What an answer means for the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Difference {
    Behind,
    None,
    Ahead,
}

fn difference(behind_ms: i64) -> Difference {
    match behind_ms {
        ms if ms > EXACT_MS => Difference::Behind,
        ms if ms < -TOLD_MS => Difference::Ahead,
        _ => Difference::None,
    }
}

/// The new floor, if it is time to write one. Nobody has signed what the clock says, so it is not followed beyond the end of
/// the trust root: a lie about the time can at most make a device wait for newer documents, and those can be signed. Without
/// a root there is no such end, and nothing to be judged by a date either.
fn next_floor(floor: Timestamp, wall: Timestamp, root_expires: Option<Timestamp>) -> Option<Timestamp> {
    let to = wall.min(root_expires?);
    (to.0.saturating_sub(floor.0) >= FLOOR_EVERY_SECS).then_some(to)
}

/// Starts the thread that asks. Servers that turn up later (a DHCP lease) go into the sender; those in `agent.toml` have
/// precedence.
pub(super) fn start(config: &Time, inbox: mpsc::Sender<Message>) -> std::io::Result<SyncSender<Vec<String>>> {
    let (sender, receiver) = sync_channel(SERVERS_DEPTH);
    let config = config.clone();
    std::thread::Builder::new().name("time".to_owned()).spawn(move || run(&config, &receiver, &inbox))?;
    Ok(sender)
}

fn run(config: &Time, offered: &Receiver<Vec<String>>, inbox: &mpsc::Sender<Message>) {
    let mut servers = config.servers.clone();
    let mut pause = FIRST_PAUSE;
    loop {
        if !servers.is_empty() {
            let heard = sntp::ask(&servers);
            pause = match &heard {
                Ok(_) => config.interval.duration(),
                Err(_) => (pause * 2).min(config.interval.duration()),
            };
            if inbox.blocking_send(Message::TimeHeard(heard)).is_err() {
                return;
            }
        }
        let wait = if servers.is_empty() { config.interval.duration() } else { pause };
        match offered.recv_timeout(wait) {
            Ok(new) if config.servers.is_empty() && new != servers => (servers, pause) = (new, FIRST_PAUSE),
            // Also when nobody can offer any more: those that are known are asked again.
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            #[expect(clippy::disallowed_methods, reason = "this thread only asks now and then")]
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(wait),
        }
    }
}

impl Reckoning {
    pub(super) fn new(stored: Timestamp) -> Self {
        Self { stored, ..Self::default() }
    }
}

impl Agent {
    pub(super) fn now(&self) -> edged_model::quantity::Now {
        clock::now(self.reckoning.ahead_ms, self.floor)
    }

    /// `floor`: the clock is known to be wrong. `ntp`: somebody outside confirmed it. `system`: nobody did.
    pub(super) fn clock_source(&self) -> &'static str {
        if clock::now(self.reckoning.ahead_ms, Timestamp(i64::MIN)).wall < self.floor {
            "floor"
        } else if self.reckoning.heard {
            "ntp"
        } else {
            "system"
        }
    }

    /// Somebody outside has said what time it is, and what we reckon with is no earlier.
    pub(super) fn knows_time(&self) -> bool {
        self.reckoning.heard
    }

    /// The floor follows the clock. On a device the hours cost one time stamp of the keeper's, and only the days a write of
    /// the store; a host has no such keeper.
    pub(super) fn floor_if_due(&mut self) {
        let root_expires = (self.root.version > 0).then_some(self.root.expires);
        let Some(to) = next_floor(self.floor, self.now().wall, root_expires) else { return };
        if self.is_device && to.0.saturating_sub(self.reckoning.stored.0) < STORED_EVERY_SECS {
            self.set_floor(to);
            self.tell_keeper(to);
        } else {
            self.raise_floor(to);
        }
    }

    /// Certificates are judged by it too, from the next connection on.
    fn set_floor(&mut self, to: Timestamp) {
        self.floor = to;
        self.pull_context.floor.raise(to);
    }

    /// A time that is certainly over: written to the store, and told the keeper.
    pub(super) fn raise_floor(&mut self, to: Timestamp) {
        if to <= self.floor {
            return;
        }
        self.set_floor(to);
        self.reckoning.stored = to;
        let written = self.writes.submit(move |store| {
            if let Err(error) = store.raise_time_floor(to) {
                tracing::error!("time floor: {}", inline_chain(&error));
            }
        });
        if let Err(busy) = written {
            tracing::error!("{busy}");
        }
        self.tell_keeper(to);
    }

    fn tell_keeper(&self, to: Timestamp) {
        let link = self.link.clone();
        tokio::spawn(async move {
            if let Err(error) = link.time_floor(to.0).await {
                tracing::warn!("time floor: {}", inline_chain(&error));
            }
        });
    }

    pub(super) async fn time_heard(&mut self, heard: Result<Heard, NobodyAnswers>) {
        let Heard { server, behind_ms, answered, asked } = match heard {
            Ok(heard) => heard,
            Err(error) => return tracing::info!("{error}"),
        };
        tracing::debug!(server, behind_ms, answered, asked, "time heard");
        self.reckoning.heard = true;
        let span = || Span::from_ms(behind_ms.unsigned_abs()).human();
        match difference(behind_ms) {
            Difference::None => (self.reckoning.ahead_ms, self.reckoning.told_ahead) = (0, false),
            Difference::Behind => {
                let before = self.reckoning.ahead_ms;
                self.move_forward(behind_ms).await;
                if (behind_ms - before).abs() >= TOLD_MS {
                    let how = if self.reckoning.ahead_ms == 0 { "it was set" } else { "edged reckons with that" };
                    let text = format!("the clock was {} behind {server}: {how}", span());
                    self.tell(None, None, &Reason::new(Code::ClockMoved, text), "time");
                }
            }
            Difference::Ahead => {
                self.reckoning.ahead_ms = 0;
                if !std::mem::replace(&mut self.reckoning.told_ahead, true) {
                    let text = format!("the clock is {} ahead of {server}, and time is never moved back", span());
                    let next = "set it by hand; if it is right, look at the time server";
                    self.tell(None, None, &Reason::new(Code::ClockMoved, text).next(next), "time");
                }
            }
        }
    }

    /// A device's clock is set, by the keeper. A host's never.
    async fn move_forward(&mut self, behind_ms: i64) {
        self.reckoning.ahead_ms = behind_ms;
        if !self.is_device {
            return;
        }
        match self.link.move_clock(clock::unix_ms().saturating_add(behind_ms)).await {
            Ok(()) => self.reckoning.ahead_ms = 0,
            Err(error) => tracing::warn!("the clock cannot be set: {}", inline_chain(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_written_hourly_and_follows_no_clock_beyond_the_root() {
        let next = |floor, wall, root: Option<i64>| next_floor(Timestamp(floor), Timestamp(wall), root.map(Timestamp));
        assert_eq!(next(1_000, 1_000 + FLOOR_EVERY_SECS - 1, Some(50_000)), None);
        assert_eq!(next(1_000, 1_000 + FLOOR_EVERY_SECS, Some(50_000)), Some(Timestamp(1_000 + FLOOR_EVERY_SECS)));
        assert_eq!(next(1_000, i64::MAX, Some(50_000)), Some(Timestamp(50_000)), "a lie has an end");
        assert_eq!(next(50_000, i64::MAX, Some(50_000)), None);
        assert_eq!(next(1_000, 0, Some(50_000)), None, "never back");
        assert_eq!(next(i64::MIN, i64::MAX, Some(i64::MAX)), Some(Timestamp(i64::MAX)));
        assert_eq!(next(1_000, i64::MAX, None), None, "without a root a lie would have no end");
    }

    #[test]
    fn servers_of_a_lease_are_asked_only_where_the_configuration_names_none() {
        let server = || {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let address = socket.local_addr().unwrap().to_string();
            (socket, address)
        };
        // What is no time is an answer too, and the next question comes at once.
        let is_asked = |socket: &std::net::UdpSocket| {
            let mut question = [0; 48];
            let (_, from) = socket.recv_from(&mut question).unwrap();
            socket.send_to(b"no time", from).unwrap();
        };
        let ((ours, configured), (theirs, offered)) = (server(), server());
        let (inbox, mut heard) = mpsc::channel(64);
        std::thread::spawn(move || while heard.blocking_recv().is_some() {});
        let interval = "1s".parse().unwrap();
        let leases = start(&Time { servers: vec![configured], interval }, inbox.clone()).unwrap();
        leases.send(vec![offered.clone()]).unwrap();
        // Between the second question and the third the offer has been looked at.
        (0..3).for_each(|_| is_asked(&ours));
        theirs.set_nonblocking(true).unwrap();
        assert_eq!(theirs.recv(&mut [0; 48]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        theirs.set_nonblocking(false).unwrap();
        let leases = start(&Time { servers: Vec::new(), interval }, inbox).unwrap();
        leases.send(vec![offered]).unwrap();
        is_asked(&theirs);
    }

    #[test]
    fn only_forward_and_only_for_a_difference_that_is_one() {
        assert_eq!(difference(0), Difference::None);
        assert_eq!(difference(EXACT_MS), Difference::None);
        assert_eq!(difference(EXACT_MS + 1), Difference::Behind);
        assert_eq!(difference(-TOLD_MS), Difference::None);
        assert_eq!(difference(-TOLD_MS - 1), Difference::Ahead);
    }
}
