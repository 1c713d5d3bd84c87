//! Debian's docker-registry over TLS with a password, images pushed by skopeo and signed by cosign.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::operator::Operator;
use crate::run::{Running, free_port, run, wait_for};

pub const USER: &str = "device";
pub const PASSWORD: &str = "let-me-pull";

pub struct Registry {
    _process: Running,
    pub port: u16,
    dir: PathBuf,
    cosign: PathBuf,
}

/// In which of its forms cosign signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signature {
    /// The `sha256-….sig` tag.
    Tag,
    /// The sigstore bundle, found by its referrer.
    Bundle,
}

impl Registry {
    pub fn start(dir: &Path, operator: &Operator, cosign: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let port = free_port()?;
        let password = run(Command::new("htpasswd").args(["-Bbn", USER, PASSWORD]))?;
        std::fs::write(dir.join("htpasswd"), password)?;
        let show = |path: PathBuf| path.display().to_string();
        let config = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '127.0.0.1:{port}', tls: {{certificate: {}, key: {}}}}}\n\
             auth: {{htpasswd: {{realm: rig, path: {}}}}}\n",
            show(dir.join("data")),
            show(operator.path("server.pem")),
            show(operator.path("server.key")),
            show(dir.join("htpasswd")),
        );
        std::fs::write(dir.join("config.yml"), config)?;
        let process =
            Running::start(Command::new("docker-registry").arg("serve").arg(dir.join("config.yml")), &dir.join("log"))?;
        let auth = format!("{{\"auths\":{{\"127.0.0.1:{port}\":{{\"auth\":\"{}\"}}}}}}", basic()?);
        std::fs::write(dir.join("config.json"), auth)?;
        let certificates = dir.join("certs");
        std::fs::create_dir_all(&certificates)?;
        std::fs::copy(operator.path("ca.pem"), certificates.join("ca.crt"))?;
        std::fs::copy(operator.path("ca.pem"), dir.join("ca.pem"))?;
        let import = ["import-key-pair", "-y", "--key"];
        let mut import_key = Command::new(cosign);
        import_key.args(import).arg(operator.path("image.key")).arg("--output-key-prefix").arg(dir.join("image"));
        run(import_key.env("COSIGN_PASSWORD", ""))?;
        let mut import_key = Command::new(cosign);
        import_key.args(import).arg(operator.path("stranger.key")).arg("--output-key-prefix").arg(dir.join("stranger"));
        run(import_key.env("COSIGN_PASSWORD", ""))?;
        let address = format!("127.0.0.1:{port}");
        wait_for("the registry listens", Duration::from_secs(20), || {
            std::net::TcpStream::connect(&address).map(drop).context(address.clone())
        })?;
        Ok(Self { _process: process, port, dir: dir.to_owned(), cosign: cosign.to_owned() })
    }

    /// Pushes an OCI layout (its tag `latest`) as `name:v1`.
    pub fn push(&self, layout: &Path, name: &str) -> Result<()> {
        let source = format!("oci:{}:latest", layout.display());
        let target = format!("docker://127.0.0.1:{}/{name}:v1", self.port);
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["copy", "--quiet", "--dest-creds", &format!("{USER}:{PASSWORD}"), "--dest-cert-dir"]);
        run(skopeo.arg(self.dir.join("certs")).args([source, target])).map(drop)
    }

    /// Signs `name:v1` with the key `image` or `stranger`.
    pub fn sign(&self, name: &str, key: &str, form: Signature) -> Result<()> {
        let bundle = format!("--new-bundle-format={}", form == Signature::Bundle);
        let mut cosign = Command::new(&self.cosign);
        cosign.args(["sign", "-y", "--use-signing-config=false", "--tlog-upload=false", &bundle, "--key"]);
        cosign.arg(self.dir.join(format!("{key}.key"))).arg(format!("127.0.0.1:{}/{name}:v1", self.port));
        cosign.env("COSIGN_PASSWORD", "").env("DOCKER_CONFIG", &self.dir).env("SSL_CERT_FILE", self.dir.join("ca.pem"));
        run(&mut cosign).map(drop)
    }

    /// How the device names an image.
    pub fn image(&self, name: &str) -> String {
        format!("10.0.2.2:{}/{name}:v1", self.port)
    }
}

fn basic() -> Result<String> {
    let mut encode = Command::new("sh");
    Ok(run(encode.args(["-c", &format!("printf %s '{USER}:{PASSWORD}' | base64 -w0")]))?.trim().to_owned())
}
