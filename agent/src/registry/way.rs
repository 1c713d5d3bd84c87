//! The way to a registry: whom the device trusts, who it is itself, which proxy is asked.

use std::path::Path;
use std::sync::Arc;

use edged_model::reason::Code;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Proxy, ProxyProtocol};

use super::{ANSWER_TIMEOUT, CONNECT_TIMEOUT, DOCUMENT_TIMEOUT, RegistryError};
use crate::config::Registry;

pub(super) fn misconfigured(text: String) -> RegistryError {
    RegistryError::new(Code::RegistryRefused, text, true)
}

/// An agent as `agent.toml` describes it for one registry: whom it trusts, who it is itself, by which way it goes.
pub(super) fn agent_of(registry: &str, config: &Registry) -> Result<Agent, RegistryError> {
    let read = |what: &str, path: &Path| {
        std::fs::read(path).map_err(|error| misconfigured(format!("{what} of {registry}: {}: {error}", path.display())))
    };
    let has_no = |what: &str, path: &Path, thing: &str| {
        misconfigured(format!("{what} of {registry}: {} has no {thing}", path.display()))
    };
    let mut tls = TlsConfig::builder();
    if let Some(path) = &config.ca {
        let roots = certificates(&read("CA", path)?).ok_or_else(|| has_no("CA", path, "certificate"))?;
        tls = tls.root_certs(roots);
    } else {
        tls = tls.root_certs(RootCerts::WebPki);
    }
    match (&config.client_cert, &config.client_key) {
        (None, None) => {}
        (Some(cert), Some(key)) => {
            let chain = certificate_list(&read("client-cert", cert)?);
            if chain.is_empty() {
                return Err(has_no("client-cert", cert, "certificate"));
            }
            let private = PrivateKey::from_pem(&read("client-key", key)?);
            let private = private.map_err(|_| has_no("client-key", key, "private key"))?;
            fit_together(&chain, &private).map_err(|why| misconfigured(format!("client-cert of {registry}: {why}")))?;
            tls = tls.client_cert(Some(ClientCert::new_with_certs(&chain, private)));
        }
        _ => return Err(misconfigured(format!("{registry}: client-cert and client-key need each other"))),
    }
    let proxy = match &config.proxy {
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
    };
    Ok(agent_with(tls.build(), proxy))
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
