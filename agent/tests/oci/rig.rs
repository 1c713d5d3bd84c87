//! One bundle in a temporary directory, and a runtime to drive it with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Whatever is waited for has happened by then, or never will.
const PATIENCE: Duration = Duration::from_secs(30);

/// A program that drives containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    Edged,
    Runc,
    Crun,
}

pub struct Bundle {
    pub dir: tempfile::TempDir,
    pub config: Value,
    pub runtime: Runtime,
    pub id: String,
}

/// What a command left behind.
#[derive(Debug)]
pub struct Seen {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Seen {
    pub fn of(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }

    /// Its output, if it did well.
    #[track_caller]
    pub fn good(self) -> String {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self.out
    }

    /// Its complaint, if it failed.
    #[track_caller]
    pub fn bad(self) -> String {
        assert!(self.code.is_some_and(|code| code != 0), "{self:#?}");
        assert!(!self.err.contains("panicked"), "{self:#?}");
        self.err
    }
}

/// The link that selects the personality, beside the program that the build made.
pub fn program() -> PathBuf {
    let link = Path::new(env!("CARGO_TARGET_TMPDIR")).join("edged-oci");
    let own = link.with_extension(std::process::id().to_string());
    // Made aside and renamed: tests run at the same time.
    let _ = std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_edged"), &own);
    fs::rename(&own, &link).unwrap_or_else(|_| assert!(link.exists()));
    link
}

#[track_caller]
pub fn need(program: &str, package: &str) {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()))
        || ["/usr/sbin", "/sbin"].iter().any(|dir| Path::new(dir).join(program).exists());
    assert!(found, "this test needs `{program}`: apt-get install {package} (`cargo xtask setup` does)");
}

/// Looks until `condition` gives something, with one deadline.
#[track_caller]
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        let _ = rustix::event::poll(&mut [], Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 5_000_000 }));
    }
}

impl Bundle {
    /// A shell that runs `script`, walled as the template has it.
    #[track_caller]
    pub fn new(script: &str) -> Self {
        Self::of(Runtime::Edged, script)
    }

    #[track_caller]
    pub fn of(runtime: Runtime, script: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        assert!(rustix::process::geteuid().is_root(), "these tests run containers: they need root");
        need("busybox", "busybox-static");
        let dir = tempfile::tempdir().unwrap();
        let id = format!("edged-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        make_rootfs(&dir.path().join("rootfs"));
        Command::new(program()).args(["spec", "--bundle"]).arg(dir.path()).status().unwrap();
        let config = fs::read(dir.path().join("config.json")).unwrap();
        let mut bundle = Self { dir, config: serde_json::from_slice(&config).unwrap(), runtime, id };
        bundle.config["process"]["terminal"] = false.into();
        bundle.config["process"]["args"] = json!(["sh", "-c", script]);
        bundle.config["root"]["readonly"] = false.into();
        if runtime == Runtime::Crun {
            // Debian's refuses versions that came after it.
            bundle.config["ociVersion"] = "1.0.2".into();
        }
        bundle.config["linux"]["cgroupsPath"] = format!("/edged-tests/{}", bundle.id).into();
        bundle
    }

    pub fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    pub fn state_root(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn save(&self) {
        fs::write(self.dir.path().join("config.json"), self.config.to_string()).unwrap();
    }

    /// The runtime, with its state in the bundle's directory. crun does not take a hybrid hierarchy for one until its
    /// v2 part is hidden.
    pub fn command(&self, words: &[&str]) -> Command {
        let root = self.state_root();
        let mut command = match self.runtime {
            Runtime::Edged => Command::new(program()),
            Runtime::Runc => Command::new("runc"),
            Runtime::Crun if Path::new("/sys/fs/cgroup/unified").exists() => {
                let mut command = Command::new("unshare");
                let script = "mount -t tmpfs none /sys/fs/cgroup/unified && exec crun \"$@\"";
                command.args(["--mount", "sh", "-c", script, "crun"]);
                command
            }
            Runtime::Crun => Command::new("crun"),
        };
        command.arg("--root").arg(root).args(words).stdin(Stdio::null());
        command
    }

    #[track_caller]
    pub fn call(&self, words: &[&str]) -> Seen {
        Seen::of(&self.command(words).output().unwrap())
    }

    /// Runs the container to its end.
    #[track_caller]
    pub fn run(&self) -> Seen {
        self.save();
        let bundle = self.dir.path().to_str().unwrap();
        self.call(&["run", "--bundle", bundle, &self.id])
    }

    /// Creates it, its output in a file: a pipe would be held open by the program.
    #[track_caller]
    pub fn create(&self) -> Seen {
        self.create_with(&[])
    }

    #[track_caller]
    pub fn create_with(&self, options: &[&str]) -> Seen {
        self.save();
        let out = fs::File::create(self.out_path()).unwrap();
        let err = self.dir.path().join("err");
        let errors = fs::File::create(&err).unwrap();
        let mut command = self.command(&["create", "--bundle", self.dir.path().to_str().unwrap()]);
        let status = command.args(options).arg(&self.id).stdout(out).stderr(errors).status().unwrap();
        Seen { code: status.code(), out: String::new(), err: fs::read_to_string(err).unwrap() }
    }

    #[track_caller]
    pub fn start(&self) {
        self.call(&["start", &self.id]).good();
    }

    fn out_path(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    /// What a created container has printed so far.
    pub fn out(&self) -> String {
        fs::read_to_string(self.out_path()).unwrap_or_default()
    }

    #[track_caller]
    pub fn wait_for_out(&self, text: &str) {
        until(&format!("`{text}` of the container, which said: {}", self.out()), || {
            self.out().contains(text).then_some(())
        });
    }

    pub fn state(&self) -> Value {
        serde_json::from_str(&self.call(&["state", &self.id]).good()).unwrap()
    }

    #[track_caller]
    pub fn wait_for_status(&self, status: &str) {
        until(&format!("the status {status}"), || (self.state()["status"] == status).then_some(()));
    }

    /// The container's group of a controller, wherever this host has it.
    pub fn cgroup(&self, controller: &str) -> PathBuf {
        let top = Path::new("/sys/fs/cgroup");
        let v1 = top.join(controller);
        if v1.exists() { v1 } else { top.to_owned() }.join("edged-tests").join(&self.id)
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.command(&["delete", "--force", &self.id]).stderr(Stdio::null()).status();
    }
}

pub fn is_cgroup_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

fn make_rootfs(root: &Path) {
    for dir in ["bin", "proc", "dev", "sys", "tmp", "etc", "data"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find(|path| Path::new(path).exists()).unwrap();
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    for name in [
        "sh", "cat", "echo", "sleep", "id", "mkdir", "tty", "stty", "true", "ls", "hostname", "readlink", "grep",
        "env", "mount", "touch", "pwd", "sort", "ps", "unshare", "umount", "test", "stat", "sed", "uname", "ln", "dd",
        "wc", "kill", "seq", "mknod", "dmesg", "rm", "head", "cut", "tr",
    ] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
}
