//! Figures. A figure stands here only when this program measures it; a ratio only when both sides ran in the same run.

/// Power-on, hand-off to the first process, first workload: in QEMU.
mod boot;
/// A device on this machine, with a registry of its own.
mod device;
/// What an idle device writes to its flash.
mod idle;
/// Pull and unpack, against what does the same.
mod images;
/// Two hundred workloads at once.
mod many;
/// What keeper and agent cost with no workload and with twenty.
mod memory;
/// After an agent that was killed, and after a power cut.
mod recovery;
/// From a crash to running again, against podman.
mod restart;
/// One container after another, against other runtimes and the bare system calls.
mod runtime;
/// The static programs.
mod sizes;
/// From the request to exec, against the bare system calls.
mod start;
/// The state store after a whole life.
mod store;
/// What fs-verity adds to a pull, in QEMU.
mod verity;

use anyhow::Result;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Bench {
    /// Sizes of the static programs, per architecture
    Sizes,
    /// Kernel hand-off to the first workload running, in QEMU
    Boot,
    /// PSS of keeper and agent with 0 and 20 workloads
    Memory,
    /// Crash to running again, against podman
    Restart,
    /// Two hundred workloads started at once, and crashed at once
    Many,
    /// Twenty workloads after an agent that was killed, and after a power cut
    Recovery,
    /// Pull and unpack of an image of 20,000 files, against podman, skopeo with umoci, and tar
    Images,
    /// Bytes written by an idle device with 20 workloads that reports to a fleet
    Idle,
    /// A container from nothing to nothing, against crun, runc and the bare system calls
    Runtime,
    /// A workload from the request to the keeper to exec, against the bare system calls
    Start,
    /// Size of the state store and what it writes, over 10,000 generations and 1,000,000 restarts
    Store,
    /// A pull with fs-verity against one without, in QEMU
    Verity,
}

pub fn run(what: &[Bench]) -> Result<()> {
    let all = [
        Bench::Sizes,
        Bench::Memory,
        Bench::Restart,
        Bench::Many,
        Bench::Recovery,
        Bench::Runtime,
        Bench::Start,
        Bench::Store,
        Bench::Idle,
        Bench::Images,
        Bench::Boot,
        Bench::Verity,
    ];
    let what = if what.is_empty() { &all[..] } else { what };
    for bench in what {
        match bench {
            Bench::Sizes => sizes::run()?,
            Bench::Boot => boot::run()?,
            Bench::Memory => memory::run()?,
            Bench::Restart => restart::run()?,
            Bench::Many => many::run()?,
            Bench::Recovery => recovery::run()?,
            Bench::Runtime => runtime::run()?,
            Bench::Start => start::run()?,
            Bench::Idle => idle::run()?,
            Bench::Images => images::run()?,
            Bench::Store => store::run()?,
            Bench::Verity => verity::run()?,
        }
    }
    Ok(())
}

/// The middle one of some measurements, and the 95th of a hundred.
fn median_and_p95(values: Vec<f64>) -> (f64, f64) {
    let Quantiles { median, p95, .. } = Quantiles::of(values);
    (median, p95)
}

/// What is told of a side of a comparison. On a machine that others use too, the quiet quarter of the rounds tells more
/// than the middle one.
#[derive(Debug, Clone, Copy)]
struct Quantiles {
    quarter: f64,
    median: f64,
    p95: f64,
}

impl Quantiles {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at =
            |share: f64| values.get((values.len() as f64 * share) as usize).or(values.last()).copied().unwrap_or(0.0);
        Self { quarter: at(0.25), median: at(0.5), p95: at(0.95) }
    }

    fn print_head(title: &str) {
        println!("{title:<46} {:>8} {:>8} {:>8} {:>8} {:>8}", "quarter", "median", "p95", "to bare", "quarter");
    }

    /// With the ratio of the medians, and that of the quiet quarters.
    fn print(self, name: &str, floor: Self) {
        let (ratio, of_quarters) = (self.median / floor.median, self.quarter / floor.quarter);
        let Self { quarter, median, p95 } = self;
        println!("{name:<46} {quarter:>8.2} {median:>8.2} {p95:>8.2} {ratio:>7.2}x {of_quarters:>7.2}x");
    }
}
