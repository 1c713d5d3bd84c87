//! From a workload's manifest and its image to a launch: folders, files, wall, namespace, specification.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use edged_model::id::{SecretName, WorkloadName};
use edged_model::keeper::{IdMapping, LaunchSpec, Rootfs};
use edged_model::manifest::{Manifest, MountSource, NetworkMode, Protocol, Seccomp, Secret, UsernsMode, Workload};
use edged_model::reason::{Code, Reason};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType, Mount};

use super::copies::{self, LayerWay};
use super::isolate::Launch;
use super::place::{self, RunFiles};
use super::pull::ReadyImage;
use super::unread;
use super::user;
use super::user_ids::Ranges;
use super::volumes::VolumeIds;
use crate::config::{Allow, Places};
use crate::content::Content;
use crate::crash_point;
use crate::runtime::cgroup::{Cgroup, CgroupRoot, IoLimits, Limits};
use crate::runtime::defaults::{self, ContainerInputs};
use crate::runtime::seccomp;
use crate::runtime::spec::{LaunchPlace, launch_spec};
use crate::store::inline_chain;
use edged_oci::mounts::CgroupView;

/// What a start needs beyond the workload.
#[derive(Clone)]
pub struct StartContext {
    pub places: Places,
    pub content: Content,
    pub cgroups: CgroupRoot,
    /// Whether the kernel has POSIX message queues: asked once.
    pub has_mqueue: bool,
    pub allow: Allow,
    /// `runtime.user-namespaces`.
    pub user_namespaces: bool,
    pub user_ids: Arc<Ranges>,
    pub layer_way: Arc<LayerWay>,
    pub volume_ids: Arc<VolumeIds>,
}

/// Ready to be launched.
pub struct Prepared {
    pub spec: LaunchSpec,
    pub fds: Vec<OwnedFd>,
    pub cgroup: Cgroup,
}

/// Files a program may have open: what systemd gives a service as its hard limit.
const OPEN_FILES: u64 = 65_536;

/// The name under which a `none` workload's namespace is pinned: one, empty, for all of them.
const SHARED_NETNS: &str = "none";

/// What a manifest asks for that this device does not allow, or this version does not do. Asked before a generation is
/// staged, so that nothing is half started.
pub fn refusal(manifest: &Manifest, allow: &Allow) -> Option<Reason> {
    let not_yet = |field: String| {
        Some(Reason::new(Code::NotAllowedHere, format!("{field}: this version of edged cannot do that yet")))
    };
    if !manifest.networks.is_empty() {
        return not_yet("networks".to_owned());
    }
    manifest.workloads.iter().find_map(|(name, workload)| {
        let at = |field: &str| format!("workloads.{name}.{field}");
        if workload.resources.disk.is_some() {
            return not_yet(at("resources.disk"));
        }
        if workload.ports.iter().any(|port| port.protocol == Protocol::Udp) {
            return not_yet(at("ports (udp)"));
        }
        not_allowed(workload, allow).map(|(field, key)| {
            let text = format!("{}: this device does not allow it", at(&field));
            Reason::new(Code::NotAllowedHere, text).next(format!("set {key} in its agent.toml"))
        })
    })
}

fn not_allowed(workload: &Workload, allow: &Allow) -> Option<(String, &'static str)> {
    let under = |path: &str, roots: &[PathBuf]| {
        let clean = !Path::new(path).components().any(|part| part == std::path::Component::ParentDir);
        clean && roots.iter().any(|root| Path::new(path).starts_with(root))
    };
    for mount in &workload.mounts {
        if let MountSource::Bind(path) = &mount.source
            && !under(path, &allow.bind)
        {
            return Some((format!("mounts: bind of {path}"), "allow.bind"));
        }
    }
    if let Some(device) = workload.devices.iter().find(|device| !under(&device.path, &allow.devices)) {
        return Some((format!("devices: {}", device.path), "allow.devices"));
    }
    let plain = |name: &str| name.strip_prefix("CAP_").unwrap_or(name).to_owned();
    let allowed = |name: &&String| {
        allow.capabilities.iter().any(|known| plain(known) == plain(name))
            || crate::runtime::caps::DEFAULT.contains(&plain(name).as_str())
    };
    if let Some(name) = workload.capabilities.add.iter().find(|name| !allowed(name)) {
        return Some((format!("capabilities.add: {name}"), "allow.capabilities"));
    }
    if workload.network_mode == NetworkMode::Host && !allow.host_network {
        return Some(("networkMode: host".to_owned(), "allow.host-network"));
    }
    if workload.has_host_ids() && !allow.host_users {
        let field = if workload.userns_mode == UsernsMode::Host { "usernsMode: host" } else { "user: host" };
        return Some((field.to_owned(), "allow.host-users"));
    }
    if workload.seccomp == Seccomp::Unconfined && !allow.seccomp_unconfined {
        return Some(("seccomp: unconfined".to_owned(), "allow.seccomp-unconfined"));
    }
    None
}

/// Where the workload's namespace is pinned; `None` for the device's own.
pub fn netns_path(places: &Places, name: &WorkloadName, mode: NetworkMode) -> Option<PathBuf> {
    match mode {
        NetworkMode::Host => None,
        NetworkMode::None => Some(places.netns().join(SHARED_NETNS)),
        // A workload may be called `none` too.
        NetworkMode::Bridge => Some(places.netns().join(format!("w-{name}"))),
    }
}

/// Not for what reads layers: that may be damaged ([`unread::failed`]).
pub(super) fn failed(name: &WorkloadName, error: &dyn std::error::Error) -> Reason {
    Reason::new(Code::StartFailed, format!("{name} could not be started: {}", inline_chain(error)))
}

/// What is prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A run: all that is missing is made, walls included.
    Run,
    /// A command in a living run: nothing of that run may be touched, the manifest may say something else by now.
    Command,
}

/// Describes the launch, but for the namespaces: those are [`super::isolate`]'s. `copied`: the ids that its root has on the
/// disk, if not those inside. Blocking.
pub(super) fn prepare(
    purpose: Purpose,
    ctx: &StartContext,
    launch: &Launch<'_>,
    copied: Option<IdMapping>,
    note: String,
) -> Result<Prepared, Reason> {
    let Launch { name, workload, manifest, image } = *launch;
    let fail = |error: &dyn std::error::Error| failed(name, error);
    let layers: Vec<PathBuf> = image.layers.iter().map(|chain| ctx.content.layer(*chain)).collect();
    let root = match purpose {
        Purpose::Run => {
            let owner = copied.map_or(0, |ids| ids.outside);
            let root_name = copies::root_name(workload, copied);
            let root = place::writable_root(&ctx.places, name, root_name, workload.digest(), owner)
                .map_err(|error| fail(&error))?;
            crash_point::pass("place-made");
            root
        }
        Purpose::Command => place::root_paths(&ctx.places, name, copies::root_name(workload, copied)),
    };
    let cgroup = match purpose {
        Purpose::Run => {
            let limits = limits(workload, ctx.places.data());
            let cgroup = ctx.cgroups.create(name.as_str(), &limits).map_err(|error| fail(&error))?;
            cgroup.reset_peak();
            crash_point::pass("cgroup-made");
            cgroup
        }
        Purpose::Command => ctx.cgroups.open(name.as_str()),
    };
    let inputs = inputs(purpose, ctx, launch, &layers)?;
    let spec = defaults::spec(&inputs).map_err(|error| fail(&error))?;
    let (entry, fds) = cgroup.entry(0).map_err(|error| fail(&error))?;
    let filter = match workload.seccomp {
        Seccomp::Default => seccomp::default_filter().map_err(|error| fail(&error))?.to_vec(),
        Seccomp::Unconfined => Vec::new(),
    };
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let place = LaunchPlace {
        key: name.to_string(),
        note,
        rootfs: Rootfs::Overlay {
            lower: copied
                .map_or(layers, |ids| copies::paths(ctx, image, ids))
                .iter()
                .rev()
                .map(|layer| text(layer))
                .collect(),
            upper: text(&root.upper),
            work: text(&root.work),
            mount_at: text(&root.mount_at),
            volatile: false,
            read_only: workload.read_only,
        },
        cgroup: entry,
        netns_fd: None,
        seccomp: filter,
        cgroups: CgroupView::Namespace,
    };
    let mut spec = launch_spec(&spec, place).map_err(|error| fail(&error))?;
    spec.init = workload.init;
    spec.stop = super::stop::plan(manifest, name, workload, Some(image));
    Ok(Prepared { spec, fds, cgroup })
}

/// Thousandths of a core.
pub fn cpu_milli(workload: &Workload) -> u64 {
    workload.resources.cpu.unwrap_or_default().0
}

/// The walls that the manifest wants.
pub fn limits(workload: &Workload, data: &Path) -> Limits {
    Limits {
        memory_bytes: workload.resources.memory.unwrap_or_default().0,
        cpu_milli: cpu_milli(workload),
        pids: u64::from(workload.resources.pids),
        io: io_limits(workload, data),
    }
}

fn io_limits(workload: &Workload, data: &Path) -> IoLimits {
    use std::os::unix::fs::MetadataExt;
    let Some(io) = &workload.resources.io else { return IoLimits::default() };
    let device = std::fs::metadata(data).ok().map(|meta| meta.dev());
    IoLimits {
        disk: device.map(|device| (rustix::fs::major(device), rustix::fs::minor(device))),
        read_bytes: io.read_bytes.map(|bytes| bytes.0),
        write_bytes: io.write_bytes.map(|bytes| bytes.0),
        read_ops: io.read_ops,
        write_ops: io.write_ops,
    }
}

fn inputs(
    purpose: Purpose,
    ctx: &StartContext,
    launch: &Launch<'_>,
    layers: &[PathBuf],
) -> Result<ContainerInputs, Reason> {
    let Launch { name, workload, manifest, image } = *launch;
    let fail = |error: &dyn std::error::Error| failed(name, error);
    let user_text = workload.user_inside().or(image.user.as_deref()).unwrap_or_default();
    let user = user::resolve(user_text, layers).map_err(|error| unread::failed(name, &error))?;
    let hostname = workload.hostname.clone().unwrap_or_else(|| name.to_string());
    let paths = match purpose {
        Purpose::Run => {
            let files = run_files(ctx, name, workload, manifest, &hostname)?;
            place::run_files(&ctx.places, name, &files).map_err(|error| fail(&error))?
        }
        Purpose::Command => place::run_paths(&ctx.places, name),
    };
    let mount = |result: Result<Mount, oci_spec::OciSpecError>| result.map_err(|error| fail(&error));
    let mut mounts = vec![
        mount(defaults::bind(paths.hosts, "/etc/hosts", true))?,
        mount(defaults::bind(paths.resolv_conf, "/etc/resolv.conf", true))?,
        mount(defaults::bind(paths.hostname, "/etc/hostname", true))?,
    ];
    if !workload.secrets.is_empty() {
        mounts.push(mount(defaults::bind(paths.secrets, "/run/secrets", true))?);
    }
    for wanted in &workload.mounts {
        mounts.push(match &wanted.source {
            MountSource::Tmpfs { size } => mount(defaults::tmpfs(&wanted.target, size.0, wanted.read_only))?,
            MountSource::Bind(path) => mount(defaults::bind(path.into(), &wanted.target, wanted.read_only))?,
            MountSource::Volume(volume) => {
                let path = place::volume(&ctx.places, volume).map_err(|error| fail(&error))?;
                mount(defaults::bind(path, &wanted.target, wanted.read_only))?
            }
        });
    }
    let argv = arguments(workload, image);
    if argv.is_empty() {
        let text = format!("{name} has no command, and neither has its image");
        return Err(Reason::new(Code::StartFailed, text).next(format!("set workloads.{name}.command")));
    }
    Ok(ContainerInputs {
        argv,
        env: environment(workload, image, &hostname, user.home.as_deref()),
        cwd: workload.workdir.clone().or_else(|| image.workdir.clone()).unwrap_or_else(|| "/".to_owned()),
        uid: user.uid,
        gid: user.gid,
        additional_gids: user.additional_gids,
        hostname,
        root_read_only: workload.read_only,
        capabilities_add: workload.capabilities.add.clone(),
        capabilities_drop: workload.capabilities.drop.clone(),
        mounts,
        devices: workload.devices.iter().map(|wanted| device(name, wanted)).collect::<Result<_, _>>()?,
        cgroup_v2: ctx.cgroups.is_v2(),
        has_mqueue: ctx.has_mqueue,
        open_files_max: OPEN_FILES
            .min(rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(OPEN_FILES)),
    })
}

/// `command` replaces the entrypoint and, unless `args` says otherwise, the image's arguments with it (Kubernetes).
fn arguments(workload: &Workload, image: &ReadyImage) -> Vec<String> {
    let (entrypoint, cmd) = if workload.command.is_empty() {
        (&image.entrypoint, if workload.args.is_empty() { &image.cmd } else { &workload.args })
    } else {
        (&workload.command, &workload.args)
    };
    entrypoint.iter().chain(cmd).cloned().collect()
}

fn environment(workload: &Workload, image: &ReadyImage, hostname: &str, home: Option<&str>) -> Vec<String> {
    let mut all = std::collections::BTreeMap::from([
        ("PATH".to_owned(), edged_sys::child::DEFAULT_PATH.to_owned()),
        ("HOME".to_owned(), home.unwrap_or("/").to_owned()),
        ("HOSTNAME".to_owned(), hostname.to_owned()),
    ]);
    let pairs = image.env.iter().filter_map(|entry| entry.split_once('='));
    all.extend(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())));
    all.extend(workload.env.clone());
    all.into_iter().map(|(key, value)| format!("{key}={value}")).collect()
}

fn run_files(
    ctx: &StartContext,
    name: &WorkloadName,
    workload: &Workload,
    manifest: &Manifest,
    hostname: &str,
) -> Result<RunFiles, Reason> {
    let secret = |secret: &SecretName| {
        let bytes = match manifest.secrets.get(secret) {
            Some(Secret::Value(text)) => Ok(text.clone().into_bytes()),
            Some(Secret::File(file)) => {
                let places = ctx.places.config_file.parent().unwrap_or(Path::new("/etc/edged")).join("secrets");
                let file_name = Path::new(file).file_name().map(PathBuf::from).unwrap_or_default();
                std::fs::read(places.join(file_name))
            }
            None => Err(std::io::Error::from(std::io::ErrorKind::NotFound)),
        };
        bytes.map(|bytes| (secret.clone(), bytes)).map_err(|error| {
            Reason::new(Code::StartFailed, format!("{name} could not be started: secret {secret}: {error}"))
        })
    };
    Ok(RunFiles {
        hosts: format!("127.0.0.1 localhost {hostname}\n::1 localhost {hostname}\n"),
        // A device without a network yet has no such file; the workload starts all the same.
        resolv_conf: std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
        hostname: hostname.to_owned(),
        secrets: workload.secrets.iter().map(secret).collect::<Result<_, _>>()?,
    })
}

fn device(name: &WorkloadName, wanted: &edged_model::manifest::Device) -> Result<LinuxDevice, Reason> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let refused = |why: String| Reason::new(Code::StartFailed, format!("{name}: device {}: {why}", wanted.path));
    let meta = std::fs::metadata(&wanted.path).map_err(|error| refused(error.to_string()))?;
    let typ = if meta.file_type().is_char_device() {
        LinuxDeviceType::C
    } else if meta.file_type().is_block_device() {
        LinuxDeviceType::B
    } else {
        return Err(refused("is no device".to_owned()));
    };
    LinuxDeviceBuilder::default()
        .path(wanted.target.as_deref().unwrap_or(&wanted.path))
        .typ(typ)
        .major(i64::from(rustix::fs::major(meta.rdev())))
        .minor(i64::from(rustix::fs::minor(meta.rdev())))
        .file_mode(meta.mode() & 0o7777)
        .uid(meta.uid())
        .gid(meta.gid())
        .build()
        .map_err(|error| refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_devices_own_configuration_does_not_allow_is_refused_whoever_signed_it() {
        let refused = |field: &str, value: serde_json::Value, allow: &Allow| {
            let mut workload = serde_json::to_value(Workload::of_image("registry.example/app:1")).unwrap();
            workload[field] = value;
            let workload: Workload = serde_json::from_value(workload).unwrap();
            let workloads = [("app".parse().unwrap(), workload.into())].into();
            refusal(&Manifest { workloads, ..Manifest::empty() }, allow)
        };
        let bind = |path: &str| serde_json::json!([{ "source": { "bind": path }, "target": "/in" }]);
        let device = serde_json::json!([{ "path": "/dev/ttyUSB0" }]);
        let nothing = Allow::default();
        let all = Allow {
            bind: vec!["/srv/data".into()],
            devices: vec!["/dev/ttyUSB0".into()],
            capabilities: vec!["SYS_ADMIN".to_owned()],
            host_network: true,
            host_users: true,
            seccomp_unconfined: true,
        };
        for (field, value, key) in [
            ("mounts", bind("/srv/data/one"), "allow.bind"),
            ("devices", device, "allow.devices"),
            ("capabilities", serde_json::json!({ "add": ["CAP_SYS_ADMIN"] }), "allow.capabilities"),
            ("networkMode", "host".into(), "allow.host-network"),
            ("usernsMode", "host".into(), "allow.host-users"),
            ("seccomp", "unconfined".into(), "allow.seccomp-unconfined"),
        ] {
            let why = refused(field, value.clone(), &nothing).expect(field);
            assert!(why.code == Code::NotAllowedHere && why.next.contains(key), "{why}");
            assert_eq!(refused(field, value, &all), None, "{field}");
        }
        for around in ["/srv/data/../../etc", "/srv/database", "/"] {
            assert!(refused("mounts", bind(around), &all).is_some(), "{around}");
        }
    }
}
