//! A small disk: a tmpfs that only the calling thread, and what it starts, can see. It goes with them.

use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// From now on this thread's mounts are its own.
pub fn own_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
}

/// `options`: `size=…,nr_inodes=…`.
pub fn mount_at(dir: &Path, options: &str) {
    mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), Some(options)).unwrap();
}

pub fn resize(dir: &Path, options: &str) {
    mount(None::<&str>, dir, None::<&str>, MsFlags::MS_REMOUNT, Some(options)).unwrap();
}
