//! The kernel's doors that no maintained crate opens safely, and the child between clone and exec. This is the only
//! crate of edged that may say `unsafe`; each block names its invariant and who upholds it.
//!
//! | door | man page |
//! |---|---|
//! | [`spawn`] | clone(2) (clone3), pidfd_open(2) |
//! | [`child`], `beside`, `enter`, `program`, `rootfs` | execve(2), namespaces(7), pivot_root(2), capabilities(7) |
//! | [`mount`] | open_tree(2), fsopen(2), move_mount(2), mount_setattr(2) |
//! | [`owned`] | user_namespaces(7), ioctl_ns(2) |
//! | [`own_program`] | execveat(2), statx(2) |
//! | [`resolve`] | openat2(2) |
//! | [`privilege`] | prctl(2), capset(2), seccomp(2) |
//! | [`fdpass`] | unix(7), SCM_RIGHTS |
//! | [`pidfd`] | pidfd_send_signal(2), waitid(2) |
//! | [`device_filter`] | bpf(2) |
//! | [`entry`] | execve(2) |
//! | [`memory`] | malloc_trim(3) |
//! | [`idle`] | ioprio_set(2), setpriority(2) |
//! | [`verity`] | ioctl(2), filesystems/fsverity.rst |
//! | [`device`] | watchdog-api, finit_module(2), clock_settime(2) |
//!
//! And one that is not the kernel's: `unzstd`, a library with the interface of C.

/// The beginning of a program that lives for milliseconds.
pub mod entry;
/// Starting a child: clone3 with a pidfd, into its cgroup.
pub mod spawn;

/// Network namespace and file systems, made on another processor.
mod beside;
/// Everything between clone and exec.
pub mod child;
/// A new file system with what was there before.
mod copy_up;
/// Namespaces that are entered.
mod enter;
/// Programs that the specification has run at the points of a container's life.
pub mod hook;
/// Mounts by descriptor.
pub mod mount;
/// The program's own file, sealed against containers.
pub mod own_program;
/// Namespaces that are kept, and who has power over them.
pub mod owned;
/// Capabilities, ids, seccomp.
pub mod privilege;
/// Exec, and the tiny init.
mod program;
/// Paths inside a root that is not trusted.
pub mod resolve;
/// The container's file system, as the child makes it.
mod rootfs;

/// Messages with descriptors.
pub mod fdpass;
/// Descriptors that an earlier self, or the keeper, left open for us.
pub mod inherit;

/// Memory that nobody uses.
pub mod memory;

/// Threads that wait for everybody else.
pub mod idle;

/// Files that the kernel checks.
pub mod verity;

/// Signals by pidfd.
pub mod pidfd;

/// Watchdog, modules, clock: the machine itself.
pub mod device;
/// Which devices a cgroup v2 may open.
pub mod device_filter;

/// Zstandard, for whoever asks for the feature.
#[cfg(feature = "unzstd")]
pub mod unzstd;
