//! `mounts` of the specification: every option word, and what a mount of type `cgroup` becomes on this host.

use std::path::PathBuf;

use edged_model::keeper::MountStep;
use nix::mount::MsFlags;
use oci_spec::runtime::Mount;

use crate::spec::SpecError;

/// What the container may see of cgroups.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CgroupView {
    /// A cgroup namespace on cgroup v2: a mount of its own shows the container's part.
    #[default]
    Namespace,
    /// cgroup v2 without a namespace: the container's directory is bound.
    Bind(PathBuf),
    /// cgroup v1: for each hierarchy its name under `/sys/fs/cgroup` and the container's directory.
    Hierarchies(Vec<(String, PathBuf)>),
}

/// One step, and whether the mount is idmapped (with all below it).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub step: MountStep,
    pub idmap: Option<bool>,
}

/// Option words of mount(8) that are flags of a mount: set, or cleared. With an `r` before it a word is meant for every
/// mount below as well (config.md, "Linux mount options").
const FLAG_WORDS: [(&str, MsFlags, bool); 18] = [
    ("ro", MsFlags::MS_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("nodev", MsFlags::MS_NODEV, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("norelatime", MsFlags::MS_RELATIME, false),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("nostrictatime", MsFlags::MS_STRICTATIME, false),
    ("nosymfollow", NOSYMFOLLOW, true),
    ("symfollow", NOSYMFOLLOW, false),
];

/// linux/mount.h; the crate does not know it.
const NOSYMFOLLOW: MsFlags = MsFlags::from_bits_retain(256);

const PROPAGATION_WORDS: [(&str, MsFlags); 4] = [
    ("private", MsFlags::MS_PRIVATE),
    ("slave", MsFlags::MS_SLAVE),
    ("shared", MsFlags::MS_SHARED),
    ("unbindable", MsFlags::MS_UNBINDABLE),
];

/// Words of the file system itself that fsconfig(2) takes as flags; their opposites are what a new one is.
const FILESYSTEM_WORDS: [&str; 4] = ["sync", "dirsync", "lazytime", "mand"];
const FILESYSTEM_DEFAULTS: [&str; 9] =
    ["async", "nolazytime", "nomand", "loud", "silent", "iversion", "noiversion", "defaults", "acl"];

enum Word {
    Flag { flag: MsFlags, set: bool, below: bool },
    Propagation { kind: MsFlags, recursive: bool },
    Bind { recursive: bool },
    Idmap { recursive: bool },
    Remount,
    CopyUp,
    SourceNoFollow,
    Filesystem,
    Nothing,
}

fn read(word: &str) -> Word {
    let below = word.strip_prefix('r');
    let flag = |word: &str| FLAG_WORDS.iter().find(|(known, ..)| *known == word).copied();
    let propagation = |word: &str| PROPAGATION_WORDS.iter().find(|(known, _)| *known == word).copied();
    match word {
        "bind" => Word::Bind { recursive: false },
        "rbind" => Word::Bind { recursive: true },
        "idmap" => Word::Idmap { recursive: false },
        "ridmap" => Word::Idmap { recursive: true },
        "remount" => Word::Remount,
        "tmpcopyup" => Word::CopyUp,
        "copy-symlink" | "src-nofollow" => Word::SourceNoFollow,
        _ if FILESYSTEM_DEFAULTS.contains(&word) => Word::Nothing,
        _ if FILESYSTEM_WORDS.contains(&word) => Word::Filesystem,
        _ => {
            if let Some((_, flag, set)) = flag(word) {
                Word::Flag { flag, set, below: false }
            } else if let Some((_, flag, set)) = below.and_then(flag) {
                Word::Flag { flag, set, below: true }
            } else if let Some((_, kind)) = propagation(word) {
                Word::Propagation { kind, recursive: false }
            } else if let Some((_, kind)) = below.and_then(propagation) {
                Word::Propagation { kind, recursive: true }
            } else {
                Word::Filesystem
            }
        }
    }
}

/// Turns one entry of `mounts` into what the child does.
pub fn steps(mount: &Mount, cgroups: &CgroupView) -> Result<Vec<Planned>, SpecError> {
    let planned = step(mount)?;
    if planned.step.fstype == "cgroup" || planned.step.fstype == "cgroup2" && !planned.step.bind {
        return Ok(cgroup_steps(planned.step, cgroups));
    }
    Ok(vec![planned])
}

/// `linux.mountLabel` is for new file systems; what is bound has labels of its own, and the kernel decides about those of
/// its own pseudo file systems.
pub fn takes_label(step: &MountStep) -> bool {
    const UNLABELLED: [&str; 4] = ["proc", "sysfs", "cgroup", "cgroup2"];
    !step.bind && !step.remount && !UNLABELLED.contains(&step.fstype.as_str())
}

fn step(mount: &Mount) -> Result<Planned, SpecError> {
    let mut step = MountStep::default();
    let (mut set, mut clear, mut set_below, mut clear_below) =
        (MsFlags::empty(), MsFlags::empty(), MsFlags::empty(), MsFlags::empty());
    let mut propagation = MsFlags::empty();
    let mut data = Vec::new();
    let mut idmap = None;
    for option in mount.options().iter().flatten().map(String::as_str) {
        match read(option) {
            Word::Flag { flag, set: wanted, below } => {
                let (on, off) = if below { (&mut set_below, &mut clear_below) } else { (&mut set, &mut clear) };
                on.set(flag, wanted);
                off.set(flag, !wanted);
            }
            Word::Propagation { kind, recursive } => {
                propagation |= kind;
                step.recursive |= recursive;
            }
            Word::Bind { recursive } => {
                step.bind = true;
                step.recursive |= recursive;
            }
            Word::Idmap { recursive } => idmap = Some(recursive),
            Word::Remount => step.remount = true,
            Word::CopyUp => step.copy_up = true,
            Word::SourceNoFollow => step.source_no_follow = true,
            Word::Filesystem => data.push(option),
            Word::Nothing => {}
        }
    }
    step.fstype = mount.typ().clone().unwrap_or_default();
    step.bind |= step.fstype == "bind";
    step.source = mount.source().as_ref().map(|source| source.to_string_lossy().into_owned()).unwrap_or_default();
    step.target = mount.destination().to_string_lossy().into_owned();
    if idmap.is_none() && mount.uid_mappings().as_ref().is_some_and(|maps| !maps.is_empty()) {
        idmap = Some(false);
    }
    check(&step, idmap.is_some(), &data)?;
    step.flags = ms_bits(set);
    step.clear = ms_bits(clear);
    step.flags_below = ms_bits(set_below);
    step.clear_below = ms_bits(clear_below);
    step.propagation = ms_bits(propagation);
    step.data = data.join(",");
    Ok(Planned { step, idmap })
}

fn check(step: &MountStep, idmap: bool, data: &[&str]) -> Result<(), SpecError> {
    let invalid = |field, value: &str| Err(SpecError::Invalid { field, value: value.to_owned() });
    if step.bind && step.source.is_empty() {
        return Err(SpecError::Missing { field: "mounts.source" });
    }
    if !step.bind && !step.remount && step.fstype.is_empty() {
        return Err(SpecError::Missing { field: "mounts.type" });
    }
    if idmap && !step.bind {
        return invalid("mounts.options", "idmap without bind");
    }
    if step.copy_up && step.fstype != "tmpfs" {
        return invalid("mounts.options", "tmpcopyup without tmpfs");
    }
    if let (true, Some(word)) = (step.bind, data.first()) {
        return Err(SpecError::Unsupported { field: "mounts.options", value: format!("{word} of a bind mount") });
    }
    Ok(())
}

fn cgroup_steps(step: MountStep, cgroups: &CgroupView) -> Vec<Planned> {
    let plain = |step| Planned { step, idmap: None };
    match cgroups {
        CgroupView::Namespace => {
            vec![plain(MountStep { fstype: "cgroup2".to_owned(), source: "cgroup".to_owned(), ..step })]
        }
        CgroupView::Bind(path) => vec![plain(bind(&step, path, &step.target))],
        CgroupView::Hierarchies(hierarchies) => {
            let tmpfs = MountStep {
                fstype: "tmpfs".to_owned(),
                source: "tmpfs".to_owned(),
                data: "mode=755,size=64k".to_owned(),
                flags: step.flags & !ms_bits(MsFlags::MS_RDONLY),
                ..step.clone()
            };
            let target = |name: &String| format!("{}/{name}", step.target);
            let binds = hierarchies.iter().map(|(name, path)| plain(bind(&step, path, &target(name))));
            let mut steps = vec![plain(tmpfs)];
            steps.extend(binds);
            if step.flags & ms_bits(MsFlags::MS_RDONLY) != 0 {
                steps.push(plain(MountStep { remount: true, ..step }));
            }
            steps
        }
    }
}

fn bind(step: &MountStep, source: &std::path::Path, target: &str) -> MountStep {
    MountStep {
        source: source.to_string_lossy().into_owned(),
        target: target.to_owned(),
        bind: true,
        data: String::new(),
        ..step.clone()
    }
}

/// `linux.rootfsPropagation` as MS_* flags; 0 where it says nothing.
pub fn root_propagation(word: Option<&str>) -> Result<u64, SpecError> {
    match word.filter(|word| !word.is_empty()).map(|word| (word, read(word))) {
        None => Ok(0),
        Some((_, Word::Propagation { kind, recursive })) => {
            let recursion = if recursive { MsFlags::MS_REC } else { MsFlags::empty() };
            Ok(ms_bits(kind | recursion))
        }
        Some((word, _)) => Err(SpecError::Invalid { field: "linux.rootfsPropagation", value: word.to_owned() }),
    }
}

#[expect(clippy::useless_conversion, reason = "c_ulong is 32 bits on armv7")]
pub(crate) fn ms_bits(flags: MsFlags) -> u64 {
    u64::from(flags.bits())
}

/// Every word that is understood, for `features`.
pub fn words() -> Vec<String> {
    let flags = FLAG_WORDS.iter().flat_map(|(word, ..)| [(*word).to_owned(), format!("r{word}")]);
    let propagation = PROPAGATION_WORDS.iter().flat_map(|(word, _)| [(*word).to_owned(), format!("r{word}")]);
    let own = ["bind", "rbind", "idmap", "ridmap", "remount", "tmpcopyup"];
    let others = own.iter().chain(&FILESYSTEM_WORDS).chain(&FILESYSTEM_DEFAULTS).map(|word| (*word).to_owned());
    let mut words: Vec<_> = flags.chain(propagation).chain(others).collect();
    words.sort();
    words
}
