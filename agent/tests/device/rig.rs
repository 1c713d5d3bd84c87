//! The factory makes keys, certificates and images and runs the registry; the device is `edged --root DIR`.

use std::fs::{self, File};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use edged_model::id::Digest;
use edged_qemu::certs::Authority;
use edged_qemu::fleet::Fleet;
use edged_qemu::keys::Keys;
use edged_qemu::process;
use edged_qemu::registry::{Registry, SignatureForm};
use edged_qemu::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// Long enough for anything on a loaded machine; a test that gets here has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);
pub const DEVICE: &str = "host-1";

/// What stands before `workloads:` in every manifest here.
pub fn head(sequence: u32) -> String {
    format!(
        "apiVersion: edge/v1\ndevice: {DEVICE}\nsequence: {sequence}\nissued: 2026-01-01T00:00:00Z\n\
         expires: 2036-01-01T00:00:00Z\nupdate: {{ probation: 2s }}\n"
    )
}

/// One workload that sleeps.
pub fn sleeper(sequence: u32, image: &str) -> String {
    format!(
        "{}workloads:\n  app:\n    image: {image}\n    command: [/bin/sleep, \"10000\"]\n    \
         resources: {{ memory: 8Mi, cpu: 100m }}\n",
        head(sequence)
    )
}

/// One byte of a large file changes as on a disk that fails: nothing else of the file tells.
pub fn rot(file: &Path) {
    let (open, before) = (File::options().write(true).open(file).unwrap(), fs::metadata(file).unwrap());
    open.write_all_at(&[8], 50_000).unwrap();
    open.set_modified(before.modified().unwrap()).unwrap();
}

pub fn until<T>(what: &str, mut holds: impl FnMut() -> Option<T>) -> T {
    wait::until(what, PATIENCE, || Ok(holds())).unwrap_or_else(|error| panic!("{error:#}"))
}

/// So many factories at a time, each with a device, whatever the number of the harness's threads: most of what a device
/// does here is waiting, and more than these would make two cores the thing that is tested.
const AT_A_TIME: usize = 4;

static TURNS: Mutex<usize> = Mutex::new(AT_A_TIME);
static TURN_OVER: Condvar = Condvar::new();

struct Turn;

impl Turn {
    fn wait() -> Self {
        let turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
        let mut turns = TURN_OVER.wait_while(turns, |turns| *turns == 0).unwrap_or_else(PoisonError::into_inner);
        *turns -= 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *TURNS.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        TURN_OVER.notify_one();
    }
}

pub struct Factory {
    pub authority: Authority,
    pub keys: Keys,
    pub registry: Registry,
    dir: TempDir,
    _turn: Turn,
}

impl Factory {
    pub fn start() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests make namespaces and cgroups: run them as root");
        let turn = Turn::wait();
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::in_dir(&dir.path().join("ca")).unwrap();
        let keys = Keys::in_dir(&dir.path().join("keys")).unwrap();
        let registry = Registry::start(&dir.path().join("registry"), &authority).unwrap();
        Self { authority, keys, registry, dir, _turn: turn }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An image of busybox and one more layer, signed; its name for a manifest.
    pub fn publish_over_busybox(&self, name: &str, own: &Path) -> String {
        self.publish_all_over_busybox(name, &[own.to_owned()])
    }

    /// The same with several more.
    pub fn publish_all_over_busybox(&self, name: &str, own: &[PathBuf]) -> String {
        let (root, layout) = (self.busybox(), self.path(&format!("{name}.layout")));
        process::run(self.keys.edgectl().args(["image", "build", "-o"]).arg(&layout).arg(root).args(own)).unwrap();
        let digest = self.registry.push(&layout, name, "latest").unwrap();
        self.registry.sign(name, &digest, &self.keys.private("image"), SignatureForm::Bundle).unwrap();
        format!("{}/{name}@{digest}", self.registry.seen_from_host())
    }

    /// busybox under the names of its applets, packed by `edgectl image build` and pushed; the digest.
    pub fn push_busybox(&self) -> String {
        let root = self.busybox();
        let layout = self.path("busybox.layout");
        let mut build = self.keys.edgectl();
        build.args(["image", "build", "--cmd", "/bin/sh", "-o"]).arg(&layout).arg(&root);
        process::run(&mut build).unwrap();
        self.registry.push(&layout, "busybox", "latest").unwrap()
    }

    pub fn busybox(&self) -> PathBuf {
        let root = self.path("busybox");
        if !root.exists() {
            for dir in ["bin", "tmp", "www", "data"] {
                fs::create_dir_all(root.join(dir)).unwrap();
            }
            fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
            for applet in ["sh", "httpd", "sleep", "cat", "echo", "kill", "dd", "true", "false", "test"] {
                symlink("busybox", root.join("bin").join(applet)).unwrap();
            }
            fs::write(root.join("www/index.html"), "here\n").unwrap();
        }
        root
    }

    /// The same, signed; its name for a manifest.
    pub fn publish_busybox(&self) -> String {
        let digest = self.push_busybox();
        self.registry.sign("busybox", &digest, &self.keys.private("image"), SignatureForm::Bundle).unwrap();
        format!("{}/busybox@{digest}", self.registry.seen_from_host())
    }

    /// Signs a manifest; its workloads are given little time to end, because as PID 1 busybox hears no SIGTERM.
    pub fn sign(&self, name: &str, yaml: &str) -> PathBuf {
        self.sign_with(name, yaml, &self.keys.private("manifest"))
    }

    pub fn sign_with(&self, name: &str, yaml: &str, key: &Path) -> PathBuf {
        let brief = yaml.replace("    resources:", "    stopTimeout: 300ms\n    resources:");
        self.keys.sign_with(name, &brief, key).unwrap()
    }

    pub fn fleet(&self) -> Fleet {
        Fleet::start(&self.path("fleet"), &self.authority).unwrap()
    }

    /// Switches a device on. `more` is added to its `agent.toml`.
    pub fn device(&self, more: &str) -> Device {
        self.device_called("device", more, &[])
    }

    /// One of several, with an environment.
    pub fn device_called(&self, name: &str, more: &str, env: &[(&str, &Path)]) -> Device {
        self.device_of(Path::new(env!("CARGO_BIN_EXE_edged")), name, more, env)
    }

    /// One that runs this program.
    pub fn device_of(&self, program: &Path, name: &str, more: &str, env: &[(&str, &Path)]) -> Device {
        let root = self.path(name);
        fs::create_dir_all(&root).unwrap();
        let push_port = process::free_port().unwrap();
        let tls = self.authority.issue("device").unwrap();
        let ca = self.authority.cert();
        let config = format!(
            "[device]\nid = \"{DEVICE}\"\ntrust-root = \"{}\"\n\n[network]\nmode = \"none\"\n\n\
             [limits]\nmemory-reserve = \"32Mi\"\n\n\
             [api]\nlisten = \"127.0.0.1:{push_port}\"\ntls-cert = \"{}\"\ntls-key = \"{}\"\n\n{}\n{more}",
            self.keys.trust_root().display(),
            tls.cert.display(),
            tls.key.display(),
            self.registry.config_as(&self.registry.seen_from_host(), &ca.display().to_string()),
        );
        let file = self.path(&format!("{name}.toml"));
        fs::write(&file, config).unwrap();
        let log = self.path(&format!("{name}.log"));
        let out = File::create(&log).unwrap();
        let child = Command::new(program)
            .arg("--root")
            .arg(&root)
            .arg("--config")
            .arg(&file)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap();
        let mut device = Device { child, root, log, push_port, ca };
        until("the push port and the console of the device", || {
            assert!(device.child.try_wait().unwrap().is_none(), "edged ended:\n{}", device.said());
            TcpStream::connect(("127.0.0.1", push_port)).and_then(|_| UnixStream::connect(device.socket())).ok()
        });
        device
    }
}

/// `edged` as it runs; switched off in order when dropped.
pub struct Device {
    child: Child,
    root: PathBuf,
    log: PathBuf,
    push_port: u16,
    ca: PathBuf,
}

impl Device {
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Something below the device's root.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_edgectl"));
        command.arg("--host").arg(format!("unix:{}", self.socket().display()));
        command
    }

    fn socket(&self) -> PathBuf {
        self.root.join("run/agent.sock")
    }

    pub fn edgectl(&self, words: &[&str]) -> Output {
        self.command().args(words).output().unwrap()
    }

    /// What a verb prints; it must not be refused.
    pub fn ask(&self, words: &[&str]) -> String {
        let output = self.edgectl(words);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        // 4: the device answers, and something on it is not well.
        assert!(
            matches!(output.status.code(), Some(0 | 4)),
            "{words:?}: {}{said}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.said()
        );
        said
    }

    pub fn status(&self) -> Value {
        serde_json::from_str(&self.ask(&["status", "-o", "json"])).unwrap()
    }

    /// The sentences of the last events, oldest first.
    pub fn events(&self) -> Vec<String> {
        let lines = self.ask(&["events", "--tail", "200", "-o", "json"]);
        let events = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events.filter_map(|event| Some(event["why"]["text"].as_str()?.to_owned())).collect()
    }

    /// One workload of the status.
    pub fn workload(&self, name: &str) -> Value {
        let status = self.status();
        let list = status["workloads"].as_array().unwrap();
        list.iter().find(|workload| workload["name"] == name).cloned().unwrap_or_default()
    }

    /// Waits until the workload is as wanted, and gives back how it is then.
    pub fn workload_that(&self, name: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let found = wait::until(&format!("{name} {what}"), PATIENCE, || {
            let output = self.edgectl(&["status", "-o", "json"]);
            let status: Value = serde_json::from_slice(&output.stdout)?;
            last = status["workloads"]
                .as_array()
                .into_iter()
                .flatten()
                .find(|w| w["name"] == name)
                .cloned()
                .unwrap_or_default();
            Ok(holds(&last).then(|| last.clone()))
        });
        found.unwrap_or_else(|error| panic!("{error:#}\nlast seen: {last:#}\n{}", self.said()))
    }

    pub fn running(&self, name: &str) -> Value {
        self.workload_that(name, "running", |workload| workload["phase"] == "running")
    }

    pub fn pid(&self, name: &str) -> i32 {
        self.running(name)["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).unwrap()
    }

    pub fn wait_for_generation(&self, sequence: u64, state: &str) {
        let mut last = Value::Null;
        wait::until(&format!("generation {sequence} to be {state}"), PATIENCE, || {
            let output = self.edgectl(&["status", "-o", "json"]);
            let status: Value = serde_json::from_slice(&output.stdout)?;
            last = status["generation"].clone();
            Ok((last["sequence"] == sequence && last["state"] == state).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}\nlast seen: {last:#}\n{}", self.said()));
    }

    /// Bytes as anybody may send them, past what `edgectl push` looks at first; the answer of the device.
    pub fn put(&self, bytes: &[u8]) -> (u16, String) {
        let file = self.root.with_extension("put");
        fs::write(&file, bytes).unwrap();
        let url = format!("https://127.0.0.1:{}/v1/manifest", self.push_port);
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "-w", "\n%{http_code}", "--upload-file"]).arg(&file);
        let said = process::read(curl.arg("--cacert").arg(&self.ca).arg(&url)).unwrap();
        let (body, status) = said.rsplit_once('\n').unwrap();
        (status.parse().unwrap(), body.to_owned())
    }

    pub fn push_port(&self) -> u16 {
        self.push_port
    }

    /// `edgectl push` of any file, once.
    pub fn push_command(&self, file: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_edgectl"));
        command
            .args(["push", "--to", &format!("https://127.0.0.1:{}", self.push_port), "--ca"])
            .arg(&self.ca)
            .arg(file);
        command
    }

    pub fn push(&self, file: &Path) -> Output {
        self.push_command(file).output().unwrap()
    }

    pub fn take(&self, file: &Path) {
        let output = self.push(file);
        assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), self.said());
    }

    /// What the operator reads when it is refused.
    pub fn refuse(&self, file: &Path) -> String {
        let output = self.push(file);
        assert!(!output.status.success(), "the device took {}", file.display());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// The agent: the keeper's child that is called so.
    pub fn agent_pid(&self) -> i32 {
        self.agent().expect("the keeper has an agent")
    }

    /// `None` while there is none.
    pub fn agent(&self) -> Option<i32> {
        let is_agent = |pid: &i32| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.split(|byte| *byte == 0).nth(1) == Some(b"agent")
        };
        self.children().into_iter().find(is_agent)
    }

    pub fn keeper_pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// All that the keeper has: what it launched, and every orphan of theirs.
    pub fn children(&self) -> Vec<i32> {
        let keeper = self.keeper_pid();
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap();
        children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }

    /// The time floor as the second copy of the state has it.
    pub fn kept_floor(&self) -> Option<edged_model::quantity::Timestamp> {
        Some(edged::store::keep::load(&self.root.join("keep")).ok()??.summary.time_floor)
    }

    pub fn kill_agent(&self) {
        kill(Pid::from_raw(self.agent_pid()), Signal::SIGKILL).unwrap();
    }

    /// SIGTERM, and waits for the end of everything.
    pub fn switch_off(mut self) {
        self.stop();
    }

    /// Where it keeps everything.
    pub fn data(&self) -> &Path {
        &self.root
    }

    pub fn stop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let ended = wait::until("the end of edged", PATIENCE, || Ok(self.child.try_wait()?));
        if ended.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stop();
        if std::thread::panicking() {
            eprintln!("--- edged said:\n{}", self.said());
        }
        // The pinned namespaces are mounts: a directory that holds one cannot be removed.
        let pins =
            ["run/netns", "run/userns"].map(|dir| fs::read_dir(self.root.join(dir)).into_iter().flatten().flatten());
        for pin in pins.into_iter().flatten() {
            let _ = rustix::mount::unmount(pin.path(), rustix::mount::UnmountFlags::DETACH);
        }
        remove_groups(&self.root);
    }
}

/// The groups of its workloads, empty by now. On cgroup v1 nobody takes them away, and each start on a host that has
/// thousands of them waits a millisecond for the kernel.
fn remove_groups(data: &Path) {
    let name = format!("edged-{}", Digest::of(data.as_os_str().as_encoded_bytes()).short());
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let places = own.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        Some(controllers.split(',').map(move |one| (one.to_owned(), path.trim_start_matches('/').to_owned())))
    });
    for (controller, path) in places.flatten() {
        let group = Path::new("/sys/fs/cgroup").join(controller).join(path).join(&name);
        for workload in fs::read_dir(&group).into_iter().flatten().flatten() {
            // Its files cannot be removed, and need not be.
            let _ = fs::remove_dir(workload.path());
        }
        let _ = fs::remove_dir(group);
    }
}
