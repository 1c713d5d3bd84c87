//! The agent's own HTTPS port: `PUT /v1/manifest`, and `PUT /v1/trust/{version}` for a newer trust root (either address
//! takes both). TLS is the transport, the signature is the authority: anybody may push, and nothing is believed for it. Bytes are handed on unread; the verdict is the answer.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use edged_model::fleet::{Accepted, MANIFEST_MAX_BYTES, Problem, TrustTaken};
use edged_model::generation::GenerationState;
use edged_model::id::{DeviceId, Digest};
use edged_model::reason::Code;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_rustls::TlsAcceptor;

use super::certificate::{self, CertificateError};
use super::{Offer, Taken};
use crate::config::Api;

/// Pushes at one time: each may hold a manifest of 1 MiB. More wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 4;
/// A whole connection, from its handshake to its end.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// From the header to the last byte of the body.
const BODY_TIMEOUT: Duration = Duration::from_secs(20);
/// The agent's loop judges in milliseconds; if it does not, somebody must be told.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(20);
/// After `accept` failed (no descriptors): long enough not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Read from a body that is too large, before the answer.
const DROPPED_MAX_BYTES: usize = 4 << 20;
const PATH: &str = "/v1/manifest";
/// Where a fleet has trust roots too: the document says which version it is.
const TRUST_PATH: &str = "/v1/trust/";

#[derive(Debug, thiserror::Error)]
pub enum PushError {
    #[error("api.listen `{address}`")]
    Listen {
        address: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the certificate or key of the push port")]
    Certificate(#[from] CertificateError),
}

/// Listens until the runtime ends, and returns where. `keep`: where a certificate made by ourselves lies.
pub async fn listen(
    config: &Api,
    device: &DeviceId,
    keep: &Path,
    offers: mpsc::Sender<Offer>,
) -> Result<Option<SocketAddr>, PushError> {
    let Some(address) = &config.listen else { return Ok(None) };
    let tls = certificate::server_config(config, device, keep)?;
    let failed = |source| PushError::Listen { address: address.clone(), source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    tokio::spawn(accept(listener, tls, offers));
    Ok(Some(local))
}

async fn accept(listener: TcpListener, tls: Arc<ServerConfig>, offers: mpsc::Sender<Offer>) {
    let acceptor = TlsAcceptor::from(tls);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "push port");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, offers) = (acceptor.clone(), offers.clone());
        tokio::spawn(async move {
            let served = serve(stream, peer, &acceptor, offers);
            if tokio::time::timeout(CONNECTION_TIMEOUT, served).await.is_err() {
                tracing::debug!(%peer, "a push took too long");
            }
            drop(slot);
        });
    }
}

async fn serve(stream: TcpStream, peer: SocketAddr, acceptor: &TlsAcceptor, offers: mpsc::Sender<Offer>) {
    // A connection that breaks is the peer's to notice.
    let Ok(stream) = acceptor.accept(stream).await else { return };
    let service = service_fn(move |request| {
        let offers = offers.clone();
        async move { Ok::<_, std::convert::Infallible>(answer(request, peer, &offers).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(BODY_TIMEOUT)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%peer, %error, "push connection");
    }
}

async fn answer(request: Request<Incoming>, peer: SocketAddr, offers: &mpsc::Sender<Offer>) -> Response<Full<Bytes>> {
    match take(request, peer, offers).await {
        Ok(Answered::Generation(accepted)) => json(StatusCode::ACCEPTED, "application/json", &accepted),
        Ok(Answered::TrustRoot(version)) => {
            json(StatusCode::OK, "application/json", &TrustTaken { trust_root: version })
        }
        Err(problem) => {
            let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let mut response = json(status, "application/problem+json", &*problem);
            if status == StatusCode::SERVICE_UNAVAILABLE {
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
            }
            response
        }
    }
}

fn json(status: StatusCode, content_type: &'static str, value: &impl serde::Serialize) -> Response<Full<Bytes>> {
    let body = serde_json::to_vec(value).unwrap_or_default();
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// What the peer is told.
enum Answered {
    Generation(Accepted),
    TrustRoot(u64),
}

async fn take(
    request: Request<Incoming>,
    peer: SocketAddr,
    offers: &mpsc::Sender<Offer>,
) -> Result<Answered, Box<Problem>> {
    let path = request.uri().path();
    if path != PATH && !path.starts_with(TRUST_PATH) {
        let detail = format!("there are only {PATH} and {TRUST_PATH}VERSION");
        return Err(Box::new(Problem::new(404, "Not Found", detail)));
    }
    if request.method() != Method::PUT {
        return Err(Box::new(Problem::new(405, "Method Not Allowed", "a manifest is pushed with PUT")));
    }
    let envelope = read(request.into_body()).await?;
    let digest = Digest::of(&envelope);
    let busy = |detail: &str| Box::new(Problem::new(503, "Service Unavailable", detail));
    let (reply, verdict) = oneshot::channel();
    let offer = Offer { envelope, chain: Vec::new(), by: format!("push from {}", peer.ip()), reply };
    offers.try_send(offer).map_err(|_| busy("other manifests are being looked at; push it again"))?;
    match tokio::time::timeout(VERDICT_TIMEOUT, verdict).await {
        Ok(Ok(Ok(Taken::Generation(sequence)))) => Ok(Answered::Generation(Accepted {
            sequence,
            digest,
            state: Some(GenerationState::Received),
            warnings: Vec::new(),
        })),
        Ok(Ok(Ok(Taken::TrustRoot(version)))) => Ok(Answered::TrustRoot(version)),
        Ok(Ok(Err(reason))) if reason.code == Code::Busy => Err(busy(&reason.to_string())),
        Ok(Ok(Err(reason))) => Err(Box::new(Problem::refused(&reason))),
        Ok(Err(_)) | Err(_) => Err(busy("the agent gave no verdict; look at `edgectl status`")),
    }
}

async fn read(body: Incoming) -> Result<Vec<u8>, Box<Problem>> {
    let problem = match tokio::time::timeout(BODY_TIMEOUT, read_whole(body)).await {
        Ok(Ok(Some(bytes))) => return Ok(bytes),
        Ok(Ok(None)) => {
            let detail = format!("the manifest is larger than {MANIFEST_MAX_BYTES} bytes");
            Problem { code: Some("tooLarge".to_owned()), ..Problem::new(413, "Content Too Large", detail) }
        }
        Ok(Err(error)) => Problem::new(400, "Bad Request", format!("the manifest did not come whole: {error}")),
        Err(_) => Problem::new(408, "Request Timeout", "the manifest did not come in time"),
    };
    Err(Box::new(problem))
}

/// The body, or `None` if it is too large: then a part of the rest is still read and dropped, because a peer that is in
/// the middle of sending would only see a broken pipe, and not why.
async fn read_whole(mut body: Incoming) -> Result<Option<Vec<u8>>, hyper::Error> {
    let mut bytes = Vec::new();
    let mut seen = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        seen += data.len();
        if seen <= MANIFEST_MAX_BYTES {
            bytes.extend_from_slice(&data);
        } else if seen > MANIFEST_MAX_BYTES + DROPPED_MAX_BYTES {
            break;
        }
    }
    Ok((seen <= MANIFEST_MAX_BYTES).then_some(bytes))
}
