//! `exec`: one more program in a container that runs, with what the specification says of the first one unless told
//! otherwise.

use std::os::fd::AsFd;

use edged_model::keeper::{LaunchSpec, Stdio};
use edged_sys::privilege;
use edged_sys::spawn::{self, Heard, SingleThread};
use oci_spec::runtime::{Process, Spec};

use crate::arguments::Parsed;
use crate::create::preserved;
use crate::error::OciError;
use crate::notifier::Notifier;
use crate::spec::{SpecError, launch_process};
use crate::state::{self, Home, Record, Status};
use crate::{bundle, caps, kernel, seccomp, terminal, wait};

pub fn exec(parsed: &Parsed) -> Result<u8, OciError> {
    let (home, record) = state::find(&parsed.global.root, parsed.id()?)?;
    let status = home.status(&record);
    let wrong = || OciError::WrongState {
        id: home.id.clone(),
        is: status.text(),
        verb: "exec",
        wanted: Status::Running.text(),
    };
    match status {
        Status::Running => {}
        Status::Paused if parsed.has("ignore-paused") => {}
        _ => return Err(wrong()),
    }
    let init = record.process().ok_or_else(wrong)?;
    let spec = own_spec(&home)?;
    let process = process(parsed, &spec)?;
    let mut launch = launch_process(&process)?;
    kernel::check_labels(&launch)?;
    if launch.stdio == Stdio::Pipes && parsed.path("console-socket").is_some() {
        let text = "--console-socket is given, but there is no terminal: --tty, or process.terminal".to_owned();
        return Err(OciError::Usage { text });
    }
    let notifier = same_filter(&home, &spec, &mut launch)?;
    let cpus = process.exec_cpu_affinity().as_ref();
    if let Some(initial) = cpus.and_then(|cpus| cpus.initial().as_deref()) {
        let own = privilege::set_cpus(&cpu_list(initial)?);
        own.map_err(|error| OciError::system("process.execCPUAffinity.initial", error))?;
    }
    launch.cpus = cpus.and_then(|cpus| cpus.cpu_affinity_final().as_deref()).map_or(Ok(Vec::new()), cpu_list)?;
    let signals = if parsed.has("detach") { None } else { Some(wait::Signals::block()?) };
    let mut fds = prepare(parsed, &record, &mut launch)?;
    if let Some(notifier) = &notifier {
        launch.seccomp_listener_fd = Some(u32::try_from(fds.len()).unwrap_or(u32::MAX));
        let socket = notifier.socket.try_clone();
        fds.push(socket.map_err(|error| OciError::system("the listener's socket", error))?);
    }
    let proof = SingleThread::prove().map_err(|error| OciError::system("threads", error))?;
    let launching = spawn::launch(&proof, &launch, &fds, Some(init.as_fd()))?;
    drop(fds);
    if let Some(notifier) = notifier {
        let words = notifier.words(&record, Status::Running, launching.pid);
        // A child that has failed by now says why, below.
        let _ = spawn::go_on(launching.talk.as_fd(), words.as_bytes());
    }
    let mut own_master = None;
    loop {
        let heard = spawn::hear(launching.talk.as_fd());
        match heard.map_err(|error| OciError::system("hearing of the program", error))? {
            Heard::Master(master) => match parsed.path("console-socket") {
                Some(socket) => terminal::give_away(&socket, &master)?,
                None => own_master = Some(master),
            },
            Heard::Holding | Heard::Ready => {}
            Heard::Silence => break,
            Heard::Failed(failure) => return Err(OciError::Step { failure }),
        }
    }
    if let Some(path) = parsed.path("pid-file") {
        state::write_renamed(&path, launching.pid.to_string().as_bytes())?;
    }
    let Some(signals) = signals else { return Ok(crate::SUCCESS) };
    match own_master {
        Some(master) => terminal::relay(master.as_fd(), &signals, launching.pidfd.as_fd(), launching.pid),
        None => signals.wait_for(launching.pid, launching.pidfd.as_fd()),
    }
}

/// The container's own filter; somebody outside decides for it as for the container's first program.
fn same_filter(home: &Home, spec: &Spec, launch: &mut LaunchSpec) -> Result<Option<Notifier>, OciError> {
    let filter = home.filter();
    if !filter.exists() {
        return Ok(None);
    }
    launch.seccomp = std::fs::read(&filter).map_err(OciError::file(&filter))?;
    let Some(profile) = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()) else { return Ok(None) };
    launch.seccomp_flags = seccomp::flags(profile);
    Notifier::connect(profile)
}

fn own_spec(home: &Home) -> Result<Spec, OciError> {
    let path = home.config();
    let config = |(place, why)| OciError::Config { path: path.clone(), place, why };
    let (spec, _) = bundle::parse(&bundle::read(&path)?).map_err(config)?;
    Ok(spec)
}

/// `0-3,7` (cpuset(7), "List format").
fn cpu_list(text: &str) -> Result<Vec<u32>, OciError> {
    let wrong = || SpecError::Invalid { field: "process.execCPUAffinity", value: text.to_owned() };
    let number = |text: &str| text.trim().parse::<u32>().ok().filter(|cpu| *cpu < MOST_CPUS).ok_or_else(wrong);
    let mut cpus = Vec::new();
    for part in text.split(',').filter(|part| !part.trim().is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to) = (number(from)?, number(to)?);
        if from > to {
            return Err(wrong().into());
        }
        cpus.extend(from..=to);
    }
    Ok(cpus)
}

/// What a mask of sched_setaffinity(2) holds in every libc.
const MOST_CPUS: u32 = 1024;

fn prepare(parsed: &Parsed, record: &Record, launch: &mut LaunchSpec) -> Result<Vec<std::os::fd::OwnedFd>, OciError> {
    let (entry, mut fds) = record.groups.entry(0)?;
    launch.cgroup = entry;
    if launch.stdio == Stdio::Pipes {
        let first = u32::try_from(fds.len()).unwrap_or(u32::MAX);
        for stream in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
            let own = stream.try_clone_to_owned().map_err(|error| OciError::system("standard streams", error))?;
            fds.push(own);
        }
        launch.stdio = Stdio::Given { stdin_fd: first, stdout_fd: first + 1, stderr_fd: first + 2 };
    }
    launch.kept_fds = preserved(parsed)?;
    Ok(fds)
}

/// The process object: of a file, or the container's own with what the command line changes.
fn process(parsed: &Parsed, spec: &Spec) -> Result<Process, OciError> {
    if let Some(path) = parsed.path("process") {
        return bundle::parse_as(&path, &bundle::read(&path)?);
    }
    let mut process = spec.process().clone().ok_or(SpecError::Missing { field: "process" })?;
    let words = &parsed.words[1..];
    if words.is_empty() {
        return Err(OciError::Usage { text: "exec needs a command, or --process".to_owned() });
    }
    process.set_args(Some(words.to_vec()));
    process.set_terminal(Some(parsed.has("tty")));
    if let Some(cwd) = parsed.path("cwd") {
        process.set_cwd(cwd);
    }
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(parsed.values("env").map(str::to_owned));
    process.set_env(Some(env));
    set_user(parsed, &mut process)?;
    if parsed.has("no-new-privs") {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(profile) = parsed.value("apparmor") {
        process.set_apparmor_profile(Some(profile.to_owned()));
    }
    if let Some(label) = parsed.value("process-label") {
        process.set_selinux_label(Some(label.to_owned()));
    }
    add_capabilities(parsed, &mut process)?;
    Ok(process)
}

fn set_user(parsed: &Parsed, process: &mut Process) -> Result<(), OciError> {
    let number = |text: &str| {
        text.parse::<u32>().map_err(|_| OciError::Usage { text: format!("--user: `{text}` is not a number") })
    };
    let mut user = process.user().clone();
    if let Some(text) = parsed.value("user") {
        let (uid, gid) = text.split_once(':').map_or((text, None), |(uid, gid)| (uid, Some(gid)));
        user.set_uid(number(uid)?);
        if let Some(gid) = gid {
            user.set_gid(number(gid)?);
        }
    }
    let more = parsed.values("additional-gids").map(number).collect::<Result<Vec<_>, _>>()?;
    if !more.is_empty() {
        let mut gids = user.additional_gids().clone().unwrap_or_default();
        gids.extend(more);
        user.set_additional_gids(Some(gids));
    }
    process.set_user(user);
    Ok(())
}

fn add_capabilities(parsed: &Parsed, process: &mut Process) -> Result<(), OciError> {
    for name in parsed.values("cap") {
        let unknown = || OciError::Usage { text: format!("--cap: no capability `{name}`") };
        caps::bit(name).ok_or_else(unknown)?;
        let plain = name.strip_prefix("CAP_").unwrap_or(name);
        let capability = plain.parse::<oci_spec::runtime::Capability>().map_err(|_| unknown())?;
        let mut sets = process.capabilities().clone().unwrap_or_default();
        let with = |set: &Option<std::collections::HashSet<_>>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(capability);
            Some(set)
        };
        sets.set_bounding(with(sets.bounding()));
        sets.set_effective(with(sets.effective()));
        sets.set_permitted(with(sets.permitted()));
        process.set_capabilities(Some(sets));
    }
    Ok(())
}
