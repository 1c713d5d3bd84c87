//! Network namespaces, pinned by a bind mount (ip-netns(8) does the same), so that they outlive a run: a restart takes
//! the one that is there, which is quick, and its published ports stay.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use edged_model::keeper::IdMapping;
use nix::sched::{CloneFlags, setns, unshare};

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("namespace {path}: {step}")]
    Step {
        path: PathBuf,
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

fn at(path: &Path, step: &'static str) -> impl FnOnce(io::Error) -> NetnsError {
    let path = path.to_owned();
    move |source| NetnsError::Step { path, step, source }
}

/// The namespace pinned at `path`, made with its loopback up if it is not there.
pub fn ensure(path: &Path) -> Result<OwnedFd, NetnsError> {
    if !is_pinned(path) {
        make(path)?;
    }
    File::open(path).map(OwnedFd::from).map_err(at(path, "opening it"))
}

/// A pinned namespace is a file of nsfs; a plain file there is what a boot left.
fn is_pinned(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == NSFS_MAGIC)
}

/// `NSFS_MAGIC` (linux/magic.h).
const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;

fn make(path: &Path) -> Result<(), NetnsError> {
    let made = on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        finish()?;
        // Who has ids of their own has no power over this one, and would get no port below 1024 in it.
        fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")?;
        File::open("/proc/thread-self/ns/net").map(OwnedFd::from)
    });
    pin(made.map_err(at(path, "making it"))?.as_fd(), path)
}

/// What a new namespace needs, from inside it.
fn finish() -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    edged_sys::device::interface_up(socket.as_fd(), "lo")
}

/// Binds a namespace of any kind onto `path`, which is made.
fn pin(namespace: BorrowedFd<'_>, path: &Path) -> Result<(), NetnsError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(at(path, "its directory"))?;
    }
    File::create(path).map_err(at(path, "its file"))?;
    let source = format!("/proc/thread-self/fd/{}", namespace.as_raw_fd());
    rustix::mount::mount_bind(source, path).map_err(|errno| at(path, "pinning it")(errno.into()))
}

/// A user namespace and, in it, a network namespace.
#[derive(Debug)]
pub struct Owned {
    pub user: OwnedFd,
    pub network: Option<OwnedFd>,
}

/// The pinned pair, made if it is not there or if the network namespace belongs to somebody else. Only for a workload
/// that does not run: who is in an old pair stays there.
pub fn ensure_owned(user: &Path, network: Option<&Path>, ids: IdMapping) -> Result<Owned, NetnsError> {
    if let Some(found) = find_owned(user, network)? {
        return Ok(found);
    }
    for path in network.into_iter().chain([user]) {
        remove(path)?;
    }
    let made = edged_sys::owned::namespaces(&[ids], &[ids], network.is_some()).map_err(at(user, "making it"))?;
    if let (Some(namespace), Some(path)) = (&made.network, network) {
        let inside = namespace.try_clone().map_err(at(path, "opening it"))?;
        let finished = on_a_thread(move || {
            setns(&inside, CloneFlags::CLONE_NEWNET)?;
            finish()
        });
        finished.map_err(at(path, "its loopback"))?;
        pin(namespace.as_fd(), path)?;
    }
    pin(made.user.as_fd(), user)?;
    Ok(Owned { user: made.user, network: made.network })
}

fn find_owned(user: &Path, network: Option<&Path>) -> Result<Option<Owned>, NetnsError> {
    if !is_pinned(user) || network.is_some_and(|path| !is_pinned(path)) {
        return Ok(None);
    }
    let open = |path: &Path| File::open(path).map(OwnedFd::from).map_err(at(path, "opening it"));
    let found = Owned { user: open(user)?, network: network.map(open).transpose()? };
    let belongs = match (&found.network, network) {
        (Some(namespace), Some(path)) => edged_sys::owned::belongs_to(namespace.as_fd(), found.user.as_fd())
            .map_err(at(path, "asking for its owner"))?,
        _ => true,
    };
    Ok(belongs.then_some(found))
}

/// Takes a namespace away. What still runs in it keeps it alive until it ends.
pub fn remove(path: &Path) -> Result<(), NetnsError> {
    if is_pinned(path) {
        rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH)
            .map_err(|errno| at(path, "unmounting it")(errno.into()))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path, "removing it")(error)),
        _ => Ok(()),
    }
}

/// A connection made inside the namespace. A socket stays where it was made, so the caller may be anywhere.
pub fn connect_in_netns(path: &Path, address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let namespace = File::open(path)?;
    on_a_thread(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        TcpStream::connect_timeout(&address, timeout)
    })
}

/// Runs `work` on a thread that ends with it: a thread that changed its namespace must do nothing else.
fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let thread = std::thread::Builder::new().name("netns".to_owned()).spawn(work)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace failed")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_namespace_has_its_own_loopback_and_can_be_reached() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web");
        let namespace = ensure(&path).unwrap();
        ensure(&path).unwrap();
        let listener = on_a_thread(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            TcpListener::bind("127.0.0.1:8080")
        })
        .unwrap();
        let address = listener.local_addr().unwrap();
        assert!(connect_in_netns(&path, address, Duration::from_secs(5)).is_ok());
        remove(&path).unwrap();
        assert!(!path.exists());
        remove(&path).unwrap();
    }

    #[test]
    fn a_pair_is_kept_and_one_that_is_not_a_pair_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (user, network) = (dir.path().join("user"), dir.path().join("net"));
        let ids = IdMapping { inside: 0, outside: 1_879_048_192, count: 65_536 };
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
        // As an earlier version left it: it belongs to the device itself.
        let foreign = ensure(&network).unwrap();
        let first = ensure_owned(&user, Some(&network), ids).unwrap();
        let own = first.network.as_ref().unwrap();
        assert_ne!(inode(own), inode(&foreign));
        let second = ensure_owned(&user, Some(&network), ids).unwrap();
        assert_eq!((inode(&first.user), inode(own)), (inode(&second.user), inode(second.network.as_ref().unwrap())));
        remove(&network).unwrap();
        remove(&user).unwrap();
    }
}
