//! The agent's end of the keeper's socket: asks and waits for the answer with the same number; exits come as events.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use edged_model::keeper::{
    ChildExit, ChildState, LaunchSpec, MAX_MESSAGE_BYTES, RefusedProgram, Reply, ReplyBody, Request, RequestBody,
    ShutdownHow,
};
use edged_sys::fdpass;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use crate::crash_point;

/// The keeper never waits, so an answer that takes longer than this never comes.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Exits that may wait for the agent's loop: one per child the keeper allows.
const EXITS_DEPTH: usize = 2048;

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("the keeper's socket")]
    Socket(#[from] io::Error),
    #[error("the request has {bytes} bytes; the keeper takes {MAX_MESSAGE_BYTES}")]
    TooLarge { bytes: usize },
    #[error("the keeper did not answer in {} s", ANSWER_TIMEOUT.as_secs())]
    NoAnswer,
    #[error("the keeper has gone")]
    Closed,
    #[error("the keeper refuses: {why}")]
    Refused { why: String },
    #[error("the keeper answered something else than was asked")]
    WrongAnswer,
}

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("{stage}: errno {errno}")]
    Failed { stage: String, errno: i32 },
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// A run that reached exec.
#[derive(Debug)]
pub struct Launched {
    pub pid: i32,
    pub boot_ms: u64,
    /// Read ends of stdout and stderr, or the pty's master.
    pub outputs: Vec<OwnedFd>,
}

/// The keeper's program, as the keeper sees it.
#[derive(Debug, Default)]
pub struct Program {
    /// Where it looks for a newer one; `None` with a keeper that cannot be upgraded in place.
    pub place: Option<PathBuf>,
    /// What comes back if the agents of this one fall.
    pub on_trial_after: Option<String>,
    pub refused: Option<RefusedProgram>,
}

type Answer = (ReplyBody, Vec<OwnedFd>);

struct Shared {
    socket: AsyncFd<OwnedFd>,
    next_id: AtomicU64,
    waiting: Mutex<HashMap<u64, mpsc::UnboundedSender<Answer>>>,
}

impl Shared {
    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u64, mpsc::UnboundedSender<Answer>>> {
        self.waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Cheap to clone.
#[derive(Clone)]
pub struct KeeperLink {
    shared: Arc<Shared>,
}

impl KeeperLink {
    /// Takes the socket and starts the reader. The receiver gives every exit; closed, it says that the keeper is gone.
    pub fn connect(socket: OwnedFd) -> io::Result<(Self, mpsc::Receiver<ChildExit>)> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        #[expect(deprecated, reason = "unsound only for types that lie about their descriptor; this one owns it")]
        let socket = AsyncFd::with_interest(socket, Interest::READABLE | Interest::WRITABLE)?;
        let shared = Arc::new(Shared { socket, next_id: AtomicU64::new(1), waiting: Mutex::new(HashMap::new()) });
        let (exits, receiver) = mpsc::channel(EXITS_DEPTH);
        let link = Self { shared };
        let reader = link.clone();
        tokio::spawn(async move { reader.read(exits).await });
        Ok((link, receiver))
    }

    async fn read(&self, exits: mpsc::Sender<ChildExit>) {
        let mut buffer = vec![0; MAX_MESSAGE_BYTES + 1];
        loop {
            let received =
                self.shared.socket.async_io(Interest::READABLE, |fd| fdpass::recv(fd.as_fd(), &mut buffer)).await;
            let (count, fds) = match received {
                Ok((0, _)) | Err(_) => break,
                Ok(received) => received,
            };
            let Ok(reply) = edged_model::cbor::read_quickly::<Reply>(&buffer[..count]) else { continue };
            if let ReplyBody::Exited(exit) = reply.body {
                if exits.send(exit).await.is_err() {
                    break;
                }
            } else if let Some(asked) = self.shared.waiting().get(&reply.id) {
                // Who asked may have given up waiting.
                let _ = asked.send((reply.body, fds));
            }
        }
        self.shared.waiting().clear();
    }

    /// Sends a request; the receiver gets its answers. The guard takes the entry away again.
    async fn ask(
        &self,
        body: RequestBody,
        fds: &[OwnedFd],
    ) -> Result<(Asked<'_>, mpsc::UnboundedReceiver<Answer>), LinkError> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let bytes = serde_cbor::to_vec(&Request { id, body }).map_err(|_| LinkError::WrongAnswer)?;
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(LinkError::TooLarge { bytes: bytes.len() });
        }
        let (sender, receiver) = mpsc::unbounded_channel();
        self.shared.waiting().insert(id, sender);
        let asked = Asked { link: self, id };
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.shared.socket.async_io(Interest::WRITABLE, |fd| fdpass::send(fd.as_fd(), &bytes, &borrowed)).await?;
        Ok((asked, receiver))
    }

    async fn ask_one(&self, body: RequestBody, fds: &[OwnedFd]) -> Result<Answer, LinkError> {
        let (_asked, mut answers) = self.ask(body, fds).await?;
        next(&mut answers).await
    }

    async fn ask_done(&self, body: RequestBody) -> Result<(), LinkError> {
        match self.ask_one(body, &[]).await?.0 {
            ReplyBody::Done => Ok(()),
            _ => Err(LinkError::WrongAnswer),
        }
    }

    /// Starts a container, or a process in one.
    pub async fn launch(&self, spec: LaunchSpec, fds: Vec<OwnedFd>) -> Result<Launched, LaunchError> {
        let (_asked, mut answers) = self.ask(RequestBody::Launch(Box::new(spec)), &fds).await?;
        crash_point::pass("start-sent");
        let (body, outputs) = next(&mut answers).await?;
        match body {
            ReplyBody::Launched { pid, boot_ms, .. } => Ok(Launched { pid, boot_ms, outputs }),
            ReplyBody::LaunchFailed { stage, errno, .. } => Err(LaunchError::Failed { stage, errno }),
            _ => Err(LinkError::WrongAnswer.into()),
        }
    }

    pub async fn signal(&self, key: &str, signal: i32) -> Result<(), LinkError> {
        self.ask_done(RequestBody::Signal { key: key.to_owned(), signal }).await
    }

    pub async fn note(&self, key: &str, note: String) -> Result<(), LinkError> {
        self.ask_done(RequestBody::Note { key: key.to_owned(), note }).await
    }

    /// All children with their output pipes, and the keeper's version.
    pub async fn list(&self) -> Result<(Vec<(ChildState, Vec<OwnedFd>)>, String), LinkError> {
        let (_asked, mut answers) = self.ask(RequestBody::List, &[]).await?;
        let (ReplyBody::Table { children, keeper_version }, _) = next(&mut answers).await? else {
            return Err(LinkError::WrongAnswer);
        };
        let mut list = Vec::new();
        for _ in 0..children {
            let (ReplyBody::Child(child), fds) = next(&mut answers).await? else { return Err(LinkError::WrongAnswer) };
            list.push((child, fds));
        }
        Ok((list, keeper_version))
    }

    pub async fn forget(&self, key: &str) -> Result<(), LinkError> {
        self.ask_done(RequestBody::Forget { key: key.to_owned() }).await
    }

    pub async fn heartbeat(&self) -> Result<(), LinkError> {
        self.ask(RequestBody::Heartbeat, &[]).await.map(drop)
    }

    pub async fn time_floor(&self, unix_seconds: i64) -> Result<(), LinkError> {
        self.ask_done(RequestBody::TimeFloor { unix_seconds }).await
    }

    pub async fn move_clock(&self, unix_ms: i64) -> Result<(), LinkError> {
        self.ask_done(RequestBody::MoveClock { unix_ms }).await
    }

    pub async fn program(&self) -> Result<Program, LinkError> {
        match self.ask_one(RequestBody::Version, &[]).await?.0 {
            ReplyBody::Version { program, on_trial_after, refused, .. } => {
                Ok(Program { place: program.map(PathBuf::from), on_trial_after, refused })
            }
            _ => Err(LinkError::WrongAnswer),
        }
    }

    /// Has the keeper try the newest program in a child.
    pub async fn rehearse(&self, again: bool) -> Result<(), LinkError> {
        self.ask_done(RequestBody::Rehearse { again }).await
    }

    /// Once by each agent, when the planner has nothing to do but wait. Nobody waits for the answer.
    pub async fn settled(&self) -> Result<(), LinkError> {
        self.ask(RequestBody::Settled, &[]).await.map(drop)
    }

    pub async fn refusal_told(&self) -> Result<(), LinkError> {
        self.ask_done(RequestBody::RefusalTold).await
    }

    /// The keeper runs the newest program, and this agent ends soon after.
    pub async fn upgrade(&self) -> Result<(), LinkError> {
        self.ask_done(RequestBody::Upgrade).await
    }

    pub async fn shutdown(&self, how: ShutdownHow) -> Result<(), LinkError> {
        self.ask_done(RequestBody::Shutdown { how }).await
    }
}

struct Asked<'l> {
    link: &'l KeeperLink,
    id: u64,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.link.shared.waiting().remove(&self.id);
    }
}

async fn next(answers: &mut mpsc::UnboundedReceiver<Answer>) -> Result<Answer, LinkError> {
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, answers.recv()).await.map_err(|_| LinkError::NoAnswer)?;
    match answer.ok_or(LinkError::Closed)? {
        (ReplyBody::Refused { why }, _) => Err(LinkError::Refused { why }),
        answer => Ok(answer),
    }
}
