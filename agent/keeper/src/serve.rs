//! The loop: wait, tell [`crate::decide`] what came about, perform the acts it orders. Nothing is decided here, and
//! nothing here waits for anybody: the socket is non-blocking, each queue is bounded, each descriptor has one owner.
//!
//! The protocol: the agent speaks first (`Version`, `List`); it needs no greeting. Every request but `Heartbeat` gets
//! one answer with its `id`, `List` one `Table` and then as many `Child`; `Exited` comes unasked with `id` 0, never
//! before that child's `Launched`. What cannot be read is answered by `Refused` with `id` 0. Descriptors that come with
//! a request are closed when it has been handled; those that go with an answer are copies, the keeper keeps its own.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use edged_model::keeper::{FileId, MAX_MESSAGE_BYTES, Reply, ReplyBody, ShutdownHow};
use edged_sys::device::{Watchdog, boot_ms};
use edged_sys::spawn::{self, Heard, SingleThread};
use edged_sys::{fdpass, pidfd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::process::WaitOptions;

use crate::decide::{Act, End, Event, Wish, decide, heard};
use crate::resume::{self, Kept, Program};
use crate::table::{Table, Way};
use crate::trial::{Asked, Looked};
use crate::{KeeperConfig, agent, boot, log, program, shutdown};

/// What an epoll event is about: one of these, or `LAUNCHES` and the pid of a child on its way to exec.
const SIGNALS: u64 = 0;
const AGENT: u64 = 1;
const LAUNCHES: u64 = 1 << 32;

/// Requests taken in one turn: an agent that floods us delays no signal and no watchdog.
const REQUESTS_A_TURN: usize = 64;

/// An agent that leaves this many messages unread is as good as hung: three answers for each child there may be.
const MAX_OUTGOING: usize = 8192;

/// The descriptors of one child.
#[derive(Debug, Default)]
pub struct Doors {
    pub pidfd: Option<OwnedFd>,
    /// While it is on its way to exec.
    pub talk: Option<OwnedFd>,
    /// Read ends of its output, or its terminal's master: kept while the agent is away.
    pub outputs: Vec<OwnedFd>,
}

/// A message that the agent has not taken yet.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Outgoing {
    pub bytes: Vec<u8>,
    pub outputs_of: Option<String>,
}

pub struct Keeper {
    config: KeeperConfig,
    proof: SingleThread,
    poll: OwnedFd,
    signals: SignalFd,
    table: Table,
    kept: Kept,
    watchdog: Option<Watchdog>,
    /// The agent's socket is also watched for room to write.
    wants_room: bool,
    buffer: Vec<u8>,
    /// A child that tries a newer program.
    trying: Option<program::Child>,
    left: Option<Way>,
}

impl Keeper {
    pub fn new(config: KeeperConfig) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in [
            Signal::SIGCHLD,
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGPWR,
            Signal::SIGUSR1,
            Signal::SIGUSR2,
            Signal::SIGHUP,
        ] {
            mask.add(signal);
        }
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        // Its children are born so too: nobody in a container can trace or open what is still edged's (CVE-2016-9962).
        edged_sys::privilege::set_not_dumpable()?;
        if !config.device {
            edged_sys::privilege::become_subreaper()?;
        }
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&poll, &signals, epoll::EventData::new_u64(SIGNALS), epoll::EventFlags::IN)?;
        let restored = resume::restore().unwrap_or_else(|error| {
            log::line(&format!("the table of the former image is lost: {error}"));
            None
        });
        let (mut table, kept, agent_too) =
            restored.unwrap_or_else(|| (Table::new(config.device, config.stop_timeout_ms), Kept::default(), false));
        table.program = resume::program().map(|path| path.to_string_lossy().into_owned());
        if resume::is_resuming() {
            log::line(&format!("runs again with {} children", table.children.len()));
        }
        let mut keeper = Self {
            config,
            proof: SingleThread::prove()?,
            poll,
            signals,
            table,
            kept,
            watchdog: None,
            wants_room: false,
            buffer: vec![0; MAX_MESSAGE_BYTES + 1],
            trying: None,
            left: None,
        };
        keeper.open_watchdog();
        keeper.take_up()?;
        if !resume::is_resuming()
            && let Some(boots) = resume::program().and_then(|place| program::boots_on_trial(&place))
        {
            keeper.feed(Event::BootedOnTrial { boots }, &[]);
        }
        if agent_too {
            keeper.feed(Event::AgentOutdated, &[]);
        }
        Ok(keeper)
    }

    fn open_watchdog(&mut self) {
        if !self.config.device {
            return;
        }
        if let Some((watchdog, every_ms)) = boot::open_watchdog() {
            self.watchdog = Some(watchdog);
            self.table.watchdog = Some(crate::table::Petting { every_ms, next_boot_ms: 0 });
        }
    }

    /// Watches what was kept through an exec, and finds out what ended meanwhile.
    fn take_up(&mut self) -> io::Result<()> {
        if let Some(socket) = &self.kept.agent {
            epoll::add(&self.poll, socket, epoll::EventData::new_u64(AGENT), epoll::EventFlags::IN)?;
        }
        for (key, doors) in &self.kept.doors {
            if let (Some(talk), Some(child)) = (&doors.talk, self.table.children.get(key)) {
                epoll::add(&self.poll, talk, launch_token(child.pid), epoll::EventFlags::IN)?;
            }
        }
        self.reap();
        // A fault between wait(2) and the table: the child is gone and nobody knows how it ended.
        let lost = End { code: None, signal: None, core_dumped: false };
        let pids: Vec<_> = self.table.living().map(|(_, child)| child.pid).chain(self.table.agent.life.pid()).collect();
        for pid in pids {
            if pidfd::open_child(pid).is_err() {
                self.feed(Event::Reaped { pid, end: lost }, &[]);
            }
        }
        Ok(())
    }

    /// Never comes back on a device.
    pub fn run(mut self) -> ExitCode {
        loop {
            let round = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.round()));
            if round.is_err() {
                log::line("a fault in the keeper: it starts itself again with its table");
                // Should the same fault wait for the new image too, this keeps the machine usable.
                #[expect(clippy::disallowed_methods, reason = "nothing can be handled while the state is in doubt")]
                std::thread::sleep(std::time::Duration::from_millis(100));
                // A fault in this, too, must not end us.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.feed(Event::Fault, &[])));
                if let Err(error) = self.exec(Program::Same, false) {
                    log::line(&format!("cannot start itself again: {error}"));
                }
            }
            if let Some(way) = self.left {
                if let Some(place) = resume::program() {
                    program::ended_in_order(&place);
                }
                if let Way::Machine(how) = way {
                    self.end_machine(how);
                }
                return ExitCode::SUCCESS;
            }
        }
    }

    /// Comes back only when it failed.
    fn exec(&mut self, program: Program, agent_too: bool) -> io::Result<()> {
        self.flush();
        Err(resume::exec_self(&self.table, &self.kept, program, agent_too))
    }

    fn look_at_program(&mut self, asked: Asked, refused: Option<FileId>, is_on_trial: bool) -> Event {
        let Some(place) = resume::program() else {
            let why = "it is not known where this program came from".to_owned();
            return Event::Looked { asked, looked: Looked::Unusable { why } };
        };
        let table = || resume::save(&self.table, &self.kept, false);
        let args = &self.config.agent_args;
        let (looked, child) = program::look(&place, args, asked.again, refused, is_on_trial, table);
        if let Some(child) = &child {
            boot::place_agent(&self.config, child.pid);
        }
        self.trying = child;
        Event::Looked { asked, looked }
    }

    fn exec_again(&mut self, file: Option<FileId>, agent_too: bool) -> Option<Event> {
        let Some(file) = file else {
            if let Err(error) = self.exec(Program::Newest, agent_too) {
                log::line(&format!("cannot start itself again: {error}"));
            }
            return None;
        };
        let changed = resume::program().is_none_or(|place| program::id(&place).ok() != Some(file));
        if changed {
            return Some(Event::NotExecuted { why: "it was changed after it had been tried".to_owned() });
        }
        if self.kept.former.is_none() {
            self.kept.former =
                program::hold().map_err(|error| log::line(&format!("the program that runs: {error}"))).ok();
        }
        let error = self.exec(Program::Newest, agent_too).err();
        self.kept.former = None;
        error.map(|error| Event::NotExecuted { why: error.to_string() })
    }

    fn go_back(&mut self) {
        if let Some(Err(error)) = resume::program().map(|place| program::put_back(&place)) {
            log::line(&format!("a power cut will bring back what was sent away: {error}"));
        }
        if let Err(error) = self.exec(Program::Former, true) {
            let why = format!("the former program cannot be executed: {error}; this one goes on");
            log::line(&why);
            if let Some(refused) = &mut self.table.upgrade.refused {
                refused.why = why;
            }
        }
    }

    /// One turn: wait, handle what came, do what is due.
    fn round(&mut self) {
        let wait_ms = self.table.wake_at_boot_ms().saturating_sub(boot_ms()).min(60_000);
        let timeout = rustix::event::Timespec {
            tv_sec: i64::try_from(wait_ms / 1000).unwrap_or(0),
            tv_nsec: i64::try_from(wait_ms % 1000 * 1_000_000).unwrap_or(0) as _,
        };
        let mut events = Vec::with_capacity(64);
        match epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => log::line(&format!("epoll: {errno}")),
        }
        for event in events {
            match event.data.u64() {
                SIGNALS => self.read_signals(),
                AGENT => self.read_agent(),
                launch => self.hear_of(launch.wrapping_sub(LAUNCHES)),
            }
        }
        self.feed(Event::Tick, &[]);
        self.flush();
        if self.kept.outgoing.len() > MAX_OUTGOING {
            self.feed(Event::AgentDeaf { why: "reads no answer any more" }, &[]);
        }
    }

    fn read_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let signal = i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok());
            // As busybox's and systemd's own halt, reboot and poweroff send them.
            let wish = match signal {
                Some(Signal::SIGCHLD) => {
                    self.reap();
                    continue;
                }
                Some(Signal::SIGTERM) => Wish::Stop,
                Some(Signal::SIGINT) => Wish::Reboot,
                Some(Signal::SIGPWR) => Wish::PowerOff,
                Some(Signal::SIGUSR1) if self.config.device => Wish::PowerOff,
                Some(Signal::SIGUSR2) => Wish::Again,
                // As `systemctl reload` sends it (config/edged.service).
                Some(Signal::SIGHUP) => Wish::Upgrade,
                _ => continue,
            };
            self.feed(Event::Asked(wish), &[]);
        }
    }

    /// Takes every ended child, ours or an orphan's.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get();
            // Its last word comes before its end.
            if let Some(key) = self.table.key_of_pid(pid).map(str::to_owned) {
                while self.hear(&key) {}
            }
            let end = End {
                code: status.exit_status(),
                signal: status.terminating_signal(),
                core_dumped: status.signaled() && status.as_raw() & 0x80 != 0,
            };
            if self.table.agent.life.pid() == Some(pid) {
                self.drop_agent();
            }
            if self.table.upgrade.trying.is_some_and(|trying| trying.pid == pid) {
                let words = self.trying.take().map(|mut child| child.said()).unwrap_or_default();
                self.feed(Event::Tried { end, words }, &[]);
                continue;
            }
            self.feed(Event::Reaped { pid, end }, &[]);
        }
    }

    fn hear_of(&mut self, pid: u64) {
        let key = i32::try_from(pid).ok().and_then(|pid| self.table.key_of_pid(pid)).map(str::to_owned);
        if let Some(key) = key {
            self.hear(&key);
        }
    }

    /// Takes one word of a child on its way to exec; says whether there may be more.
    fn hear(&mut self, key: &str) -> bool {
        let Some(doors) = self.kept.doors.get_mut(key) else { return false };
        let Some(talk) = &doors.talk else { return false };
        let key = key.to_owned();
        let event = match spawn::hear(talk.as_fd()) {
            Ok(Heard::Master(master)) => {
                doors.outputs.push(master);
                return true;
            }
            // `launch` has let it go on already.
            Ok(Heard::Holding | Heard::Ready) => return true,
            Ok(Heard::Silence) => Event::ExecReached { key },
            Ok(Heard::Failed(failure)) => Event::StepFailed { key, stage: failure.place(), errno: failure.errno },
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(0);
                Event::StepFailed { key, stage: "hearing of the child".to_owned(), errno }
            }
        };
        // Taken off by hand: a child that was cloned meanwhile may hold a copy for a moment.
        let _ = epoll::delete(&self.poll, talk);
        doors.talk = None;
        self.feed(event, &[]);
        false
    }

    fn read_agent(&mut self) {
        for _ in 0..REQUESTS_A_TURN {
            let Some(socket) = &self.kept.agent else { return };
            match fdpass::recv(socket.as_fd(), &mut self.buffer) {
                Ok((0, _)) => {
                    self.drop_agent();
                    return self.feed(Event::AgentClosed, &[]);
                }
                Ok((count, _)) if count > MAX_MESSAGE_BYTES => self.too_large(),
                Ok((count, fds)) => self.feed(heard(&self.buffer[..count]), &fds),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => self.too_large(),
                Err(error) => {
                    log::line(&format!("the agent's socket: {error}"));
                    self.drop_agent();
                    return self.feed(Event::AgentDeaf { why: "cannot be heard" }, &[]);
                }
            }
        }
    }

    fn too_large(&mut self) {
        let fds = edged_model::keeper::MAX_MESSAGE_FDS;
        let why = format!("a message may have {MAX_MESSAGE_BYTES} bytes and {fds} descriptors");
        self.feed(Event::Unreadable { why }, &[]);
    }

    /// The agent's socket goes, and what it has not taken; the next one asks for the list.
    fn drop_agent(&mut self) {
        if let Some(socket) = self.kept.agent.take() {
            let _ = epoll::delete(&self.poll, &socket);
        }
        self.kept.outgoing.clear();
        self.wants_room = false;
    }

    /// Decides on `event` and performs what comes of it, and of that, until nothing does.
    fn feed(&mut self, event: Event, fds: &[OwnedFd]) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for act in decide(&mut self.table, event, boot_ms()) {
                events.extend(self.perform(act, fds));
            }
        }
    }

    fn perform(&mut self, act: Act, fds: &[OwnedFd]) -> Option<Event> {
        match act {
            Act::Say(text) => log::line(&text),
            Act::Send { id, body, outputs_of } => self.send(id, body, outputs_of),
            Act::Launch { request, spec } => return Some(self.launch(request, &spec, fds)),
            Act::Signal { id, key, signal } => match self.signal(&key, signal) {
                // It has ended; the exit is on its way.
                Ok(()) | Err(Errno::SRCH) => self.send(id, ReplyBody::Done, None),
                Err(errno) => self.send(id, ReplyBody::Refused { why: format!("`{key}`: {errno}") }, None),
            },
            Act::SignalChildren { signal } => self.signal_children(signal),
            Act::End { key, signal } => match self.signal(&key, signal) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(errno) => log::line(&format!("`{key}`: {errno}")),
            },
            Act::KillAll => shutdown::kill_all(),
            Act::ClosePidfd { key } => {
                if let Some(doors) = self.kept.doors.get_mut(&key) {
                    doors.pidfd = None;
                }
            }
            Act::Close { key } => {
                if let Some(Doors { talk: Some(talk), .. }) = self.kept.doors.remove(&key) {
                    let _ = epoll::delete(&self.poll, talk);
                }
            }
            Act::StartAgent => return Some(self.start_agent()),
            Act::EndAgent { pid } => signal_process(pid, rustix::process::Signal::TERM),
            Act::KillProcess { pid } => signal_process(pid, rustix::process::Signal::KILL),
            Act::KeepTimeFloor { unix_seconds } => boot::keep_time_floor(&self.config.data, unix_seconds),
            Act::MoveClock { unix_ms } => {
                if let Err(error) = edged_sys::device::raise_clock_ms(unix_ms) {
                    log::line(&format!("the clock: {error}"));
                }
            }
            Act::PetWatchdog => {
                if let Some(Err(error)) = self.watchdog.as_ref().map(Watchdog::pet) {
                    log::line(&format!("watchdog: {error}"));
                }
            }
            Act::LookAtProgram { asked, refused, is_on_trial } => {
                return Some(self.look_at_program(asked, refused, is_on_trial));
            }
            Act::ExecAgain { file, agent_too } => return self.exec_again(file, agent_too),
            Act::GoBack => self.go_back(),
            Act::DropFormer => {
                self.kept.former = None;
                if let Some(place) = resume::program() {
                    program::drop_former(&place);
                }
            }
            Act::Leave { way } => self.left = Some(way),
        }
        None
    }

    fn launch(&mut self, request: u64, spec: &edged_model::keeper::LaunchSpec, fds: &[OwnedFd]) -> Event {
        let pidfd_of = |key: &String| self.kept.doors.get(key).and_then(|doors| doors.pidfd.as_ref()).map(AsFd::as_fd);
        let join = spec.join.as_ref().and_then(pidfd_of);
        let key = spec.key.clone();
        if spec.join.is_some() && join.is_none() {
            return Event::NotCloned {
                request,
                key,
                stage: "entering the container".to_owned(),
                errno: Errno::SRCH.raw_os_error(),
            };
        }
        let launching = match spawn::launch(&self.proof, spec, fds, join) {
            Ok(launching) => launching,
            Err(error) => return Event::NotCloned { request, key, stage: error.to_string(), errno: error.errno() },
        };
        let pid = launching.pid;
        // Unwatched, its end would still tell (`reap`): only the answer would be later.
        if let Err(errno) = epoll::add(&self.poll, &launching.talk, launch_token(pid), epoll::EventFlags::IN) {
            log::line(&format!("epoll: {errno}"));
        }
        let doors = Doors { pidfd: Some(launching.pidfd), talk: Some(launching.talk), outputs: launching.outputs };
        self.kept.doors.insert(key.clone(), doors);
        Event::Cloned { request, key, note: spec.note.clone(), stop: spec.stop, pid }
    }

    fn signal(&self, key: &str, signal: i32) -> Result<(), Errno> {
        let pidfd = self.kept.doors.get(key).and_then(|doors| doors.pidfd.as_ref()).ok_or(Errno::SRCH)?;
        if signal == rustix::process::Signal::KILL.as_raw() {
            shutdown::lift_cpu_limit(key);
        }
        pidfd::send_signal(pidfd.as_fd(), signal)
    }

    fn signal_children(&self, signal: i32) {
        for (key, _) in self.table.living() {
            match self.signal(key, signal) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(errno) => log::line(&format!("{key}: {errno}")),
            }
        }
    }

    fn start_agent(&mut self) -> Event {
        let started = agent::start(&self.config).and_then(|(pid, socket)| {
            boot::place_agent(&self.config, pid);
            epoll::add(&self.poll, &socket, epoll::EventData::new_u64(AGENT), epoll::EventFlags::IN)?;
            Ok((pid, socket))
        });
        match started {
            Ok((pid, socket)) => {
                self.kept.agent = Some(socket);
                Event::AgentStarted { pid }
            }
            Err(error) => Event::AgentNotStarted { why: error.to_string() },
        }
    }

    /// Puts a message into the agent's queue; with no agent there is nobody to tell, and `List` will.
    fn send(&mut self, id: u64, body: ReplyBody, outputs_of: Option<String>) {
        if self.kept.agent.is_none() {
            return;
        }
        match serde_cbor::to_vec(&Reply { id, body }) {
            Ok(bytes) => self.kept.outgoing.push_back(Outgoing { bytes, outputs_of }),
            Err(error) => log::line(&format!("a reply cannot be written: {error}")),
        }
    }

    fn flush(&mut self) {
        while let (Some(socket), Some(message)) = (&self.kept.agent, self.kept.outgoing.front()) {
            let doors = message.outputs_of.as_ref().and_then(|key| self.kept.doors.get(key));
            let fds: Vec<_> = doors.iter().flat_map(|doors| &doors.outputs).map(AsFd::as_fd).collect();
            match fdpass::send(socket.as_fd(), &message.bytes, &fds) {
                Ok(()) => {
                    self.kept.outgoing.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // It is gone; its end is on its way, and the next one asks for the list.
                Err(_) => self.kept.outgoing.clear(),
            }
        }
        self.watch_for_room();
    }

    fn watch_for_room(&mut self) {
        let wants_room = !self.kept.outgoing.is_empty();
        let Some(socket) = &self.kept.agent else { return };
        if wants_room != self.wants_room {
            let room = if wants_room { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
            match epoll::modify(&self.poll, socket, epoll::EventData::new_u64(AGENT), epoll::EventFlags::IN | room) {
                Ok(()) => self.wants_room = wants_room,
                Err(errno) => log::line(&format!("epoll: {errno}")),
            }
        }
    }

    fn end_machine(&mut self, how: ShutdownHow) {
        // A reboot may hang: then the watchdog shall have the last word.
        if let Some(watchdog) = self.watchdog.take_if(|_| how != ShutdownHow::Reboot) {
            let _ = watchdog.disarm();
        }
        shutdown::machine(&self.config.data, how);
    }
}

/// One of our own children, which is not reaped yet: the number is its own.
fn signal_process(pid: i32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

fn launch_token(pid: i32) -> epoll::EventData {
    epoll::EventData::new_u64(LAUNCHES + u64::from(pid.unsigned_abs()))
}

/// Doors by key.
pub type AllDoors = BTreeMap<String, Doors>;
