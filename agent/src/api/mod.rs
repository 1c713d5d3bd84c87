//! Stage: the local API. Bytes from a socket become requests on a bounded channel; answers become bytes. It knows
//! nothing of what it carries.
//!
//! One connection, one request: a frame (4-byte big-endian length, CBOR) in, frames out until `End` or `Error`.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use edged_model::api::{Answer, MAX_FRAME_BYTES, Request};
use edged_model::reason::{Code, Reason};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Duration, timeout};

/// The line console on a terminal.
pub mod console;

/// Clients at one time; more are told so.
const CLIENTS_MAX: usize = 32;
/// A client that has connected and says nothing.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that does not read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
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
}

/// Listens at `path` until the runtime ends. Root and members of the group `group_id` may come in.
pub fn listen(path: &Path, group_id: Option<u32>, calls: mpsc::Sender<Call>) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    std::os::unix::fs::chown(path, None, group_id)?;
    tokio::spawn(async move {
        let slots = Arc::new(Semaphore::new(CLIENTS_MAX));
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let (calls, slots) = (calls.clone(), Arc::clone(&slots));
            tokio::spawn(async move {
                let slot = slots.try_acquire_owned().ok();
                // A client that has gone needs no answer.
                let _ = serve(stream, group_id, calls, slot.is_some()).await;
            });
        }
    });
    Ok(())
}

async fn serve(mut stream: UnixStream, group_id: Option<u32>, calls: mpsc::Sender<Call>, has_slot: bool) -> io::Result<()> {
    let peer = stream.peer_cred()?;
    let refuse = |code, text: String| Answer::Error(Reason::new(code, text));
    if !has_slot {
        return write(&mut stream, &refuse(Code::Busy, format!("{CLIENTS_MAX} clients are connected already"))).await;
    }
    if peer.uid() != 0 && Some(peer.gid()) != group_id {
        let text = format!("uid {} may not talk to the agent", peer.uid());
        return write(&mut stream, &refuse(Code::NotAllowedHere, text)).await;
    }
    let request = match timeout(REQUEST_TIMEOUT, read_frame(&mut stream)).await {
        Err(_) | Ok(Ok(None)) => return Ok(()),
        Ok(Err(error)) => return write(&mut stream, &refuse(Code::Malformed, error.to_string())).await,
        Ok(Ok(Some(bytes))) => serde_cbor::from_slice::<Request>(&bytes),
    };
    let request = match request {
        Ok(request) => request,
        Err(error) => return write(&mut stream, &refuse(Code::Malformed, format!("not a request: {error}"))).await,
    };
    let caller = Caller { name: format!("operator uid={}", peer.uid()), may_write: true };
    let mut answers = ask(&calls, request, caller);
    let (mut from_client, mut to_client) = stream.into_split();
    let mut byte = [0; 1];
    loop {
        tokio::select! {
            answer = answers.recv() => match answer {
                Some(answer) => {
                    let is_last = matches!(answer, Answer::End | Answer::Error(_));
                    timeout(WRITE_TIMEOUT, write(&mut to_client, &answer)).await??;
                    if is_last {
                        return Ok(());
                    }
                }
                None => return write(&mut to_client, &Answer::End).await,
            },
            // A client that leaves ends what it asked for (`logs -f`).
            _ = from_client.read(&mut byte) => return Ok(()),
        }
    }
}

/// Puts a request to the loop; a full queue is an answer too.
pub fn ask(calls: &mpsc::Sender<Call>, request: Request, caller: Caller) -> mpsc::Receiver<Answer> {
    let (answers, receiver) = mpsc::channel(ANSWERS_DEPTH);
    let call = Call { request, caller, answers: answers.clone() };
    if calls.try_send(call).is_err() {
        let busy = Reason::new(Code::Busy, "the agent has more requests than it can take").next("try again");
        // The channel is new and empty.
        let _ = answers.try_send(Answer::Error(busy));
    }
    receiver
}

/// One frame; `None` at the end of the stream.
async fn read_frame(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => drop(read?),
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_FRAME_BYTES {
        let text = format!("a frame of {length} bytes; {MAX_FRAME_BYTES} are allowed");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    Ok(Some(bytes))
}

async fn write(stream: &mut (impl AsyncWriteExt + Unpin), answer: &Answer) -> io::Result<()> {
    let bytes = serde_cbor::to_vec(answer).map_err(io::Error::other)?;
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&length.to_be_bytes()).await?;
    stream.write_all(&bytes).await?;
    stream.flush().await
}
