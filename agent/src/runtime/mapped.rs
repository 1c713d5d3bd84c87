//! The file systems of a container with ids of its own (user_namespaces(7)). On the disk everything keeps the ids that
//! the container sees; idmapped mounts (mount_setattr(2)) translate. So a range can change, a volume can go from one
//! workload to another, and what was written before there were ranges is still right.
//!
//! The container's own root has no power over the device's files, so all of it is made here, detached, and handed over by
//! descriptor: root, `/dev`, binds, and `/sys` where the network namespace is not the container's own. A thread does
//! it, in a mount namespace that ends with it: layers must be mounted somewhere for overlayfs to take them, and nobody
//! else shall see that.
//!
//! ```text
//! layer, layer, …  ─ idmapped ─┐
//! upper + work     ─ idmapped ─┴─> overlay, mounted by the device's root with the container's ids ─> descriptor
//! ```
//! Where that cannot be ([`takes_mapped_layers`]), the layers that come here are copies with the container's ids on the
//! disk, and nothing of the root is idmapped ([`Layers::Copied`]).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use edged_model::keeper::{DeviceNode, IdMapping, LaunchSpec, MountStep, NamespaceJoin, Rootfs};
use edged_sys::mount::{self, Attributes};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};

/// Where the root is put for a moment: every system has it, and anybody may enter it.
const MOUNT_AT: &str = "/sys";

#[derive(Debug, thiserror::Error)]
pub enum MappedError {
    #[error("{what} cannot be given ids of its own (idmapped mounts: {needs})")]
    Idmap {
        what: String,
        needs: &'static str,
        #[source]
        source: Errno,
    },
    #[error("overlay of {layers} layers (CONFIG_OVERLAY_FS)")]
    Overlay {
        layers: &'static str,
        #[source]
        source: Errno,
    },
    #[error("{path}")]
    Path {
        path: String,
        #[source]
        source: Errno,
    },
    #[error("device {path}: a workload with ids of its own takes devices under /dev only")]
    DeviceElsewhere { path: String },
    #[error("the thread that mounts")]
    Thread(#[source] io::Error),
}

/// Whose ids the layers and the writable root have on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layers {
    /// Those inside; mounts translate.
    Mapped,
    /// Those of the container on the device.
    Copied,
}

/// What is needed beyond the launch itself.
pub struct Around {
    pub layers: Layers,
    pub user: OwnedFd,
    pub network: Option<OwnedFd>,
    /// Whether `network` belongs to `user`; else `/sys` is made here.
    pub owns_network: bool,
    pub ids: IdMapping,
    /// Below these a bind must be idmapped: data that the workload owns.
    pub owned_by_workload: PathBuf,
    /// Below these a bind is taken as it is: files that have the right owners.
    pub ready: Vec<PathBuf>,
}

/// Changes `spec` to one for a container inside `around`, and gives the descriptors it now names; the first of them has
/// the index `first`.
pub fn map(spec: LaunchSpec, first: u32, around: Around) -> Result<(LaunchSpec, Vec<OwnedFd>), MappedError> {
    let thread = std::thread::Builder::new().name("mounts".to_owned());
    let work = move || Mapping { around, first, fds: Vec::new() }.run(spec);
    let running = thread.spawn(work).map_err(MappedError::Thread)?;
    running.join().unwrap_or_else(|_| Err(MappedError::Thread(io::Error::other("it failed"))))
}

/// Whether this kernel mounts an overlay over idmapped mounts of these directories, which lie where layers do.
pub fn takes_mapped_layers(directories: [String; 2], user: OwnedFd, ids: IdMapping) -> Result<bool, MappedError> {
    let probe = move || {
        own_mounts()?;
        let around = Around {
            layers: Layers::Mapped,
            user,
            network: None,
            owns_network: false,
            ids,
            owned_by_workload: PathBuf::new(),
            ready: Vec::new(),
        };
        match (Mapping { around, first: 0, fds: Vec::new() }).overlay(&directories, None, MOUNT_AT, false) {
            Ok(_) => Ok(true),
            Err(
                MappedError::Idmap { source: Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP, .. }
                | MappedError::Overlay { source: Errno::INVAL, .. },
            ) => Ok(false),
            Err(error) => Err(error),
        }
    };
    let thread = std::thread::Builder::new().name("mounts".to_owned());
    let running = thread.spawn(probe).map_err(MappedError::Thread)?;
    running.join().unwrap_or_else(|_| Err(MappedError::Thread(io::Error::other("it failed"))))
}

/// Whether mounts of what is at `path` can be idmapped.
pub fn can_be_idmapped(path: &Path, user: BorrowedFd<'_>) -> Result<bool, MappedError> {
    let name = path.to_string_lossy();
    let tree = open(&name).and_then(|opened| mount::clone_tree(opened.as_fd(), false)).map_err(at(&name))?;
    match mount::set_idmap(tree.as_fd(), user, false) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(false),
        Err(source) => Err(MappedError::Idmap { what: name.into_owned(), needs: NEEDS, source }),
    }
}

/// For this thread, which ends soon: what it mounts nobody else sees.
fn own_mounts() -> Result<(), MappedError> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| MappedError::Thread(error.into()))?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave).map_err(at("/"))
}

struct Mapping {
    around: Around,
    first: u32,
    fds: Vec<OwnedFd>,
}

fn at(path: &str) -> impl FnOnce(Errno) -> MappedError + '_ {
    move |source| MappedError::Path { path: path.to_owned(), source }
}

fn errno(error: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(error as i32)
}

const NEEDS: &str = "Linux 5.12, CONFIG_USER_NS, and a file system that can, such as ext4";

impl Mapping {
    fn run(mut self, mut spec: LaunchSpec) -> Result<(LaunchSpec, Vec<OwnedFd>), MappedError> {
        own_mounts()?;
        for step in &mut spec.mounts {
            if step.target == "/dev" && step.fstype == "tmpfs" {
                let tree = self.dev(step, &spec.device_nodes)?;
                self.use_tree(step, tree);
                spec.device_nodes.clear();
            } else if step.bind && step.tree_fd.is_none() {
                let tree = self.bind(step)?;
                self.use_tree(step, tree);
            }
        }
        if let Some(Rootfs::Overlay { lower, upper, work, mount_at, volatile, read_only }) = &spec.rootfs {
            let upper = (!*read_only || lower.len() < 2).then_some((upper.as_str(), work.as_str()));
            let tree = self.overlay(lower, upper, mount_at, *volatile)?;
            let tree_fd = self.put(tree);
            spec.rootfs = Some(Rootfs::Tree { tree_fd, mount_at: MOUNT_AT.to_owned(), read_only: *read_only });
        }
        // Last: this thread leaves the device's network for it.
        if !self.around.owns_network {
            self.sys(&mut spec.mounts)?;
        }
        let Around { user, network, ids, .. } = self.around;
        spec.uid_map = vec![ids];
        spec.gid_map = vec![ids];
        spec.joins.push(NamespaceJoin {
            flag: u64::from(CloneFlags::CLONE_NEWUSER.bits().unsigned_abs()),
            fd: self.first + index(&self.fds),
        });
        self.fds.push(user);
        spec.netns_fd = network.map(|network| {
            self.fds.push(network);
            self.first + index(&self.fds) - 1
        });
        Ok((spec, self.fds))
    }

    fn put(&mut self, tree: OwnedFd) -> u32 {
        self.fds.push(tree);
        self.first + index(&self.fds) - 1
    }

    fn use_tree(&mut self, step: &mut MountStep, tree: OwnedFd) {
        step.tree_fd = Some(self.put(tree));
    }

    fn idmap(&self, tree: BorrowedFd<'_>, recursive: bool) -> Result<(), Errno> {
        mount::set_idmap(tree, self.around.user.as_fd(), recursive)
    }

    fn idmapped(&self, path: &str) -> Result<OwnedFd, MappedError> {
        let opened = open(path).map_err(at(path))?;
        let tree = mount::clone_tree(opened.as_fd(), false).map_err(at(path))?;
        self.idmap(tree.as_fd(), false).map_err(|source| MappedError::Idmap {
            what: path.to_owned(),
            needs: NEEDS,
            source,
        })?;
        Ok(tree)
    }

    /// A part of the root, by [`Layers`].
    fn part(&self, path: &str) -> Result<OwnedFd, MappedError> {
        match self.around.layers {
            Layers::Mapped => self.idmapped(path),
            Layers::Copied => open(path).and_then(|opened| mount::clone_tree(opened.as_fd(), false)).map_err(at(path)),
        }
    }

    fn bind(&self, step: &MountStep) -> Result<OwnedFd, MappedError> {
        let source = Path::new(&step.source);
        let is_ready = self.around.ready.iter().any(|ready| source.starts_with(ready));
        if source.starts_with(&self.around.owned_by_workload) && !is_ready {
            return self.idmapped(&step.source);
        }
        let opened = open(&step.source).map_err(at(&step.source))?;
        let tree = || mount::clone_tree(opened.as_fd(), step.recursive).map_err(at(&step.source));
        if is_ready {
            return tree();
        }
        // A path of the device: where the file system cannot translate, its owners are strangers inside.
        let mapped = tree()?;
        match self.idmap(mapped.as_fd(), step.recursive) {
            Ok(()) => Ok(mapped),
            Err(Errno::INVAL) => tree(),
            Err(source) => Err(MappedError::Idmap { what: step.source.clone(), needs: NEEDS, source }),
        }
    }

    /// Device nodes cannot be made in a user namespace, and the device's own belong to its own users.
    fn dev(&self, step: &MountStep, nodes: &[DeviceNode]) -> Result<OwnedFd, MappedError> {
        let root = self.around.ids.outside;
        let data = format!("{},uid={root},gid={root}", step.data);
        let tree = mount::new_filesystem("tmpfs", "tmpfs", &data, 0).map_err(at("/dev"))?;
        for node in nodes {
            let inside = Path::new(&node.path).strip_prefix("/dev").ok();
            let inside =
                inside.filter(|path| path.components().all(|part| matches!(part, std::path::Component::Normal(_))));
            let inside = inside.ok_or_else(|| MappedError::DeviceElsewhere { path: node.path.clone() })?;
            self.node(tree.as_fd(), inside, node).map_err(at(&node.path))?;
        }
        Ok(tree)
    }

    /// `path` is clean, and nobody else has this file system yet.
    fn node(&self, dev: BorrowedFd<'_>, path: &Path, node: &DeviceNode) -> Result<(), Errno> {
        let owner =
            |id: u32| if id < self.around.ids.count { self.around.ids.outside + id } else { self.around.ids.outside };
        let mut parents: Vec<_> = path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()).collect();
        parents.reverse();
        for parent in parents {
            match rustix::fs::mkdirat(dev, parent, Mode::from_raw_mode(0o755)) {
                Ok(()) => own(dev, parent, owner(0), owner(0), 0o755)?,
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
        let kind = match node.kind {
            'b' => FileType::BlockDevice,
            'p' => FileType::Fifo,
            _ => FileType::CharacterDevice,
        };
        let number = rustix::fs::makedev(node.major, node.minor);
        rustix::fs::mknodat(dev, path, kind, Mode::from_raw_mode(node.mode), number)?;
        own(dev, path, owner(node.uid), owner(node.gid), node.mode)
    }

    /// overlayfs works with the rights and the ids of who mounted it: the device's root, as far as rights go, and the
    /// container's root as the owner of what it makes in `upper` and `work`.
    fn overlay(
        &self,
        lower: &[String],
        upper: Option<(&str, &str)>,
        mount_at: &str,
        volatile: bool,
    ) -> Result<OwnedFd, MappedError> {
        let layers = lower.iter().map(|layer| self.part(layer)).collect::<Result<Vec<_>, _>>()?;
        // Both in one mount: overlayfs insists.
        let home =
            upper.and_then(|(upper, _)| Path::new(upper).parent()).map(|home| home.to_string_lossy().into_owned());
        let home = home.map(|home| self.part(&home)).transpose()?;
        let bench = mount::new_filesystem("tmpfs", "edged", "mode=700", 0).map_err(at(mount_at))?;
        mount::attach(bench.as_fd(), open(mount_at).map_err(at(mount_at))?.as_fd()).map_err(at(mount_at))?;
        rustix::process::fchdir(&bench).map_err(at(mount_at))?;
        for (number, layer) in layers.iter().enumerate() {
            put_at(&bench, &number.to_string(), layer).map_err(at(&lower[number]))?;
        }
        let numbers: Vec<_> = (0..layers.len()).map(|number| number.to_string()).collect();
        let mut data = format!("lowerdir={}", numbers.join(":"));
        if let (Some((upper, work)), Some(home)) = (upper, &home) {
            put_at(&bench, "w", home).map_err(at(upper))?;
            let name = |path: &str| Path::new(path).file_name().map(|name| name.to_string_lossy().into_owned());
            let (upper, work) = (name(upper).unwrap_or_default(), name(work).unwrap_or_default());
            data.push_str(&format!(",upperdir=w/{upper},workdir=w/{work}"));
            data.push_str(if volatile { ",volatile" } else { "" });
        }
        rustix::fs::mkdirat(&bench, "root", Mode::from_raw_mode(0o755)).map_err(at(mount_at))?;
        let layers = if self.around.layers == Layers::Mapped { "idmapped" } else { "copied" };
        let failed = |source| MappedError::Overlay { layers, source };
        self.act_as_root_inside().map_err(failed)?;
        let data = CString::new(data).map_err(|_| failed(Errno::INVAL))?;
        rustix::mount::mount("overlay", "root", "overlay", MountFlags::empty(), Some(data.as_c_str()))
            .map_err(failed)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(&bench, "root", flags, Mode::empty()).map_err(failed)?;
        mount::clone_tree(root.as_fd(), false).map_err(failed)
    }

    /// From now on this thread makes files as the container's root does. With the ids the rights over files go too
    /// (capabilities(7)); they are taken up again. The thread ends soon.
    fn act_as_root_inside(&self) -> Result<(), Errno> {
        nix::unistd::setfsgid(nix::unistd::Gid::from_raw(self.around.ids.outside));
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(self.around.ids.outside));
        let mut sets = rustix::thread::capabilities(None)?;
        sets.effective = sets.permitted;
        rustix::thread::set_capabilities(None, sets)
    }

    /// A sysfs shows the network namespace of who mounts it, which must be his (or he is the device's root).
    fn sys(&mut self, steps: &mut [MountStep]) -> Result<(), MappedError> {
        let Some(step) = steps.iter_mut().find(|step| step.fstype == "sysfs") else { return Ok(()) };
        if let Some(network) = &self.around.network {
            setns(network, CloneFlags::CLONE_NEWNET).map_err(|error| at("/sys")(errno(error)))?;
        }
        let tree = mount::new_filesystem("sysfs", "sysfs", "", mount::attributes_of(step.flags)).map_err(at("/sys"))?;
        let private = Attributes { propagation: MS_PRIVATE, ..Attributes::default() };
        mount::set_attributes(tree.as_fd(), private).map_err(at("/sys"))?;
        self.use_tree(step, tree);
        Ok(())
    }
}

#[expect(clippy::unnecessary_cast, reason = "c_ulong is 32 bits on armv7")]
const MS_PRIVATE: u64 = nix::mount::MsFlags::MS_PRIVATE.bits() as u64;

/// The next descriptor's index in a launch.
pub fn index(fds: &[OwnedFd]) -> u32 {
    u32::try_from(fds.len()).unwrap_or(u32::MAX)
}

fn open(path: &str) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Puts a detached mount onto a new directory.
fn put_at(bench: &OwnedFd, name: &str, tree: &OwnedFd) -> Result<(), Errno> {
    rustix::fs::mkdirat(bench, name, Mode::from_raw_mode(0o700))?;
    let target = rustix::fs::openat(bench, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    mount::attach(tree.as_fd(), target.as_fd())
}

fn own(at: BorrowedFd<'_>, path: &Path, uid: u32, gid: u32, mode: u32) -> Result<(), Errno> {
    // The umask took bits away.
    rustix::fs::chmodat(at, path, Mode::from_raw_mode(mode), AtFlags::empty())?;
    rustix::fs::chownat(at, path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::SYMLINK_NOFOLLOW)
}
