//! Named places at which a test can let the agent die: before and after every step that another process, the disk or the
//! next agent can see. A power cut there leaves less (what was not synced is gone too); `tests/qemu` cuts the power.
//!
//! Only in builds for tests and debugging, and only where the environment names a file with lines of `<point> <n>` in it: the
//! agent that passes the first of them for the n-th time takes that line away and is gone, with no destructor and no handler
//! run. In any other build [`pass`] is nothing. (The crate `fail` does this and much more; it would bring three
//! crates and a registry of callbacks, and cannot die once over several processes, which is what a supervisor needs.)

/// Names the file that holds the name of a point.
pub const FILE_ENV: &str = "EDGED_CRASH_POINT_FILE";

/// Every point, in the order in which a device comes by.
pub const POINTS: [&str; 80] = [
    // The store and its second copy.
    "store-opening",
    "store-set-aside",
    "store-empty",
    "store-rebuilt",
    "store-written",
    "store-synced",
    "keep-bodies-written",
    "keep-previous-linked",
    "file-written",
    "file-named",
    "keep-saved",
    // The start of the agent.
    "store-opened",
    "root-taken",
    "content-opened",
    "key-made",
    "world-loaded",
    "child-adopted",
    "all-adopted",
    "doors-open",
    // A manifest comes in, and a generation moves.
    "manifest-verified",
    "failure-remembered",
    "change-written",
    "change-taken",
    // An image comes.
    "pull-ordered",
    "layer-unpacked",
    "layer-synced",
    "layer-named",
    "documents-written",
    "image-recorded",
    "image-told",
    "image-stored",
    // A workload starts.
    "start-ordered",
    "place-made",
    "cgroup-made",
    "namespace-made",
    "start-prepared",
    "start-sent",
    "start-unlimited",
    "start-answered",
    "start-taken",
    // It is stopped, ends, goes.
    "stop-told",
    "stop-signalled",
    "kill-signalled",
    "end-seen",
    "end-told",
    "end-written",
    "end-forgotten",
    "cgroup-removed",
    "namespace-removed",
    "place-removed",
    "workload-forgotten",
    // Its limits change while it runs.
    "limits-set",
    "limits-noted",
    "limits-told",
    // A layer that comes slowly is kept while it comes.
    "partial-begun",
    "partial-synced",
    "partial-resumed",
    "partial-removed",
    // After an unclean stop layers are looked at.
    "check-begun",
    "check-found",
    "check-removed",
    "check-written",
    "check-done",
    // Whom the device trusts changes.
    "root-verified",
    "root-written",
    "root-in-force",
    // A log has filled its segment.
    "log-full",
    "log-rotated",
    // The disk is collected.
    "layer-moved-aside",
    "layer-removed",
    "record-removed",
    // An operator has the workloads reset.
    "reset-told",
    "reset-begun",
    "reset-images-gone",
    "reset-places-gone",
    "reset-volumes-gone",
    "reset-ended",
    // The fleet is told.
    "report-numbered",
    "report-waiting",
    "report-taken",
];

/// How often this process has come by the point that is wanted.
#[cfg(debug_assertions)]
static PASSED: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

/// The agent may die here.
#[cfg(debug_assertions)]
pub fn pass(point: &'static str) {
    debug_assert!(POINTS.contains(&point), "{point} is not in the list");
    let Some(file) = std::env::var_os(FILE_ENV) else { return };
    let Ok(wanted) = std::fs::read_to_string(&file) else { return };
    let (first, later) = wanted.split_once('\n').unwrap_or((&wanted, ""));
    let Some((name, times)) = first.trim().split_once(' ') else { return };
    if name != point {
        return;
    }
    let passed = PASSED.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
    // Who takes the file away dies: two threads may come by at once. What else it says is for the next agent.
    if times.parse().is_ok_and(|times: u32| passed >= times) && std::fs::remove_file(&file).is_ok() {
        if !later.is_empty() {
            let _ = std::fs::write(&file, later);
        }
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::process::abort();
    }
}

#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn pass(_point: &'static str) {}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    fn points_in(dir: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                points_in(&path, found);
            } else {
                let text = std::fs::read_to_string(&path).unwrap();
                let names = text.split("crash_point::pass(\"").skip(1).map(|rest| rest.split('"').next().unwrap());
                found.extend(names.map(str::to_owned));
            }
        }
    }

    #[test]
    fn every_point_of_the_code_is_listed_once_and_every_listed_one_is_in_the_code() {
        let mut found = Vec::new();
        points_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
        found.retain(|name| !name.contains("skip"));
        let listed: BTreeSet<String> = POINTS.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(listed.len(), POINTS.len(), "one is listed twice");
        assert_eq!(found.iter().cloned().collect::<BTreeSet<_>>(), listed);
        assert_eq!(found.len(), listed.len(), "a name stands for one place");
    }
}
