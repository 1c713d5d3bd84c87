//! A real registry: Debian's `docker-registry` over TLS with a CA of its own and a password, on a free port of
//! loopback; skopeo to push, cosign to sign.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use edged::config;
use tempfile::TempDir;

use super::{openssl, run};

pub const USER: &str = "puller";
pub const PASSWORD: &str = "correct horse";

pub struct Registry {
    dir: TempDir,
    process: Child,
    port: u16,
}

impl Registry {
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// One that lets in only who shows a certificate of its CA: [`Registry::client`] has one.
    pub fn start_asking_for_certificates() -> Self {
        Self::start_with("clientcas: [CERTS/ca.crt]")
    }

    fn start_with(tls: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        certificate(dir.path());
        let password = run(Command::new("htpasswd").args(["-nbB", USER, PASSWORD]));
        std::fs::write(dir.path().join("htpasswd"), password.stdout).unwrap();
        // A port that was free a moment ago may be taken: then the next one.
        for _ in 0..5 {
            let port = free_port();
            std::fs::write(dir.path().join("config.yml"), configuration(dir.path(), port, tls)).unwrap();
            let log = std::fs::File::create(dir.path().join("log")).unwrap();
            let mut process = Command::new("docker-registry")
                .arg("serve")
                .arg(dir.path().join("config.yml"))
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .expect("docker-registry is installed");
            if listens(&mut process, port) {
                let registry = Self { dir, process, port };
                registry.write_login();
                return registry;
            }
        }
        panic!("docker-registry does not start: {}", std::fs::read_to_string(dir.path().join("log")).unwrap());
    }

    /// Host and port, as image names begin.
    pub fn host(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// What `agent.toml` says of it.
    pub fn config(&self) -> config::Registry {
        config::Registry {
            username: Some(USER.to_owned()),
            password: Some(PASSWORD.to_owned()),
            ca: Some(self.ca()),
            ..config::Registry::default()
        }
    }

    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("certs/ca.crt")
    }

    /// A client's certificate and key. (skopeo takes them from beside the CA.)
    pub fn client(&self) -> (PathBuf, PathBuf) {
        (self.dir.path().join("certs/client.cert"), self.dir.path().join("certs/client.key"))
    }

    /// Where it keeps a blob.
    pub fn blob_file(&self, hex: &str) -> PathBuf {
        self.dir.path().join(format!("data/docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]))
    }

    /// Pushes `from` (in skopeo's words) and returns the digest it has now.
    pub fn push(&self, from: &str, name: &str, options: &[&str]) -> String {
        let digest_file = self.dir.path().join("digest");
        run(Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", "--authfile"])
            .arg(self.dir.path().join("login/config.json"))
            .arg("--dest-cert-dir")
            .arg(self.dir.path().join("certs"))
            .arg("--digestfile")
            .arg(&digest_file)
            .args(options)
            .arg(from)
            .arg(format!("docker://{}/{name}", self.host())));
        std::fs::read_to_string(digest_file).unwrap().trim().to_owned()
    }

    /// Signs with a key that [`signing_key`] made; `bundle` is the newer format.
    pub fn sign(&self, image: &str, key: &Path, bundle: bool) {
        self.sign_with(image, key, bundle, &[]);
    }

    /// The same with more options of cosign.
    pub fn sign_with(&self, image: &str, key: &Path, bundle: bool, options: &[&str]) {
        let mut command = cosign();
        command
            .args(["sign", "--yes", "--use-signing-config=false", "--tlog-upload=false", "--registry-cacert"])
            .arg(self.ca())
            .arg("--key")
            .arg(key);
        if !bundle {
            command.arg("--new-bundle-format=false");
        }
        command.args(options);
        run(command.arg(format!("{}/{image}", self.host())).env("DOCKER_CONFIG", self.dir.path().join("login")));
    }

    /// `cosign save`: the image and what it knows of its signatures, in a layout.
    pub fn save(&self, image: &str, to: &Path) {
        let mut command = cosign();
        command.args(["save", "--registry-cacert"]).arg(self.ca()).arg("--dir").arg(to);
        run(command.arg(format!("{}/{image}", self.host())).env("DOCKER_CONFIG", self.dir.path().join("login")));
    }

    /// Anything of this registry into a layout, as it is.
    pub fn fetch(&self, image: &str, to: &str) {
        run(Command::new("skopeo")
            .args(["copy", "-q", "--all", "--src-creds", &format!("{USER}:{PASSWORD}"), "--src-cert-dir"])
            .arg(self.dir.path().join("certs"))
            .arg(format!("docker://{}/{image}", self.host()))
            .arg(format!("oci:{to}")));
    }

    fn write_login(&self) {
        use base64::Engine;
        let login = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
        std::fs::create_dir(self.dir.path().join("login")).unwrap();
        let text = format!(r#"{{"auths":{{"{}":{{"auth":"{login}"}}}}}}"#, self.host());
        std::fs::write(self.dir.path().join("login/config.json"), text).unwrap();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A key pair for cosign; returns its private file and the public half as SPKI DER. `algorithm` in openssl's words.
pub fn signing_key(dir: &Path, name: &str, algorithm: &str) -> (PathBuf, Vec<u8>) {
    openssl(dir, &format!("genpkey -algorithm {algorithm} -out {name}.pem"));
    openssl(dir, &format!("pkey -in {name}.pem -pubout -outform DER -out {name}.der"));
    run(cosign()
        .args(["import-key-pair", "--yes", "--key"])
        .arg(dir.join(format!("{name}.pem")))
        .arg("--output-key-prefix")
        .arg(dir.join(name)));
    (dir.join(format!("{name}.key")), std::fs::read(dir.join(format!("{name}.der"))).unwrap())
}

fn cosign() -> Command {
    let program = std::env::var_os("EDGED_COSIGN").unwrap_or_else(|| "cosign".into());
    let found = Command::new(&program).arg("version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(
        found.is_ok(),
        "{} does not run: these tests need cosign; `cargo xtask test` provides it, or set EDGED_COSIGN to its path",
        program.to_string_lossy()
    );
    let mut command = Command::new(program);
    command.env("COSIGN_PASSWORD", "");
    command
}

fn certificate(dir: &Path) {
    std::fs::create_dir(dir.join("certs")).unwrap();
    std::fs::write(dir.join("names"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n").unwrap();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    openssl(dir, &format!("req -x509 {key} -days 3650 -keyout ca.key -out certs/ca.crt -subj /CN=edged-test-ca"));
    openssl(dir, &format!("req {key} -keyout server.key -out server.csr -subj /CN=localhost"));
    openssl(
        dir,
        "x509 -req -in server.csr -CA certs/ca.crt -CAkey ca.key -CAcreateserial -days 3650 -extfile names -out server.crt",
    );
    openssl(dir, &format!("req {key} -keyout certs/client.key -out client.csr -subj /CN=device"));
    let sign = "-CA certs/ca.crt -CAkey ca.key -CAcreateserial -days 3650 -extfile names";
    openssl(dir, &format!("x509 -req -in client.csr {sign} -out certs/client.cert"));
}

fn configuration(dir: &Path, port: u16, tls: &str) -> String {
    let dir = dir.display();
    let tls = tls.replace("CERTS", &format!("{dir}/certs"));
    format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {dir}/data}}}}\n\
         http: {{addr: '127.0.0.1:{port}', secret: test, tls: {{certificate: {dir}/server.crt, key: {dir}/server.key, {tls}}}}}\n\
         auth: {{htpasswd: {{realm: test, path: {dir}/htpasswd}}}}\n"
    )
}

/// `cosign sign-blob`: a bundle with a signature of the file itself.
pub fn sign_blob(file: &Path, key: &Path, bundle: &Path) {
    let mut command = cosign();
    command.args([
        "sign-blob",
        "--yes",
        "--use-signing-config=false",
        "--tlog-upload=false",
        "--new-bundle-format=true",
    ]);
    run(command.arg("--key").arg(key).arg("--bundle").arg(bundle).arg(file));
}

pub fn free_port() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

fn listens(process: &mut Child, port: u16) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if process.try_wait().unwrap().is_some() {
            return false;
        }
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return true;
        }
        std::thread::yield_now();
    }
    let _ = process.kill();
    false
}
