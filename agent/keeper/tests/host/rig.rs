//! One keeper with its root directory, and the test's end of its socket.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio as Process};
use std::time::{Duration, Instant};

use edged_keeper::{KeeperConfig, SOCKET_ENV};
use edged_model::keeper::{
    CapabilitySets, ChildExit, ChildState, DeviceNode, LaunchSpec, MAX_MESSAGE_BYTES, MountStep, Reply, ReplyBody,
    Request, RequestBody, Rootfs,
};
use edged_sys::fdpass;
use rustix::event::{PollFd, PollFlags};

/// Whatever is waited for has happened by then, or never will.
const PATIENCE: Duration = Duration::from_secs(20);

pub fn play_keeper(hub: &str) -> ExitCode {
    edged_keeper::run(KeeperConfig {
        agent_args: vec![hub.to_owned()],
        device: false,
        agent_memory_max_bytes: 64 << 20,
        stop_timeout_ms: 500,
        built_at: 0,
        data: PathBuf::from("/nonexistent"),
    })
}

/// Hands the socket to the test, then lives until the test closes the hub or kills it. In a program that ends with the
/// right words it falls.
pub fn play_agent(hub: &str) -> ExitCode {
    let mut own = File::open("/proc/self/exe").unwrap();
    own.seek(SeekFrom::End(-64)).unwrap();
    let mut ending = Vec::new();
    own.read_to_end(&mut ending).unwrap();
    if ending.ends_with(b"AGENT FALLS") {
        return ExitCode::from(3);
    }
    let number = std::env::var(SOCKET_ENV).unwrap().parse().unwrap();
    let keeper = edged_sys::inherit::take(number).unwrap();
    let mut hub = UnixStream::connect(hub).unwrap();
    fdpass::send(hub.as_fd(), std::process::id().to_string().as_bytes(), &[keeper.as_fd()]).unwrap();
    drop(keeper);
    let _ = hub.read(&mut [0]);
    ExitCode::SUCCESS
}

/// Looks until `condition` gives something, with one deadline.
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        rustix::thread::sched_yield();
        let _ = rustix::event::poll(&mut [], Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 2_000_000 }));
    }
}

pub struct Rig {
    pub dir: tempfile::TempDir,
    pub keeper: Child,
    hub: UnixListener,
}

/// The agent's place at the keeper's table.
pub struct Link {
    pub agent_pid: i32,
    socket: OwnedFd,
    hub: UnixStream,
    next_id: u64,
    pub exits: VecDeque<ChildExit>,
}

impl Rig {
    pub fn start() -> (Self, Link) {
        Self::start_program(&std::env::current_exe().unwrap())
    }

    pub fn start_program(program: &Path) -> (Self, Link) {
        let dir = tempfile::tempdir().unwrap();
        let hub_path = dir.path().join("hub");
        let hub = UnixListener::bind(&hub_path).unwrap();
        hub.set_nonblocking(true).unwrap();
        let stderr = File::create(dir.path().join("keeper.log")).unwrap();
        let keeper =
            Command::new(program).arg("keeper").arg(&hub_path).stdin(Process::null()).stderr(stderr).spawn().unwrap();
        let rig = Self { dir, keeper, hub };
        make_rootfs(&rig.rootfs());
        let link = rig.next_agent();
        (rig, link)
    }

    pub fn rootfs(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.keeper.id()).unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("keeper.log")).unwrap()
    }

    /// Waits for the next agent that the keeper starts.
    pub fn next_agent(&self) -> Link {
        let (hub, _) = until("an agent", || self.hub.accept().ok());
        hub.set_nonblocking(false).unwrap();
        let mut buffer = [0; 16];
        let (count, mut fds) = fdpass::recv(hub.as_fd(), &mut buffer).unwrap();
        let agent_pid = std::str::from_utf8(&buffer[..count]).unwrap().parse().unwrap();
        Link { agent_pid, socket: fds.pop().unwrap(), hub, next_id: 1, exits: VecDeque::new() }
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Every namespace, a directory as root, what a shell needs.
    pub fn spec(&self, key: &str, script: &str) -> LaunchSpec {
        let plain = |source: &str, target: &str, data: &str| MountStep {
            source: source.into(),
            target: target.into(),
            fstype: source.into(),
            data: data.into(),
            ..MountStep::default()
        };
        let node = |name: &str, minor| DeviceNode {
            path: format!("/dev/{name}"),
            kind: 'c',
            major: 1,
            minor,
            mode: 0o666,
            uid: 0,
            gid: 0,
        };
        // The default set of today's engines.
        let set = 0xa804_25fb;
        LaunchSpec {
            key: key.into(),
            note: format!("note of {key}"),
            namespaces: NAMESPACES,
            hostname: Some("inside".into()),
            argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec!["PATH=/bin".into()],
            cwd: "/".into(),
            rootfs: Some(Rootfs::Directory { path: self.rootfs().to_str().unwrap().into(), read_only: false }),
            mounts: vec![
                plain("proc", "/proc", ""),
                plain("tmpfs", "/dev", "mode=755,size=64k"),
                plain("devpts", "/dev/pts", "newinstance,ptmxmode=0666,mode=0620"),
            ],
            device_nodes: vec![node("null", 3), node("zero", 5)],
            symlinks: vec![("/dev/fd".into(), "/proc/self/fd".into())],
            capabilities: CapabilitySets { bounding: set, effective: set, permitted: set, inheritable: 0, ambient: 0 },
            no_new_privs: true,
            ..LaunchSpec::default()
        }
    }
}

/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWPID, NEWNET (linux/sched.h).
pub const NAMESPACES: u64 = 0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x2000_0000 | 0x4000_0000;

impl Drop for Rig {
    fn drop(&mut self) {
        let ended = |rig: &mut Self| matches!(rig.keeper.try_wait(), Ok(Some(_)));
        if !ended(self) {
            self.signal(nix::sys::signal::Signal::SIGTERM);
            until("the keeper's end", || ended(self).then_some(()));
        }
        if std::thread::panicking() {
            eprintln!("--- the keeper's log:\n{}", self.log());
        }
    }
}

fn make_rootfs(root: &Path) {
    for dir in ["bin", "proc", "dev", "tmp", "etc"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for name in
        ["sh", "cat", "echo", "sleep", "id", "mkdir", "tty", "stty", "true", "ls", "hostname", "readlink", "grep"]
    {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
}

impl Link {
    /// Sends without waiting for an answer; gives the request's number.
    pub fn send(&mut self, body: RequestBody, fds: &[OwnedFd]) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let bytes = serde_cbor::to_vec(&Request { id, body }).unwrap();
        self.send_raw(&bytes, fds);
        id
    }

    pub fn send_raw(&self, bytes: &[u8], fds: &[OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        until("room in the socket", || match fdpass::send(self.socket.as_fd(), bytes, &fds) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Ok(()) => Some(()),
            Err(error) => panic!("{error}"),
        });
    }

    /// The next message that is not an exit; exits are put aside.
    pub fn next(&mut self) -> (u64, ReplyBody, Vec<OwnedFd>) {
        loop {
            let (reply, fds) = self.receive();
            match reply.body {
                ReplyBody::Exited(exit) => self.exits.push_back(exit),
                body => return (reply.id, body, fds),
            }
        }
    }

    /// The next message, exits among them.
    pub fn next_of_any_kind(&mut self) -> ReplyBody {
        self.receive().0.body
    }

    /// As [`Self::list`], when answers to earlier requests may still be on their way.
    pub fn list_after_all_answers(&mut self) -> Vec<ChildState> {
        let id = self.send(RequestBody::List, &[]);
        let mut left = None;
        let mut list = Vec::new();
        while left != Some(0) {
            let (reply, _) = self.receive();
            match reply.body {
                ReplyBody::Table { children, .. } if reply.id == id => left = Some(children),
                ReplyBody::Child(state) => {
                    list.push(state);
                    left = left.map(|left| left - 1);
                }
                ReplyBody::Done => {}
                other => panic!("{other:?}"),
            }
        }
        list
    }

    fn receive(&self) -> (Reply, Vec<OwnedFd>) {
        let mut buffer = vec![0; MAX_MESSAGE_BYTES];
        let mut answers = [PollFd::new(&self.socket, PollFlags::IN)];
        // Woken at once: what is measured with this is not the pause between two looks.
        let ready = rustix::event::poll(&mut answers, Some(&PATIENCE.try_into().unwrap())).unwrap();
        assert_ne!(ready, 0, "waited in vain for a message of the keeper");
        let (count, fds) = fdpass::recv(self.socket.as_fd(), &mut buffer).unwrap();
        assert_ne!(count, 0, "the keeper has closed the socket");
        (serde_cbor::from_slice(&buffer[..count]).unwrap(), fds)
    }

    pub fn ask(&mut self, body: RequestBody, fds: &[OwnedFd]) -> (ReplyBody, Vec<OwnedFd>) {
        let id = self.send(body, fds);
        let (answered, body, fds) = self.next();
        assert_eq!(answered, id);
        (body, fds)
    }

    pub fn launch(&mut self, spec: LaunchSpec) -> (i32, Vec<File>) {
        self.launch_with(spec, &[])
    }

    pub fn launch_with(&mut self, spec: LaunchSpec, fds: &[OwnedFd]) -> (i32, Vec<File>) {
        match self.ask(RequestBody::Launch(Box::new(spec)), fds) {
            (ReplyBody::Launched { pid, .. }, fds) => (pid, fds.into_iter().map(File::from).collect()),
            (other, _) => panic!("not launched: {other:?}"),
        }
    }

    /// A launch that must fail: the stage and the error number.
    pub fn fails(&mut self, spec: LaunchSpec) -> (String, i32) {
        match self.ask(RequestBody::Launch(Box::new(spec)), &[]).0 {
            ReplyBody::LaunchFailed { stage, errno, .. } => (stage, errno),
            other => panic!("did not fail: {other:?}"),
        }
    }

    pub fn exit_of(&mut self, key: &str) -> ChildExit {
        loop {
            if let Some(place) = self.exits.iter().position(|exit| exit.key == key) {
                return self.exits.remove(place).unwrap();
            }
            let (reply, _) = self.receive();
            match reply.body {
                ReplyBody::Exited(exit) => self.exits.push_back(exit),
                other => panic!("an exit was awaited: {other:?}"),
            }
        }
    }

    /// Runs a script to its end: exit code, stdout, stderr.
    pub fn run(&mut self, spec: LaunchSpec) -> (Option<i32>, String, String) {
        let key = spec.key.clone();
        let (_, mut outputs) = self.launch(spec);
        let [out, err] = [0, 1].map(|number| {
            let mut text = String::new();
            outputs[number].read_to_string(&mut text).unwrap();
            text
        });
        let exit = self.exit_of(&key);
        assert!(matches!(self.ask(RequestBody::Forget { key }, &[]).0, ReplyBody::Done));
        (exit.code, out, err)
    }

    pub fn list(&mut self) -> Vec<(ChildState, Vec<File>)> {
        let (ReplyBody::Table { children, .. }, _) = self.ask(RequestBody::List, &[]) else { panic!("no table") };
        (0..children)
            .map(|_| match self.next() {
                (_, ReplyBody::Child(state), fds) => (state, fds.into_iter().map(File::from).collect()),
                (_, other, _) => panic!("no child: {other:?}"),
            })
            .collect()
    }

    /// `kill -9` of the agent, and its end of the socket with it.
    pub fn kill(self) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.agent_pid), nix::sys::signal::Signal::SIGKILL).unwrap();
        drop(self.hub);
    }
}

/// Reads one line, byte by byte: the rest stays in the pipe.
pub fn line(file: &mut File) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while file.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        text.push(byte[0]);
    }
    String::from_utf8(text).unwrap().trim_end().to_owned()
}
