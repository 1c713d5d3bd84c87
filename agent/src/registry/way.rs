//! The way to a registry: whom the device trusts, who it is itself, which proxy is asked.

use std::path::Path;
use std::sync::Arc;

use edged_model::reason::Code;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use ureq::http::Uri;
use ureq::tls::{PemItem, PrivateKey, parse_pem};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{ConnectProxyConnector, Connector as _, TcpConnector};
use ureq::{Agent, Proxy, ProxyProtocol};

use super::tls::{self, Floor, Identity, TlsConnector};
use super::{ANSWER_TIMEOUT, CONNECT_TIMEOUT, DOCUMENT_TIMEOUT, RegistryError};
use crate::config::Registry;

pub(super) fn misconfigured(text: String) -> RegistryError {
    RegistryError::new(Code::RegistryRefused, text, true)
}

/// How hosts are reached on behalf of one registry.
pub(super) struct Ways {
    /// Scheme, host and port of the registry itself.
    origin: Option<Origin>,
    /// To the registry: by its own CA alone if it has one, and with the device's certificate.
    own: Agent,
    /// To hosts that it names (blob stores, token services): by its CA or a public one, and without that certificate.
    others: Agent,
}

type Origin = (String, String, u16);

impl Ways {
    /// As `agent.toml` describes it: whom the device trusts, who it is itself, which proxy it asks.
    pub(super) fn of(registry: &str, base: &str, config: &Registry, floor: &Floor) -> Result<Self, RegistryError> {
        Self::beside(&web_roots(), registry, base, config, floor)
    }

    fn beside(
        public: &Arc<RootCertStore>,
        registry: &str,
        base: &str,
        config: &Registry,
        floor: &Floor,
    ) -> Result<Self, RegistryError> {
        let proxy = proxy_of(registry, config)?;
        let (own_roots, all_roots) = match roots_of(registry, config)? {
            None => (Arc::clone(public), Arc::clone(public)),
            Some(roots) => {
                let mut all = RootCertStore::clone(&roots);
                all.roots.extend(public.roots.iter().cloned());
                (roots, Arc::new(all))
            }
        };
        let misfit = |why| misconfigured(format!("client-cert of {registry}: {why}"));
        let identity = identity_of(registry, config)?;
        let own = tls::config(own_roots, identity, floor).map_err(misfit)?;
        let others = tls::config(all_roots, None, floor).map_err(misfit)?;
        Ok(Self { origin: origin(base), own: agent_with(own, proxy.clone()), others: agent_with(others, proxy) })
    }

    /// The one that is for this URL.
    pub(super) fn to(&self, url: &str) -> &Agent {
        let is_own = self.origin.is_some() && origin(url) == self.origin;
        if is_own { &self.own } else { &self.others }
    }
}

/// RFC 6454, 4.
fn origin(url: &str) -> Option<Origin> {
    let url: Uri = url.parse().ok()?;
    let scheme = url.scheme_str()?.to_lowercase();
    let port = url.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
    Some((scheme, url.host()?.to_lowercase(), port))
}

fn read(registry: &str, what: &str, path: &Path) -> Result<Vec<u8>, RegistryError> {
    std::fs::read(path).map_err(|error| misconfigured(format!("{what} of {registry}: {}: {error}", path.display())))
}

fn has_no(registry: &str, what: &str, path: &Path, thing: &str) -> RegistryError {
    misconfigured(format!("{what} of {registry}: {} has no {thing}", path.display()))
}

/// The registry's own CA, if it has one.
fn roots_of(registry: &str, config: &Registry) -> Result<Option<Arc<RootCertStore>>, RegistryError> {
    let Some(path) = &config.ca else { return Ok(None) };
    let roots = certificates(&read(registry, "CA", path)?);
    roots.map(Some).ok_or_else(|| has_no(registry, "CA", path, "certificate"))
}

/// Who the device is.
fn identity_of(registry: &str, config: &Registry) -> Result<Option<Identity>, RegistryError> {
    let (cert, key) = match (&config.client_cert, &config.client_key) {
        (None, None) => return Ok(None),
        (Some(cert), Some(key)) => (cert, key),
        _ => return Err(misconfigured(format!("{registry}: client-cert and client-key need each other"))),
    };
    let chain = certificate_list(&read(registry, "client-cert", cert)?);
    if chain.is_empty() {
        return Err(has_no(registry, "client-cert", cert, "certificate"));
    }
    let private = PrivateKey::from_pem(&read(registry, "client-key", key)?).ok();
    let private = private.and_then(|private| PrivateKeyDer::try_from(private.der().to_vec()).ok());
    Ok(Some((chain, private.ok_or_else(|| has_no(registry, "client-key", key, "private key"))?)))
}

fn proxy_of(registry: &str, config: &Registry) -> Result<Option<Proxy>, RegistryError> {
    Ok(match &config.proxy {
        // As the environment of the agent says.
        None => Proxy::try_from_env(),
        Some(text) if text.is_empty() => None,
        Some(text) => {
            // Its text may hold a password.
            let is_http = |proxy: &Proxy| proxy.protocol() == ProxyProtocol::Http && text.starts_with("http://");
            let proxy = Proxy::new(text).ok().filter(is_http);
            let bad = || misconfigured(format!("proxy of {registry}: write it as http://[user:password@]host:port"));
            Some(proxy.ok_or_else(bad)?)
        }
    })
}

/// An HTTPS agent that trusts `roots` as of `floor`, follows no redirect by itself and gives up in time.
pub fn agent(roots: Arc<RootCertStore>, floor: &Floor) -> Result<Agent, rustls::Error> {
    Ok(agent_with(tls::config(roots, None, floor)?, Proxy::try_from_env()))
}

fn agent_with(tls: ClientConfig, proxy: Option<Proxy>) -> Agent {
    let config = Agent::config_builder()
        .proxy(proxy)
        .max_redirects(0)
        .http_status_as_error(false)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(ANSWER_TIMEOUT))
        .timeout_recv_body(Some(DOCUMENT_TIMEOUT))
        .user_agent(concat!("edged/", env!("CARGO_PKG_VERSION")))
        .build();
    let chain = ConnectProxyConnector::default().chain(TcpConnector::default()).chain(TlsConnector(Arc::new(tls)));
    Agent::with_parts(config, chain, DefaultResolver::default())
}

/// Whom browsers trust.
pub fn web_roots() -> Arc<RootCertStore> {
    Arc::new(RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() })
}

/// The certificates of a PEM file as the only roots.
pub fn certificates(pem: &[u8]) -> Option<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificate_list(pem));
    (!roots.is_empty()).then(|| Arc::new(roots))
}

fn certificate_list(pem: &[u8]) -> Vec<CertificateDer<'static>> {
    let certificate = |item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(CertificateDer::from(certificate.der().to_vec())),
        _ => None,
    };
    parse_pem(pem).filter_map(certificate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    /// A server on loopback that answers everything with 200; its URL, and its certificate as the authority for it.
    fn server() -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let own = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().self_signed(&key).unwrap();
        let private = rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.unwrap().with_no_client_auth();
        let config = Arc::new(config.with_single_cert(vec![own.der().clone()], private).unwrap());
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
                let mut stream = BufReader::new(rustls::StreamOwned::new(connection, client));
                let is_whole = |head: &str| head.ends_with("\r\n\r\n");
                let mut head = String::new();
                while !is_whole(&head) && stream.read_line(&mut head).is_ok_and(|bytes| bytes > 0) {}
                if is_whole(&head) {
                    let _ = stream
                        .get_mut()
                        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                }
            }
        });
        (url, own.pem())
    }

    #[test]
    fn a_host_that_a_registry_names_may_be_of_its_ca_or_of_a_public_one_and_the_registry_of_its_ca_alone() {
        let dir = tempfile::tempdir().unwrap();
        let ((private, private_ca), (public, public_ca)) = (server(), server());
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, private_ca).unwrap();
        let config = Registry { ca: Some(ca), proxy: Some(String::new()), ..Registry::default() };
        let public_roots = certificates(public_ca.as_bytes()).unwrap();
        let ways = |base: &str| Ways::beside(&public_roots, "r.example", base, &config, &Floor::default()).unwrap();
        let reaches = |ways: &Ways, url: &str| ways.to(url).get(url).call().is_ok();
        let elsewhere = ways("https://r.example/v2");
        assert!(reaches(&elsewhere, &private) && reaches(&elsewhere, &public));
        assert!(!reaches(&elsewhere, &server().0), "of neither");
        assert!(reaches(&ways(&format!("{private}/v2")), &private));
        assert!(!reaches(&ways(&format!("{public}/v2")), &public), "the registry itself");
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same = |a, b| origin(a).is_some() && origin(a) == origin(b);
        assert!(same("https://r.example/v2", "HTTPS://R.Example:443/a?b"));
        assert!(same("http://r.example/v2", "http://r.example:80"));
        for other in [
            "http://r.example/v2",
            "https://r.example:5000/v2",
            "https://r.example.evil/v2",
            "https://r.example@evil/v2",
            "https://evil/r.example",
            "r.example",
        ] {
            assert!(!same("https://r.example/v2", other), "{other}");
        }
    }
}
