//! `create`, `run` and `start`. The order is that of the specification's life cycle (runtime.md, "Lifecycle").

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use edged_model::keeper::{Hook, LaunchSpec, NamespaceJoin, Rootfs, Stdio};
use edged_sys::hook;
use edged_sys::spawn::{self, Heard, Launching, SingleThread};
use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxSeccomp, Spec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::arguments::Parsed;
use crate::cgroup::Groups;
use crate::error::{OciError, warn};
use crate::notifier::Notifier;
use crate::spec::{LaunchPlace, Translated, bits, translate};
use crate::state::{self, Home, Record, Status};
use crate::{bundle, kernel, life, manage, seccomp, terminal, wait};

/// Who waits for what, in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// The program waits at the gate.
    Create,
    /// The program runs at once.
    Run,
}

/// A container that was set up.
struct Up {
    home: Home,
    record: Record,
    launching: Launching,
    hooks: LateHooks,
    master: Option<OwnedFd>,
}

struct LateHooks {
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
}

pub fn create(parsed: &Parsed) -> Result<(), OciError> {
    bring_up(parsed, Purpose::Create).map(drop)
}

pub fn run(parsed: &Parsed) -> Result<u8, OciError> {
    // Blocked before the clone: no end of the program, and no signal to it, is missed.
    let signals = if parsed.has("detach") { None } else { Some(wait::Signals::block()?) };
    let up = bring_up(parsed, Purpose::Run)?;
    run_hooks(parsed, &up.hooks.poststart, &up.record, Status::Running);
    let Some(signals) = signals else { return Ok(crate::SUCCESS) };
    let code = match &up.master {
        Some(master) => terminal::relay(master.as_fd(), &signals, up.launching.pidfd.as_fd(), up.launching.pid)?,
        None => signals.wait_for(up.launching.pid, up.launching.pidfd.as_fd())?,
    };
    if !parsed.has("keep") {
        manage::take_away(&parsed.global, &up.home, &up.record, Some(&up.hooks.poststop))?;
    }
    Ok(code)
}

/// Hooks of points at which nothing can be undone any more: failures are told, and the others run.
pub fn run_hooks(parsed: &Parsed, hooks: &[Hook], record: &Record, status: Status) {
    let state = record.as_state(status).to_string();
    for one in hooks {
        if let Err(error) = hook::run(one, state.as_bytes()) {
            warn(&parsed.global, &error.to_string());
        }
    }
}

fn bring_up(parsed: &Parsed, purpose: Purpose) -> Result<Up, OciError> {
    if parsed.has("no-pivot") {
        return Err(OciError::Refused("--no-pivot", "chroot(2) is no wall"));
    }
    let home = Home::new(&parsed.global.root, parsed.id()?)?;
    let bundle = absolute(&parsed.path("bundle").unwrap_or_else(|| PathBuf::from(".")))?;
    let (spec, bytes, warnings) = bundle::load(&bundle)?;
    for text in warnings {
        warn(&parsed.global, &text);
    }
    let linux = spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let cgroups_path = linux.and_then(|linux| linux.cgroups_path().as_deref()).map(Path::to_string_lossy);
    let groups = Groups::place(cgroups_path.as_deref(), &home.id, resources)?;
    let profile = linux.and_then(|linux| linux.seccomp().as_ref());
    profile.map_or(Ok(()), seccomp::check)?;
    let rootfs = root_directory(&spec, &bundle)?;
    let place = LaunchPlace {
        key: home.id.clone(),
        note: String::new(),
        rootfs: Rootfs::Directory {
            path: rootfs.to_string_lossy().into_owned(),
            read_only: spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false),
        },
        cgroup: edged_model::keeper::CgroupEntry::Inherit,
        netns_fd: None,
        seccomp: Vec::new(),
        cgroups: groups.view(has_cgroup_namespace(&spec)),
    };
    let translated = translate(&spec, place)?;
    check_terminal(&translated.launch, parsed, purpose)?;
    kernel::check_labels(&translated.launch)?;
    let hooks = EarlyHooks {
        prestart: life::hooks(&spec, |hooks| hooks.prestart())?,
        create_runtime: life::hooks(&spec, |hooks| hooks.create_runtime())?,
        poststart: life::hooks(&spec, |hooks| hooks.poststart())?,
        poststop: life::hooks(&spec, |hooks| hooks.poststop())?,
    };
    let notifier = profile.map(Notifier::connect).transpose()?.flatten();
    home.make()?;
    let job = Job {
        parsed,
        purpose,
        home: &home,
        bundle,
        rootfs,
        spec: &spec,
        config: &bytes,
        profile,
        groups: &groups,
        notifier,
    };
    let result = groups.create(resources).map_err(OciError::from).and_then(|()| job.launch(translated, hooks));
    result.inspect_err(|_| {
        // What failed is what is told; the rest of it is taken away as far as it goes.
        let _ = groups.kill_all();
        let _ = groups.remove();
        let _ = home.remove();
    })
}

struct EarlyHooks {
    prestart: Vec<Hook>,
    create_runtime: Vec<Hook>,
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
}

struct Job<'j> {
    parsed: &'j Parsed,
    purpose: Purpose,
    home: &'j Home,
    bundle: PathBuf,
    rootfs: PathBuf,
    spec: &'j Spec,
    config: &'j [u8],
    profile: Option<&'j LinuxSeccomp>,
    groups: &'j Groups,
    notifier: Option<Notifier>,
}

impl Job<'_> {
    /// What need not be there before the child is: done while that makes its file system, on another processor where
    /// there is one.
    fn beside(&self, launching: &Launching, launch: &LaunchSpec) -> Result<(), OciError> {
        let compiled = match self.profile.filter(|_| launch.seccomp_follows) {
            Some(profile) => {
                let filter = seccomp::compile(profile)?;
                // A child that has failed by now says why.
                let _ = spawn::give_filter(launching.talk.as_fd(), &filter);
                filter
            }
            None => Vec::new(),
        };
        let filter = if launch.seccomp_follows { &compiled } else { &launch.seccomp };
        // For `exec`: the bundle may be gone by then.
        let write = |path: PathBuf, bytes: &[u8]| std::fs::write(&path, bytes).map_err(OciError::file(&path));
        write(self.home.config(), self.config)?;
        if filter.is_empty() { Ok(()) } else { write(self.home.filter(), filter) }
    }

    fn launch(&self, translated: Translated, hooks: EarlyHooks) -> Result<Up, OciError> {
        let proof = SingleThread::prove().map_err(|error| OciError::system("threads", error))?;
        let mut fds = Vec::new();
        let mut launch = self.prepare(&proof, translated, &mut fds, &hooks)?;
        let offsets = std::mem::take(&mut launch.1);
        let launching = spawn::launch(&proof, &launch.0, &fds, None).map_err(|error| {
            kernel::missing_namespace(launch.0.namespaces).map_or_else(|| OciError::from(error), OciError::from)
        })?;
        drop(fds);
        let seen = self.beside(&launching, &launch.0).and_then(|()| self.see_through(&launching, &hooks, &offsets));
        match seen {
            Ok((record, master)) => {
                let hooks = LateHooks { poststart: hooks.poststart, poststop: hooks.poststop };
                Ok(Up { home: self.home.clone(), record, launching, hooks, master })
            }
            Err(error) => {
                let _ = edged_sys::pidfd::send_signal(launching.pidfd.as_fd(), 9);
                let pid = rustix::process::Pid::from_raw(launching.pid);
                let _ = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
                Err(error)
            }
        }
    }

    /// Opens what the launch names by index.
    fn prepare(
        &self,
        proof: &SingleThread,
        translated: Translated,
        fds: &mut Vec<OwnedFd>,
        hooks: &EarlyHooks,
    ) -> Result<(LaunchSpec, Offsets), OciError> {
        let Translated { mut launch, joins, idmaps, time_offsets } = translated;
        let put = |fd: OwnedFd, fds: &mut Vec<OwnedFd>| {
            fds.push(fd);
            u32::try_from(fds.len() - 1).unwrap_or(u32::MAX)
        };
        for (flag, path) in joins {
            let file = std::fs::File::open(&path).map_err(OciError::file(&path))?;
            launch.joins.push(NamespaceJoin { flag, fd: put(file.into(), fds) });
        }
        for (place, map) in idmaps {
            let source = launch.mounts[place].source.clone();
            let tree = idmapped_tree(proof, &source, &map, launch.mounts[place].recursive)?;
            launch.mounts[place].tree_fd = Some(put(tree, fds));
        }
        if self.purpose == Purpose::Create {
            launch.gate_fd = Some(put(self.open_gate()?, fds));
        }
        if launch.stdio == Stdio::Pipes {
            let own = |fd: std::os::fd::BorrowedFd<'_>| {
                fd.try_clone_to_owned().map_err(|error| OciError::system("standard streams", error))
            };
            launch.stdio = Stdio::Given {
                stdin_fd: put(own(rustix::stdio::stdin())?, fds),
                stdout_fd: put(own(rustix::stdio::stdout())?, fds),
                stderr_fd: put(own(rustix::stdio::stderr())?, fds),
            };
        }
        if let Some(notifier) = &self.notifier {
            let socket =
                notifier.socket.try_clone().map_err(|error| OciError::system("the listener's socket", error))?;
            launch.seccomp_listener_fd = Some(put(socket, fds));
        }
        let (entry, cgroup_fds) = self.groups.entry(fds.len())?;
        launch.cgroup = entry;
        fds.extend(cgroup_fds);
        launch.kept_fds = preserved(self.parsed)?;
        launch.keep_keyring = self.parsed.has("no-new-keyring");
        launch.hold = launch.namespaces & bits(CloneFlags::CLONE_NEWUSER) != 0
            || self.notifier.is_some()
            || !time_offsets.is_empty()
            || !hooks.prestart.is_empty()
            || !hooks.create_runtime.is_empty()
            || !launch.create_container_hooks.is_empty()
            || !launch.start_container_hooks.is_empty();
        match self.profile {
            Some(profile) if launch.hold => launch.seccomp = seccomp::compile(profile)?,
            profile => launch.seccomp_follows = profile.is_some(),
        }
        Ok((launch, time_offsets))
    }

    /// The socket at which the program waits for `start`. Bound by a short name: the path may be longer than a socket's
    /// may be.
    fn open_gate(&self) -> Result<OwnedFd, OciError> {
        let gate = |errno: rustix::io::Errno| OciError::File { path: self.home.gate(), source: errno.into() };
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        let directory = rustix::fs::open(&self.home.path, flags, rustix::fs::Mode::empty()).map_err(gate)?;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(gate)?;
        rustix::net::bind(&socket, &short_address(&directory, "gate").map_err(gate)?).map_err(gate)?;
        rustix::net::listen(&socket, 1).map_err(gate)?;
        Ok(socket)
    }

    /// Hears the child out until it waits at its gate, or runs.
    fn see_through(
        &self,
        launching: &Launching,
        hooks: &EarlyHooks,
        offsets: &Offsets,
    ) -> Result<(Record, Option<OwnedFd>), OciError> {
        let pid = launching.pid;
        let record = Record {
            oci_version: state::OCI_VERSION.to_owned(),
            id: self.home.id.clone(),
            pid,
            bundle: self.bundle.clone(),
            rootfs: self.rootfs.clone(),
            created: state::rfc3339(state::now()),
            annotations: self.spec.annotations().clone().unwrap_or_default(),
            // It has not been waited for: its number is its own, even if it has ended.
            start_ticks: state::start_ticks(pid).unwrap_or(0),
            groups: self.groups.clone(),
        };
        let mut own_master = None;
        loop {
            let heard = spawn::hear(launching.talk.as_fd());
            match heard.map_err(|error| OciError::system("hearing of the child", error))? {
                Heard::Master(master) => match self.parsed.path("console-socket") {
                    Some(socket) => terminal::give_away(&socket, &master)?,
                    None => own_master = Some(master),
                },
                Heard::Holding => self.let_go_on(launching, &record, hooks, offsets)?,
                Heard::Ready => break,
                Heard::Silence if self.purpose == Purpose::Run => break,
                Heard::Silence => return Err(OciError::Vanished),
                Heard::Failed(failure) => return Err(OciError::Step { failure }),
            }
        }
        if let Some(path) = self.parsed.path("pid-file") {
            state::write_renamed(&path, pid.to_string().as_bytes())?;
        }
        self.home.save(&record)?;
        Ok((record, own_master))
    }

    /// The namespaces are there: clocks are set, hooks of the runtime run.
    fn let_go_on(
        &self,
        launching: &Launching,
        record: &Record,
        hooks: &EarlyHooks,
        offsets: &Offsets,
    ) -> Result<(), OciError> {
        if !offsets.is_empty() {
            let path = PathBuf::from(format!("/proc/{}/timens_offsets", launching.pid));
            let lines: String =
                offsets.iter().map(|(clock, secs, nanos)| format!("{clock} {secs} {nanos}\n")).collect();
            std::fs::write(&path, lines).map_err(OciError::file(&path))?;
        }
        let state = record.as_state(Status::Creating).to_string();
        let most = edged_sys::child::MAX_STATE_BYTES;
        if state.len() > most {
            return Err(OciError::StateTooLarge { bytes: state.len(), most });
        }
        if !hooks.prestart.is_empty() || !hooks.create_runtime.is_empty() {
            // A hook may ask for it by id.
            self.home.save(record)?;
        }
        for one in hooks.prestart.iter().chain(&hooks.create_runtime) {
            hook::run(one, state.as_bytes())?;
        }
        let state = record.as_state(Status::Created).to_string();
        let say = |words: &str| {
            spawn::go_on(launching.talk.as_fd(), words.as_bytes()).map_err(|error| OciError::system("the child", error))
        };
        say(&state)?;
        let notifier = self.notifier.as_ref();
        notifier.map_or(Ok(()), |notifier| say(&notifier.words(record, Status::Creating, launching.pid)))
    }
}

type Offsets = Vec<(String, i64, u32)>;

fn absolute(path: &Path) -> Result<PathBuf, OciError> {
    std::fs::canonicalize(path).map_err(OciError::file(path))
}

fn root_directory(spec: &Spec, bundle: &Path) -> Result<PathBuf, OciError> {
    let root = spec.root().as_ref().ok_or(crate::spec::SpecError::Missing { field: "root" })?;
    absolute(&bundle.join(root.path()))
}

fn has_cgroup_namespace(spec: &Spec) -> bool {
    let namespaces = spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
    namespaces.into_iter().any(|namespace| namespace.typ() == oci_spec::runtime::LinuxNamespaceType::Cgroup)
}

/// A terminal needs somebody who takes it; without one, the socket would wait for nothing.
fn check_terminal(launch: &LaunchSpec, parsed: &Parsed, purpose: Purpose) -> Result<(), OciError> {
    let has = matches!(launch.stdio, Stdio::Terminal { .. });
    let socket = parsed.path("console-socket").is_some();
    let nobody = purpose == Purpose::Create || parsed.has("detach");
    let text = match (has, socket) {
        (true, false) if nobody => "process.terminal is true: --console-socket must say who gets the terminal",
        (false, true) => "--console-socket is given, but process.terminal is not true",
        _ => return Ok(()),
    };
    Err(OciError::Usage { text: text.to_owned() })
}

/// Descriptors from 3 on that go through; each must be open.
pub fn preserved(parsed: &Parsed) -> Result<u32, OciError> {
    let count = parsed.number("preserve-fds")?.unwrap_or(0);
    for number in 3..3_u32.saturating_add(count) {
        let there = std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok();
        if !there {
            return Err(OciError::NoPreservedFd { number, count });
        }
    }
    Ok(count)
}

fn idmapped_tree(
    proof: &SingleThread,
    source: &str,
    map: &crate::spec::Idmap,
    mount_recursive: bool,
) -> Result<OwnedFd, OciError> {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let path = Path::new(source);
    let failed = |errno: rustix::io::Errno| {
        OciError::system(
            &format!("idmapped mount of {source} (mount_setattr, Linux 5.12; not every file system can)"),
            errno,
        )
    };
    let opened = rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        .map_err(|errno| OciError::File { path: path.to_owned(), source: errno.into() })?;
    let tree = edged_sys::mount::clone_tree(opened.as_fd(), mount_recursive).map_err(failed)?;
    let namespace = spawn::user_namespace(proof, &map.uid_map, &map.gid_map)
        .map_err(|error| OciError::system("a user namespace for an idmapped mount (CONFIG_USER_NS)", error))?;
    edged_sys::mount::set_idmap(tree.as_fd(), namespace.as_fd(), map.recursive).map_err(failed)?;
    Ok(tree)
}

/// `/proc/self/fd/N/name`: short, whatever the directory's own path is.
fn short_address(directory: &OwnedFd, name: &str) -> Result<SocketAddrUnix, rustix::io::Errno> {
    use std::os::fd::AsRawFd;
    SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
}

/// Connects to the gate and hears whether exec was reached.
pub fn start(parsed: &Parsed) -> Result<(), OciError> {
    let (home, record) = state::find(&parsed.global.root, parsed.id()?)?;
    let wrong = |is: Status| OciError::WrongState {
        id: home.id.clone(),
        is: is.text(),
        verb: "start",
        wanted: Status::Created.text(),
    };
    match home.status(&record) {
        Status::Created => {}
        other => return Err(wrong(other)),
    }
    let poststart = match bundle::read(&home.config()).ok().and_then(|bytes| bundle::parse(&bytes).ok()) {
        Some((spec, _)) if spec.hooks().is_some() => life::hooks(&spec, |hooks| hooks.poststart())?,
        _ => Vec::new(),
    };
    let gate = |errno: rustix::io::Errno| OciError::File { path: home.gate(), source: errno.into() };
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let socket_file = rustix::fs::open(home.gate(), flags, rustix::fs::Mode::empty()).map_err(gate)?;
    // Whoever takes the name away is the one who starts.
    match std::fs::remove_file(home.gate()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(wrong(Status::Running)),
        removed => removed.map_err(OciError::file(&home.gate()))?,
    }
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(gate)?;
    use std::os::fd::AsRawFd;
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", socket_file.as_raw_fd())).map_err(gate)?;
    rustix::net::connect(&socket, &address).map_err(gate)?;
    match spawn::hear(socket.as_fd()).map_err(|error| OciError::system("hearing of the container", error))? {
        Heard::Failed(failure) => Err(OciError::Step { failure }),
        _ => {
            run_hooks(parsed, &poststart, &record, Status::Running);
            Ok(())
        }
    }
}
