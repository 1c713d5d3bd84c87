//! The container's file system, made by the child in its own mount namespace: root, mounts, device nodes, links,
//! pivot_root(2), masked and read-only paths (OCI runtime-spec, config-linux.md). No path inside the new root is handed
//! to the kernel as a path: each is resolved by [`crate::resolve`] and used by descriptor.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use edged_model::keeper::{DeviceNode, LaunchSpec, MountStep, Rootfs};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};

use crate::beside::{FileSystems, Network, network};
use crate::child::{Stage, Step, about, at, enter_network};
use crate::mount::{self, Attributes};
use crate::resolve::{self, Want};
use crate::{copy_up, hook};

/// Everything from the private mount namespace to the new root, in order.
/// `procfs` is taken for every mount of one.
pub(crate) fn make(
    spec: &LaunchSpec,
    rootfs: &Rootfs,
    fds: &[OwnedFd],
    procfs: Option<&OwnedFd>,
    network: &mut Option<Network>,
    state: &[u8],
) -> Step {
    let empty = empty_filesystem(spec.mount_label.as_deref());
    let for_masks = (!spec.masked_paths.is_empty()).then_some(&empty);
    let is_there = |step: &&MountStep| procfs.is_some() && step.fstype == "proc";
    let new = for_masks.into_iter().chain(spec.mounts.iter().filter(|step| !is_there(step)));
    // One thread beside us is enough.
    let made = if network.is_some() { FileSystems::none() } else { FileSystems::begin(new) };
    let root = make_root(spec, rootfs, fds)?;
    let mut targets = Targets { root: root.as_fd(), last: None };
    for step in &spec.mounts {
        if !network::has_no_use_for_it(step) {
            enter_network(network)?;
        }
        if let Err(errno) = mount_step(&mut targets, step, fds, procfs, &made) {
            about(Stage::Mounts, &words_of(step), Err(errno))?;
        }
    }
    drop(targets);
    let mut parents = Parents { root: root.as_fd(), last: None };
    let mask = rustix::process::umask(Mode::empty());
    for node in &spec.device_nodes {
        about(Stage::Devices, &node.path, device_node(&mut parents, node))?;
    }
    rustix::process::umask(mask);
    for (link, target) in &spec.symlinks {
        about(Stage::Links, link, symlink(&mut parents, link, target))?;
    }
    drop(parents);
    enter_network(network)?;
    for one in &spec.create_container_hooks {
        about(Stage::CreateContainerHooks, &one.path, hook::run(one, state).map_err(|error| error.errno()))?;
    }
    at(Stage::Pivot, pivot(root.as_fd()))?;
    let root = at(Stage::Pivot, rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))?;
    if spec.root_propagation != 0 {
        let propagation = Attributes { propagation: spec.root_propagation & !MS_REC, ..Attributes::default() };
        let recursive = spec.root_propagation & MS_REC != 0;
        at(Stage::Root, mount::set_attributes(root.as_fd(), Attributes { recursive, ..propagation }))?;
    }
    for (name, value) in &spec.sysctls {
        about(Stage::Sysctls, name, sysctl(root.as_fd(), name, value))?;
    }
    let mut masks = Masks { step: &empty, made: &made, empty: None, null: None };
    for path in &spec.masked_paths {
        about(Stage::MaskedPaths, path, masks.hide(root.as_fd(), path))?;
    }
    for path in &spec.readonly_paths {
        about(Stage::ReadonlyPaths, path, make_read_only(root.as_fd(), path))?;
    }
    Ok(())
}

/// What is told of a mount that failed: the file system's type first, then where it was to come from, if that says more.
fn words_of(step: &MountStep) -> String {
    let MountStep { source, target, fstype, .. } = step;
    let is_new = !step.bind && !step.remount && step.tree_fd.is_none();
    match (is_new, source == fstype || source.is_empty()) {
        (true, true) => format!("{fstype} at {target}"),
        (true, false) => format!("{fstype} {source} at {target}"),
        (false, _) => format!("{source} at {target}"),
    }
}

fn make_root(spec: &LaunchSpec, rootfs: &Rootfs, fds: &[OwnedFd]) -> Step<OwnedFd> {
    let (Rootfs::Overlay { mount_at: path, .. } | Rootfs::Directory { path, .. } | Rootfs::Tree { mount_at: path, .. }) =
        rootfs;
    if spec.root_propagation & MS_SHARED == 0 {
        // Slave first: what the host unmounts while we work goes here too, and nothing of ours goes to the host.
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        at(Stage::MountNamespace, rustix::mount::mount_change("/", slave))?;
    } else {
        // Mounts below are to travel both ways; the new root itself is not to appear on the host.
        let point = at(Stage::MountNamespace, mount_point_of(path))?;
        let private = rustix::mount::mount_change(point.as_str(), MountPropagationFlags::PRIVATE);
        about(Stage::MountNamespace, &point, private)?;
    }
    about(Stage::Root, path, open_root(rootfs, fds))
}

/// The mount point that `path` lies under (proc_pid_mountinfo(5)).
fn mount_point_of(path: &str) -> Result<String, Errno> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").map_err(|_| Errno::IO)?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    let longest = points.filter(|point| Path::new(path).starts_with(point)).max_by_key(|point| point.len());
    longest.map(str::to_owned).ok_or(Errno::NOENT)
}

/// The last thing done to the root: the terminal's `/dev/console` still needed a file in it.
pub(crate) fn seal_root(rootfs: &Rootfs) -> Result<(), Errno> {
    let (Rootfs::Overlay { read_only, .. } | Rootfs::Directory { read_only, .. } | Rootfs::Tree { read_only, .. }) =
        rootfs;
    if !*read_only {
        return Ok(());
    }
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    mount::set_attributes(root.as_fd(), Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() })
}

/// Mounts the root file system in this mount namespace, private from now on, and opens it.
fn open_root(rootfs: &Rootfs, fds: &[OwnedFd]) -> Result<OwnedFd, Errno> {
    let at = match rootfs {
        Rootfs::Tree { tree_fd, mount_at, .. } => {
            let tree = fds.get(*tree_fd as usize).ok_or(Errno::BADF)?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            mount::attach(tree.as_fd(), rustix::fs::open(mount_at.as_str(), flags, Mode::empty())?.as_fd())?;
            mount_at
        }
        Rootfs::Overlay { lower, upper, work, mount_at, volatile, read_only } => {
            // A read-only root of several layers needs no upper; of a single one, overlayfs insists on it.
            let upper = if !*read_only || lower.len() < 2 { Some((upper.as_str(), work.as_str())) } else { None };
            mount_overlay(lower, upper, mount_at, *volatile)?;
            mount_at
        }
        Rootfs::Directory { path, .. } => {
            rustix::mount::mount_bind_recursive(path.as_str(), path.as_str())?;
            path
        }
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(at.as_str(), flags, Mode::empty())?;
    let private = Attributes { propagation: MS_PRIVATE, recursive: true, ..Attributes::default() };
    mount::set_attributes(root.as_fd(), private)?;
    Ok(root)
}

#[expect(clippy::unnecessary_cast, reason = "c_ulong is 32 bits on armv7")]
const MS_PRIVATE: u64 = libc::MS_PRIVATE as u64;
#[expect(clippy::unnecessary_cast, reason = "c_ulong is 32 bits on armv7")]
const MS_RDONLY: u64 = libc::MS_RDONLY as u64;
#[expect(clippy::unnecessary_cast, reason = "c_ulong is 32 bits on armv7")]
const MS_SHARED: u64 = libc::MS_SHARED as u64;
#[expect(clippy::unnecessary_cast, reason = "c_ulong is 32 bits on armv7")]
const MS_REC: u64 = libc::MS_REC as u64;
#[expect(clippy::unnecessary_cast, reason = "c_ulong is 32 bits on armv7")]
const MS_RELATIME: u64 = libc::MS_RELATIME as u64;

/// mount(2) copies one page of options, its end included.
const LONGEST_OPTIONS_BYTES: usize = 4095;

/// One mount(2) where the options fit into it; an image of many layers needs `lowerdir+`, layer by layer (Linux 6.5).
fn mount_overlay(lower: &[String], upper: Option<(&str, &str)>, at: &str, volatile: bool) -> Result<(), Errno> {
    // In the option list `:` parts layers and `,` parts options (Documentation/filesystems/overlayfs.rst).
    let escaped = |path: &str| path.replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,");
    let mut data = format!("lowerdir={}", lower.iter().map(|path| escaped(path)).collect::<Vec<_>>().join(":"));
    if let Some((upper, work)) = upper {
        data.push_str(&format!(",upperdir={},workdir={}", escaped(upper), escaped(work)));
    }
    if volatile && upper.is_some() {
        data.push_str(",volatile");
    }
    if data.len() <= LONGEST_OPTIONS_BYTES {
        let data = CString::new(data).map_err(|_| Errno::INVAL)?;
        return rustix::mount::mount("overlay", at, "overlay", MountFlags::empty(), Some(data.as_c_str()));
    }
    let mut options: Vec<(&str, Option<&str>)> = lower.iter().map(|path| ("lowerdir+", Some(path.as_str()))).collect();
    if let Some((upper, work)) = upper {
        options.extend([("upperdir", Some(upper)), ("workdir", Some(work))]);
        options.extend(volatile.then_some(("volatile", None)));
    }
    let tree = mount::new_filesystem_of("overlay", "overlay", options, 0)?;
    let target = rustix::fs::open(at, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    mount::attach(tree.as_fd(), target.as_fd())
}

/// What mounts are put onto. The next target most often lies directly in the file system that was mounted last (`/dev`,
/// then `/dev/pts`): that one is still at hand, and what is made in it is looked up in no other way.
struct Targets<'r> {
    root: BorrowedFd<'r>,
    /// A file system of ours, and where it was put.
    last: Option<(PathBuf, OwnedFd)>,
}

impl Targets<'_> {
    /// What `step` is put onto. `/proc` and `/sys` are made where the configuration says and nowhere else: an image in
    /// which they are links would have every later check look elsewhere (CVE-2019-19921, CVE-2023-27561).
    fn of(&mut self, step: &MountStep, want: Want) -> Result<OwnedFd, Errno> {
        let path = Path::new(&step.target);
        if step.fstype != "proc" && step.fstype != "sysfs" {
            return self.ensure(path, want);
        }
        self.last = None;
        match want {
            Want::Directory => resolve::ensure_directory_itself(self.root, path),
            Want::File => resolve::ensure_itself(self.root, path),
        }
    }

    /// A target, made if missing. Nothing that is mounted on one that was made here covers the file system it lies in:
    /// what is kept stays true. After any other look-up nothing is kept.
    fn ensure(&mut self, path: &Path, want: Want) -> Result<OwnedFd, Errno> {
        if let (Some((parent, tree)), Some(name), Want::Directory) = (&self.last, path.file_name(), want)
            && path.parent() == Some(parent)
            && let Some(made) = resolve::make_directory(tree.as_fd(), name)?
        {
            return Ok(made);
        }
        self.last = None;
        resolve::ensure(self.root, path, want)
    }

    /// A new file system was put onto `path`.
    fn keep(&mut self, path: &Path, tree: OwnedFd) {
        self.last.get_or_insert_with(|| (path.to_owned(), tree));
    }
}

fn mount_step(
    targets: &mut Targets<'_>,
    step: &MountStep,
    fds: &[OwnedFd],
    procfs: Option<&OwnedFd>,
    made: &FileSystems<'_>,
) -> Result<(), Errno> {
    let root = targets.root;
    if step.remount {
        let target = resolve::open_path(root, Path::new(&step.target))?;
        return set_step_attributes(target.as_fd(), step, 0);
    }
    if let Some(index) = step.tree_fd {
        let tree = fds.get(index as usize).ok_or(Errno::BADF)?;
        return attach_bind(targets, tree.as_fd(), step);
    }
    if step.bind {
        let tree = mount::clone_tree_at(&step.source, step.recursive, step.source_no_follow)?;
        return attach_bind(targets, tree.as_fd(), step);
    }
    let tree = match procfs.filter(|_| step.fstype == "proc") {
        Some(procfs) => rustix::io::fcntl_dupfd_cloexec(procfs, 0)?,
        None => new_filesystem(step, made)?,
    };
    // A new mount that says nothing is private as it is.
    let propagation = step.propagation;
    mount::set_attributes(tree.as_fd(), Attributes { propagation, ..Attributes::default() })?;
    let target = targets.of(step, Want::Directory)?;
    if step.copy_up {
        copy_up::fill(target.as_fd(), tree.as_fd())?;
    }
    mount::attach(tree.as_fd(), target.as_fd())?;
    targets.keep(Path::new(&step.target), tree);
    Ok(())
}

/// Out of `made`, or now; with the SELinux context of all that is in it, where there is one: as an option of the mount, but
/// for message queues, whose root is labelled instead (they take no option).
fn new_filesystem(step: &MountStep, made: &FileSystems<'_>) -> Result<OwnedFd, Errno> {
    if let Some(tree) = made.take(step) {
        return Ok(tree);
    }
    let attributes = mount::attributes_of(step.flags);
    let label = step.label.as_deref();
    if step.fstype != "mqueue" {
        return mount::new_labelled_filesystem(&step.fstype, &step.source, &step.data, label, attributes);
    }
    let tree = mount::new_filesystem(&step.fstype, &step.source, &step.data, attributes)?;
    if let Some(label) = label {
        let root = rustix::fs::openat(&tree, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::fs::fsetxattr(&root, "security.selinux", label.as_bytes(), rustix::fs::XattrFlags::empty())?;
    }
    Ok(tree)
}

/// The directories that nodes and links go to. Most go to the one that the one before went to.
struct Parents<'r> {
    root: BorrowedFd<'r>,
    last: Option<Parent>,
}

struct Parent {
    path: PathBuf,
    fd: OwnedFd,
    /// What is made in it is root's, as whoever makes it is.
    gives_no_group: bool,
}

impl Parents<'_> {
    fn of<'p>(&mut self, path: &'p Path) -> Result<(&Parent, &'p OsStr), Errno> {
        let (parent, name) = (path.parent().ok_or(Errno::INVAL)?, path.file_name().ok_or(Errno::INVAL)?);
        let found = match self.last.take() {
            Some(last) if last.path == parent => last,
            _ => {
                let fd = resolve::ensure_parent(self.root, path)?.0;
                let gives_no_group = rustix::fs::fstat(&fd)?.st_mode & libc::S_ISGID == 0;
                Parent { path: parent.to_owned(), fd, gives_no_group }
            }
        };
        Ok((self.last.insert(found), name))
    }
}

fn attach_bind(targets: &mut Targets<'_>, tree: BorrowedFd<'_>, step: &MountStep) -> Result<(), Errno> {
    let is_directory = FileType::from_raw_mode(rustix::fs::fstat(tree)?.st_mode) == FileType::Directory;
    let propagation = if step.propagation == 0 { MS_PRIVATE } else { step.propagation };
    set_step_attributes(tree, step, propagation)?;
    let want = if is_directory { Want::Directory } else { Want::File };
    mount::attach(tree, targets.of(step, want)?.as_fd())
}

/// The attributes of the mount itself, then those of everything below.
fn set_step_attributes(tree: BorrowedFd<'_>, step: &MountStep, propagation: u64) -> Result<(), Errno> {
    let relatime = |flags: u64| if flags & MS_RELATIME == 0 { 0 } else { libc::MOUNT_ATTR__ATIME };
    let of = |set: u64, clear: u64, recursive| Attributes {
        set: mount::attributes_of(set),
        clear: (mount::attributes_of(clear) & !libc::MOUNT_ATTR__ATIME) | relatime(set | clear),
        propagation: 0,
        recursive,
    };
    if step.flags_below == 0 && step.clear_below == 0 && !step.recursive {
        return mount::set_attributes(tree, Attributes { propagation, ..of(step.flags, step.clear, false) });
    }
    mount::set_attributes(tree, of(step.flags, step.clear, false))?;
    mount::set_attributes(tree, of(step.flags_below, step.clear_below, true))?;
    mount::set_attributes(tree, Attributes { propagation, recursive: step.recursive, ..Attributes::default() })
}

/// The umask is empty.
fn device_node(parents: &mut Parents<'_>, node: &DeviceNode) -> Result<(), Errno> {
    let root = parents.root;
    let (parent, name) = parents.of(Path::new(&node.path))?;
    let kind = match node.kind {
        'b' => FileType::BlockDevice,
        'p' => FileType::Fifo,
        _ => FileType::CharacterDevice,
    };
    let number = rustix::fs::makedev(node.major, node.minor);
    let is_it = |stat: &rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == kind && stat.st_rdev == number;
    let mode = Mode::from_raw_mode(node.mode);
    match rustix::fs::mknodat(&parent.fd, name, kind, mode, number) {
        Ok(()) if (node.uid, node.gid) == (0, 0) && parent.gives_no_group => Ok(()),
        Ok(()) => {
            let (uid, gid) = (Some(Uid::from_raw(node.uid)), Some(Gid::from_raw(node.gid)));
            rustix::fs::chownat(&parent.fd, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
        }
        Err(Errno::EXIST) => {
            let found = rustix::fs::statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if is_it(&found) { Ok(()) } else { Err(Errno::EXIST) }
        }
        // mknod is not ours to do here (a user namespace): the host's own node, if it is the same device.
        Err(Errno::PERM) => {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let host = rustix::fs::open(node.path.as_str(), flags, Mode::empty())?;
            if !is_it(&rustix::fs::fstat(&host)?) {
                return Err(Errno::PERM);
            }
            let tree = mount::clone_tree(host.as_fd(), false)?;
            let target = resolve::ensure(root, Path::new(&node.path), Want::File)?;
            mount::attach(tree.as_fd(), target.as_fd())
        }
        Err(errno) => Err(errno),
    }
}

fn symlink(parents: &mut Parents<'_>, link: &str, target: &str) -> Result<(), Errno> {
    let (parent, name) = parents.of(Path::new(link))?;
    match rustix::fs::symlinkat(target, &parent.fd, name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// The old root is stacked under the new one and taken off: no directory for it is needed (pivot_root(2), NOTES).
fn pivot(root: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::process::fchdir(root)?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", rustix::mount::UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}

/// `net.core.somaxconn` in /proc/sys. A name may have its parts apart by slashes, where a part has a dot
/// (`net/ipv4/conf/eth0.1/forwarding`, sysctl(8)).
fn sysctl(root: BorrowedFd<'_>, name: &str, value: &str) -> Result<(), Errno> {
    let path = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    let file = resolve::open_proc(root, &format!("sys/{path}"), OFlags::WRONLY)?;
    rustix::io::write(&file, value.as_bytes()).map(drop)
}

/// The empty file system that hides directories; it is put onto the first of them.
fn empty_filesystem(label: Option<&str>) -> MountStep {
    MountStep {
        source: "tmpfs".to_owned(),
        fstype: "tmpfs".to_owned(),
        data: "size=0,nr_inodes=1,mode=755".to_owned(),
        flags: MS_RDONLY,
        label: label.map(str::to_owned),
        ..MountStep::default()
    }
}

/// What hides paths: one empty file system for all directories, `/dev/null` for files.
struct Masks<'m> {
    step: &'m MountStep,
    made: &'m FileSystems<'m>,
    empty: Option<OwnedFd>,
    null: Option<OwnedFd>,
}

impl Masks<'_> {
    /// Hides a path. What is not there needs no mask.
    fn hide(&mut self, root: BorrowedFd<'_>, path: &str) -> Result<(), Errno> {
        let target = match resolve::open_path_no_follow(root, Path::new(path)) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            found => found?,
        };
        let is_directory = FileType::from_raw_mode(rustix::fs::fstat(&target)?.st_mode) == FileType::Directory;
        match is_directory {
            true => self.hide_directory(target.as_fd()),
            false => mount::attach(self.null(root)?.as_fd(), target.as_fd()),
        }
    }

    /// The first directory is hidden by the empty file system itself, the others by copies of that mount: before Linux
    /// 6.15 only what is attached can be copied.
    fn hide_directory(&mut self, target: BorrowedFd<'_>) -> Result<(), Errno> {
        if let Some(empty) = &self.empty {
            return mount::attach(mount::clone_tree(empty.as_fd(), false)?.as_fd(), target);
        }
        let empty = new_filesystem(self.step, self.made)?;
        mount::attach(empty.as_fd(), target)?;
        self.empty = Some(empty);
        Ok(())
    }

    fn null(&mut self, root: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        if self.null.is_none() {
            let null = resolve::open_path_no_follow(root, Path::new("/dev/null"))?;
            // CVE-2025-31133: a /dev/null that is something else would be mounted writable over the masked path.
            let stat = rustix::fs::fstat(&null)?;
            let is_null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
                && stat.st_rdev == rustix::fs::makedev(1, 3);
            if !is_null {
                return Err(Errno::NXIO);
            }
            self.null = Some(null);
        }
        let null = self.null.as_ref().ok_or(Errno::NXIO)?;
        mount::clone_tree(null.as_fd(), false)
    }
}

fn make_read_only(root: BorrowedFd<'_>, path: &str) -> Result<(), Errno> {
    let target = match resolve::open_path_no_follow(root, Path::new(path)) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        found => found?,
    };
    let tree = mount::clone_tree(target.as_fd(), true)?;
    let set = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    mount::set_attributes(tree.as_fd(), Attributes { set, recursive: true, ..Attributes::default() })?;
    mount::attach(tree.as_fd(), target.as_fd())
}
