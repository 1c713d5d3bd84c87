//! A real engine on top: Debian's containerd, driven by `ctr`, with this runtime below its own shim.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use edged_model::id::Digest;
use serde_json::{Value, json};

use crate::rig::{Bundle, Seen, need, program, until};

pub const IMAGE: &str = "docker.io/test/busybox:1";

/// A daemon of its own, in a directory of its own.
pub struct Containerd {
    pub dir: tempfile::TempDir,
    /// What containerd calls so: engines on one daemon do not see each other.
    namespace: String,
    /// The parent of its containers' cgroups.
    pub group: String,
    daemon: Child,
}

/// What a network would take is left out.
const CONFIG: &str = r#"version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt"WITHOUT]
"#;

impl Containerd {
    /// Without what kubelets speak to.
    fn new() -> Self {
        Self::of("", |_| String::new())
    }

    /// In that namespace, or one of its own, with more of a configuration.
    pub fn of(namespace: &str, more: impl FnOnce(&Path) -> String) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        need("containerd", "containerd");
        need("ctr", "containerd");
        let dir = tempfile::tempdir().unwrap();
        let group = format!("edged-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let namespace = if namespace.is_empty() { &group } else { namespace }.to_owned();
        let config = dir.path().join("config.toml");
        let more = more(dir.path());
        let without = if more.is_empty() { ", \"io.containerd.grpc.v1.cri\"" } else { "" };
        fs::write(&config, CONFIG.replace("WITHOUT", without) + &more).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let daemon = Command::new("containerd")
            .arg("--config")
            .arg(config)
            .arg("--root")
            .arg(dir.path().join("root"))
            .arg("--state")
            .arg(dir.path().join("state"))
            .arg("--address")
            .arg(dir.path().join("sock"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let containerd = Self { dir, namespace, group, daemon };
        until("containerd", || (containerd.call(&["version"]).code == Some(0)).then_some(()));
        let archive = containerd.image();
        containerd.call(&["image", "import", archive.to_str().unwrap()]).good();
        containerd
    }

    /// One layer, as `docker save` writes it.
    fn image(&self) -> PathBuf {
        let dir = self.dir.path().join("image");
        fs::create_dir(&dir).unwrap();
        let tar = |of: &Path, to: &Path| {
            let done = Command::new("tar").arg("-C").arg(of).arg("-cf").arg(to).arg(".").status().unwrap();
            assert!(done.success());
        };
        tar(&Bundle::new("true").rootfs(), &dir.join("layer.tar"));
        let layer = Digest::of(&fs::read(dir.join("layer.tar")).unwrap());
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
            "config": { "Env": ["PATH=/bin"], "Cmd": ["sleep", "1000"] },
            "rootfs": { "type": "layers", "diff_ids": [layer.to_string()] },
        });
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let manifest = json!([{ "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }]);
        fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
        let archive = self.dir.path().join("image.tar");
        tar(&dir, &archive);
        archive
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    fn ctr(&self) -> Vec<String> {
        let address = self.socket().to_string_lossy().into_owned();
        ["ctr", "--address", &address, "--namespace", &self.namespace].map(str::to_owned).to_vec()
    }

    fn call(&self, words: &[&str]) -> Seen {
        let ctr = self.ctr();
        let output = Command::new(&ctr[0]).args(&ctr[1..]).args(words).stdin(Stdio::null()).output();
        Seen::of(&output.unwrap())
    }

    /// The same on a terminal, which `ctr` insists on for `--tty`.
    fn on_terminal(&self, words: &[&str]) -> Seen {
        let quoted = |word: &str| format!("'{}'", word.replace('\'', r"'\''"));
        let ctr = self.ctr();
        let line: Vec<_> = ctr.iter().map(String::as_str).chain(words.iter().copied()).map(quoted).collect();
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--command", &line.join(" "), "/dev/null"]);
        Seen::of(&script.stdin(Stdio::null()).output().unwrap())
    }

    fn runtime(&self) -> Vec<String> {
        let (binary, root) = (program(), self.dir.path().join("oci"));
        let text = |path: &Path| path.to_string_lossy().into_owned();
        ["--runtime", "io.containerd.runc.v2", "--runc-binary", &text(&binary), "--runc-root", &text(&root)]
            .map(str::to_owned)
            .to_vec()
    }

    fn words<'w>(runtime: &'w [String], options: &[&'w str], rest: &[&'w str]) -> Vec<&'w str> {
        let run = ["run"].into_iter().chain(runtime.iter().map(String::as_str));
        run.chain(options.iter().copied()).chain([IMAGE]).chain(rest.iter().copied()).collect()
    }

    /// A container of its own name, removed at its end.
    fn run(&self, options: &[&str], name: &str, words: &[&str]) -> Seen {
        let runtime = self.runtime();
        self.call(&Self::words(&runtime, &[&["--rm"], options].concat(), &[&[name], words].concat()))
    }

    /// One that stays, and that nobody watches.
    fn start(&self, options: &[&str], name: &str, script: &str) {
        let runtime = self.runtime();
        self.call(&Self::words(&runtime, &[&["-d"], options].concat(), &[name, "sh", "-c", script])).good();
    }

    fn status(&self, name: &str) -> String {
        let list = self.call(&["task", "ls"]).good();
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(name));
        line.and_then(|line| line.split_whitespace().nth(2)).unwrap_or("none").to_owned()
    }

    fn remove(&self, name: &str) {
        self.call(&["task", "rm", "--force", name]).good();
        self.call(&["container", "rm", name]).good();
    }

    /// What the runtime keeps of this engine's containers.
    pub fn kept(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.dir.path().join("oci").join(&self.namespace)) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    /// The limit in a file of the container's cgroups, of either version.
    pub fn limit(&self, name: &str, v1: &str, v2: &str) -> String {
        let below = |path: &str| Path::new("/sys/fs/cgroup").join(path);
        let (controller, file) = v1.split_once('/').unwrap();
        let v1 = below(controller).join(&self.group).join(name).join(file);
        let v2 = below(&self.group).join(name).join(v2);
        let text = fs::read_to_string(&v1).or_else(|_| fs::read_to_string(&v2));
        text.unwrap_or_else(|error| panic!("{}, {}: {error}", v1.display(), v2.display())).trim().to_owned()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let list = self.call(&["task", "ls", "--quiet"]).out;
        for name in list.split_whitespace() {
            self.call(&["task", "rm", "--force", name]);
        }
        // Its shims end with their tasks.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        // The engine's own parent of its containers' groups, which it leaves behind.
        for group in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = fs::remove_dir(group.path().join(&self.group));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.group));
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.dir.path().join("log")).unwrap_or_default());
        }
    }
}

#[test]
fn containerd_runs_and_tells_codes() {
    let containerd = Containerd::new();
    let seen = containerd.run(&["--env", "A=b", "--cwd", "/tmp"], "code", &["sh", "-c", "echo $A; pwd; exit 7"]);
    assert_eq!((seen.code, seen.out.as_str()), (Some(7), "b\n/tmp\n"), "{seen:?}");
    let missing = containerd.run(&[], "missing", &["no-such-program"]).bad();
    assert!(missing.contains("executable file not found"), "{missing}");
    let directory = containerd.run(&[], "directory", &["/etc"]).bad();
    assert!(directory.contains("create failed") && directory.contains("denied"), "{directory}");
    assert_eq!(
        containerd
            .run(&["--read-only"], "ro", &["sh", "-c", "touch /x 2>&1 || echo ro"])
            .good()
            .matches("ro\n")
            .count(),
        1
    );
    let filter = containerd.run(&["--seccomp"], "filter", &["grep", "Seccomp:", "/proc/self/status"]);
    assert_eq!(filter.good(), "Seccomp:\t2\n", "the engine's own filter");
    let mapped = ["--uidmap", "0:100000:1000", "--gidmap", "0:100000:1000"];
    assert_eq!(containerd.run(&mapped, "mapped", &["sh", "-c", "id -u; stat -c %u /bin/sh"]).good(), "0\n0\n");
    let terminal = containerd.runtime();
    let words = Containerd::words(&terminal, &["--rm", "--tty"], &["terminal", "sh", "-c", "tty; exit 3"]);
    let seen = containerd.on_terminal(&words);
    assert!(seen.code == Some(3) && seen.out.contains("/dev/pts/0"), "{seen:?}");
    assert!(containerd.kept().is_empty() && containerd.call(&["container", "ls", "--quiet"]).good().is_empty());
}

#[test]
fn containerd_limits_execs_pauses_kills_and_removes() {
    let containerd = Containerd::new();
    let limits = ["--memory-limit", "33554432", "--cpu-quota", "50000", "--cpu-period", "100000"];
    containerd.start(&limits, "web", "trap 'exit 5' TERM; while :; do sleep 0.05; done");
    assert_eq!(containerd.limit("web", "memory/memory.limit_in_bytes", "memory.max"), "33554432");
    assert!(containerd.limit("web", "cpu/cpu.cfs_quota_us", "cpu.max").starts_with("50000"));

    let exec = |id: &str, words: &[&str]| containerd.call(&[&["task", "exec", "--exec-id", id, "web"], words].concat());
    let seen = exec("a", &["sh", "-c", "echo in; exit 4"]);
    assert_eq!((seen.code, seen.out.as_str()), (Some(4), "in\n"), "{seen:?}");
    assert!(exec("b", &["no-such-program"]).bad().contains("executable file not found"));
    let seen = containerd.on_terminal(&["task", "exec", "--tty", "--exec-id", "c", "web", "tty"]);
    assert!(seen.out.contains("/dev/pts/"), "{seen:?}");

    containerd.call(&["task", "pause", "web"]).good();
    assert_eq!(containerd.status("web"), "PAUSED");
    containerd.call(&["task", "resume", "web"]).good();
    assert_eq!(containerd.status("web"), "RUNNING");
    let usage: Value =
        serde_json::from_str(&containerd.call(&["task", "metrics", "--format", "json", "web"]).good()).unwrap();
    assert!(usage.to_string().contains("33554432"), "{usage}");
    assert!(containerd.call(&["task", "ps", "web"]).good().lines().count() >= 2);

    containerd.call(&["task", "rm", "web"]).bad();
    containerd.call(&["task", "kill", "--signal", "TERM", "web"]).good();
    until("the end that was asked for", || (containerd.status("web") == "STOPPED").then_some(()));
    let removed = containerd.call(&["task", "rm", "web"]);
    assert_eq!(removed.code, Some(0), "{removed:?}");
    assert!(removed.err.contains("code 5"), "it was asked, not killed: {removed:?}");
    containerd.call(&["container", "rm", "web"]).good();

    containerd.start(&[], "stubborn", "trap '' TERM; while :; do sleep 1000; done");
    containerd.call(&["task", "kill", "--all", "--signal", "KILL", "stubborn"]).good();
    until("the end", || (containerd.status("stubborn") == "STOPPED").then_some(()));
    containerd.remove("stubborn");
    containerd.start(&[], "busy", "sleep 1000");
    containerd.remove("busy");
    assert!(containerd.kept().is_empty(), "{:?}", containerd.kept());
}
