//! The real registry: Debian's `docker-registry` over TLS with a password, pushed to by `skopeo`, signed by `cosign`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use crate::artifacts::Artifacts;
use crate::certs::Authority;
use crate::machine::HOST_SEEN_FROM_GUEST;
use crate::process::{self, Service};
use crate::wait;

pub const USER: &str = "device";
pub const PASSWORD: &str = "correct-horse";

/// What a signature looks like in the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignatureForm {
    /// The tag `sha256-….sig` with a simple-signing payload.
    Tag,
    /// A sigstore bundle, found by the referrers API or its fallback tag.
    Bundle,
}

#[derive(Debug)]
pub struct Registry {
    pub service: Service,
    pub port: u16,
    dir: PathBuf,
    ca: PathBuf,
    cosign: PathBuf,
}

impl Registry {
    /// Starts an empty one with its data in `dir`, on a free port.
    pub fn start(dir: &Path, authority: &Authority) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let port = process::free_port()?;
        let pair = authority.issue("registry")?;
        let passwords = dir.join("htpasswd");
        fs::write(&passwords, process::read(Command::new("htpasswd").args(["-Bbn", USER, PASSWORD]))?)?;
        // JSON is YAML.
        let config = json!({
            "version": "0.1",
            "log": { "accesslog": { "disabled": false }, "level": "info" },
            "storage": { "filesystem": { "rootdirectory": dir.join("data") }, "delete": { "enabled": true } },
            "http": { "addr": format!("127.0.0.1:{port}"), "tls": { "certificate": pair.cert, "key": pair.key } },
            "auth": { "htpasswd": { "realm": "edged", "path": passwords } },
        });
        let file = dir.join("config.yml");
        fs::write(&file, serde_json::to_string_pretty(&config)?)?;
        let auth = json!({ "auths": { format!("127.0.0.1:{port}"): { "auth": BASIC_AUTH } } });
        fs::write(dir.join("config.json"), auth.to_string())?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file);
        let mut service = Service::start("docker-registry", &mut command, &dir.join("registry.log"))?;
        service.wait_for_port(port, wait::LONG)?;
        Ok(Self { service, port, dir: dir.to_owned(), ca: authority.cert(), cosign: Artifacts::find().cosign()? })
    }

    /// `host:port` as the device spells it.
    pub fn seen_from_guest(&self) -> String {
        format!("{HOST_SEEN_FROM_GUEST}:{}", self.port)
    }

    /// `host:port` as this machine spells it.
    pub fn seen_from_host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Pushes an OCI layout and gives back the digest of its manifest.
    pub fn push(&self, layout: &Path, repository: &str, tag: &str) -> Result<String> {
        self.copy(layout, repository, tag, &["--preserve-digests"])
    }

    /// The same with its layers packed by zstd.
    pub fn push_as_zstd(&self, layout: &Path, repository: &str, tag: &str) -> Result<String> {
        self.copy(layout, repository, tag, &["--format", "oci", "--dest-compress-format", "zstd", "--dest-compress"])
    }

    fn copy(&self, layout: &Path, repository: &str, tag: &str, how: &[&str]) -> Result<String> {
        let digest = self.dir.join(format!("{}.digest", repository.replace('/', "_")));
        process::run(
            Command::new("skopeo")
                .args(["copy", "--quiet"])
                .args(how)
                .arg("--dest-cert-dir")
                .arg(self.certificates()?)
                .args(["--dest-creds", &format!("{USER}:{PASSWORD}"), "--digestfile"])
                .arg(&digest)
                .arg(format!("oci:{}", layout.display()))
                .arg(format!("docker://{}/{repository}:{tag}", self.seen_from_host())),
        )?;
        Ok(fs::read_to_string(digest)?.trim().to_owned())
    }

    /// Signs what was pushed with an ordinary Ed25519 PKCS#8 PEM key.
    pub fn sign(&self, repository: &str, digest: &str, key: &Path, form: SignatureForm) -> Result<()> {
        let imported = self.import(key)?;
        let mut command = self.cosign();
        command.args(["sign", "--yes", "--use-signing-config=false", "--tlog-upload=false", "--registry-cacert"]);
        command.arg(&self.ca);
        if form == SignatureForm::Tag {
            command.arg("--new-bundle-format=false");
        }
        command.arg("--key").arg(imported).arg(format!("{}/{repository}@{digest}", self.seen_from_host()));
        process::run(&mut command).map(drop)
    }

    /// The device's `agent.toml` lines for this registry; the CA is at `ca` on the device.
    pub fn device_config(&self, ca: &str) -> String {
        self.config_as(&self.seen_from_guest(), ca)
    }

    /// The same for a device that knows it by another name.
    pub fn config_as(&self, host: &str, ca: &str) -> String {
        format!("[registry.\"{host}\"]\nusername = \"{USER}\"\npassword = \"{PASSWORD}\"\nca = \"{ca}\"\n")
    }

    /// cosign keeps keys in a wrapping of its own.
    fn import(&self, key: &Path) -> Result<PathBuf> {
        let name = key.file_stem().context("a key file has a name")?.to_string_lossy().into_owned();
        let prefix = self.dir.join(format!("cosign-{name}"));
        let imported = prefix.with_extension("key");
        if !imported.exists() {
            let mut command = self.cosign();
            command.args(["import-key-pair", "--yes", "--key"]).arg(key).arg("--output-key-prefix").arg(&prefix);
            process::run(&mut command)?;
        }
        Ok(imported)
    }

    fn cosign(&self) -> Command {
        let mut command = Command::new(&self.cosign);
        command.env("COSIGN_PASSWORD", "").env("DOCKER_CONFIG", &self.dir);
        command
    }

    /// skopeo takes CAs as a directory of `*.crt`.
    fn certificates(&self) -> Result<PathBuf> {
        let dir = self.dir.join("certs");
        fs::create_dir_all(&dir)?;
        fs::copy(&self.ca, dir.join("ca.crt"))?;
        Ok(dir)
    }
}

/// base64 of `device:correct-horse`.
const BASIC_AUTH: &str = "ZGV2aWNlOmNvcnJlY3QtaG9yc2U=";
