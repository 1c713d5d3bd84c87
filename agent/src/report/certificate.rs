//! The certificate of the push port: the configured one, or one of our own, made once and kept. It only hides what is
//! pushed from bystanders; who may push is decided by the manifest's signature.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use edged_model::id::DeviceId;
use rustls::ServerConfig;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::Api;
use crate::store::{StoreError, keep};

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("api.tls-cert and api.tls-key belong together: only one of them is set")]
    HalfConfigured,
    #[error("{path} cannot be read as PEM")]
    Pem {
        path: PathBuf,
        #[source]
        source: pem::Error,
    },
    #[error("{path} holds no certificate")]
    Empty { path: PathBuf },
    #[error("certificate {certificate} and key {key} cannot be used together")]
    Pair {
        certificate: PathBuf,
        key: PathBuf,
        #[source]
        source: rustls::Error,
    },
    #[error("a certificate of our own cannot be made")]
    Make(#[from] rcgen::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// `keep`: where a certificate made by ourselves lies.
pub fn server_config(config: &Api, device: &DeviceId, keep: &Path) -> Result<Arc<ServerConfig>, CertificateError> {
    match (&config.tls_cert, &config.tls_key) {
        (Some(certificate), Some(key)) => load(certificate, key),
        (None, None) => {
            let (certificate, key) = (keep.join("push.crt"), keep.join("push.key"));
            if certificate.exists() && key.exists() {
                match load(&certificate, &key) {
                    Ok(config) => return Ok(config),
                    Err(error) => {
                        tracing::warn!("the push port's own certificate is damaged and made again: {error}");
                    }
                }
            }
            make(device, &certificate, &key)?;
            load(&certificate, &key)
        }
        (Some(_), None) | (None, Some(_)) => Err(CertificateError::HalfConfigured),
    }
}

fn load(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, CertificateError> {
    let fault = |path: &Path| {
        let path = path.to_owned();
        move |source| CertificateError::Pem { path, source }
    };
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect).map_err(fault(certificate))?;
    if chain.is_empty() {
        return Err(CertificateError::Empty { path: certificate.to_owned() });
    }
    let private_key = PrivateKeyDer::from_pem_file(key).map_err(fault(key))?;
    let pair = |source| CertificateError::Pair { certificate: certificate.to_owned(), key: key.to_owned(), source };
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(pair)?
        .with_no_client_auth()
        .with_single_cert(chain, private_key)
        .map_err(pair)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Valid for all time (1975 to 4096): the device's clock may say anything when it is made, and nobody renews it.
fn make(device: &DeviceId, certificate: &Path, key: &Path) -> Result<(), CertificateError> {
    let made = rcgen::generate_simple_self_signed(vec![device.to_string(), "localhost".to_owned()])?;
    // The key first: a power cut between the two leaves no certificate, and both are made again.
    keep::durable(key, made.signing_key.serialize_pem().as_bytes(), 0o600)?;
    keep::durable(certificate, made.cert.pem().as_bytes(), 0o644)?;
    Ok(())
}
