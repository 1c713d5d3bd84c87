//! The whole lab: operator, registry, fleet and one device.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::artifacts::Artifacts;
use crate::fleet::{Fleet, OPERATOR_TOKEN};
use crate::machine::{Machine, Plan};
use crate::operator::Operator;
use crate::registry::{PASSWORD, Registry, Signature, USER};
use crate::run::run;

pub const DEVICE: &str = "pump-17";
/// The agent's own HTTPS port.
pub const PUSH_PORT: u16 = 7443;
/// What the stories publish.
pub const WEB_PORT: u16 = 8080;

pub struct Lab {
    pub artifacts: Artifacts,
    pub operator: Operator,
    pub registry: Registry,
    pub fleet: Fleet,
    dir: PathBuf,
}

impl Lab {
    /// Everything but the device, in `dir` (emptied first).
    pub fn new(artifacts: Artifacts, dir: &Path) -> Result<Self> {
        if dir.exists() {
            std::fs::remove_dir_all(dir)?;
        }
        std::fs::create_dir_all(dir)?;
        let operator = Operator::new(&dir.join("operator"), &artifacts.edgectl)?;
        let registry = Registry::start(&dir.join("registry"), &operator, &artifacts.cosign)?;
        let fleet = Fleet::start(&dir.join("fleet"), &operator, &artifacts.edgefleet)?;
        Ok(Self { artifacts, operator, registry, fleet, dir: dir.to_owned() })
    }

    /// Pushes the image `layout` as `name` and signs it.
    pub fn publish(&self, layout: &str, name: &str, signed_by: Option<(&str, Signature)>) -> Result<()> {
        self.registry.push(&self.artifacts.images.join(layout), name)?;
        match signed_by {
            Some((key, form)) => self.registry.sign(name, key, form),
            None => Ok(()),
        }
    }

    /// The device's own files, as the factory would put them: a second initramfs, which the kernel unpacks over the first.
    fn factory(&self) -> Result<PathBuf> {
        let etc = self.dir.join("factory/etc/edged");
        std::fs::create_dir_all(&etc)?;
        let token = self.fleet.token()?;
        let config = format!(
            "[device]\nid = \"{DEVICE}\"\n\n[fleet]\nurl = \"https://10.0.2.2:{}\"\nca = \"/etc/edged/ca.pem\"\n\
             enroll-token = \"{token}\"\nreport-interval = \"10s\"\n\n[api]\nlisten = \"0.0.0.0:{PUSH_PORT}\"\n\
             tls-cert = \"/etc/edged/server.pem\"\ntls-key = \"/etc/edged/server.key\"\n\n\
             [console]\ntty = \"/dev/hvc0\"\nmode = \"full\"\n\n[limits]\nmemory-reserve = \"64Mi\"\n\
             disk-reserve = \"16Mi\"\n\n[registry.\"10.0.2.2:{}\"]\nusername = \"{USER}\"\npassword = \"{PASSWORD}\"\n\
             ca = \"/etc/edged/ca.pem\"\n",
            self.fleet.port, self.registry.port
        );
        std::fs::write(etc.join("agent.toml"), config)?;
        for name in ["trust.cose", "ca.pem", "server.pem", "server.key"] {
            std::fs::copy(self.operator.path(name), etc.join(name)).context(name)?;
        }
        std::fs::write(self.dir.join("factory/etc/hostname"), format!("{DEVICE}\n"))?;
        let overlay = self.dir.join("factory.cpio");
        let pack = format!("find . | cpio --quiet -o -H newc --owner=0:0 > {}", overlay.display());
        run(Command::new("sh").args(["-ec", &pack]).current_dir(self.dir.join("factory")))?;
        let whole = self.dir.join("initramfs");
        let mut bytes = std::fs::read(&self.artifacts.initramfs)?;
        // The kernel wants each part at a multiple of four bytes (early-userspace/buffer-format.rst).
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes.extend(std::fs::read(overlay)?);
        std::fs::write(&whole, bytes)?;
        Ok(whole)
    }

    /// Switches the device on for the first time, or again with its disk as it was left.
    pub fn boot(&self) -> Result<Machine> {
        let initramfs = self.dir.join("initramfs");
        let initramfs = if initramfs.exists() { initramfs } else { self.factory()? };
        Machine::boot(&Plan {
            arch: self.artifacts.arch.clone(),
            kernel: self.artifacts.kernel.clone(),
            initramfs,
            memory_mib: 256,
            disk: self.dir.join("disk.img"),
            disk_mib: 512,
            dir: self.dir.join("machine"),
            forward: vec![PUSH_PORT, WEB_PORT],
        })
    }

    /// Signs a manifest and leaves it at the fleet for the device.
    pub fn push(&self, name: &str, yaml: &str) -> Result<String> {
        let file = self.operator.sign(name, yaml, "ops.key")?;
        let to = format!("https://127.0.0.1:{}", self.fleet.port);
        let file = file.display().to_string();
        self.operator.edgectl(&["push", &file, "--to", &to, "--device", DEVICE, "--ca", "ca.pem", "--token", OPERATOR_TOKEN])
    }

    /// Pushes a file to the device's own port.
    pub fn push_directly(&self, machine: &Machine, file: &Path) -> Result<String> {
        let to = format!("https://127.0.0.1:{}", machine.port(PUSH_PORT)?);
        self.operator.edgectl(&["push", &file.display().to_string(), "--to", &to, "--ca", "ca.pem"])
    }
}
