//! Tool: an OCI distribution client (distribution-spec v1.1) over HTTPS. Blocking; called on threads made for it.
//!
//! Nothing it returns is believed here: digests are checked by whoever reads (documents in [`Client::document`], layers
//! while they stream).

use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use edged_model::id::Digest;
use edged_model::reason::{Code, Reason};
use ureq::Body;
use ureq::http::{Response, StatusCode, header};

use crate::config::Registry;

/// What hangs on an image and may be its signature.
pub mod artifacts;
mod auth;
mod blob;
mod bundle;
mod docker_archive;
/// An OCI layout or a saved image: a stick, a test, a build.
pub mod layout;
mod link;
/// Which image of an index is for this machine.
pub mod platform;
/// Image names.
pub mod reference;
/// What an answer says of the next try.
pub mod retry_after;
/// Where an image comes from: a registry or a layout.
pub mod source;
/// Certificates judged by the time floor too.
mod tls;
/// What may come a second and a day.
pub mod traffic;
mod way;

use auth::Challenge;
pub use blob::BlobReader;
pub use reference::Reference;
pub use source::{BlobStream, Source};
pub use tls::Floor;
use traffic::{Metered, Spent, Traffic};
use way::{Ways, misconfigured};
pub use way::{agent, certificates, web_roots};

/// A manifest, an index or a configuration larger than this is none (distribution-spec: 4 MiB).
pub const DOCUMENT_MAX_BYTES: u64 = 4 << 20;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Nothing came for so long: the link is dead. A layer goes on with a range request where it stopped.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// A whole document.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// A blob that comes slower than this is not coming: without a bound a drip would hold a pull for ever.
const SLOWEST_BYTES_PER_SEC: u64 = 1 << 10;
const REDIRECTS_MAX: u32 = 5;
/// Tries of one document, or of one layer without progress between them.
const TRIES: u32 = 4;
/// The longest pause a registry may ask for; a longer one fails the pull, to be tried again later.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(10);

/// Why something could not be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryError {
    pub reason: Reason,
    /// Trying again cannot help.
    pub permanent: bool,
    pub retry_after: Option<Duration>,
}

impl RegistryError {
    fn new(code: Code, text: String, permanent: bool) -> Self {
        Self { reason: Reason::new(code, text), permanent, retry_after: None }
    }

    /// Not worth another try now: it cannot help, or the registry asks for a longer pause than a pull may take.
    fn is_final(&self) -> bool {
        self.permanent || self.retry_after.is_some_and(|asked| asked > RETRY_AFTER_MAX)
    }
}

/// One registry with its credentials.
pub struct Client {
    ways: Ways,
    base: String,
    name: String,
    basic: Option<String>,
    /// [`STALL_TIMEOUT`].
    stall_timeout: Duration,
    /// [`DOCUMENT_TIMEOUT`].
    document_timeout: Duration,
    authorization: Arc<Mutex<Option<String>>>,
    traffic: Arc<Traffic>,
}

/// A list of referrers, or a part of it.
pub struct Referrers {
    pub index: Document,
    /// The path of the next part; or the host where it would be, which is another one.
    pub next: Option<Result<String, String>>,
}

/// A document as it came.
struct Page {
    document: Document,
    link: Option<String>,
}

/// A document and its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    pub bytes: Vec<u8>,
    pub digest: Digest,
    pub media_type: String,
}

/// What is asked for when a manifest is: OCI and Docker schema 2, single and multi-platform.
pub const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

impl Client {
    /// A client for `registry` (host and port) with the device's configuration for it.
    pub fn new(
        registry: &str,
        config: &Registry,
        traffic: &Arc<Traffic>,
        floor: &Floor,
    ) -> Result<Self, RegistryError> {
        let password = match (&config.password, &config.password_file) {
            (Some(password), _) => Some(password.clone()),
            (None, Some(path)) => Some(
                std::fs::read_to_string(path)
                    .map_err(|error| misconfigured(format!("password of {registry}: {}: {error}", path.display())))?
                    .trim_end()
                    .to_owned(),
            ),
            (None, None) => None,
        };
        let basic = config.username.as_ref().zip(password).map(|(user, password)| {
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
        });
        let scheme = if config.insecure_http { "http" } else { "https" };
        let base = format!("{scheme}://{registry}/v2");
        Ok(Self {
            ways: Ways::of(registry, &base, config, floor)?,
            base,
            name: registry.to_owned(),
            basic,
            stall_timeout: STALL_TIMEOUT,
            document_timeout: DOCUMENT_TIMEOUT,
            authorization: Arc::default(),
            traffic: Arc::clone(traffic),
        })
    }

    /// A manifest by tag or digest; a digest is checked.
    pub fn manifest(&self, repository: &str, wanted: &str, bytes_max: u64) -> Result<Document, RegistryError> {
        let expected = Digest::parse(wanted).ok();
        let path = format!("/{repository}/manifests/{wanted}");
        self.document(&path, MANIFEST_TYPES, expected, bytes_max).map(|page| page.document)
    }

    /// A small blob, checked.
    pub fn small_blob(&self, repository: &str, digest: Digest, bytes_max: u64) -> Result<Document, RegistryError> {
        let path = format!("/{repository}/blobs/{digest}");
        self.document(&path, "*/*", Some(digest), bytes_max).map(|page| page.document)
    }

    /// The referrers of an image: by the API, or by the tag that stands in for it where a registry has none. `next`: where
    /// the part before said that the list goes on.
    pub fn referrers(
        &self,
        repository: &str,
        digest: Digest,
        next: Option<&str>,
        bytes_max: u64,
    ) -> Result<Option<Referrers>, RegistryError> {
        const INDEX: &str = "application/vnd.oci.image.index.v1+json";
        let paths = match next {
            Some(path) => vec![path.to_owned()],
            None => vec![
                format!("/{repository}/referrers/{digest}"),
                format!("/{repository}/manifests/sha256-{}", digest.hex()),
            ],
        };
        for path in paths {
            match self.document(&path, INDEX, None, bytes_max) {
                Ok(page) if page.document.media_type.starts_with(INDEX) => {
                    let next = page.link.as_deref().and_then(link::next).map(|target| self.next_page(&path, target));
                    return Ok(Some(Referrers { index: page.document, next }));
                }
                Ok(_) => {}
                Err(error) if matches!(error.reason.code, Code::ImageNotFound | Code::RegistryRefused) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The path that a list names for its next part, if this registry itself has it; else the host that has.
    fn next_page(&self, path: &str, target: &str) -> Result<String, String> {
        let url = absolute(&format!("{}{path}", self.base), target).unwrap_or_else(|| target.to_owned());
        match url.strip_prefix(&self.base).filter(|path| path.starts_with('/')) {
            Some(path) => Ok(path.to_owned()),
            None => Err(without_path(&url).to_owned()),
        }
    }

    fn document(
        &self,
        path: &str,
        accept: &str,
        expected: Option<Digest>,
        bytes_max: u64,
    ) -> Result<Page, RegistryError> {
        let what = format!("{}{path}", self.name);
        let mut tries = 0;
        loop {
            tries += 1;
            match self.document_once(path, accept, &what, bytes_max) {
                Ok(page) if expected.is_none_or(|digest| digest == page.document.digest) => return Ok(page),
                Ok(page) => {
                    let text = format!("{what} has digest {}", page.document.digest);
                    return Err(RegistryError::new(Code::DigestMismatch, text, true));
                }
                Err(error) if error.is_final() || tries == TRIES => return Err(error),
                Err(error) => pause(tries, error.retry_after),
            }
        }
    }

    fn document_once(&self, path: &str, accept: &str, what: &str, bytes_max: u64) -> Result<Page, RegistryError> {
        let response = self.get(path, accept, None, self.document_timeout, what)?;
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let (media_type, link) = (text(header::CONTENT_TYPE).unwrap_or_default(), text(header::LINK));
        let announced = length(&response);
        let too_large = || {
            let text = format!("{what} is larger than {bytes_max} bytes");
            RegistryError::new(Code::ImageUnusable, text, true)
        };
        if announced.is_some_and(|announced| announced > bytes_max) {
            return Err(too_large());
        }
        // Nothing is grown and copied over where the size is known.
        let mut bytes = Vec::with_capacity(usize::try_from(announced.unwrap_or(0)).unwrap_or(0));
        let body = Metered::new(response.into_body().into_reader(), &self.traffic);
        body.take(bytes_max + 1).read_to_end(&mut bytes).map_err(|error| broken(what, &error))?;
        if bytes.len() as u64 > bytes_max {
            return Err(too_large());
        }
        if announced.is_some_and(|announced| announced != bytes.len() as u64) {
            let text = format!("{what}: {} bytes came of {}", bytes.len(), announced.unwrap_or(0));
            return Err(RegistryError::new(Code::RegistryUnavailable, text, false));
        }
        let digest = Digest::of(&bytes);
        Ok(Page { document: Document { bytes, digest, media_type }, link })
    }

    /// A blob as a stream that goes on where it stopped when the link breaks. Its digest is the reader's to check.
    pub fn blob<'c>(&'c self, repository: &str, digest: Digest, size: u64, from: u64) -> BlobReader<'c> {
        BlobReader::new(self, format!("/{repository}/blobs/{digest}"), size, from)
    }

    /// `bytes` of a blob from `from` on, from a registry that has ranges.
    pub fn part(&self, repository: &str, digest: Digest, from: u64, bytes: usize) -> Option<Vec<u8>> {
        let path = format!("/{repository}/blobs/{digest}");
        let last = from.checked_add(bytes as u64)?.checked_sub(1)?;
        let what = format!("{}{path}", self.name);
        let response = self.get(&path, "*/*", Some((from, Some(last))), self.document_timeout, &what).ok()?;
        if response.status() != StatusCode::PARTIAL_CONTENT || blob::range_start(&response) != Some(from) {
            return None;
        }
        let mut part = vec![0; bytes];
        Metered::new(response.into_body().into_reader(), &self.traffic).read_exact(&mut part).ok()?;
        Some(part)
    }

    /// GET with authorization and redirects; `range`: the first and the last byte that are wanted. The credentials never go
    /// to another host, and what began encrypted does not go on in the clear.
    fn get(
        &self,
        path: &str,
        accept: &str,
        range: Option<(u64, Option<u64>)>,
        body_timeout: Duration,
        what: &str,
    ) -> Result<Response<Body>, RegistryError> {
        // A request that may bring nothing is not made.
        self.traffic.allowed(1).map_err(|spent| spent.told(what))?;
        let mut url = format!("{}{path}", self.base);
        let mut is_registry = true;
        let mut redirects = 0;
        let mut authorized = false;
        loop {
            let authorization = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let mut request = self.ways.to(&url).get(&url).header(header::ACCEPT, accept);
            if let Some((first, last)) = range {
                let last = last.map(|last| last.to_string()).unwrap_or_default();
                request = request.header(header::RANGE, format!("bytes={first}-{last}"));
            }
            if let (true, Some(authorization)) = (is_registry, &authorization) {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            let timeouts = request.config().timeout_recv_body(Some(body_timeout));
            let asked = timeouts.timeout_per_read(Some(self.stall_timeout)).build().call();
            let response = asked.map_err(|error| match redirects {
                0 => unreachable(what, &error),
                _ => unreachable(&format!("{what}, redirected to {}", without_path(&url)), &error),
            })?;
            let status = response.status();
            if status == StatusCode::UNAUTHORIZED && is_registry && !authorized {
                authorized = true;
                self.authorize(&response, authorization.as_deref(), what)?;
            } else if status.is_redirection() {
                redirects += 1;
                let next = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
                let next = next.and_then(|location| absolute(&url, location));
                let why = match next {
                    Some(_) if redirects > REDIRECTS_MAX => format!("redirected more than {REDIRECTS_MAX} times"),
                    Some(next) if url.starts_with("https://") && !next.starts_with("https://") => {
                        "redirected to a place without encryption".to_owned()
                    }
                    Some(next) => {
                        is_registry = next.starts_with(&format!("{}/", self.base));
                        url = next;
                        continue;
                    }
                    None => format!("the registry answers {} and does not say where to go", status.as_u16()),
                };
                return Err(RegistryError::new(Code::RegistryRefused, format!("{what}: {why}"), true));
            } else if status.is_success() {
                return Ok(response);
            } else {
                return Err(self.refused(what, &response));
            }
        }
    }

    fn credentials_hint(&self) -> String {
        format!("set username and password in [registry.\"{}\"] of agent.toml", self.name)
    }

    /// Logs in as the registry asks; `used` is what it did not take.
    fn authorize(&self, response: &Response<Body>, used: Option<&str>, what: &str) -> Result<(), RegistryError> {
        let unauthorized = |why: &str| {
            let mut error = RegistryError::new(Code::ImageUnauthorized, format!("{what}: 401: {why}"), true);
            error.reason = error.reason.next(self.credentials_hint());
            error
        };
        let challenge = response.headers().get(header::WWW_AUTHENTICATE).and_then(|value| value.to_str().ok());
        let authorization = match challenge.and_then(Challenge::parse) {
            Some(Challenge::Basic) => self.basic.clone().ok_or_else(|| unauthorized("it wants a password"))?,
            Some(Challenge::Bearer { realm, .. })
                if self.base.starts_with("https:") && !realm.starts_with("https:") =>
            {
                return Err(unauthorized("its token service is not encrypted"));
            }
            Some(Challenge::Bearer { realm, service, scope }) => {
                let mut request = self.ways.to(&realm).get(&realm).query("service", &service).query("scope", &scope);
                if let Some(basic) = &self.basic {
                    request = request.header(header::AUTHORIZATION, basic);
                }
                let response = request.call().map_err(|error| unreachable(&realm, &error))?;
                if !response.status().is_success() {
                    return Err(unauthorized(&format!("the token service answers {}", response.status().as_u16())));
                }
                let mut text = String::new();
                let mut body = response.into_body().into_reader().take(64 << 10);
                body.read_to_string(&mut text).map_err(|error| broken(&realm, &error))?;
                auth::token(&text)
                    .map(|token| format!("Bearer {token}"))
                    .ok_or_else(|| unauthorized("no token came"))?
            }
            None => return Err(unauthorized("it does not say how to log in")),
        };
        if used == Some(&authorization) {
            return Err(unauthorized("the user name or password is wrong"));
        }
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(authorization);
        Ok(())
    }

    fn refused(&self, what: &str, response: &Response<Body>) -> RegistryError {
        let mut error = refused(what, response, self.traffic.unix_secs());
        if error.reason.code == Code::ImageUnauthorized {
            if self.basic.is_some() {
                error.reason.text.push_str(": the user name or password is wrong, or may not read this");
            }
            error.reason = error.reason.next(self.credentials_hint());
        }
        error
    }
}

/// Scheme, host and port: the rest of a redirect's target may hold a secret.
fn without_path(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    url[host..].find(['/', '?', '#']).map_or(url, |end| &url[..host + end])
}

fn length(response: &Response<Body>) -> Option<u64> {
    response.headers().get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Where a `Location` leads (RFC 3986, 4.2); `None`: nowhere that this client goes.
fn absolute(base: &str, location: &str) -> Option<String> {
    if location.starts_with("https://") || location.starts_with("http://") {
        return Some(location.to_owned());
    }
    let (scheme, rest) = base.split_once("://")?;
    if location.starts_with("//") {
        return Some(format!("{scheme}:{location}"));
    }
    let host = rest.split('/').next()?;
    if location.starts_with('/') {
        return Some(format!("{scheme}://{host}{location}"));
    }
    // A list's next part is often the same address with another question.
    let same_path = base.split(['?', '#']).next()?;
    location.starts_with('?').then(|| format!("{same_path}{location}"))
}

fn unreachable(what: &str, error: &ureq::Error) -> RegistryError {
    RegistryError::new(Code::RegistryUnavailable, format!("{what}: {error}"), false)
}

fn broken(what: &str, error: &io::Error) -> RegistryError {
    if let Some(spent) = error.get_ref().and_then(|error| error.downcast_ref::<Spent>()) {
        return spent.told(what);
    }
    RegistryError::new(Code::RegistryUnavailable, format!("{what}: {error}"), false)
}

fn refused(what: &str, response: &Response<Body>, now_unix_secs: i64) -> RegistryError {
    let status = response.status().as_u16();
    let (code, permanent) = match status {
        401 | 403 => (Code::ImageUnauthorized, true),
        404 => (Code::ImageNotFound, true),
        408 | 429 | 500..=599 => (Code::RegistryUnavailable, false),
        _ => (Code::RegistryRefused, true),
    };
    let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    let retry_after =
        text(header::RETRY_AFTER).and_then(|value| retry_after::pause(value, text(header::DATE), Some(now_unix_secs)));
    let asked = retry_after.map(|pause| format!(", asks to come back in {} s", pause.as_secs())).unwrap_or_default();
    let mut error = RegistryError::new(code, format!("{what}: the registry answers {status}{asked}"), permanent);
    error.retry_after = retry_after;
    error
}

/// Waits before the next try.
fn pause(tries: u32, asked: Option<Duration>) {
    #[expect(clippy::disallowed_methods, reason = "this thread was made for one pull and has nothing else to do")]
    std::thread::sleep(next_pause(tries, asked));
}

/// What the registry asks for, or a back-off; with jitter up to a quarter of a second.
fn next_pause(tries: u32, asked: Option<Duration>) -> Duration {
    let mut random = [0; 1];
    // Without randomness the pause is only not spread.
    let _ = getrandom::fill(&mut random);
    // Also behind what was asked for: a thousand devices were asked the same.
    let spread = Duration::from_millis(u64::from(random[0]));
    let backoff = Duration::from_millis(200 << tries.min(5));
    asked.unwrap_or(backoff).min(RETRY_AFTER_MAX) + spread
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};

    /// Answers the first request with half of the body and then says nothing more, the second as it should.
    fn stalls_once(listener: &TcpListener, body: &[u8]) -> (TcpStream, String) {
        let request = |listener: &TcpListener| {
            let stream = listener.accept().unwrap().0;
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let head: Vec<String> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            (stream, head.join("\n").to_lowercase())
        };
        let (mut first, _) = request(listener);
        write!(first, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).unwrap();
        first.write_all(&body[..body.len() / 2]).unwrap();
        let (mut second, head) = request(listener);
        let rest = &body[body.len() / 2..];
        let range = format!("bytes {}-{}/{}", body.len() / 2, body.len() - 1, body.len());
        write!(second, "HTTP/1.1 206 X\r\nContent-Range: {range}\r\nContent-Length: {}\r\n\r\n", rest.len()).unwrap();
        second.write_all(rest).unwrap();
        (first, head)
    }

    #[test]
    fn a_link_that_falls_silent_is_left_and_the_blob_goes_on_from_there() {
        let body: Vec<u8> = (0..100_000_u32).map(|n| n.to_be_bytes()[3]).collect();
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let mut client = Client::new(
            &host,
            &Registry { insecure_http: true, ..Registry::default() },
            &Arc::new(Traffic::free()),
            &Floor::default(),
        )
        .unwrap();
        client.stall_timeout = Duration::from_millis(300);
        let sent = body.clone();
        let server = std::thread::spawn(move || stalls_once(&listener, &sent));
        let mut read = Vec::new();
        client.blob("app", Digest::of(&body), body.len() as u64, 0).read_to_end(&mut read).unwrap();
        assert!(read == body);
        let (_, head) = server.join().unwrap();
        assert!(head.contains("range: bytes=50000-"), "{head}");
    }

    /// Answers every request with what is left of the body, so many bytes at a time.
    fn drips(listener: &TcpListener, body: &[u8], piece_bytes: usize, pause: Duration) {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut stream = stream;
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let head: Vec<String> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            let range =
                head.iter().find_map(|line| line.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
            let from: usize = range.map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
            let (last, rest) = (body.len() - 1, &body[from..]);
            let status = if from > 0 { 206 } else { 200 };
            let range = format!("Content-Range: bytes {from}-{last}/{}", body.len());
            let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{range}\r\n\r\n", rest.len());
            let mut pieces = std::iter::once(head.as_bytes()).chain(rest.chunks(piece_bytes));
            // Whoever has had enough hangs up.
            while pieces.next().is_some_and(|piece| stream.write_all(piece).is_ok()) {
                #[expect(clippy::disallowed_methods, reason = "this server is slow on purpose")]
                std::thread::sleep(pause);
            }
        }
    }

    #[test]
    fn a_blob_that_only_drips_is_given_up_and_a_slow_one_is_not() {
        let body: Vec<u8> = (0..SLOWEST_BYTES_PER_SEC).map(|n| n.to_be_bytes()[7]).collect();
        let read = |bytes_per_sec: u64| {
            let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
            let host = listener.local_addr().unwrap().to_string();
            let config = Registry { insecure_http: true, ..Registry::default() };
            let mut client = Client::new(&host, &config, &Arc::new(Traffic::free()), &Floor::default()).unwrap();
            client.document_timeout = Duration::from_millis(200);
            let (sent, piece_bytes) = (body.clone(), usize::try_from(bytes_per_sec / 20).unwrap());
            std::thread::spawn(move || drips(&listener, &sent, piece_bytes, Duration::from_millis(50)));
            let mut read = Vec::new();
            let mut blob = client.blob("app", Digest::of(&body), body.len() as u64, 0);
            let whole = blob.read_to_end(&mut read).map(|_| read == body);
            whole.map_err(|_| blob.take_error().unwrap().reason)
        };
        assert_eq!(read(4 * SLOWEST_BYTES_PER_SEC), Ok(true));
        // It never falls silent: what ends it is that the whole takes too long.
        let reason = read(SLOWEST_BYTES_PER_SEC / 4).unwrap_err();
        assert!(reason.code == Code::RegistryUnavailable && reason.text.contains("timeout"), "{reason}");
    }

    #[test]
    fn pauses_grow_are_spread_and_are_never_shorter_than_was_asked() {
        const SPREAD: Duration = Duration::from_millis(255);
        let drawn = |tries, asked| -> Vec<Duration> { (0..64).map(|_| next_pause(tries, asked)).collect() };
        let ms = |ms| Duration::from_millis(ms);
        let asked = Some(Duration::from_secs(3));
        let cases = [
            (1, None, ms(400)),
            (2, None, ms(800)),
            (5, None, ms(6_400)),
            (60, None, ms(6_400)),
            (1, Some(Duration::ZERO), Duration::ZERO),
            (1, asked, ms(3_000)),
            (5, asked, ms(3_000)),
            (1, Some(Duration::from_secs(3_600)), RETRY_AFTER_MAX),
        ];
        for (tries, asked, least) in cases {
            let drawn = drawn(tries, asked);
            assert!(drawn.iter().all(|pause| (least..=least + SPREAD).contains(pause)), "{tries} {asked:?}: {drawn:?}");
            assert!(drawn.iter().any(|pause| *pause != drawn[0]), "a thousand devices would come back at once");
        }
    }

    #[test]
    fn a_location_leads_where_rfc_3986_says() {
        let base = "https://r.example:5000/v2/x/blobs/y?z=1";
        let to = |location| absolute(base, location);
        assert_eq!(to("/a?b"), Some("https://r.example:5000/a?b".to_owned()));
        assert_eq!(to("//s.example/a"), Some("https://s.example/a".to_owned()));
        assert_eq!(to("http://s.example/a"), Some("http://s.example/a".to_owned()));
        assert_eq!(to("?z=2"), Some("https://r.example:5000/v2/x/blobs/y?z=2".to_owned()));
        assert_eq!(to("file:///etc/passwd"), None);
        assert_eq!(to("a/b"), None);
    }
}
