//! An HTTP server that misbehaves on demand: every answer is the test's to write, down to the byte where it breaks off and
//! the way in which it does. In the clear or over TLS.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    pub headers: BTreeMap<String, String>,
    /// The client has shown a certificate.
    pub has_certificate: bool,
    /// How often this path has been asked for before.
    pub before: usize,
}

impl Request {
    /// Where a range request wants to begin.
    pub fn from(&self) -> Option<usize> {
        self.headers.get("range")?.strip_prefix("bytes=")?.split('-').next()?.parse().ok()
    }
}

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ending {
    /// FIN; over TLS a close_notify before it.
    #[default]
    Orderly,
    /// FIN without the close_notify that TLS wants.
    WithoutNotice,
    /// RST.
    Reset,
}

#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// The connection ends after so many bytes of the body, whatever its length was said to be.
    pub cut: Option<usize>,
    /// Of the body; else its real one.
    pub claimed_length: Option<u64>,
    /// Not a length but chunks of so many bytes (RFC 9112, section 7.1).
    pub chunk_bytes: Option<usize>,
    /// All of it goes out in pieces of so many bytes, with a pause behind each.
    pub drip: Option<(usize, Duration)>,
    /// The connection is closed without a word.
    pub silent: bool,
    pub ending: Ending,
}

impl Answer {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn write_to(&self, stream: &mut impl Write) -> Option<()> {
        if self.silent {
            return Some(());
        }
        let (piece_bytes, pause) = self.drip.unwrap_or((usize::MAX, Duration::ZERO));
        for piece in self.bytes().chunks(piece_bytes) {
            stream.write_all(piece).ok()?;
            stream.flush().ok()?;
            if self.drip.is_some() {
                #[expect(clippy::disallowed_methods, reason = "this server is slow on purpose")]
                std::thread::sleep(pause);
            }
        }
        Some(())
    }

    /// What goes over the wire, cut off where it is to be.
    fn bytes(&self) -> Vec<u8> {
        let framing = match self.chunk_bytes {
            Some(_) => "Transfer-Encoding: chunked".to_owned(),
            None => format!("Content-Length: {}", self.claimed_length.unwrap_or(self.body.len() as u64)),
        };
        let mut bytes = format!("HTTP/1.1 {} X\r\nConnection: close\r\n{framing}\r\n", self.status).into_bytes();
        for (name, value) in &self.headers {
            bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        }
        bytes.extend_from_slice(b"\r\n");
        let is_cut = self.cut.is_some_and(|cut| cut <= self.body.len());
        let body = &self.body[..self.cut.unwrap_or(self.body.len()).min(self.body.len())];
        let Some(chunk_bytes) = self.chunk_bytes else {
            bytes.extend_from_slice(body);
            return bytes;
        };
        for chunk in body.chunks(chunk_bytes) {
            bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            bytes.extend_from_slice(chunk);
            bytes.extend_from_slice(b"\r\n");
        }
        if !is_cut {
            bytes.extend_from_slice(b"0\r\n\r\n");
        }
        bytes
    }
}

type Behaviour = dyn Fn(&Request) -> Answer + Send + Sync;

pub struct FaultServer {
    pub host: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl FaultServer {
    /// The server lives as long as the test's process.
    pub fn start(behaviour: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::start_with(None, behaviour)
    }

    pub fn start_with(
        tls: Option<Arc<rustls::ServerConfig>>,
        behaviour: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let host = format!("127.0.0.1:{}", listener.local_addr().unwrap().port());
        let seen: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (behaviour, log): (Arc<Behaviour>, _) = (Arc::new(behaviour), Arc::clone(&seen));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, behaviour, log) = (stream.unwrap(), Arc::clone(&behaviour), Arc::clone(&log));
                let tls = tls.clone();
                std::thread::spawn(move || match tls {
                    Some(config) => serve_encrypted(stream, config, &*behaviour, &log),
                    None => serve_plainly(stream, &*behaviour, &log),
                });
            }
        });
        Self { host, seen }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }
}

/// One request, one connection.
fn serve_plainly(mut stream: TcpStream, behaviour: &Behaviour, log: &Mutex<Vec<Request>>) -> Option<()> {
    let answer = behaviour(&request(&mut stream, false, log)?);
    answer.write_to(&mut stream)?;
    end(&stream, answer.ending);
    Some(())
}

fn serve_encrypted(
    stream: TcpStream,
    config: Arc<rustls::ServerConfig>,
    behaviour: &Behaviour,
    log: &Mutex<Vec<Request>>,
) -> Option<()> {
    let mut stream = rustls::StreamOwned::new(rustls::ServerConnection::new(config).ok()?, stream);
    stream.conn.complete_io(&mut stream.sock).ok()?;
    let has_certificate = stream.conn.peer_certificates().is_some();
    let answer = behaviour(&request(&mut stream, has_certificate, log)?);
    answer.write_to(&mut stream)?;
    if answer.ending == Ending::Orderly {
        stream.conn.send_close_notify();
        stream.flush().ok()?;
    }
    end(&stream.sock, answer.ending);
    Some(())
}

fn end(stream: &TcpStream, ending: Ending) {
    // tcp(7): with SO_LINGER of no time, close(2) is a reset.
    if ending == Ending::Reset {
        let _ = rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO));
    } else {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn request(stream: &mut impl Read, has_certificate: bool, log: &Mutex<Vec<Request>>) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line.ok()?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let mut log = log.lock().unwrap();
    let before = log.iter().filter(|request| request.path == path).count();
    let request = Request { path, headers, has_certificate, before };
    log.push(request.clone());
    Some(request)
}

/// A certificate for 127.0.0.1, and the file of the authority that issued it.
pub fn certificate(dir: &Path) -> (Arc<rustls::ServerConfig>, PathBuf) {
    let authority = Authority::new(dir, "authority");
    (authority.server(), authority.file.clone())
}

/// Issues certificates.
pub struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    own: rustls::pki_types::CertificateDer<'static>,
    /// Its own certificate.
    pub file: PathBuf,
}

impl Authority {
    pub fn new(dir: &Path, name: &str) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let own = params.self_signed(&key).unwrap();
        let file = dir.join(format!("{name}.pem"));
        std::fs::write(&file, own.pem()).unwrap();
        Self { issuer: rcgen::Issuer::new(params, key), own: own.der().clone(), file }
    }

    fn issue(&self) -> (rcgen::Certificate, rcgen::KeyPair) {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    /// A server of this authority. It asks for certificates of the same one, and serves who has none as well.
    pub fn server(&self) -> Arc<rustls::ServerConfig> {
        let (own, key) = self.issue();
        let key = rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut clients = rustls::RootCertStore::empty();
        clients.add(self.own.clone()).unwrap();
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(clients.into(), provider.clone());
        let verifier = verifier.allow_unauthenticated().build().unwrap();
        let builder = rustls::ServerConfig::builder_with_provider(provider);
        let builder = builder.with_safe_default_protocol_versions().unwrap().with_client_cert_verifier(verifier);
        Arc::new(builder.with_single_cert(vec![own.der().clone()], key).unwrap())
    }

    /// The files of a client's certificate and key.
    pub fn client(&self, dir: &Path) -> (PathBuf, PathBuf) {
        let (own, key) = self.issue();
        let (cert_file, key_file) = (dir.join("client.crt"), dir.join("client.key"));
        std::fs::write(&cert_file, own.pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        (cert_file, key_file)
    }
}
