//! Stage: the local API. Bytes from a socket or a terminal become requests on a bounded channel; answers become bytes.
//! It knows nothing of what it carries, and it never makes the agent wait: a queue that is full, a client too many, a
//! client that does not read each get their own answer or their own end.
//!
//! One connection, one request: a frame (4-byte big-endian length, CBOR) in, frames out until `End` or `Error`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use edged_model::api::{Answer, DETACH, Request};
use edged_model::reason::{Code, Reason};
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Duration, timeout};

/// The line console on a terminal.
pub mod console;
/// The frames on every line.
pub mod frame;
/// Who may come in.
pub mod peer;

use peer::{Allowed, Peer};

/// Clients at one time; more are told so.
pub const CLIENTS_MAX: usize = 32;
/// A client that has connected and says nothing, or half a frame.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that does not read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// After a failed accept(2) (no descriptor left): trying again at once would only burn the processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Answers that may wait for one client: what a screen of logs has.
pub const ANSWERS_DEPTH: usize = 64;

/// Who asks, for the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub name: String,
    pub may_write: bool,
}

/// A request on its way to the agent's loop. Dropping `answers` ends it.
#[derive(Debug)]
pub struct Call {
    pub request: Request,
    pub caller: Caller,
    pub answers: mpsc::Sender<Answer>,
    /// Where descriptors for the client are put before the answer that goes with them; a line that carries none has
    /// none.
    pub passing: Option<Passing>,
}

/// Descriptors on their way to a client.
pub type Passing = Arc<Handover>;

#[derive(Debug, Default)]
pub struct Handover {
    fds: Mutex<Vec<OwnedFd>>,
    is_detached: AtomicBool,
}

impl Handover {
    pub fn put(&self, fds: Vec<OwnedFd>) {
        *self.fds.lock().unwrap_or_else(PoisonError::into_inner) = fds;
    }

    fn take(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut *self.fds.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the client has said that the command goes on without it.
    pub fn is_detached(&self) -> bool {
        self.is_detached.load(Ordering::Acquire)
    }
}

/// Listens at `path` until the runtime ends.
pub fn listen(path: &Path, allowed: Allowed, calls: mpsc::Sender<Call>) -> io::Result<()> {
    // A socket that answers is another agent's; one that does not was left behind.
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another agent listens there"));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::os::unix::fs::chown(path, None, allowed.gid)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    tokio::spawn(async move {
        let slots = Arc::new(Semaphore::new(CLIENTS_MAX));
        let allowed = Arc::new(allowed);
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                // The buffer of a new connection is empty: this fits, and nobody waits for it.
                let busy = format!("{CLIENTS_MAX} clients are connected already");
                let answer =
                    Answer::Error(Reason::new(Code::Busy, busy).next("end one, such as a forgotten `logs -f`"));
                let _ = frame::of_answer(&answer).and_then(|bytes| stream.try_write(&bytes));
                continue;
            };
            let (calls, allowed) = (calls.clone(), Arc::clone(&allowed));
            tokio::spawn(async move {
                // A client that has gone needs no answer.
                let _ = serve(stream, &allowed, calls).await;
                drop(slot);
            });
        }
    });
    Ok(())
}

async fn serve(mut stream: UnixStream, allowed: &Allowed, calls: mpsc::Sender<Call>) -> io::Result<()> {
    let credentials = stream.peer_cred()?;
    let peer = Peer { uid: credentials.uid(), gid: credentials.gid() };
    if let Err(why) = allowed.check(peer) {
        return write(&mut stream, &Answer::Error(why)).await;
    }
    let read = async {
        let bytes = frame::read(&mut stream).await?;
        bytes.map(|bytes| frame::request(&bytes)).transpose()
    };
    let request = match timeout(REQUEST_TIMEOUT, read).await {
        Ok(Ok(Some(request))) => request,
        Ok(Ok(None)) => return Ok(()),
        Ok(Err(error)) => return write(&mut stream, &Answer::Error(error.reason())).await,
        Err(_) => {
            let text = format!("no request within {} s", REQUEST_TIMEOUT.as_secs());
            return write(&mut stream, &Answer::Error(Reason::new(Code::Malformed, text))).await;
        }
    };
    let caller = Caller { name: format!("operator uid={}", peer.uid), may_write: true };
    let passing = Passing::default();
    let mut answers = ask_with(&calls, request, caller, Some(passing.clone()));
    let (mut from_client, mut to_client) = stream.into_split();
    let mut byte = [0; 1];
    // What the loop says by dropping a call it has not answered.
    let mut at_the_end = unanswered();
    loop {
        tokio::select! {
            // What is ready is sent before the client's end is looked at: it may have closed its sending half only.
            biased;
            answer = answers.recv() => {
                let answer = answer.unwrap_or_else(|| std::mem::replace(&mut at_the_end, Answer::End));
                at_the_end = Answer::End;
                if answer == Answer::ExecStarted {
                    pass(to_client.as_ref(), &answer, &passing).await?;
                    continue;
                }
                write(&mut to_client, &answer).await?;
                if matches!(answer, Answer::End | Answer::Error(_)) {
                    return Ok(());
                }
            }
            // A client that leaves ends what it asked for (`logs -f`).
            read = from_client.read(&mut byte) => {
                let says_so = matches!(read, Ok(1)) && byte == [DETACH];
                passing.is_detached.store(says_so, Ordering::Release);
                return Ok(());
            }
        }
    }
}

async fn write(stream: &mut (impl tokio::io::AsyncWrite + Unpin), answer: &Answer) -> io::Result<()> {
    timeout(WRITE_TIMEOUT, frame::write(stream, answer)).await?
}

/// An answer that goes with descriptors: a small frame, whole, in one message.
async fn pass(stream: &UnixStream, answer: &Answer, passing: &Passing) -> io::Result<()> {
    let fds = passing.take();
    let bytes = frame::of_answer(answer)?;
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let sent =
        stream.async_io(tokio::io::Interest::WRITABLE, || edged_sys::fdpass::send(stream.as_fd(), &bytes, &borrowed));
    timeout(WRITE_TIMEOUT, sent).await?
}

fn unanswered() -> Answer {
    let text = "the agent dropped the request without an answer";
    Answer::Error(Reason::new(Code::Busy, text).next("try again; its log says more"))
}

/// Puts a request to the loop; a full queue is an answer too.
pub fn ask(calls: &mpsc::Sender<Call>, request: Request, caller: Caller) -> mpsc::Receiver<Answer> {
    ask_with(calls, request, caller, None)
}

fn ask_with(
    calls: &mpsc::Sender<Call>,
    request: Request,
    caller: Caller,
    passing: Option<Passing>,
) -> mpsc::Receiver<Answer> {
    let (answers, receiver) = mpsc::channel(ANSWERS_DEPTH);
    let call = Call { request, caller, answers: answers.clone(), passing };
    if calls.try_send(call).is_err() {
        let busy = Reason::new(Code::Busy, "the agent has more requests than it can take").next("try again");
        // The channel is new and empty.
        let _ = answers.try_send(Answer::Error(busy));
    }
    receiver
}
