//! A real engine on top: podman with this runtime.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::rig::{Bundle, need, program, until};

struct Podman {
    dir: tempfile::TempDir,
}

#[derive(Debug)]
struct Answer {
    code: Option<i32>,
    out: String,
    err: String,
}

/// Podman's own limits may be higher than what this machine lets root set.
const CONFIG: &str = "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n";

impl Podman {
    fn new() -> Self {
        need("podman", "podman");
        need("conmon", "conmon");
        let podman = Self { dir: tempfile::tempdir().unwrap() };
        std::fs::write(podman.path("containers.conf"), CONFIG).unwrap();
        let image = Bundle::new("true");
        let archive = podman.dir.path().join("image.tar");
        let tar = Command::new("tar").arg("-C").arg(image.rootfs()).arg("-cf").arg(&archive).arg(".").status();
        assert!(tar.unwrap().success());
        podman.call(&["import", archive.to_str().unwrap(), "test:1"]).good();
        podman
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn call(&self, words: &[&str]) -> Answer {
        let mut command = Command::new("podman");
        command
            .args(["--cgroup-manager", "cgroupfs", "--events-backend", "file", "--storage-driver", "vfs", "--runtime"])
            .arg(program())
            .arg("--root")
            .arg(self.path("store"))
            .arg("--runroot")
            .arg(self.path("run"))
            .arg("--tmpdir")
            .arg(self.path("tmp"))
            .args(words)
            .env("CONTAINERS_CONF", self.path("containers.conf"))
            .stdin(Stdio::null());
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Answer { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }

    fn run(&self, options: &[&str], words: &[&str]) -> Answer {
        self.call(&[&["run", "--rm", "--network", "none"], options, &["test:1"], words].concat())
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        self.call(&["pod", "rm", "--all", "--force", "--time", "0"]);
        self.call(&["rm", "--all", "--force", "--time", "0"]);
    }
}

impl Answer {
    #[track_caller]
    fn good(self) -> String {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self.out
    }
}

#[test]
fn podman_runs_and_tells_codes() {
    let podman = Podman::new();
    let answer = podman.run(&[], &["sh", "-c", "id -u; exit 7"]);
    assert_eq!((answer.code, answer.out.as_str()), (Some(7), "0\n"), "{answer:?}");
    let missing = podman.run(&[], &["no-such-program"]);
    assert!(missing.code == Some(127) && missing.err.contains("not found"), "{missing:?}");
    assert_eq!(podman.run(&[], &["/etc"]).code, Some(126));
}

#[test]
fn podman_limits_users_volumes_and_terminals() {
    let podman = Podman::new();
    let files = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; \
                 cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null; true";
    let limits = podman.run(&["--memory", "32m", "--pids-limit", "10", "--cpus", "0.5"], &["sh", "-c", files]);
    assert_eq!(limits.good(), "33554432\n10\n");
    let user =
        podman.run(&["--user", "5:6", "--cap-drop", "all"], &["sh", "-c", "id -u; grep CapBnd /proc/self/status"]);
    assert_eq!(user.good(), "5\nCapBnd:\t0000000000000000\n");
    assert!(podman.run(&["-t"], &["tty"]).good().contains("/dev/pts/0"));
    let mapped = ["--uidmap", "0:100000:1000", "--gidmap", "0:100000:1000"];
    assert_eq!(podman.run(&mapped, &["sh", "-c", "touch /x; stat -c %u /x"]).good(), "0\n");
    let volume = format!("{}:/v:ro", podman.dir.path().display());
    assert_eq!(podman.run(&["-v", &volume], &["sh", "-c", "touch /v/x 2>/dev/null || echo ro"]).good(), "ro\n");
    assert_eq!(podman.run(&["--read-only"], &["sh", "-c", "touch /x 2>/dev/null || echo ro"]).good(), "ro\n");
    let filter = podman.run(&[], &["grep", "Seccomp:", "/proc/self/status"]);
    assert_eq!(filter.good(), "Seccomp:\t2\n", "the engine's own filter");
}

#[test]
fn podman_execs_pauses_stops_starts_and_removes() {
    let podman = Podman::new();
    let script = "trap 'exit 0' TERM; while :; do sleep 0.05; done";
    podman.call(&["run", "-d", "--name", "web", "--network", "none", "test:1", "sh", "-c", script]).good();
    assert_eq!(podman.call(&["exec", "-e", "A=b", "web", "sh", "-c", "echo $A"]).good(), "b\n");
    assert!(podman.call(&["exec", "-t", "web", "tty"]).good().contains("/dev/pts/"));
    assert_eq!(podman.call(&["exec", "web", "sh", "-c", "exit 4"]).code, Some(4));
    let status = || podman.call(&["inspect", "web", "--format", "{{.State.Status}}"]).good();
    podman.call(&["pause", "web"]).good();
    assert_eq!(status(), "paused\n");
    podman.call(&["unpause", "web"]).good();
    podman.call(&["update", "--memory", "64m", "web"]).good();
    podman.call(&["stop", "-t", "20", "web"]).good();
    assert_eq!(
        podman.call(&["inspect", "web", "--format", "{{.State.ExitCode}}"]).good(),
        "0\n",
        "it was asked, not killed"
    );
    podman.call(&["start", "web"]).good();
    assert_eq!(status(), "running\n");
    podman.call(&["rm", "-f", "-t", "0", "web"]).good();
    assert!(!Path::new("/run/edged-oci").exists() || podman.call(&["ps", "-aq"]).good().is_empty());
}

/// Three containers: podman's own that holds the namespaces, and two that are in them.
#[test]
fn podman_pods_share_namespaces() {
    need("../libexec/podman/catatonit", "catatonit");
    let podman = Podman::new();
    podman.call(&["pod", "create", "--name", "pod", "--network", "none", "--hostname", "shared"]).good();
    let run = |name: &str, script: &str| {
        let script = format!("trap 'exit 3' TERM; {script}; while :; do sleep 0.05; done");
        podman.call(&["run", "-d", "--pod", "pod", "--name", name, "test:1", "sh", "-c", &script]).good();
    };
    run("server", "echo in memory > /dev/shm/word; echo over the loopback | busybox nc -l -p 8000");
    let ask = "until busybox nc 127.0.0.1 8000 < /dev/null 2> /dev/null; do sleep 0.05; done";
    run("client", &format!("hostname; cat /dev/shm/word; {ask}"));
    let said = || podman.call(&["logs", "client"]).good();
    until("all that comes from beside", || said().contains("loopback").then_some(()));
    assert_eq!(said(), "shared\nin memory\nover the loopback\n");

    let namespace =
        |name: &str, kind: &str| podman.call(&["exec", name, "readlink", &format!("/proc/self/ns/{kind}")]).good();
    for (kind, is_shared) in [("net", true), ("ipc", true), ("uts", true), ("pid", false), ("mnt", false)] {
        assert_eq!(namespace("server", kind) == namespace("client", kind), is_shared, "{kind}");
    }
    let status = || podman.call(&["pod", "inspect", "pod", "--format", "{{.State}}"]).good();
    podman.call(&["pod", "pause", "pod"]).good();
    assert_eq!(status(), "Paused\n");
    podman.call(&["pod", "unpause", "pod"]).good();
    podman.call(&["pod", "stop", "--time", "20", "pod"]).good();
    let codes = podman.call(&["inspect", "server", "client", "--format", "{{.State.ExitCode}}"]).good();
    assert_eq!(codes, "3\n3\n", "they were asked, not killed");
    podman.call(&["pod", "start", "pod"]).good();
    assert_eq!(status(), "Running\n");
    podman.call(&["pod", "rm", "--force", "--time", "0", "pod"]).good();
    assert_eq!(podman.call(&["ps", "--all", "--quiet"]).good(), "");
}
