//! New file systems (tmpfs, devpts, mqueue, ...), made detached while the child mounts others: it begins with the first of its
//! steps, the thread with the last, and where they meet all are made. fsopen(2), fsmount(2).

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use edged_model::keeper::MountStep;
use rustix::thread::futex;

use super::{Job, Thread, has_another_processor};
use crate::mount;

/// Of fewer, the thread would be no gain.
const WORTH_A_THREAD: usize = 3;

/// Longer names would be copied to the heap on their way to the kernel, which is not the thread's.
const TEXT_MAX_BYTES: usize = 200;

/// Nobody has begun with it.
const FREE: u32 = u32::MAX;
/// The thread has.
const TAKEN: u32 = u32::MAX - 1;
/// It is the child's to make, the thread could not, or it was taken away.
const GONE: u32 = u32::MAX - 2;

/// Those that are being made.
pub(crate) struct FileSystems<'s> {
    thread: Option<Thread<Making<'s>>>,
}

/// Each step with the descriptor of its mount, once that is there.
struct Making<'s>(Vec<(&'s MountStep, AtomicU32)>);

impl<'s> FileSystems<'s> {
    /// Of `steps`, those that make a file system. The namespaces they are made in are entered, and stay.
    pub(crate) fn begin(steps: impl Iterator<Item = &'s MountStep>) -> Self {
        let steps = steps.filter(|step| is_for_the_thread(step));
        let making: Vec<_> = steps.map(|step| (step, AtomicU32::new(FREE))).collect();
        let is_worth_it = making.len() >= WORTH_A_THREAD && has_another_processor();
        Self { thread: is_worth_it.then(|| Thread::begin(Making(making))).flatten() }
    }

    pub(crate) fn none() -> Self {
        Self { thread: None }
    }

    /// The file system of `step`, if the thread has made it or is about to; else it is the child's to make.
    pub(crate) fn take(&self, step: &MountStep) -> Option<OwnedFd> {
        let steps = &self.thread.as_ref()?.job().0;
        let (_, state) = steps.iter().find(|(one, _)| std::ptr::eq(*one, step))?;
        if is_claimed(state, GONE) {
            return None;
        }
        while state.load(Ordering::Acquire) == TAKEN {
            // The thread wakes us; what else may have, the loop sees.
            let _ = futex::wait(state, futex::Flags::PRIVATE, TAKEN, None);
        }
        taken(state)
    }
}

impl Drop for FileSystems<'_> {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        // What nobody wants any more it need not make.
        for (_, state) in &thread.job().0 {
            is_claimed(state, GONE);
        }
        thread.wait();
        for (_, state) in &thread.job().0 {
            drop(taken(state));
        }
    }
}

/// What the thread has left there.
fn taken(state: &AtomicU32) -> Option<OwnedFd> {
    let made = i32::try_from(state.swap(GONE, Ordering::Acquire)).ok()?;
    // SAFETY: all that is no descriptor is above `i32::MAX`. The thread has left this one to whoever takes it out.
    Some(unsafe { OwnedFd::from_raw_fd(made) })
}

/// Whether it was nobody's, and is now that one's.
fn is_claimed(state: &AtomicU32, by: u32) -> bool {
    state.compare_exchange(FREE, by, Ordering::AcqRel, Ordering::Acquire).is_ok()
}

/// Those that come of nothing but their options: what lies in another file system may first have to be mounted, or may make
/// one wait.
const OF_THE_KERNEL: [&str; 6] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup2"];

fn is_for_the_thread(step: &MountStep) -> bool {
    let is_new = !step.bind && !step.remount && step.tree_fd.is_none() && step.label.is_none();
    let are_short = [&step.source, &step.data].iter().all(|text| text.len() <= TEXT_MAX_BYTES);
    is_new && are_short && OF_THE_KERNEL.contains(&step.fstype.as_str())
}

impl Job for Making<'_> {
    fn run(&self) {
        for (step, state) in self.0.iter().rev() {
            if !is_claimed(state, TAKEN) {
                continue;
            }
            let made = mount::new_filesystem(&step.fstype, &step.source, &step.data, mount::attributes_of(step.flags));
            let made = made.map_or(GONE, |tree| tree.into_raw_fd().unsigned_abs());
            state.store(made, Ordering::Release);
            // If nobody waits, nobody is woken.
            let _ = futex::wake(state, futex::Flags::PRIVATE, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(data: &str) -> MountStep {
        let (source, fstype, data) = ("test".to_owned(), "tmpfs".to_owned(), data.to_owned());
        MountStep { source, fstype, data, ..MountStep::default() }
    }

    /// For root, who alone may make file systems: whether the thread was let finish first or not, and whoever has made it.
    #[test]
    fn each_is_made_once_and_those_that_cannot_be_are_left() {
        if !rustix::process::geteuid().is_root() || !has_another_processor() {
            return;
        }
        let mut steps = ["size=64k", "size=nonsense", "size=64k", "size=64k", "size=64k", "size=64k"].map(step);
        steps[3].bind = true;
        steps[4].fstype = "ext4".to_owned();
        for round in 0..200 {
            let made = FileSystems::begin(steps.iter());
            let is_finished = round % 2 == 0;
            if is_finished {
                made.thread.as_ref().unwrap().wait();
            }
            for (number, step) in steps.iter().enumerate() {
                let taken = made.take(step);
                if let Some(tree) = &taken {
                    let stat = rustix::fs::fstatvfs(tree).unwrap();
                    assert_eq!(stat.f_blocks * stat.f_frsize, 64 << 10);
                }
                let is_for_the_thread = [0, 2, 5].contains(&number);
                assert!(is_for_the_thread || taken.is_none(), "{number} cannot be made, or is none for the thread");
                assert!(!is_finished || taken.is_some() == is_for_the_thread, "{number}");
                assert!(made.take(step).is_none(), "taken twice");
            }
        }
    }
}
