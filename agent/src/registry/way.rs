//! The way to a registry: whom the device trusts, who it is itself, which proxy is asked.

use std::path::Path;
use std::sync::Arc;

use edged_model::reason::Code;
use ureq::http::Uri;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Proxy, ProxyProtocol};

use super::{ANSWER_TIMEOUT, CONNECT_TIMEOUT, DOCUMENT_TIMEOUT, RegistryError};
use crate::config::Registry;

pub(super) fn misconfigured(text: String) -> RegistryError {
    RegistryError::new(Code::RegistryRefused, text, true)
}

/// How hosts are reached on behalf of one registry.
pub(super) struct Ways {
    /// Scheme, host and port of the registry itself.
    origin: Option<Origin>,
    /// To the registry: by its own CA alone, and with the device's certificate.
    own: Agent,
    /// To hosts that it names (blob stores, token services): without that certificate. They may be of its CA, …
    others: Agent,
    /// … or of the public ones that are built in, where it has a CA of its own.
    public: Option<Agent>,
}

type Origin = (String, String, u16);

impl Ways {
    /// As `agent.toml` describes it: whom the device trusts, who it is itself, which proxy it asks.
    pub(super) fn of(registry: &str, base: &str, config: &Registry) -> Result<Self, RegistryError> {
        let proxy = proxy_of(registry, config)?;
        let roots = roots_of(registry, config)?;
        let tls = || TlsConfig::builder().root_certs(roots.clone().unwrap_or(RootCerts::WebPki));
        let others = agent_with(tls().build(), proxy.clone());
        let own = match client_cert_of(registry, config)? {
            Some(client_cert) => agent_with(tls().client_cert(Some(client_cert)).build(), proxy.clone()),
            None => others.clone(),
        };
        let public = roots.is_some().then(|| {
            let tls = TlsConfig::builder().root_certs(RootCerts::WebPki);
            agent_with(tls.build(), proxy)
        });
        Ok(Self { origin: origin(base), own, others, public })
    }

    /// Asks by the way that is for this URL.
    pub(super) fn ask<T>(&self, url: &str, ask: impl Fn(&Agent) -> Result<T, ureq::Error>) -> Result<T, ureq::Error> {
        if self.origin.is_some() && origin(url) == self.origin {
            return ask(&self.own);
        }
        match (ask(&self.others), &self.public) {
            // Nothing has been said to that host yet.
            (Err(error), Some(public)) if is_about_certificate(&error) => ask(public),
            (answer, _) => answer,
        }
    }
}

/// RFC 6454, 4.
fn origin(url: &str) -> Option<Origin> {
    let url: Uri = url.parse().ok()?;
    let scheme = url.scheme_str()?.to_lowercase();
    let port = url.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
    Some((scheme, url.host()?.to_lowercase(), port))
}

fn is_about_certificate(error: &ureq::Error) -> bool {
    let tls = match error {
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref().and_then(|error| error.downcast_ref()),
        _ => None,
    };
    matches!(tls, Some(rustls::Error::InvalidCertificate(_)))
}

fn read(registry: &str, what: &str, path: &Path) -> Result<Vec<u8>, RegistryError> {
    std::fs::read(path).map_err(|error| misconfigured(format!("{what} of {registry}: {}: {error}", path.display())))
}

fn has_no(registry: &str, what: &str, path: &Path, thing: &str) -> RegistryError {
    misconfigured(format!("{what} of {registry}: {} has no {thing}", path.display()))
}

/// The registry's own CA, if it has one.
fn roots_of(registry: &str, config: &Registry) -> Result<Option<RootCerts>, RegistryError> {
    let Some(path) = &config.ca else { return Ok(None) };
    let roots = certificates(&read(registry, "CA", path)?);
    roots.map(Some).ok_or_else(|| has_no(registry, "CA", path, "certificate"))
}

/// Who the device is.
fn client_cert_of(registry: &str, config: &Registry) -> Result<Option<ClientCert>, RegistryError> {
    let (cert, key) = match (&config.client_cert, &config.client_key) {
        (None, None) => return Ok(None),
        (Some(cert), Some(key)) => (cert, key),
        _ => return Err(misconfigured(format!("{registry}: client-cert and client-key need each other"))),
    };
    let chain = certificate_list(&read(registry, "client-cert", cert)?);
    if chain.is_empty() {
        return Err(has_no(registry, "client-cert", cert, "certificate"));
    }
    let private = PrivateKey::from_pem(&read(registry, "client-key", key)?);
    let private = private.map_err(|_| has_no(registry, "client-key", key, "private key"))?;
    fit_together(&chain, &private).map_err(|why| misconfigured(format!("client-cert of {registry}: {why}")))?;
    Ok(Some(ClientCert::new_with_certs(&chain, private)))
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

/// Asks the TLS library beforehand: the HTTP client would panic on what it does not take.
fn fit_together(chain: &[Certificate<'static>], key: &PrivateKey<'static>) -> Result<(), rustls::Error> {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let chain = chain.iter().map(|certificate| CertificateDer::from(certificate.der().to_vec())).collect();
    let key = PrivateKeyDer::try_from(key.der().to_vec()).map_err(|why| rustls::Error::General(why.to_owned()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    config.with_root_certificates(rustls::RootCertStore::empty()).with_client_auth_cert(chain, key).map(drop)
}

/// An HTTPS agent that trusts `roots`, follows no redirect by itself and gives up in time.
pub fn agent(roots: RootCerts) -> Agent {
    agent_with(TlsConfig::builder().root_certs(roots).build(), Proxy::try_from_env())
}

fn agent_with(tls: TlsConfig, proxy: Option<Proxy>) -> Agent {
    Agent::config_builder()
        .tls_config(tls)
        .proxy(proxy)
        .max_redirects(0)
        .http_status_as_error(false)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(ANSWER_TIMEOUT))
        .timeout_recv_body(Some(DOCUMENT_TIMEOUT))
        .user_agent(concat!("edged/", env!("CARGO_PKG_VERSION")))
        .build()
        .into()
}

/// The certificates of a PEM file as the only roots.
pub fn certificates(pem: &[u8]) -> Option<RootCerts> {
    let list = certificate_list(pem);
    (!list.is_empty()).then(|| RootCerts::Specific(Arc::new(list)))
}

fn certificate_list(pem: &[u8]) -> Vec<Certificate<'static>> {
    let certificate = |item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
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
        let ways = |base: &str| {
            let mut ways = Ways::of("r.example", base, &config).unwrap();
            assert!(ways.public.is_some(), "there are public roots beside the registry's own");
            ways.public = Some(agent(certificates(public_ca.as_bytes()).unwrap()));
            ways
        };
        let reaches = |ways: &Ways, url: &str| ways.ask(url, |agent| agent.get(url).call()).is_ok();
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
