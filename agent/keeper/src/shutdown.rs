//! The last steps of a device, in order: nothing runs any more, the disk is clean, the machine goes.

use std::path::Path;

use edged_model::keeper::ShutdownHow;
use edged_sys::device::boot_ms;
use nix::mount::{MntFlags, MsFlags};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::WaitOptions;

use crate::{boot, log};

/// Kills every process but PID 1 itself: orphans, and what a workload left behind.
pub fn kill_all() {
    let groups = std::fs::read_dir(WORKLOADS).into_iter().flatten().flatten();
    for group in groups.filter(|entry| entry.path().is_dir()) {
        lift_cpu_limit(&group.file_name().to_string_lossy());
    }
    if let Err(error) = std::fs::write(format!("{WORKLOADS}/cgroup.kill"), "1") {
        log::line(&format!("cgroup.kill: {error}"));
    }
    match kill(Pid::from_raw(-1), Signal::SIGKILL) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
        Err(errno) => log::line(&format!("kill everything: {errno}")),
    }
    // What died is ours to reap, and holds the disk until it is gone. One in disk sleep is not waited for.
    let deadline = boot_ms() + REAP_MS;
    while boot_ms() < deadline {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            #[expect(clippy::disallowed_methods, reason = "nothing else is left to be done")]
            Ok(None) => std::thread::sleep(std::time::Duration::from_millis(5)),
            Err(_) => return,
        }
    }
}

const REAP_MS: u64 = 1_000;
const WORKLOADS: &str = "/sys/fs/cgroup/edged/workloads";

/// Before SIGKILL: a group that has used up its share of time stands still until the next period, and the dead in it too.
pub fn lift_cpu_limit(workload: &str) {
    let path = format!("{WORKLOADS}/{workload}/cpu.max");
    match std::fs::write(&path, "max") {
        // On a host the agent's groups are elsewhere; a probe or a command has none of its own.
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => log::line(&format!("{path}: {error}")),
        _ => {}
    }
}

type Step = (&'static str, fn(&Path) -> nix::Result<()>);

/// A file in `keep/` that says: the last boot ended in order. The agent of the next one takes it away.
pub const FAREWELL: &str = "farewell";

const STEPS: [Step; 6] = [
    ("farewell", |data| {
        let path = data.join("keep").join(FAREWELL);
        std::fs::write(path, "").map_err(|error| nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(0)))
    }),
    ("time floor", |data| {
        boot::keep_last_time(data);
        Ok(())
    }),
    ("sync", |_| {
        nix::unistd::sync();
        Ok(())
    }),
    ("data disk", leave_disk),
    // The system's own, where it is on a disk and can be written: an upgrade in place writes there.
    ("system", |_| make_read_only(Path::new("/"))),
    ("sync", |_| {
        nix::unistd::sync();
        Ok(())
    }),
];

/// What is open keeps a disk mounted; read-only it is as clean.
fn leave_disk(data: &Path) -> nix::Result<()> {
    nix::mount::umount2(data, MntFlags::empty()).or_else(|errno| {
        log::line(&format!("{} stays mounted ({errno}): made read-only", data.display()));
        make_read_only(data)
    })
}

fn make_read_only(place: &Path) -> nix::Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    nix::mount::mount(None::<&str>, place, None::<&str>, flags, None::<&str>)
}

/// Takes the machine down; comes back only when the kernel refuses.
pub fn machine(data: &Path, how: ShutdownHow) {
    for (name, step) in STEPS {
        if let Err(errno) = step(data) {
            log::line(&format!("shutdown: {name}: {errno}"));
        }
    }
    let mode = match how {
        ShutdownHow::Reboot => nix::sys::reboot::RebootMode::RB_AUTOBOOT,
        ShutdownHow::PowerOff | ShutdownHow::Exit => nix::sys::reboot::RebootMode::RB_POWER_OFF,
    };
    log::line(&format!("going down: {how:?}"));
    let Err(errno) = nix::sys::reboot::reboot(mode);
    log::line(&format!("the kernel refuses to go down: {errno}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_left_between_two_syncs() {
        assert_eq!(STEPS.map(|(name, _)| name), ["farewell", "time floor", "sync", "data disk", "system", "sync"]);
    }
}
