//! The loop: wait, handle, send. All state of the keeper is here; each handler is short and none waits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::ExitCode;

use edged_model::keeper::{
    ChildExit, LaunchSpec, MAX_MESSAGE_BYTES, Reply, ReplyBody, Request, RequestBody, ShutdownHow,
};
use edged_sys::device::{Watchdog, boot_ms};
use edged_sys::fdpass;
use edged_sys::spawn::{self, Failure, SingleThread};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::process::{WaitOptions, kill_process, pidfd_send_signal};

use crate::agent::{self, Agent, Outgoing};
use crate::resume::{self, SavedAgent};
use crate::shutdown::{self, FORCED_MS, Next, Phase, Shutdown};
use crate::table::{Child, Life, MAX_CHILDREN, Table};
use crate::{KeeperConfig, boot, log};

/// What an epoll event is about. The numbers above are the launches' descriptors.
const SIGNALS: u64 = 0;
const AGENT: u64 = 1;
const LAUNCHES: u64 = 1 << 32;

pub struct Keeper {
    config: KeeperConfig,
    proof: SingleThread,
    poll: OwnedFd,
    signals: SignalFd,
    table: Table,
    agent: Agent,
    watchdog: Option<(Watchdog, u64)>,
    shutdown: Option<Shutdown>,
    buffer: Vec<u8>,
}

impl Keeper {
    pub fn new(config: KeeperConfig) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGUSR2] {
            mask.add(signal);
        }
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        if !config.device {
            edged_sys::privilege::become_subreaper()?;
        }
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&poll, &signals, epoll::EventData::new_u64(SIGNALS), epoll::EventFlags::IN)?;
        let waiting = agent::Life::Waiting { until_boot_ms: 0 };
        let mut keeper = Self {
            watchdog: if config.device { boot::open_watchdog() } else { None },
            config,
            proof: SingleThread::prove()?,
            poll,
            signals,
            table: Table::default(),
            agent: Agent { life: waiting, failures_in_a_row: 0, restarts: 0 },
            shutdown: None,
            buffer: vec![0; MAX_MESSAGE_BYTES + 1],
        };
        if let Some((table, agent)) = resume::restore()? {
            log::line(&format!("runs again with {} children", table.children.len()));
            keeper.table = table;
            if let Some(saved) = agent {
                keeper.adopt_agent(saved)?;
            }
        }
        Ok(keeper)
    }

    fn adopt_agent(&mut self, saved: SavedAgent) -> io::Result<()> {
        let socket = edged_sys::inherit::take(saved.socket)?;
        let now = boot_ms();
        self.watch_agent(&socket)?;
        self.agent.life = agent::Life::Running(agent::Running {
            pid: saved.pid,
            socket,
            started_boot_ms: now,
            heard_boot_ms: now,
            outgoing: std::collections::VecDeque::new(),
            killed: false,
        });
        Ok(())
    }

    fn watch_agent(&self, socket: &OwnedFd) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&self.poll, socket, epoll::EventData::new_u64(AGENT), flags).map_err(Into::into)
    }

    /// Never comes back on a device.
    pub fn run(mut self) -> ExitCode {
        loop {
            let round = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.round()));
            match round {
                Ok(None) => {}
                Ok(Some(code)) => return code,
                Err(_) => {
                    log::line("a fault in the keeper: it starts itself again with its table");
                    self.exec_self();
                }
            }
        }
    }

    fn exec_self(&mut self) {
        let agent = match &self.agent.life {
            agent::Life::Running(running) if edged_sys::inherit::leave(&running.socket).is_ok() => {
                Some(SavedAgent { pid: running.pid, socket: running.socket.as_raw_fd() })
            }
            _ => None,
        };
        let error = resume::exec_self(&self.table, agent);
        log::line(&format!("cannot start itself again: {error}"));
    }

    /// One turn: wait, handle what came, do what is due.
    fn round(&mut self) -> Option<ExitCode> {
        let wait_ms = self.next_wake_ms().saturating_sub(boot_ms());
        let timeout = rustix::event::Timespec {
            tv_sec: i64::try_from(wait_ms / 1000).unwrap_or(i64::MAX),
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
                launch => self.finish_launch_of(launch - LAUNCHES),
            }
        }
        self.pet_watchdog();
        self.look_after_agent();
        self.flush();
        self.go_down()
    }

    /// The next time that something is due without an event.
    fn next_wake_ms(&self) -> u64 {
        let now = boot_ms();
        let agent = match &self.agent.life {
            agent::Life::Waiting { until_boot_ms } => *until_boot_ms,
            agent::Life::Running(running) => running.heard_boot_ms + edged_model::keeper::HEARTBEAT_TIMEOUT_MS + 1,
            agent::Life::Retired => u64::MAX,
        };
        let watchdog = self.watchdog.as_ref().map_or(u64::MAX, |(_, next)| *next);
        let shutdown = self.shutdown.as_ref().map_or(u64::MAX, Shutdown::wake_at_boot_ms);
        agent.min(watchdog).min(shutdown).min(now + 60_000)
    }

    fn read_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            match i32::try_from(info.ssi_signo).ok().and_then(|n| Signal::try_from(n).ok()) {
                Some(Signal::SIGCHLD) => self.reap(),
                // The signals of reboot(8) and poweroff(8) as busybox and systemd know them.
                Some(Signal::SIGTERM) if self.config.device => self.begin_shutdown(ShutdownHow::Reboot),
                Some(Signal::SIGINT) if self.config.device => self.begin_shutdown(ShutdownHow::Reboot),
                Some(Signal::SIGTERM | Signal::SIGINT) => self.begin_shutdown(ShutdownHow::Exit),
                Some(Signal::SIGUSR1) if self.config.device => self.begin_shutdown(ShutdownHow::PowerOff),
                Some(Signal::SIGUSR2) => self.exec_self(),
                _ => {}
            }
        }
    }

    /// Takes every ended child, ours or an orphan's.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get();
            if matches!(&self.agent.life, agent::Life::Running(running) if running.pid == pid) {
                self.agent_ended(&format!("{status:?}"));
                continue;
            }
            let Some(key) = self.table.key_of_pid(pid) else { continue };
            self.finish_launch(&key);
            let Some(child) = self.table.children.get_mut(&key) else { continue };
            let exit = ChildExit {
                key: key.clone(),
                pid,
                code: status.exit_status(),
                signal: status.terminating_signal(),
                core_dumped: status.as_raw() & 0x80 != 0 && status.signaled(),
                boot_ms: boot_ms(),
            };
            child.life = Life::Ended(exit.clone());
            child.pidfd = None;
            self.send(0, ReplyBody::Exited(exit), Vec::new());
        }
    }

    fn agent_ended(&mut self, how: &str) {
        let now = boot_ms();
        let agent::Life::Running(running) = &self.agent.life else { return };
        let ran_ms = now.saturating_sub(running.started_boot_ms);
        self.agent.failures_in_a_row = agent::count_failure(self.agent.failures_in_a_row, ran_ms);
        self.agent.restarts += 1;
        let delay = agent::restart_delay_ms(self.agent.failures_in_a_row);
        log::line(&format!("the agent ended ({how}) after {ran_ms} ms; again in {delay} ms"));
        self.agent.life = match self.shutdown {
            Some(_) => agent::Life::Retired,
            None => agent::Life::Waiting { until_boot_ms: now + delay },
        };
    }

    fn look_after_agent(&mut self) {
        let now = boot_ms();
        match &mut self.agent.life {
            agent::Life::Waiting { until_boot_ms } if *until_boot_ms <= now && self.shutdown.is_none() => {
                self.start_agent(now);
            }
            agent::Life::Running(running) if !running.killed => {
                let hung = running.is_silent(now) || running.outgoing.len() > agent::MAX_OUTGOING;
                if hung {
                    log::line("the agent gives no sign of life: it is killed");
                    running.killed = true;
                    kill(running.pid, rustix::process::Signal::KILL);
                }
            }
            _ => {}
        }
    }

    fn start_agent(&mut self, now: u64) {
        let started = agent::start(&self.config, now).and_then(|(running, child)| {
            boot::place_agent(&self.config, running.pid);
            self.watch_agent(&running.socket)?;
            // The end is seen by `reap`; the handle has nothing more to do.
            drop(child);
            Ok(running)
        });
        match started {
            Ok(running) => self.agent.life = agent::Life::Running(running),
            Err(error) => {
                self.agent.failures_in_a_row = self.agent.failures_in_a_row.saturating_add(1);
                let delay = agent::restart_delay_ms(self.agent.failures_in_a_row).max(100);
                log::line(&format!("the agent cannot be started: {error}; again in {delay} ms"));
                self.agent.life = agent::Life::Waiting { until_boot_ms: now + delay };
            }
        }
    }

    fn pet_watchdog(&mut self) {
        let alive = matches!(&self.agent.life, agent::Life::Running(running) if !running.is_silent(boot_ms()));
        if let Some((watchdog, next)) = &mut self.watchdog {
            let now = boot_ms();
            // While the agent is being replaced the machine is not hung; only a machine that cannot even do that is.
            if *next <= now && (alive || self.agent.failures_in_a_row < 50 || self.shutdown.is_some()) {
                if let Err(error) = watchdog.pet() {
                    log::line(&format!("watchdog: {error}"));
                }
                *next = now + boot::WATCHDOG_PET_MS;
            } else if *next <= now {
                *next = now + boot::WATCHDOG_PET_MS;
            }
        }
    }

    fn read_agent(&mut self) {
        loop {
            let agent::Life::Running(running) = &mut self.agent.life else { return };
            match fdpass::recv(running.socket.as_fd(), &mut self.buffer) {
                // Closed: the SIGCHLD that follows tells the rest.
                Ok((0, _)) => return,
                Ok((count, fds)) => {
                    running.heard_boot_ms = boot_ms();
                    match serde_cbor::from_slice::<Request>(&self.buffer[..count]) {
                        Ok(request) => self.handle(request, fds),
                        Err(error) => self.refuse(0, format!("not a request: {error}")),
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    self.refuse(0, format!("a message may have {MAX_MESSAGE_BYTES} bytes"));
                }
                Err(error) => {
                    log::line(&format!("the agent's socket: {error}"));
                    return;
                }
            }
        }
    }

    fn refuse(&mut self, id: u64, why: String) {
        self.send(id, ReplyBody::Refused { why }, Vec::new());
    }

    fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) {
        let id = request.id;
        match request.body {
            RequestBody::Heartbeat => {}
            RequestBody::Launch(spec) => self.launch(id, &spec, &fds),
            RequestBody::Signal { key, signal } => match self.signal(&key, signal) {
                Ok(()) => self.send(id, ReplyBody::Done, Vec::new()),
                Err(why) => self.refuse(id, why),
            },
            RequestBody::List => self.list(id),
            RequestBody::Forget { key } => {
                if self.table.children.get(&key).is_some_and(|child| !child.is_living()) {
                    self.table.children.remove(&key);
                }
                self.send(id, ReplyBody::Done, Vec::new());
            }
            RequestBody::Shutdown { how } => {
                self.send(id, ReplyBody::Done, Vec::new());
                self.begin_shutdown(how);
            }
            RequestBody::TimeFloor { unix_seconds } => {
                if self.config.device {
                    boot::keep_time_floor(&self.config.data, unix_seconds);
                }
                self.send(id, ReplyBody::Done, Vec::new());
            }
            RequestBody::Version => {
                let version = env!("CARGO_PKG_VERSION").to_owned();
                self.send(id, ReplyBody::Version { version }, Vec::new());
            }
        }
    }

    fn launch(&mut self, id: u64, spec: &LaunchSpec, fds: &[OwnedFd]) {
        if self.shutdown.is_some() {
            return self.refuse(id, "the machine is going down".to_owned());
        }
        if self.table.children.contains_key(&spec.key) {
            return self.refuse(id, format!("`{}` is there already", spec.key));
        }
        if self.table.children.len() >= MAX_CHILDREN {
            return self.refuse(id, format!("there are {MAX_CHILDREN} children already"));
        }
        let join = match &spec.join {
            None => None,
            Some(key) => match self.table.children.get(key).and_then(|child| child.pidfd.as_ref()) {
                Some(pidfd) => Some(pidfd.as_fd()),
                None => return self.refuse(id, format!("`{key}` does not run")),
            },
        };
        let started_boot_ms = boot_ms();
        match spawn::launch(&self.proof, spec, fds, join) {
            Ok(launching) => {
                let token = LAUNCHES + u64::from(launching.pid as u32);
                let watched =
                    epoll::add(&self.poll, &launching.failure, epoll::EventData::new_u64(token), epoll::EventFlags::IN);
                if let Err(errno) = watched {
                    log::line(&format!("epoll: {errno}"));
                }
                let child = Child {
                    pid: launching.pid,
                    pidfd: Some(launching.pidfd),
                    started_boot_ms,
                    note: spec.note.clone(),
                    outputs: launching.outputs,
                    life: Life::Launching { request: id, failure: launching.failure },
                };
                self.table.children.insert(spec.key.clone(), child);
            }
            Err(error) => {
                let (key, stage, errno) = (spec.key.clone(), error.to_string(), error.errno());
                self.send(id, ReplyBody::LaunchFailed { key, stage, errno }, Vec::new());
            }
        }
    }

    fn finish_launch_of(&mut self, pid: u64) {
        let pid = i32::try_from(pid).unwrap_or(-1);
        if let Some(key) = self.table.key_of_pid(pid) {
            self.finish_launch(&key);
        }
    }

    /// Reads what the child said on its way to exec, and answers.
    fn finish_launch(&mut self, key: &str) {
        let Some(child) = self.table.children.get_mut(key) else { return };
        let Life::Launching { request, failure } = &child.life else { return };
        let mut bytes = [0; Failure::BYTES];
        let count = match rustix::io::read(failure, &mut bytes[..]) {
            Ok(count) => count,
            Err(errno) => {
                log::line(&format!("{key}: launch pipe: {errno}"));
                0
            }
        };
        let (request, pid) = (*request, child.pid);
        if count == 0 {
            child.life = Life::Running;
            let fds = child.outputs.iter().filter_map(|fd| fd.try_clone().ok()).collect();
            let body = ReplyBody::Launched { key: key.to_owned(), pid, boot_ms: child.started_boot_ms };
            self.send(request, body, fds);
        } else {
            let (stage, errno) = match Failure::parse(&bytes[..count]) {
                Some(failure) => (failure.stage.text().to_owned(), failure.errno),
                None => ("start".to_owned(), 0),
            };
            // It ends by itself; whoever reaps it later finds no entry, as for any orphan.
            self.table.children.remove(key);
            let key = key.to_owned();
            self.send(request, ReplyBody::LaunchFailed { key, stage, errno }, Vec::new());
        }
    }

    fn signal(&self, key: &str, signal: i32) -> Result<(), String> {
        let child = self.table.children.get(key).ok_or_else(|| format!("`{key}` is not there"))?;
        let Some(pidfd) = &child.pidfd else { return Ok(()) };
        let signal = rustix::process::Signal::from_named_raw(signal).ok_or_else(|| format!("no signal {signal}"))?;
        match pidfd_send_signal(pidfd, signal) {
            // It has ended; the exit is on its way.
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(format!("`{key}`: {errno}")),
        }
    }

    fn list(&mut self, id: u64) {
        let entries: Vec<_> = self
            .table
            .children
            .iter()
            .filter(|(_, child)| !matches!(child.life, Life::Launching { .. }))
            .map(|(key, child)| {
                let fds: Vec<OwnedFd> = child.outputs.iter().filter_map(|fd| fd.try_clone().ok()).collect();
                (child.state(key), fds)
            })
            .collect();
        let children = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        let keeper_version = env!("CARGO_PKG_VERSION").to_owned();
        self.send(id, ReplyBody::Table { children, keeper_version }, Vec::new());
        for (state, fds) in entries {
            self.send(id, ReplyBody::Child(state), fds);
        }
    }

    /// Puts a message into the agent's queue; with no agent there is nobody to tell, and `List` will.
    fn send(&mut self, id: u64, body: ReplyBody, fds: Vec<OwnedFd>) {
        let agent::Life::Running(running) = &mut self.agent.life else { return };
        match serde_cbor::to_vec(&Reply { id, body }) {
            Ok(bytes) => running.outgoing.push_back(Outgoing { bytes, fds }),
            Err(error) => log::line(&format!("a reply cannot be written: {error}")),
        }
    }

    fn flush(&mut self) {
        let agent::Life::Running(running) = &mut self.agent.life else { return };
        while let Some(message) = running.outgoing.front() {
            let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
            match fdpass::send(running.socket.as_fd(), &message.bytes, &fds) {
                Ok(()) => {
                    running.outgoing.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The agent is gone; the next one asks for the list.
                Err(_) => {
                    running.outgoing.clear();
                    return;
                }
            }
        }
    }

    fn begin_shutdown(&mut self, how: ShutdownHow) {
        if self.shutdown.is_some() {
            return;
        }
        log::line(&format!("shutting down: {how:?}"));
        let kill_at_boot_ms = boot_ms() + self.config.stop_timeout_ms;
        self.shutdown = Some(Shutdown { how, phase: Phase::Asked { kill_at_boot_ms } });
        // First the agent, or it would start again what we stop. It is crash-only: nothing is lost.
        if let agent::Life::Running(running) = &self.agent.life {
            kill(running.pid, rustix::process::Signal::KILL);
        }
        self.signal_all(rustix::process::Signal::TERM);
    }

    fn signal_all(&self, signal: rustix::process::Signal) {
        for (key, child) in self.table.living() {
            if let Some(pidfd) = &child.pidfd {
                match pidfd_send_signal(pidfd, signal) {
                    Ok(()) | Err(Errno::SRCH) => {}
                    Err(errno) => log::line(&format!("{key}: {errno}")),
                }
            }
        }
    }

    fn go_down(&mut self) -> Option<ExitCode> {
        let shutdown = self.shutdown?;
        let agent_lives = matches!(self.agent.life, agent::Life::Running(_));
        let any_living = agent_lives || self.table.living().next().is_some();
        match shutdown.next(boot_ms(), any_living) {
            Next::Wait => None,
            Next::Kill => {
                self.signal_all(rustix::process::Signal::KILL);
                let phase = Phase::Forced { leave_at_boot_ms: boot_ms() + FORCED_MS };
                self.shutdown = Some(Shutdown { phase, ..shutdown });
                None
            }
            Next::Leave => {
                if self.config.device {
                    if let Some((watchdog, _)) = self.watchdog.take() {
                        // A reboot may hang: then the watchdog shall have the last word.
                        if shutdown.how != ShutdownHow::Reboot {
                            let _ = watchdog.disarm();
                        }
                    }
                    shutdown::machine(&self.config.data, shutdown.how);
                }
                Some(ExitCode::SUCCESS)
            }
        }
    }
}

fn kill(pid: i32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = kill_process(pid, signal);
    }
}
