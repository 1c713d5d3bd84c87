use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use edged::api::peer::Allowed;
use edged::api::{self, Call};
use edged_model::api::{Answer, Event, FleetStatus, LogLine, Request, Status, Stream, VersionInfo, WorkloadStatus};
use edged_model::id::{DeviceId, WorkloadName};
use edged_model::quantity::{Bytes, Timestamp};
use edged_model::reason::{Code, Reason};
use edged_model::report::DiskReport;
use edged_model::workload::{Health, Phase};
use tokio::sync::mpsc;

/// Long enough for a loaded machine; no test waits this long when all is well.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits for a condition.
pub fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come within {DEADLINE:?}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// A socket server with its answering thread, in a directory of its own.
pub struct Device {
    dir: tempfile::TempDir,
    pub calls: mpsc::Sender<Call>,
}

impl Device {
    pub fn start() -> Self {
        Self::with_queue(16, true)
    }

    /// A device whose loop takes no calls: the queue of `depth` fills.
    pub fn that_hangs(depth: usize) -> Self {
        Self::with_queue(depth, false)
    }

    fn with_queue(depth: usize, answers: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (calls, receiver) = mpsc::channel(depth);
        let (path, to_listen) = (dir.path().join("agent.sock"), calls.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                api::listen(&path, Allowed::group_named("no-such-group"), to_listen).unwrap();
                if answers { answer_all(receiver).await } else { hold(receiver).await }
            });
        });
        let device = Self { dir, calls };
        wait_for("the socket", || std::os::unix::net::UnixStream::connect(device.socket()).is_ok());
        device
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    pub fn edgectl(&self, words: &[&str]) -> Output {
        edgectl(&format!("unix:{}", self.socket().display()), words)
    }
}

pub fn edgectl(host: &str, words: &[&str]) -> Output {
    command(host, words).output().unwrap()
}

pub fn command(host: &str, words: &[&str]) -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_edgectl")));
    command.arg("--host").arg(host).args(words).env_remove("EDGED_HOST");
    command
}

async fn hold(receiver: mpsc::Receiver<Call>) {
    let _held = receiver;
    std::future::pending::<()>().await;
}

async fn answer_all(mut calls: mpsc::Receiver<Call>) {
    while let Some(call) = calls.recv().await {
        tokio::spawn(answer(call));
    }
}

async fn answer(Call { request, caller, answers, .. }: Call) {
    let list = match request {
        Request::Version => {
            let text = |text: &str| text.to_owned();
            vec![Answer::Version(VersionInfo { agent: text("1.2.3"), keeper: text("1.2.2"), arch: text("riscv") })]
        }
        Request::Status => vec![Answer::Status(Box::new(status()))],
        Request::Logs { follow, .. } => {
            for n in 0.. {
                if n == 3 && !follow {
                    break;
                }
                let text = format!("line {n} \u{1b}[31mred");
                let line = LogLine { at_unix_ms: n, stream: Stream::Stdout, text };
                if answers.send(Answer::Log(line)).await.is_err() {
                    return;
                }
            }
            Vec::new()
        }
        Request::Events { .. } => vec![Answer::Event(Event {
            number: 7,
            at: Timestamp(0),
            boot_id: String::new(),
            workload: None,
            generation: None,
            why: Reason::new(Code::Boot, "began"),
            by: "kernel".to_owned(),
        })],
        Request::Restart { workload } => vec![Answer::Accepted { what: format!("{workload} by {}", caller.name) }],
        Request::Apply { envelope } => vec![Answer::Accepted { what: format!("{} bytes", envelope.len()) }],
        Request::Inspect { workload } => {
            let why = Reason::new(Code::NoSuchWorkload, format!("there is no workload {workload}"));
            let _ = answers.send(Answer::Error(why.next("did you mean web?"))).await;
            return;
        }
        // The loop died: the call is dropped.
        Request::Generations => return,
        other => vec![Answer::Accepted { what: format!("{other:?}") }],
    };
    for answer in list.into_iter().chain([Answer::End]) {
        if answers.send(answer).await.is_err() {
            return;
        }
    }
}

fn status() -> Status {
    let web = WorkloadStatus {
        name: WorkloadName::parse("web").unwrap(),
        image: "r.example/web:1".to_owned(),
        phase: Phase::Failed,
        health: Health::Unchecked,
        pid: None,
        up_secs: None,
        restarts: 3,
        oom_kills: 0,
        last_exit: None,
        memory: None,
        memory_max: Some(Bytes::mebi(64)),
        cpu_milli: None,
        cpu_max_milli: Some(250),
        address: None,
        log_lines_dropped: 0,
        why: Some(Reason::new(Code::Exited, "web ended with exit code 3").next("`edgectl logs web`")),
    };
    Status {
        device: DeviceId::parse("pump-17").unwrap(),
        agent_version: "1.2.3".to_owned(),
        boot_id: "b".to_owned(),
        uptime_secs: 60,
        now: Timestamp(0),
        clock_source: "rtc".to_owned(),
        boot_cause: None,
        generation: None,
        candidate: None,
        workloads: vec![web],
        fleet: FleetStatus { url: None, last_contact: None, waiting_reports: 0, dropped_untold: 0, problem: None },
        disk: DiskReport { total: Bytes(0), free: Bytes(0) },
        memory_total: Bytes(0),
        memory_available: Bytes(0),
        supervisor: None,
        pressure: None,
        refused: None,
        upgrade: None,
        trust: Default::default(),
        pulls: Vec::new(),
        survived: Default::default(),
        scrub: Default::default(),
    }
}
