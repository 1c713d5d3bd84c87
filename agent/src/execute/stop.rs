//! How a workload is ended: by which signal, how long it may take, and after whom.

use edged_model::id::WorkloadName;
use edged_model::keeper::StopPlan;
use edged_model::manifest::{Manifest, Workload};
use nix::sys::signal::Signal;

use super::pull::ReadyImage;

/// What the keeper is told at the start, so that it can end everything in order when the agent is gone.
pub fn plan(manifest: &Manifest, name: &WorkloadName, workload: &Workload, image: Option<&ReadyImage>) -> StopPlan {
    StopPlan {
        signal: signal(workload, image),
        timeout_ms: workload.stop_timeout.ms,
        order: depth(manifest, name, manifest.workloads.len()),
    }
}

/// The manifest's word, else the image's, else SIGTERM.
pub fn signal(workload: &Workload, image: Option<&ReadyImage>) -> i32 {
    let text = workload.stop_signal.as_deref().or_else(|| image?.stop_signal.as_deref());
    text.and_then(number).unwrap_or(Signal::SIGTERM as i32)
}

/// 15 for `SIGTERM`, `TERM` or `15`.
fn number(text: &str) -> Option<i32> {
    let name = if text.starts_with("SIG") { text.to_owned() } else { format!("SIG{text}") };
    name.parse::<Signal>().ok().map(|signal| signal as i32).or_else(|| text.parse().ok())
}

/// The length of the longest chain of dependencies below it. `bound`: a cycle was refused long ago, and ends here.
fn depth(manifest: &Manifest, name: &WorkloadName, bound: usize) -> u32 {
    let Some(workload) = manifest.workloads.get(name).filter(|_| bound > 0) else { return 0 };
    let below = workload.depends_on.keys().map(|need| depth(manifest, need, bound - 1) + 1);
    below.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use edged_model::manifest::DependsOn;

    fn name(text: &str) -> WorkloadName {
        WorkloadName::parse(text).unwrap()
    }

    #[test]
    fn who_depends_on_others_ends_before_them() {
        let mut manifest = Manifest::empty();
        for (workload, needs) in [("db", &[][..]), ("api", &["db"][..]), ("web", &["api", "db"][..]), ("log", &[][..])]
        {
            let mut spec = Workload::of_image("r.example/i:1");
            spec.depends_on = needs.iter().map(|need| (name(need), DependsOn::Started)).collect();
            manifest.workloads.insert(name(workload), spec.into());
        }
        let order = |text: &str| plan(&manifest, &name(text), &manifest.workloads[&name(text)], None).order;
        assert_eq!(["web", "api", "db", "log"].map(order), [2, 1, 0, 0]);
    }

    #[test]
    fn signals_have_many_spellings() {
        let mut spec = Workload::of_image("r.example/i:1");
        assert_eq!(signal(&spec, None), 15);
        for text in ["SIGQUIT", "QUIT", "3"] {
            spec.stop_signal = Some(text.to_owned());
            assert_eq!(signal(&spec, None), 3);
        }
    }
}
