//! `edged`: the keeper, or with `agent` as its first word the agent that the keeper starts. Under the name `edgectl` it
//! is that program, and under the name `edged-oci`, or with `oci` as the first word, it is an OCI runtime for other
//! engines: one file is all of them, because what they share is most of each.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use edged::config::{Config, Places};
use edged_keeper::{KeeperConfig, SOCKET_ENV};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

#[derive(Debug, Parser)]
#[command(name = "edged", version, about = "Runs signed containers on an edge device")]
struct Options {
    /// Keep everything under this directory (a host; several may run side by side)
    #[arg(long)]
    root: Option<PathBuf>,
    /// Default: /etc/edged/agent.toml, or agent.toml under --root
    #[arg(long)]
    config: Option<PathBuf>,
    /// Set by the keeper: this is a device, edged is PID 1
    #[arg(long, hide = true)]
    device: bool,
}

impl Options {
    /// Paths that stay right wherever the keeper and the agent stand.
    fn absolute(mut self) -> Self {
        for path in [&mut self.root, &mut self.config].into_iter().flatten() {
            *path = std::path::absolute(&*path).unwrap_or_else(|_| path.clone());
        }
        self
    }

    fn words(&self) -> Vec<String> {
        let path = |name: &str, path: &Option<PathBuf>| {
            path.iter().flat_map(|path| [name.to_owned(), path.to_string_lossy().into_owned()]).collect::<Vec<_>>()
        };
        let mut words = [path("--root", &self.root), path("--config", &self.config)].concat();
        words.extend(self.device.then(|| "--device".to_owned()));
        words
    }

    fn places(&self) -> Places {
        Places::new(self.root.as_deref(), self.config.as_deref())
    }
}

fn main() -> ExitCode {
    let mut words: Vec<OsString> = std::env::args_os().collect();
    let called =
        |program: &str| words.first().is_some_and(|name| Path::new(name).file_name() == Some(program.as_ref()));
    if called("edgectl") {
        return edged::cli::run();
    }
    // Before anything else is looked at: engines count microseconds.
    if called(edged_oci::PROGRAM) {
        return edged_oci::main(words.into_iter().skip(1), env!("CARGO_PKG_VERSION"));
    }
    if words.get(1).is_some_and(|word| word == "oci") {
        return edged_oci::main(words.into_iter().skip(2), env!("CARGO_PKG_VERSION"));
    }
    if words.get(1).is_some_and(|word| word == "agent") {
        words.remove(1);
        return match agent(&Options::parse_from(words)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("edged[agent]: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    if words.get(1).is_some_and(|word| word == edged_keeper::SET_ASIDE) {
        return edged_keeper::set_aside(&words[2..]);
    }
    // What keeper and agent do before they run, and no more.
    if words.get(1).is_some_and(|word| word == edged_keeper::REHEARSE) {
        words.remove(1);
        let options = Options::parse_from(words);
        return match keeper_config(&options).and_then(|_| agent_config(&options.places())) {
            Ok(_) => edged_keeper::rehearse(),
            Err(error) => {
                println!("{}", in_one_line(&error));
                ExitCode::FAILURE
            }
        };
    }
    // As PID 1 the words are what the kernel did not understand of its command line.
    let is_device = std::process::id() == 1;
    let options =
        if is_device { Options { root: None, config: None, device: true } } else { Options::parse().absolute() };
    match keeper_config(&options) {
        Ok(config) => edged_keeper::run(config),
        Err(error) => {
            eprintln!("edged: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What was read and what is wrong with it: in between the reader of TOML shows the place.
fn in_one_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    match (lines.next(), lines.next_back()) {
        (Some(first), Some(last)) => format!("{first}: {last}"),
        (first, _) => first.unwrap_or_default().to_owned(),
    }
}

fn keeper_config(options: &Options) -> Result<KeeperConfig> {
    let places = options.places();
    if !options.device {
        check_host(&places)?;
    }
    // PID 1 reads no file it could stumble over: the agent's wall is the default there.
    let config = if options.device { Config::default() } else { Config::load(&places.config_file)? };
    Ok(KeeperConfig {
        agent_args: options.words(),
        device: options.device,
        agent_memory_max_bytes: config.limits.agent_memory.0,
        stop_timeout_ms: 120_000,
        built_at: edged::BUILT_AT,
        data: places.data().to_owned(),
    })
}

/// Says what is missing now, rather than fail at the first container.
fn check_host(places: &Places) -> Result<()> {
    use anyhow::ensure;
    ensure!(nix::unistd::geteuid().is_root(), "edged must run as root: it makes namespaces, mounts and cgroups");
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has_overlay = filesystems.lines().any(|line| line.trim_end().ends_with("overlay"));
    ensure!(has_overlay, "this kernel has no overlayfs (CONFIG_OVERLAY_FS; try `modprobe overlay`)");
    let instance = edged_model::id::Digest::of(places.data().as_os_str().as_encoded_bytes()).short();
    edged::runtime::cgroup::CgroupRoot::detect(Some(&instance)).context("cgroups")?;
    Ok(())
}

fn agent_config(places: &Places) -> Result<(Config, Targets)> {
    let config = Config::load(&places.config_file)?;
    let filter = config.log.level.parse().context("log.level in agent.toml")?;
    Ok((config, filter))
}

fn agent(options: &Options) -> Result<()> {
    let places = options.places();
    let (config, filter) = agent_config(&places)?;
    log(filter);
    let number = std::env::var(SOCKET_ENV).ok().and_then(|text| text.parse().ok());
    let number = number.context("the agent is started by the keeper (run `edged`)")?;
    let socket = edged_sys::inherit::take(number).context("the keeper's socket")?;
    // One thread for the loop; what blocks (disk, network) has threads of its own.
    let mut builder = tokio::runtime::Builder::new_current_thread();
    // A thread that has nothing to do for a second ends, and its stack with it: twenty starts at once have sixteen.
    builder.enable_all().max_blocking_threads(16).thread_keep_alive(std::time::Duration::from_secs(1));
    let runtime = builder.build()?;
    let ended = runtime.block_on(edged::reconcile::run(places, config, socket, options.device));
    // Nobody waits for what blocks: it is crash-only.
    runtime.shutdown_background();
    ended
}

/// To the journal where there is one, else to stderr: the serial console of a device, the terminal of a developer.
fn log(filter: Targets) {
    let registry = tracing_subscriber::registry().with(filter);
    match tracing_journald::layer() {
        Ok(journal) if std::env::var_os("JOURNAL_STREAM").is_some() => registry.with(journal).init(),
        _ => registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false)).init(),
    }
}
