//! A real server on loopback with a certificate of a private CA, and clients that trust only that CA.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use edge_fleet::{App, http, system_clock, tls};
use edged_model::cbor;
use edged_model::envelope::{self, Kind};
use edged_model::fleet::{EnrollRequest, Problem, Token};
use edged_model::keys::SecretKey;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::runtime::Runtime;

pub const OPERATOR: &str = "0123456789abcdef-operator";

pub struct Server {
    pub address: SocketAddr,
    pub ca_pem: String,
    // Dropped with the server: its connections end.
    _runtime: Runtime,
}

pub struct Answer {
    pub status: u16,
    pub headers: ureq::http::HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json<T: serde::de::DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// An error must be a problem document that repeats its status.
    pub fn problem(&self) -> Problem {
        assert_eq!(self.headers["content-type"], "application/problem+json");
        let problem: Problem = self.json();
        assert_eq!(problem.status, self.status);
        problem
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

fn certificates(directory: &Path) -> String {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().unwrap();
    let server = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    std::fs::write(directory.join("server.crt"), server.pem()).unwrap();
    std::fs::write(directory.join("server.key"), key.serialize_pem()).unwrap();
    ca_certificate.pem()
}

impl Server {
    /// Serves the database that is in `directory`, or a new one.
    pub fn start(directory: &Path) -> Self {
        let ca_pem = certificates(directory);
        let token_file = directory.join("operator");
        std::fs::write(&token_file, OPERATOR).unwrap();
        let app = Arc::new(App::open(&directory.join("data"), Some(&token_file), system_clock).unwrap());
        let config = tls::server_config(&directory.join("server.crt"), &directory.join("server.key")).unwrap();
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(tls::serve(listener, config, http::router(app), std::future::pending()));
        Self { address, ca_pem, _runtime: runtime }
    }

    pub fn client(&self) -> ureq::Agent {
        let ca = ureq::tls::Certificate::from_pem(self.ca_pem.as_bytes()).unwrap();
        let roots = ureq::tls::RootCerts::new_with_certs(&[ca]);
        ureq::Agent::config_builder()
            .tls_config(ureq::tls::TlsConfig::builder().root_certs(roots).build())
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(30)))
            .build()
            .into()
    }

    /// One request; `headers` as `name: value`.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut request = ureq::http::Request::builder().method(method).uri(format!("https://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = self.client().run(request.body(body).unwrap()).unwrap();
        let body = response.body_mut().with_config().limit(4 << 20).read_to_vec().unwrap();
        Answer { status: response.status().as_u16(), headers: response.headers().clone(), body }
    }

    pub fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.send("GET", path, headers, b"")
    }

    pub fn operator(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        self.send(method, path, &[("authorization", &format!("Bearer {OPERATOR}"))], body)
    }

    pub fn token(&self, wish: &serde_json::Value) -> String {
        let answer = self.operator("POST", "/v1/tokens", wish.to_string().as_bytes());
        assert_eq!(answer.status, 201);
        answer.json::<Token>().token
    }

    pub fn enroll(&self, device: &str, groups: &[&str], token: &str, key: &SecretKey) -> Answer {
        let request = EnrollRequest {
            device: device.parse().unwrap(),
            token: token.to_owned(),
            public_key: key.public().to_pem().unwrap(),
            groups: groups.iter().map(|group| group.parse().unwrap()).collect(),
        };
        self.send("POST", "/v1/enroll", &[], &serde_json::to_vec(&request).unwrap())
    }

    /// A device that is already enrolled.
    pub fn enrolled(&self, device: &str, groups: &[&str], key: &SecretKey) {
        let token = self.token(&serde_json::json!({}));
        assert_eq!(self.enroll(device, groups, &token, key).status, 201);
    }
}

pub fn key(n: u8) -> SecretKey {
    SecretKey::from_seed(&[n; 32])
}

/// A signed manifest; nobody here checks by whom.
pub fn manifest(selector: (&str, &str), sequence: u64) -> Vec<u8> {
    let document = serde_json::json!({
        "apiVersion": "edge/v1", selector.0: selector.1, "sequence": sequence,
        "issued": "2026-01-01T00:00:00Z", "expires": "2036-01-01T00:00:00Z",
    });
    envelope::sign(Kind::Manifest, cbor::encode(&document).unwrap(), &[key(1)]).unwrap()
}

pub fn report(device: &str, number: u64, key: &SecretKey) -> Vec<u8> {
    let document = serde_json::json!({
        "device": device, "bootId": "boot", "number": number, "at": "2026-01-01T00:00:00Z",
        "agentVersion": "0", "arch": "x86_64", "uptimeSecs": 1, "clockSource": "ntp",
        "workloads": {"web": {"phase": "running", "health": "healthy", "memory": ["1Mi", "2Mi"]}},
        "ofANewerAgent": [1, 2],
    });
    envelope::sign1(Kind::Report, cbor::encode(&document).unwrap(), key).unwrap()
}
