//! All that stands around a device: an authority, the operator's keys, a registry with signed images, a fleet server;
//! and the files that a factory puts on the device for them.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::artifacts::Artifacts;
use crate::certs::Authority;
use crate::fleet::Fleet;
use crate::keys::Keys;
use crate::machine::{Machine, Setup, blank_disk};
use crate::process;
use crate::registry::{Registry, SignatureForm};
use crate::wait;

/// The device's port for direct pushes.
pub const PUSH_PORT: u16 = 7443;
pub const DEVICE: &str = "edge-1";
/// What the console shows when it listens.
pub const PROMPT: &str = "edge-1> ";

const DISK_MIB: u64 = 512;

#[derive(Debug)]
pub struct Site {
    pub authority: Authority,
    pub keys: Keys,
    pub registry: Registry,
    pub fleet: Option<Fleet>,
    arch: Arch,
    dir: PathBuf,
}

impl Site {
    /// Authority, keys and an empty registry.
    pub fn start(dir: &Path, arch: Arch) -> Result<Self> {
        let authority = Authority::in_dir(&dir.join("ca"))?;
        let keys = Keys::in_dir(&dir.join("keys"))?;
        let registry = Registry::start(&dir.join("registry"), &authority)?;
        Ok(Self { authority, keys, registry, fleet: None, arch, dir: dir.to_owned() })
    }

    /// And a fleet server.
    pub fn with_fleet(mut self) -> Result<Self> {
        self.fleet = Some(Fleet::start(&self.dir.join("fleet"), &self.authority)?);
        Ok(self)
    }

    /// Pushes one of the built images and signs it with the fleet's image key; gives back its name for a manifest.
    pub fn publish(&self, name: &str) -> Result<String> {
        let digest = self.publish_unsigned(name)?;
        self.registry.sign(name, &digest, &self.keys.private("image"), SignatureForm::Bundle)?;
        Ok(self.image(name, &digest))
    }

    /// Pushes an image and gives back its digest.
    pub fn publish_unsigned(&self, name: &str) -> Result<String> {
        self.registry.push(&Artifacts::find().image(self.arch, name), name, "latest")
    }

    /// Pushes what one of the built images has, and a file of noise of so many MiB beside it, as one layer packed by zstd,
    /// and signs it.
    pub fn publish_large(&self, from: &str, name: &str, mib: usize) -> Result<String> {
        let (root, layout) = (self.dir.join(name), self.dir.join(format!("{name}.layout")));
        fs::create_dir_all(&root)?;
        for blob in fs::read_dir(Artifacts::find().image(self.arch, from).join("blobs/sha256"))? {
            let blob = blob?.path();
            // The others are documents.
            if fs::read(&blob)?.starts_with(&[0x1f, 0x8b]) {
                process::run(Command::new("tar").arg("-xzf").arg(&blob).arg("-C").arg(&root))?;
            }
        }
        let mut rng = fastrand::Rng::with_seed(1);
        fs::write(root.join("noise"), (0..mib << 20).map(|_| rng.u8(..)).collect::<Vec<u8>>())?;
        let mut build = self.keys.edgectl();
        build.args(["image", "build", "--arch", self.arch.oci().0, "--output"]).arg(&layout).arg(&root);
        process::run(&mut build)?;
        let digest = self.registry.push_as_zstd(&layout, name, "latest")?;
        self.registry.sign(name, &digest, &self.keys.private("image"), SignatureForm::Bundle)?;
        Ok(self.image(name, &digest))
    }

    /// An image as the device names it.
    pub fn image(&self, name: &str, digest: &str) -> String {
        format!("{}/{name}@{digest}", self.registry.seen_from_guest())
    }

    /// A device as it leaves the factory: an empty disk, its configuration, whom it trusts.
    pub fn device(&self, dir: &Path) -> Result<Setup> {
        fs::create_dir_all(dir)?;
        let disk = dir.join("data.img");
        blank_disk(&disk, DISK_MIB)?;
        let tls = self.authority.issue("device")?;
        let mut setup = Setup { disk: Some(disk), forward: vec![PUSH_PORT], ..Setup::default() }
            .file("etc/edged/agent.toml", self.agent_toml()?)
            .file("etc/edged/trust.cose", fs::read(self.keys.trust_root())?)
            .file("etc/edged/ca.pem", fs::read(self.authority.cert())?)
            .file("etc/edged/tls.pem", fs::read(tls.cert)?)
            .file("etc/hostname", format!("{DEVICE}\n"));
        setup.files.push(("etc/edged/tls.key".to_owned(), 0o600, fs::read(tls.key)?));
        Ok(setup)
    }

    fn agent_toml(&self) -> Result<String> {
        let mut text = format!(
            "[device]\nid = \"{DEVICE}\"\n\n[api]\nlisten = \"0.0.0.0:{PUSH_PORT}\"\ntls-cert = \"/etc/edged/tls.pem\"\n\
             tls-key = \"/etc/edged/tls.key\"\n\n[console]\ntty = \"/dev/hvc0\"\nmode = \"full\"\n\n"
        );
        if let Some(fleet) = &self.fleet {
            text.push_str(&format!(
                "[fleet]\nurl = \"{}\"\nca = \"/etc/edged/ca.pem\"\nenroll-token = \"{}\"\npoll-wait = \"10s\"\n\
                 report-interval = \"10s\"\n\n",
                fleet.url_seen_from_guest(),
                fleet.enroll_token()?
            ));
        }
        text.push_str(&self.registry.device_config("/etc/edged/ca.pem"));
        Ok(text)
    }

    /// Pushes a signed manifest straight to the device, which takes a moment to listen after power-on.
    pub fn push(&self, device: &Machine, signed: &Path) -> Result<String> {
        let port = device.port(PUSH_PORT)?;
        wait::until("connection to the device", wait::LONG, || self.tls_answers(port))?;
        process::read(self.push_command(port).arg(signed))
    }

    /// Leaves a signed manifest at the fleet for the device.
    pub fn leave_at_fleet(&self, signed: &Path) -> Result<String> {
        let fleet = self.fleet.as_ref().context("this site has no fleet")?;
        let mut command = self.keys.edgectl();
        command.args(["push", "--to", &fleet.url_seen_from_host(), "--device", DEVICE, "--ca"]);
        command.arg(self.authority.cert()).env("EDGED_TOKEN", fleet.operator_token()?).arg(signed);
        process::read(&mut command)
    }

    /// The same for a manifest that must be refused; gives back what the operator reads.
    pub fn push_refused(&self, device: &Machine, signed: &Path) -> Result<String> {
        let port = device.port(PUSH_PORT)?;
        wait::until("connection to the device", wait::LONG, || self.tls_answers(port))?;
        let output = self.push_command(port).arg(signed).output()?;
        anyhow::ensure!(!output.status.success(), "the device took {}", signed.display());
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn push_command(&self, port: u16) -> Command {
        let mut command = self.keys.edgectl();
        command.args(["push", "--to", &format!("https://127.0.0.1:{port}"), "--ca"]).arg(self.authority.cert());
        command
    }

    /// QEMU takes a forwarded connection before the guest listens, and then resets it: only a handshake tells.
    fn tls_answers(&self, port: u16) -> Result<Option<()>> {
        let output = Command::new("openssl")
            .args(["s_client", "-connect", &format!("127.0.0.1:{port}"), "-verify_return_error", "-CAfile"])
            .arg(self.authority.cert())
            .stdin(std::process::Stdio::null())
            .output()?;
        Ok(output.status.success().then_some(()))
    }
}

/// `GET path` on a port of this machine: the whole answer, headers and all.
pub fn get(port: u16, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(wait::LONG))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Asks on the device's console until the answer has `text` in it.
pub fn console_shows(device: &mut Machine, verb: &str, text: &str, within: Duration) -> Result<String> {
    let mut last = String::new();
    let console = &mut device.console;
    wait::until("answer on the console", within, || {
        last = console.ask(verb, PROMPT, wait::LONG)?;
        Ok(last.contains(text).then(|| last.clone()))
    })
    .map_err(|error| error.context(format!("`{verb}` never showed `{text}`; the last answer was:\n{last}")))
}
