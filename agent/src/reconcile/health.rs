//! Probes of running workloads, each on a task of its own; commands are run through the keeper.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use edged_model::id::WorkloadName;
use edged_model::keeper::{ChildExit, LaunchSpec, Stdio, StopPlan};
use edged_model::manifest::{Health, NetworkMode, Probe};
use nix::sys::signal::Signal;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, timeout};

use super::{Agent, Message};
use crate::execute::isolate::{self, Launch};
use crate::execute::start::{self, StartContext};
use crate::observe::ProbeOutcome;
use crate::observe::probes::{self, Target};
use crate::runtime::keeper_link::KeeperLink;

/// Commands under way in containers, and who waits for their ends.
pub type Execs = Arc<Mutex<HashMap<String, oneshot::Sender<ChildExit>>>>;

/// Hands an end to who waits for it. False for a key that is no command's.
pub fn finish(execs: &Execs, exit: &ChildExit) -> bool {
    let waiting = execs.lock().unwrap_or_else(PoisonError::into_inner).remove(&exit.key);
    if let Some(waiting) = waiting {
        // Who asked may have given up.
        let _ = waiting.send(exit.clone());
    }
    exit.key.contains('/')
}

static EXEC_NUMBER: AtomicU64 = AtomicU64::new(1);

impl Agent {
    /// The task that probes this run; `None` for a workload without a health check.
    pub(super) fn probe_task(&self, name: &WorkloadName, pid: i32) -> Option<JoinHandle<()>> {
        let manifest = &self.active()?.manifest;
        let workload = manifest.workloads.get(name)?.clone();
        let health = workload.health.clone()?;
        let target = match start::netns_path(&self.start_context.places, name, workload.network_mode) {
            Some(path) if workload.network_mode != NetworkMode::Host => Target::Namespace(path),
            _ => Target::Host,
        };
        let exec = match &health.probe {
            Probe::Exec { command } => {
                let image = self.images.get(&workload.image)?.clone();
                let (context, manifest) = (self.start_context.clone(), manifest.clone());
                Some(ExecProbe {
                    link: self.link.clone(),
                    execs: self.execs.clone(),
                    name: name.clone(),
                    command: command.clone(),
                    describe: Arc::new(move |name: &WorkloadName, context: &StartContext| {
                        let launch = Launch { name, workload: &workload, manifest: &manifest, image: &image };
                        isolate::command(context, &launch).ok()
                    }),
                    context,
                })
            }
            Probe::Http { .. } | Probe::Tcp { .. } => None,
        };
        let (inbox, name) = (self.inbox.clone(), name.clone());
        Some(tokio::spawn(async move {
            let mut interval = tokio::time::interval(health.interval.duration());
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                interval.tick().await;
                let begin = tokio::time::Instant::now();
                let outcome = match &exec {
                    Some(exec) => exec.run(&health).await,
                    None => match probes::ask(&health, &target).await {
                        Some(outcome) => outcome,
                        None => return,
                    },
                };
                let message = Message::Probed { workload: name.clone(), pid, outcome, took: begin.elapsed() };
                if inbox.send(message).await.is_err() {
                    return;
                }
            }
        }))
    }
}

/// The keeper's name for one more process of a workload.
pub(super) fn exec_key(name: &WorkloadName, kind: &str) -> String {
    format!("{name}/{kind}-{}", EXEC_NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// A command with the identity, the wall and the filter of a workload that runs; its namespaces are entered, not made.
pub(super) fn joining(spec: LaunchSpec, name: &WorkloadName, key: String, command: Vec<String>) -> LaunchSpec {
    LaunchSpec {
        key,
        note: String::new(),
        join: Some(name.to_string()),
        namespaces: 0,
        netns_fd: None,
        rootfs: None,
        mounts: Vec::new(),
        device_nodes: Vec::new(),
        symlinks: Vec::new(),
        stop: StopPlan::default(),
        masked_paths: Vec::new(),
        readonly_paths: Vec::new(),
        sysctls: Vec::new(),
        hostname: None,
        init: false,
        argv: command,
        stdio: Stdio::Pipes,
        ..spec
    }
}

type Describe = dyn Fn(&WorkloadName, &StartContext) -> Option<start::Prepared> + Send + Sync;

/// A command inside the container.
struct ExecProbe {
    link: KeeperLink,
    execs: Execs,
    name: WorkloadName,
    command: Vec<String>,
    describe: Arc<Describe>,
    context: StartContext,
}

impl ExecProbe {
    async fn run(&self, health: &Health) -> ProbeOutcome {
        let failed = |why: String| ProbeOutcome::Failed { why };
        let (describe, name, context) = (self.describe.clone(), self.name.clone(), self.context.clone());
        let described = tokio::task::spawn_blocking(move || describe(&name, &context)).await;
        let Ok(Some(prepared)) = described else { return failed("the command could not be prepared".to_owned()) };
        let key = exec_key(&self.name, "probe");
        let (sender, ended) = oneshot::channel();
        self.execs.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), sender);
        let spec = joining(prepared.spec, &self.name, key.clone(), self.command.clone());
        let launched = match self.link.launch(spec, prepared.fds).await {
            Ok(launched) => launched,
            Err(error) => {
                self.execs.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
                return failed(crate::store::inline_chain(&error));
            }
        };
        // What it prints is nobody's; with the pipes closed it gets SIGPIPE, as under any supervisor that does not read.
        let _held_open = launched.outputs;
        match timeout(health.timeout.duration(), ended).await {
            Ok(Ok(exit)) if exit.code == Some(0) => ProbeOutcome::Passed,
            Ok(Ok(exit)) => match (exit.code, exit.signal) {
                (Some(code), _) => failed(format!("exit {code}")),
                (_, signal) => failed(format!("signal {}", signal.unwrap_or(0))),
            },
            Ok(Err(_)) => failed("its end was not seen".to_owned()),
            Err(_) => {
                // It is gone, or goes now; its end is forgotten by the loop.
                let _ = self.link.signal(&key, Signal::SIGKILL as i32).await;
                probes::no_answer(health)
            }
        }
    }
}
