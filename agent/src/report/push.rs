//! The agent's own HTTPS port: `PUT /v1/manifest`. TLS is the transport, the signature is the authority: anybody may
//! push, and nothing is believed for it.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use edged_model::cbor::MAX_DOCUMENT_BYTES;
use edged_model::id::{DeviceId, Sequence};
use edged_model::reason::{Code, Reason};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_rustls::TlsAcceptor;

use crate::config::Api;
use crate::store::keep::durable;

/// Pushes at one time; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 8;
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);

/// A push on its way to the agent's loop.
pub struct Push {
    pub envelope: Vec<u8>,
    pub by: String,
    pub reply: oneshot::Sender<Result<Sequence, Reason>>,
}

#[derive(Debug, thiserror::Error)]
pub enum PushError {
    #[error("api.listen `{address}`")]
    Listen {
        address: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the certificate or key of the push port: {why}")]
    Certificate { why: String },
}

/// Listens until the runtime ends. `keep`: where a certificate made by ourselves lies.
pub async fn listen(config: &Api, device: &DeviceId, keep: &Path, pushes: mpsc::Sender<Push>) -> Result<(), PushError> {
    let Some(address) = &config.listen else { return Ok(()) };
    let tls = TlsAcceptor::from(Arc::new(server_config(config, device, keep)?));
    let failed = |source| PushError::Listen { address: address.clone(), source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    tokio::spawn(async move {
        let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            let Ok((stream, peer)) = listener.accept().await else { continue };
            let (tls, pushes) = (tls.clone(), pushes.clone());
            tokio::spawn(async move {
                let _slot = slot;
                let service = service_fn(move |request| answer(request, peer, pushes.clone()));
                let served = async {
                    let Ok(stream) = tls.accept(stream).await else { return };
                    let mut server = hyper::server::conn::http1::Builder::new();
                    server.timer(TokioTimer::new()).header_read_timeout(CONNECTION_TIMEOUT).max_buf_size(16 << 10);
                    // A connection that breaks is the peer's to notice.
                    let _ = server.serve_connection(TokioIo::new(stream), service).await;
                };
                let _ = tokio::time::timeout(CONNECTION_TIMEOUT, served).await;
            });
        }
    });
    Ok(())
}

async fn answer(
    request: Request<Incoming>,
    peer: SocketAddr,
    pushes: mpsc::Sender<Push>,
) -> Result<Response<Full<Bytes>>, std::convert::Infallible> {
    Ok(match take(request, peer, pushes).await {
        Ok(sequence) => json(StatusCode::ACCEPTED, "application/json", &serde_json::json!({ "sequence": sequence })),
        Err((status, reason)) => {
            // RFC 9457.
            let problem = serde_json::json!({
                "title": reason.text, "status": status.as_u16(), "code": reason.code, "next": reason.next,
            });
            json(status, "application/problem+json", &problem)
        }
    })
}

async fn take(
    request: Request<Incoming>,
    peer: SocketAddr,
    pushes: mpsc::Sender<Push>,
) -> Result<Sequence, (StatusCode, Reason)> {
    let refuse = |status, code, text: &str| (status, Reason::new(code, text));
    if request.uri().path() != "/v1/manifest" {
        return Err(refuse(StatusCode::NOT_FOUND, Code::Malformed, "there is only /v1/manifest"));
    }
    if request.method() != Method::PUT {
        return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, Code::Malformed, "a manifest is pushed with PUT"));
    }
    let body = Limited::new(request.into_body(), MAX_DOCUMENT_BYTES).collect().await;
    let too_large = |_| refuse(StatusCode::PAYLOAD_TOO_LARGE, Code::TooLarge, "the manifest is too large or did not come whole");
    let envelope = body.map_err(too_large)?.to_bytes().to_vec();
    let (reply, verdict) = oneshot::channel();
    let busy = || refuse(StatusCode::SERVICE_UNAVAILABLE, Code::Busy, "the agent is busy");
    pushes.try_send(Push { envelope, by: format!("push from {}", peer.ip()), reply }).map_err(|_| busy())?;
    match verdict.await {
        Ok(Ok(sequence)) => Ok(sequence),
        Ok(Err(reason)) if reason.code == Code::Busy => Err((StatusCode::SERVICE_UNAVAILABLE, reason)),
        Ok(Err(reason)) => Err((StatusCode::UNPROCESSABLE_ENTITY, reason)),
        Err(_) => Err(busy()),
    }
}

fn json(status: StatusCode, content_type: &'static str, value: &serde_json::Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())));
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static(content_type));
    response
}

/// The configured certificate, or one of our own: made once, kept, and told by its fingerprint on the console.
fn server_config(config: &Api, device: &DeviceId, keep: &Path) -> Result<rustls::ServerConfig, PushError> {
    let failed = |why: String| PushError::Certificate { why };
    let (cert, key) = match (&config.tls_cert, &config.tls_key) {
        (Some(cert), Some(key)) => (cert.clone(), key.clone()),
        _ => own_certificate(device, keep)?,
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(&cert).map_err(|e| failed(e.to_string()))?.collect();
    let key = PrivateKeyDer::from_pem_file(&key).map_err(|error| failed(error.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(error.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain.map_err(|error| failed(error.to_string()))?, key)
        .map_err(|error| failed(error.to_string()))
}

fn own_certificate(device: &DeviceId, keep: &Path) -> Result<(std::path::PathBuf, std::path::PathBuf), PushError> {
    let (cert, key) = (keep.join("push.crt"), keep.join("push.key"));
    if !(cert.exists() && key.exists()) {
        let failed = |why: String| PushError::Certificate { why };
        let names = vec![device.to_string(), "localhost".to_owned()];
        let made = rcgen::generate_simple_self_signed(names).map_err(|error| failed(error.to_string()))?;
        let write = |path: &Path, text: String| {
            durable(path, text.as_bytes(), 0o600).map_err(|error| failed(error.to_string()))
        };
        write(&key, made.signing_key.serialize_pem())?;
        write(&cert, made.cert.pem())?;
    }
    Ok((cert, key))
}
