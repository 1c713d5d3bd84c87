//! One booted device: QEMU, its two consoles, its disk, its network cable.
//!
//! Every machine has a directory of its own. It is removed when the story ends well and kept, with the console's log,
//! when it does not.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::arch::Arch;
use crate::artifacts::Firmware;
use crate::cpio::Archive;
use crate::process;
use crate::qmp::Qmp;
use crate::serial::Line;
use crate::wait;

/// The guest's name for the machine it runs on (QEMU's user network).
pub const HOST_SEEN_FROM_GUEST: &str = "10.0.2.2";

/// What happens when the guest asks for a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnReset {
    /// QEMU ends: a panic shows at once.
    #[default]
    End,
    /// As on a real board.
    Boot,
}

/// A device before it is switched on.
#[derive(Debug, Clone)]
pub struct Setup {
    pub memory_mib: u32,
    pub cores: u32,
    pub on_reset: OnReset,
    /// The data disk: any file. `None`: no disk at all.
    pub disk: Option<PathBuf>,
    /// What the guest calls the data disk, or the part of it that holds the data.
    pub data: &'static str,
    /// Nobody pulls this plug: what the disk is told to flush may stay in the host's memory.
    pub is_never_cut: bool,
    /// Where all that the disk is told is logged ([`crate::power::log::WriteLog`]).
    pub write_log: Option<PathBuf>,
    /// Files laid over the firmware: path, mode, content.
    pub files: Vec<(String, u32, Vec<u8>)>,
    /// Those files are all there is in memory at the boot; the firmware is on the disk.
    pub replaces_firmware: bool,
    /// Guest ports to be reached from the host.
    pub forward: Vec<u16>,
    /// The time the real-time clock shows at power-on, e.g. `1970-01-01T00:00:00`; `None`: the host's.
    pub clock: Option<String>,
    /// A board with a watchdog of its own (x86_64: i6300esb). The kernel's softdog is there in any case.
    pub has_watchdog: bool,
    /// More words for the kernel command line.
    pub kernel: Vec<String>,
    /// More arguments for QEMU.
    pub qemu: Vec<String>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            memory_mib: 256,
            cores: 1,
            on_reset: OnReset::End,
            disk: None,
            data: "/dev/vda",
            is_never_cut: false,
            write_log: None,
            files: Vec::new(),
            replaces_firmware: false,
            forward: Vec::new(),
            clock: None,
            has_watchdog: false,
            kernel: Vec::new(),
            qemu: Vec::new(),
        }
    }
}

impl Setup {
    /// Lays a file over the firmware.
    #[must_use]
    pub fn file(mut self, path: &str, content: impl Into<Vec<u8>>) -> Self {
        self.files.push((path.to_owned(), 0o644, content.into()));
        self
    }

    /// More of the device's `agent.toml`.
    #[must_use]
    pub fn configure(mut self, toml: &str) -> Self {
        for (path, _, content) in &mut self.files {
            if path == "etc/edged/agent.toml" {
                content.extend_from_slice(toml.as_bytes());
            }
        }
        self
    }
}

/// An empty disk of `mib` MiB that takes no space until it is written to.
pub fn blank_disk(path: &Path, mib: u64) -> Result<()> {
    File::create(path)?.set_len(mib << 20).with_context(|| path.display().to_string())
}

/// A device that is switched on. Dropping it pulls the plug.
#[derive(Debug)]
pub struct Machine {
    pub arch: Arch,
    /// The kernel's console, where the keeper's log goes as well.
    pub kernel: Line,
    /// The technician's line: `hvc0`.
    pub console: Line,
    pub qmp: Qmp,
    child: Child,
    dir: PathBuf,
    sockets: PathBuf,
    ports: Vec<(u16, u16)>,
}

impl Machine {
    /// Switches it on. `dir` is made if it is missing.
    pub fn boot(firmware: &Firmware, dir: &Path, setup: &Setup) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let ports =
            setup.forward.iter().map(|guest| Ok((*guest, process::free_port()?))).collect::<Result<Vec<_>>>()?;
        let initramfs = lay_over(firmware, dir, setup)?;
        let sockets = socket_directory()?;
        let mut command = command(firmware, &initramfs, [dir, &sockets], setup, &ports);
        fs::write(dir.join("command"), process::line(&command))?;
        let errors = File::create(dir.join("qemu.log"))?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(errors.try_clone()?)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start {}", firmware.arch.qemu()))?;
        match connect(&sockets) {
            Ok((kernel, console, qmp)) => {
                Ok(Self { arch: firmware.arch, kernel, console, qmp, child, dir: dir.to_owned(), sockets, ports })
            }
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.context(fs::read_to_string(dir.join("qemu.log")).unwrap_or_default()))
            }
        }
    }

    /// The host's port that leads to the guest's `port`.
    pub fn port(&self, port: u16) -> Result<u16> {
        let found = self.ports.iter().find(|(guest, _)| *guest == port);
        found.map(|(_, host)| *host).with_context(|| format!("guest port {port} is not forwarded"))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the emulated processors have worked until now, in the host's processor time: a busy host makes it no longer.
    /// They do not work while they wait.
    pub fn worked(&self) -> Result<Duration> {
        let mut total = Duration::ZERO;
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let task = task?.path();
            if fs::read_to_string(task.join("comm"))?.contains("CPU") {
                // proc_pid_schedstat(5): nanoseconds on a processor come first.
                let text = fs::read_to_string(task.join("schedstat"))?;
                let spent = text.split(' ').next().context("an empty schedstat")?;
                total += Duration::from_nanos(spent.parse()?);
            }
        }
        Ok(total)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the technician's line can be connected to, once [`Line::hang_up`] has let go of it.
    pub fn console_socket(&self) -> PathBuf {
        self.sockets.join("console.sock")
    }

    /// Pulls the network cable out, or puts it back.
    pub fn cable(&mut self, is_in: bool) -> Result<()> {
        self.qmp.execute("set_link", json!({ "name": "nic0", "up": is_in })).map(drop)
    }

    /// The reset button.
    pub fn reset(&mut self) -> Result<()> {
        self.qmp.execute("system_reset", json!({})).map(drop)
    }

    /// Waits until the guest has switched the machine off.
    pub fn wait_for_power_off(&mut self, within: Duration) -> Result<()> {
        let child = &mut self.child;
        let status: ExitStatus = wait::until("power-off", within, || Ok(child.try_wait()?))
            .with_context(|| format!("the console's last lines:\n{}", self.kernel.tail()))?;
        ensure!(status.success(), "QEMU ended with {status}");
        Ok(())
    }

    /// SIGKILL for QEMU: the guest's page cache is gone, and what it had written without a flush is not (see
    /// [`crate::power`]).
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.sockets);
        if std::thread::panicking() {
            let mut out = std::io::stderr().lock();
            let _ = writeln!(
                out,
                "--- {} console, kept with all else in {}\n{}",
                self.arch,
                self.dir.display(),
                self.kernel.tail()
            );
        }
    }
}

/// The path of a unix socket holds 107 bytes (unix(7)), and a checkout may lie deep: sockets have a short home.
fn socket_directory() -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("edged-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
    Ok(path)
}

fn connect(dir: &Path) -> Result<(Line, Line, Qmp)> {
    let within = Duration::from_secs(20);
    let kernel = Line::connect("kernel console", &dir.join("kernel.sock"), within)?;
    let console = Line::connect("hvc0", &dir.join("console.sock"), within)?;
    Ok((kernel, console, Qmp::connect(&dir.join("qmp.sock"), within)?))
}

/// The firmware's initramfs with this device's own files behind it.
fn lay_over(firmware: &Firmware, dir: &Path, setup: &Setup) -> Result<PathBuf> {
    if setup.files.is_empty() {
        return Ok(firmware.initramfs());
    }
    let mut bytes = match setup.replaces_firmware {
        true => Vec::new(),
        false => fs::read(firmware.initramfs()).context("the firmware is not built")?,
    };
    while bytes.len() % 4 != 0 {
        bytes.push(0);
    }
    let mut archive = Archive::new();
    for (path, mode, content) in &setup.files {
        archive.file(path, *mode, content);
    }
    bytes.extend(archive.finish());
    let path = dir.join("initramfs.img");
    fs::write(&path, bytes)?;
    Ok(path)
}

fn command(
    firmware: &Firmware,
    initramfs: &Path,
    [dir, sockets]: [&Path; 2],
    setup: &Setup,
    ports: &[(u16, u16)],
) -> Command {
    let arch = firmware.arch;
    let mut command = Command::new(arch.qemu());
    command.args(arch.qemu_machine());
    // Emulation is what is measured and what every machine can do; `EDGED_QEMU_ACCEL=kvm` is faster where it works.
    let accelerator = std::env::var("EDGED_QEMU_ACCEL").ok().filter(|_| Arch::host() == Some(arch));
    command.args(["-accel", accelerator.as_deref().unwrap_or("tcg")]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    // Threads have names then: those of the processors can be told from the others.
    command.args(["-name", "edged,debug-threads=on"]);
    command.args(["-m", &setup.memory_mib.to_string(), "-smp", &setup.cores.to_string()]);
    command.arg("-kernel").arg(firmware.kernel()).arg("-initrd").arg(initramfs);
    command.args(["-append", &kernel_command_line(firmware, setup)]);
    if setup.on_reset == OnReset::End {
        command.arg("-no-reboot");
    }
    if let Some(clock) = &setup.clock {
        command.args(["-rtc", &format!("base={clock},clock=vm")]);
    }
    let socket = |name: &str| format!("{}/{name}.sock", sockets.display());
    let chardev =
        |id: &str| format!("socket,id={id},path={},server=on,wait=on,logfile={}/{id}.log", socket(id), dir.display());
    command.args(["-chardev", &chardev("kernel"), "-serial", "chardev:kernel"]);
    command.args(["-device", "virtio-serial-pci", "-chardev", &chardev("console")]);
    command.args(["-device", "virtconsole,chardev=console"]);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket("qmp"))]);
    if let Some(disk) = &setup.disk {
        command.args(disk_arguments(disk, setup));
    }
    let mut network = "user,id=net0".to_owned();
    for (guest, host) in ports {
        network.push_str(&format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}"));
    }
    command.args(["-netdev", &network, "-device", "virtio-net-pci,netdev=net0,id=nic0,romfile="]);
    command.args(["-device", "virtio-rng-pci"]);
    if setup.has_watchdog && arch == Arch::X86_64 {
        command.args(["-device", "i6300esb", "-action", "watchdog=reset"]);
    }
    command.args(&setup.qemu);
    command
}

/// With a log, QEMU writes down every request before it passes it on.
fn disk_arguments(disk: &Path, setup: &Setup) -> Vec<String> {
    let Some(log) = &setup.write_log else {
        let cache = if setup.is_never_cut { "unsafe" } else { "none" };
        let format = if disk.extension().is_some_and(|e| e == "qcow2") { "qcow2" } else { "raw" };
        let drive = format!("if=none,id=data,file={},format={format},cache={cache},discard=unmap", disk.display());
        return ["-drive", &drive, "-device", "virtio-blk-pci,drive=data"].map(str::to_owned).into();
    };
    let nodes = [
        format!("driver=file,node-name=disk-file,filename={}", disk.display()),
        "driver=raw,node-name=disk,file=disk-file".to_owned(),
        format!("driver=file,node-name=log-file,filename={}", log.display()),
        "driver=raw,node-name=log,file=log-file".to_owned(),
        "driver=blklogwrites,node-name=data,file=disk,log=log,log-sector-size=512,log-super-update-interval=1"
            .to_owned(),
    ];
    let mut arguments: Vec<String> = nodes.into_iter().flat_map(|node| ["-blockdev".to_owned(), node]).collect();
    // Merged requests may have as many pieces as pwritev(2) takes; with the log's own one more the log refuses them, and the
    // guest has an input/output error. A request for zeroes QEMU before 9 logs in two steps, and loses it between them.
    arguments.extend(["-device", "virtio-blk-pci,drive=data,request-merging=off,write-zeroes=off"].map(str::to_owned));
    arguments
}

/// `console=`: where the kernel and the keeper write; `loglevel=4` lets the keeper's lines through and not the kernel's
/// own news, `printk.devkmsg=on` all of them. `edged.data=`: the data disk, formatted when it is empty,
/// as `edged.data-type=` says. `edged.watchdog=`: seconds, 0 for none. `panic=`: seconds until a panic resets the machine.
fn kernel_command_line(firmware: &Firmware, setup: &Setup) -> String {
    let mut words = vec![format!("console={}", firmware.arch.console())];
    words.extend(["panic=1", "loglevel=4", "printk.devkmsg=on"].map(str::to_owned));
    if setup.disk.is_some() {
        words.push(format!("edged.data={}", setup.data));
        words.push(format!("edged.data-type={}", firmware.filesystem));
    }
    if !setup.kernel.iter().any(|word| word.starts_with("edged.watchdog=")) {
        words.push("edged.watchdog=60".to_owned());
    }
    words.extend(setup.kernel.iter().cloned());
    words.join(" ")
}
