//! Network namespaces, pinned by a bind mount (ip-netns(8) does the same), so that they outlive a run: a restart takes
//! the one that is there, which is quick, and its published ports stay.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("network namespace {path}: {step}")]
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
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(at(path, "its directory"))?;
    }
    File::create(path).map_err(at(path, "its file"))?;
    let target = path.to_owned();
    let made = on_a_thread(move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
        edged_sys::device::interface_up(socket.as_fd(), "lo")?;
        rustix::mount::mount_bind("/proc/thread-self/ns/net", &target).map_err(io::Error::from)
    });
    made.map_err(at(path, "making it"))
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
}
