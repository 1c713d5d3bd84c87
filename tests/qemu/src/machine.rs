//! The device: a kernel, an initramfs and a disk in QEMU, emulated in software. Its kernel console is a log file, its
//! line console (hvc0) a socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::run::{Running, free_port, wait_for};

/// How a machine is to be.
#[derive(Debug, Clone)]
pub struct Plan {
    pub arch: String,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub memory_mib: u32,
    pub disk: PathBuf,
    pub disk_mib: u64,
    pub dir: PathBuf,
    /// Ports of the guest that the host shall reach.
    pub forward: Vec<u16>,
}

pub struct Machine {
    process: Running,
    dir: PathBuf,
    line: UnixStream,
    forwarded: Vec<(u16, u16)>,
}

const PROMPT: &str = "> ";

impl Machine {
    /// Switches the machine on. A disk that is not there is made, empty.
    pub fn boot(plan: &Plan) -> Result<Self> {
        std::fs::create_dir_all(&plan.dir)?;
        if !plan.disk.exists() {
            std::fs::File::create(&plan.disk)?.set_len(plan.disk_mib << 20)?;
        }
        let socket = plan.dir.join("hvc0");
        // Of an earlier boot.
        let _ = std::fs::remove_file(&socket);
        let forwarded = plan.forward.iter().map(|guest| Ok((*guest, free_port()?))).collect::<Result<Vec<_>>>()?;
        let mut qemu = command(plan, &socket, &forwarded)?;
        let process = Running::start(&mut qemu, &plan.dir.join("qemu.log"))?;
        let line = wait_for("QEMU opens the line console", Duration::from_secs(20), || {
            UnixStream::connect(&socket).context(socket.display().to_string())
        })?;
        line.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Self { process, dir: plan.dir.clone(), line, forwarded })
    }

    /// The port of this host that leads to `guest`'s.
    pub fn port(&self, guest: u16) -> Result<u16> {
        let found = self.forwarded.iter().find(|(port, _)| *port == guest);
        found.map(|(_, host)| *host).with_context(|| format!("port {guest} is not forwarded"))
    }

    /// All that the kernel and the agent have printed.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.join("console.log")).unwrap_or_default()).into_owned()
    }

    /// Waits for a line of the log.
    pub fn wait_for_log(&self, text: &str, deadline: Duration) -> Result<()> {
        wait_for(text, deadline, || if self.log().contains(text) { Ok(()) } else { bail!("{}", tail(&self.log())) })
    }

    /// Types `line` at the line console and returns what it answers.
    pub fn ask(&mut self, line: &str) -> Result<String> {
        self.drain()?;
        self.line.write_all(format!("{line}\n").as_bytes())?;
        let mut text = String::new();
        wait_for(&format!("the console answers `{line}`"), Duration::from_secs(30), || {
            text.push_str(&self.read()?);
            // The echo, the answer, and the prompt again.
            if text.trim_end_matches(' ').ends_with(PROMPT.trim_end()) && text.matches('\n').count() > 1 {
                return Ok(());
            }
            bail!("{text}")
        })?;
        let text = text.replace('\r', "");
        let body = text.split_once('\n').map_or("", |(_, body)| body);
        Ok(body.rsplit_once('\n').map_or(body, |(body, _)| body).trim_end().to_owned() + "\n")
    }

    /// Until the console has a prompt and says no more.
    pub fn wait_for_console(&mut self, deadline: Duration) -> Result<()> {
        wait_for("the line console", deadline, || {
            self.line.write_all(b"\n")?;
            let text = self.read()?;
            if text.contains(PROMPT) { Ok(()) } else { bail!("{}", tail(&self.log())) }
        })
    }

    /// `edgectl … -o json` on the console.
    pub fn ask_json(&mut self, line: &str) -> Result<serde_json::Value> {
        let text = self.ask(&format!("{line} -o json"))?;
        serde_json::from_str(&text).with_context(|| text.clone())
    }

    fn read(&mut self) -> Result<String> {
        let mut buffer = [0; 65536];
        match self.line.read(&mut buffer) {
            Ok(count) => Ok(String::from_utf8_lossy(&buffer[..count]).into_owned()),
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                Ok(String::new())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn drain(&mut self) -> Result<()> {
        while !self.read()?.is_empty() {}
        Ok(())
    }

    /// Pulls the plug.
    pub fn pull_the_plug(mut self) {
        self.process.kill();
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits until the machine has gone off by itself.
    pub fn wait_for_power_off(&mut self, deadline: Duration) -> Result<()> {
        wait_for("power off", deadline, || if self.process.has_ended() { Ok(()) } else { bail!("{}", tail(&self.log())) })
    }
}

fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

fn command(plan: &Plan, socket: &Path, forwarded: &[(u16, u16)]) -> Result<Command> {
    let (program, machine, console) = match plan.arch.as_str() {
        // QEMU 7.2's emulation of cmpxchg16b makes Linux 6.12 fail at random.
        "x86_64" => ("qemu-system-x86_64", ["-M", "q35", "-cpu", "max,-cx16"], "ttyS0"),
        "aarch64" => ("qemu-system-aarch64", ["-M", "virt", "-cpu", "cortex-a53"], "ttyAMA0"),
        other => bail!("no machine for {other}"),
    };
    let mut network = "user,id=net".to_owned();
    for (guest, host) in forwarded {
        network.push_str(&format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}"));
    }
    let show = |path: &Path| path.display().to_string();
    let mut qemu = Command::new(program);
    qemu.args(machine).args(["-accel", "tcg", "-smp", "1", "-nodefaults", "-no-reboot", "-display", "none"]);
    qemu.args(["-m", &plan.memory_mib.to_string()]);
    qemu.arg("-kernel").arg(&plan.kernel).arg("-initrd").arg(&plan.initramfs);
    qemu.args(["-append", &format!("console={console} panic=-1 quiet edged.data=/dev/vda")]);
    qemu.args(["-serial", &format!("file:{}", show(&plan.dir.join("console.log")))]);
    qemu.args(["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=line"]);
    qemu.args(["-chardev", &format!("socket,id=line,path={},server=on,wait=off", show(socket))]);
    qemu.args(["-drive", &format!("file={},if=none,id=data,format=raw,cache=none", show(&plan.disk))]);
    qemu.args(["-device", "virtio-blk-pci,drive=data"]);
    qemu.args(["-netdev", &network, "-device", "virtio-net-pci,netdev=net,romfile="]);
    Ok(qemu)
}
