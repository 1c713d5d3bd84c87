//! `edgectl exec`: a command in a running workload. The keeper starts it; its terminal or its pipes are handed to the
//! client, which speaks to it without the agent in between. A client that leaves hangs up on it, unless it said that it
//! leaves it to itself.

use std::os::fd::OwnedFd;
use std::sync::PoisonError;
use std::time::Duration;

use edged_model::api::{Answer, ExecWish};
use edged_model::id::WorkloadName;
use edged_model::keeper::{ChildExit, LaunchSpec, Stdio};
use edged_model::observed::InstanceState;
use edged_model::reason::{Code, Reason};
use nix::sys::signal::Signal;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

use super::{Agent, health};
use crate::api::Passing;
use crate::execute::isolate::{self, Launch};
use crate::execute::start::Prepared;
use crate::runtime::keeper_link::KeeperLink;
use crate::store::inline_chain;

/// A command that was hung up on and still runs.
const AFTER_HANGUP: Duration = Duration::from_secs(5);

impl Agent {
    pub(super) fn exec(
        &mut self,
        answers: mpsc::Sender<Answer>,
        passing: Option<Passing>,
        name: WorkloadName,
        wish: ExecWish,
        by: &str,
    ) {
        let refuse = |reason| {
            let _ = answers.try_send(Answer::Error(reason));
        };
        let Some(passing) = passing else {
            let text = "a command's terminal cannot be handed over this line";
            return refuse(Reason::new(Code::NotAllowedHere, text).next("use the local socket, or --host ssh://HOST"));
        };
        let active = self.active().map(|active| active.manifest.clone());
        let found = active.as_ref().and_then(|manifest| manifest.workloads.get(&name).cloned());
        let (Some(manifest), Some(workload)) = (active, found) else { return refuse(self.no_such(&name)) };
        let runs = matches!(self.world.instance(&name).state, InstanceState::Running { .. });
        let image = self.images.get(&workload.image).cloned();
        let (Some(image), true) = (image, runs) else {
            let text = format!("{name} does not run: there is nothing to run a command in");
            return refuse(Reason::new(Code::NotRunning, text).next(format!("`edgectl inspect {name}` says why")));
        };
        let text = format!("a command in {name}: {}", wish.command.join(" "));
        self.tell(Some(&name), None, &Reason::new(Code::OperatorCommand, text), by);
        let (link, execs, context) = (self.link.clone(), self.execs.clone(), self.start_context.clone());
        tokio::spawn(async move {
            let described = name.clone();
            let prepared = tokio::task::spawn_blocking(move || {
                let name = &described;
                let launch = Launch { name, workload: &workload, manifest: &manifest, image: &image };
                isolate::command(&context, &launch)
            });
            let failed = |text: String| Answer::Error(Reason::new(Code::StartFailed, text));
            let answer = match prepared.await {
                Ok(Ok(prepared)) => run(&link, &execs, &name, wish, prepared, passing, &answers).await,
                Ok(Err(reason)) => Err(Answer::Error(reason)),
                Err(error) => Err(failed(error.to_string())),
            };
            // A client that has gone needs no answer.
            match answer {
                Ok(exit) => {
                    let code = exit.code.or(exit.signal.map(|signal| 128 + signal)).unwrap_or(255);
                    let _ = answers.send(Answer::ExecEnded { code }).await;
                    let _ = answers.send(Answer::End).await;
                }
                Err(error) => drop(answers.send(error).await),
            }
        });
    }
}

/// The other ends of a command's three streams, and the launch's.
fn pipes(first: usize) -> std::io::Result<(Stdio, Vec<OwnedFd>, Vec<OwnedFd>)> {
    let (stdin_read, stdin_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (stdout_read, stdout_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (stderr_read, stderr_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let first = u32::try_from(first).unwrap_or(u32::MAX);
    let stdio = Stdio::Given { stdin_fd: first, stdout_fd: first + 1, stderr_fd: first + 2 };
    let childs = vec![stdin_read, stdout_write, stderr_write];
    Ok((stdio, childs, vec![stdin_write, stdout_read, stderr_read]))
}

async fn run(
    link: &KeeperLink,
    execs: &health::Execs,
    name: &WorkloadName,
    wish: ExecWish,
    prepared: Prepared,
    passing: Passing,
    answers: &mpsc::Sender<Answer>,
) -> Result<ChildExit, Answer> {
    let failed = |text: String| Answer::Error(Reason::new(Code::StartFailed, format!("{name}: {text}")));
    let key = health::exec_key(name, "exec");
    let mut fds = prepared.fds;
    let (stdio, clients) = match wish.terminal {
        Some(size) => (Stdio::Terminal { rows: size.rows, columns: size.columns }, Vec::new()),
        None => {
            let (stdio, childs, clients) = pipes(fds.len()).map_err(|error| failed(error.to_string()))?;
            fds.extend(childs);
            (stdio, clients)
        }
    };
    let mut spec = health::joining(prepared.spec, name, key.clone(), wish.command);
    spec.stdio = stdio;
    spec.env.extend(wish.env);
    let (sender, mut ended) = oneshot::channel();
    execs.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), sender);
    let launched = link.launch(LaunchSpec { ..spec }, fds).await.map_err(|error| {
        execs.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        failed(inline_chain(&error))
    })?;
    let clients = if clients.is_empty() { launched.outputs } else { clients };
    // A second descriptor for the time when nobody looks at the terminal any more.
    let terminal = wish.terminal.and_then(|_| clients.first()?.try_clone().ok());
    passing.put(clients);
    let _ = answers.send(Answer::ExecStarted).await;
    let unseen = || failed("its end was not seen".to_owned());
    tokio::select! {
        exit = &mut ended => exit.map_err(|_| unseen()),
        () = answers.closed() => {
            if let Some(terminal) = terminal.filter(|_| passing.is_detached()) {
                tokio::spawn(drain(terminal));
                return ended.await.map_err(|_| unseen());
            }
            // The terminal's master lives on in the keeper: hanging up is ours to do.
            let _ = link.signal(&key, Signal::SIGHUP as i32).await;
            if let Ok(exit) = tokio::time::timeout(AFTER_HANGUP, &mut ended).await {
                return exit.map_err(|_| unseen());
            }
            let _ = link.signal(&key, Signal::SIGKILL as i32).await;
            ended.await.map_err(|_| unseen())
        }
    }
}

/// Reads what nobody will see, until the command is gone: a terminal that is full stops who writes to it.
async fn drain(terminal: OwnedFd) -> std::io::Result<()> {
    rustix::io::ioctl_fionbio(&terminal, true)?;
    #[expect(deprecated, reason = "unsound only for types that lie about their descriptor; this one owns it")]
    let terminal = AsyncFd::with_interest(terminal, Interest::READABLE)?;
    let mut buffer = [0_u8; 4096];
    // At the end of the command a terminal says EIO (pty(7)).
    while terminal.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut buffer)?)).await? > 0 {}
    Ok(())
}
