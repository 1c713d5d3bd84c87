//! Frames: a 4-byte big-endian length and a CBOR document. A length is believed only up to `MAX_FRAME_BYTES`, and memory
//! grows with what has arrived, not with what was promised.

use std::io;

use edged_model::api::{Answer, MAX_FRAME_BYTES, Request};
use edged_model::reason::{Code, Reason};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Why bytes are no request.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("the connection")]
    Io(#[from] io::Error),
    #[error("a frame of {bytes} bytes; {MAX_FRAME_BYTES} are allowed")]
    TooLarge { bytes: usize },
    #[error("the frame ends after {found} of {promised} bytes")]
    Cut { found: usize, promised: usize },
    #[error("not a request: {why}")]
    NotARequest { why: String },
}

impl FrameError {
    pub fn reason(&self) -> Reason {
        let code = match self {
            Self::TooLarge { .. } => Code::TooLarge,
            Self::Io(_) | Self::Cut { .. } | Self::NotARequest { .. } => Code::Malformed,
        };
        Reason::new(code, self.to_string()).next("is `edgectl` of the same version as the agent?")
    }
}

/// One frame; `None` at the end of the stream. An empty frame is a frame.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<Vec<u8>>, FrameError> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => drop(read?),
    }
    let promised = u32::from_be_bytes(length) as usize;
    if promised > MAX_FRAME_BYTES {
        return Err(FrameError::TooLarge { bytes: promised });
    }
    let mut bytes = Vec::new();
    let found = stream.take(promised as u64).read_to_end(&mut bytes).await?;
    if found < promised { Err(FrameError::Cut { found, promised }) } else { Ok(Some(bytes)) }
}

pub fn request(bytes: &[u8]) -> Result<Request, FrameError> {
    edged_model::cbor::read(bytes).map_err(|error| FrameError::NotARequest { why: error.to_string() })
}

/// The frame of an answer. One that is too large to be read becomes an error that says so.
pub fn of_answer(answer: &Answer) -> io::Result<Vec<u8>> {
    let mut bytes = serde_cbor::to_vec(answer).map_err(io::Error::other)?;
    if bytes.len() > MAX_FRAME_BYTES {
        let text = format!("the answer has {} bytes; {MAX_FRAME_BYTES} fit into one frame", bytes.len());
        bytes = serde_cbor::to_vec(&Answer::Error(Reason::new(Code::TooLarge, text))).map_err(io::Error::other)?;
    }
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    Ok([&length.to_be_bytes(), bytes.as_slice()].concat())
}

pub async fn write(stream: &mut (impl AsyncWrite + Unpin), answer: &Answer) -> io::Result<()> {
    stream.write_all(&of_answer(answer)?).await?;
    stream.flush().await
}
