//! A device on this machine: the shipped program under a directory, pulling from a real registry beside it.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use edged_model::api::Request;
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::{Artifacts, RunDir};
use edged_qemu::certs::Authority;
use edged_qemu::keys::Keys;
use edged_qemu::process::{self, Service};
use edged_qemu::registry::Registry;
use edged_qemu::wait;
use serde_json::Value;

use crate::setup::{self, Need};
use crate::toolchain::{self, Profile};
use crate::workloads;

const PATIENCE: Duration = Duration::from_secs(120);

/// A request that waits to be sent.
pub struct Word {
    socket: UnixStream,
    frame: Vec<u8>,
}

impl Word {
    pub fn say(&self) -> Result<()> {
        Ok((&self.socket).write_all(&self.frame)?)
    }
}

pub struct Device {
    pub keeper: u32,
    keys: Keys,
    image: String,
    socket: PathBuf,
    sequence: u32,
    edged: Option<Service>,
    _registry: Registry,
    dir: RunDir,
}

impl Device {
    pub fn start(name: &str) -> Result<Self> {
        let arch = Arch::host().context("this machine's architecture is none of ours")?;
        setup::ensure(&[Need::HostTests, Need::Build(arch)])?;
        setup::cosign(&Artifacts::find())?;
        crate::test::host_programs()?;
        workloads::build_all(arch)?;
        let program = toolchain::build(arch, Profile::Release, "edged", &["edged"])?.join("edged");
        let dir = Artifacts::find().run_dir(name, arch)?;
        let authority = Authority::in_dir(&dir.join("ca"))?;
        let keys = Keys::in_dir(&dir.join("keys"))?;
        let registry = Registry::start(&dir.join("registry"), &authority)?;
        let host = registry.seen_from_host();
        let digest = registry.push(&Artifacts::find().image(arch, "programs"), "programs", "latest")?;
        let config = dir.join("agent.toml");
        // What is measured here is not the signature of the image.
        let text = format!(
            "[device]\nid = \"bench\"\ntrust-root = \"{}\"\n[network]\nmode = \"none\"\n[images]\npolicy = \"digest\"\n\
             [limits]\nmemory-reserve = \"32Mi\"\n{}",
            keys.trust_root().display(),
            registry.config_as(&host, &authority.cert().display().to_string())
        );
        fs::write(&config, text)?;
        let root = dir.join("root");
        let mut command = Command::new(&program);
        command.arg("--root").arg(&root).arg("--config").arg(&config);
        let edged = Service::start("edged", &mut command, &dir.join("edged.log"))?;
        let device = Self {
            keeper: edged.pid(),
            keys,
            image: format!("{host}/programs@{digest}"),
            socket: root.join("run/agent.sock"),
            sequence: 0,
            edged: Some(edged),
            _registry: registry,
            dir,
        };
        wait::until("agent", PATIENCE, || device.status().map(Some))?;
        Ok(device)
    }

    /// Runs so many workloads that wait for ever, and nothing else; comes back when the generation is good.
    pub fn run_idle(&mut self, count: usize) -> Result<()> {
        let signed = self.sign_idle(count)?;
        self.apply(&signed)?;
        self.wait_until_good()
    }

    pub fn sign_idle(&mut self, count: usize) -> Result<PathBuf> {
        self.sequence += 1;
        let sequence = self.sequence;
        let mut yaml = format!(
            "apiVersion: edge/v1\ndevice: bench\nsequence: {sequence}\nissued: 2026-01-01T00:00:00Z\n\
             expires: 2036-01-01T00:00:00Z\nupdate: {{ probation: 2s }}\nworkloads:\n"
        );
        // No more than nine tenths of a core in all: they must fit beside the reserve.
        let cpu = (900 / count.max(1)).clamp(1, 20);
        for number in 0..count {
            yaml.push_str(&format!(
                "  w{number}:\n    image: {}\n    args: [hang]\n    resources: {{ memory: 8Mi, cpu: {cpu}m, pids: 16 }}\n",
                self.image
            ));
        }
        self.keys.sign("bench", &yaml)
    }

    pub fn apply(&self, signed: &Path) -> Result<()> {
        process::run(self.edgectl().arg("apply").arg(signed)).map(drop)
    }

    pub fn wait_until_good(&self) -> Result<()> {
        wait::until(&format!("generation {} to be good", self.sequence), PATIENCE, || {
            let status = self.status()?;
            let generation = &status["generation"];
            Ok((generation["sequence"] == self.sequence && generation["state"] == "good").then_some(()))
        })
    }

    /// Pids of the running workloads, by name.
    pub fn pids(&self) -> Result<Vec<(String, u32)>> {
        let status = self.status()?;
        let list = status["workloads"].as_array().context("no workloads")?;
        let pid = |workload: &Value| {
            let pid = workload["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok())?;
            Some((workload["name"].as_str()?.to_owned(), pid))
        };
        list.iter().map(|workload| pid(workload).with_context(|| format!("not running: {workload}"))).collect()
    }

    pub fn stop(&self, name: &str) -> Result<()> {
        process::run(self.edgectl().args(["stop", name])).map(drop)
    }

    /// What `edgectl start` says, ready to be said: its own start is not to be measured.
    pub fn word_to_start(&self, name: &str) -> Result<Word> {
        let request = Request::Start { workload: name.parse().ok().context("no name of a workload")? };
        let bytes = edged_model::cbor::encode(&request)?;
        let frame = [&u32::try_from(bytes.len())?.to_be_bytes(), bytes.as_slice()].concat();
        Ok(Word { socket: UnixStream::connect(&self.socket)?, frame })
    }

    /// Until the agent says so, too.
    pub fn wait_for(&self, name: &str, pid: u32) -> Result<()> {
        let running = || Ok(self.pids().ok().filter(|all| all.contains(&(name.to_owned(), pid))).map(drop));
        wait::until(&format!("{name} as process {pid}"), PATIENCE, running)
    }

    /// The agent: the keeper's child that was started so.
    pub fn agent(&self) -> Result<u32> {
        let is_agent = |pid: &u32| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.split(|byte| *byte == 0).nth(1) == Some(b"agent")
        };
        children(self.keeper)?.into_iter().find(is_agent).context("the keeper has no agent")
    }

    fn status(&self) -> Result<Value> {
        let output = self.edgectl().args(["status", "-o", "json"]).output()?;
        ensure!(matches!(output.status.code(), Some(0 | 4)), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn edgectl(&self) -> Command {
        let mut command = self.keys.edgectl();
        command.arg("--host").arg(format!("unix:{}", self.socket.display()));
        command
    }

    /// Ends it in order: a workload that is left would disturb the next figure.
    pub fn switch_off(mut self) -> Result<()> {
        let keeper = self.keeper.to_string();
        process::run(Command::new("kill").args(["-TERM", &keeper]))?;
        wait::until("end of edged", PATIENCE, || Ok((!is_running(self.keeper)).then_some(())))?;
        self.edged = None;
        for pins in ["netns", "userns"] {
            for pin in fs::read_dir(self.socket.with_file_name(pins)).into_iter().flatten().flatten() {
                let _ = Command::new("umount").arg(pin.path()).output();
            }
        }
        self.dir.remove();
        Ok(())
    }
}

/// Running, and not a zombie that waits for us.
fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

pub fn children(pid: u32) -> Result<Vec<u32>> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    Ok(list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect())
}
