//! Links that are slow, break, or cost: what came once need not come twice, over restarts too.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use edged::config::Places;
use edged::content::Content;
use edged::content::build::{BuildSpec, build_layout};
use edged::execute::pull;
use edged::registry::platform::architecture;
use edged::registry::traffic::{Clock, Limits, Traffic};
use edged_model::id::Digest;
use edged_model::reason::Code;

use super::Device;
use super::broken_registry::{Good, plain_http};
use super::support::faults::{Answer, FaultServer, Request};
use super::support::tmpfs;

/// Whoever looks at it has waited ten seconds.
fn slow_ms() -> u64 {
    static NOW: AtomicU64 = AtomicU64::new(0);
    NOW.fetch_add(10_000, Ordering::Relaxed)
}

pub(super) const SLOW: Clock = Clock { boot_ms: slow_ms, unix_secs: || 0 };

impl Device {
    /// As another process, after a restart or a boot, finds it.
    fn restarted(mut self) -> Self {
        self.ctx.content = Content::open(&Places::new(Some(&self.ctx.data), None)).unwrap();
        self
    }

    pub(super) fn with_traffic(mut self, limits: Limits, clock: Clock) -> Self {
        let file = Places::new(Some(&self.ctx.data), None).content().join("traffic");
        self.ctx.traffic = Arc::new(Traffic::new(limits, clock, file));
        self
    }

    pub(super) fn partial_bytes(&self) -> u64 {
        let partials = std::fs::read_dir(self.ctx.content.directory().join("partial")).into_iter().flatten();
        partials.map(|partial| partial.unwrap().metadata().unwrap().len()).sum()
    }
}

fn whole(request: &Request) -> Request {
    Request { headers: [].into(), ..request.clone() }
}

/// A registry whose link breaks after so much of the large layer, and then is gone; until it is told to be well.
pub(super) fn breaking(good: &Good, after: usize) -> (FaultServer, Arc<AtomicU64>) {
    let (good, is_well) = (good.clone(), Arc::new(AtomicU64::new(0)));
    let well = Arc::clone(&is_well);
    let server = FaultServer::start(move |request| {
        let answer = good.answer(request);
        if well.load(Ordering::Relaxed) == 1 || !good.is_large_layer(&whole(request)) {
            return answer;
        }
        match request.before {
            0 => Answer { cut: Some(after), ..answer },
            _ => Answer { silent: true, ..answer },
        }
    });
    (server, is_well)
}

#[test]
fn a_layer_that_came_slowly_goes_on_where_it_stopped_after_a_restart() {
    let good = Good::new();
    let (server, is_well) = breaking(&good, 700_000);
    let image = format!("{}/app@{}", server.host, good.digest);
    let device = Device::new([(server.host.clone(), plain_http())]).trusting_digests();
    let device = device.with_traffic(Limits::default(), SLOW);
    assert_eq!(device.pull(&image).unwrap_err().reason.code, Code::RegistryUnavailable);
    let kept = device.partial_bytes();
    assert!((600_000..=700_000).contains(&kept), "{kept}");

    is_well.store(1, Ordering::Relaxed);
    let device = device.restarted();
    let before = server.requests().len();
    let ready = device.pull(&image).unwrap();
    let large = server.requests().split_off(before).into_iter().filter(|request| good.is_large_layer(&whole(request)));
    // One asks for its last bytes only: how large it is.
    let from: Vec<_> =
        large.map(|request| request.from()).filter(|from| *from != Some(good.large_bytes() - 4)).collect();
    assert_eq!(from, [Some(usize::try_from(kept).unwrap())], "nothing came twice");
    assert_eq!(std::fs::read(device.layer(&ready, 1).join("data/noise")).unwrap().len(), (1 << 20) + 77);
    assert_eq!(device.partial_bytes(), 0, "what was kept goes when the layer is there");
}

#[test]
fn what_was_kept_and_is_damaged_is_fetched_again() {
    let good = Good::new();
    let (server, is_well) = breaking(&good, 700_000);
    let image = format!("{}/app@{}", server.host, good.digest);
    let device = Device::new([(server.host.clone(), plain_http())]).trusting_digests();
    let device = device.with_traffic(Limits::default(), SLOW);
    device.pull(&image).unwrap_err();
    let partial = std::fs::read_dir(device.ctx.data.join("content/partial")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&partial).unwrap();
    bytes[350_000] ^= 1;
    std::fs::write(&partial, bytes).unwrap();
    is_well.store(1, Ordering::Relaxed);
    device.restarted().pull(&image).unwrap();
}

#[test]
fn on_a_quick_link_nothing_is_written_twice() {
    let good = Good::new();
    let (server, _) = breaking(&good, good.large_bytes() - 10);
    let image = format!("{}/app@{}", server.host, good.digest);
    let still = Clock { boot_ms: || 0, unix_secs: || 0 };
    let device = Device::new([(server.host.clone(), plain_http())]).trusting_digests();
    let device = device.with_traffic(Limits::default(), still);
    device.pull(&image).unwrap_err();
    assert_eq!(device.partial_bytes(), 0);
}

#[test]
fn a_large_layer_comes_over_several_days_where_the_day_has_so_many_bytes() {
    static DAY: AtomicI64 = AtomicI64::new(20_000);
    let clock = Clock { boot_ms: || 0, unix_secs: || DAY.load(Ordering::Relaxed) * 86_400 };
    let good = Good::new();
    let server_has = good.clone();
    let server = FaultServer::start(move |request| server_has.answer(request));
    let image = format!("{}/app@{}", server.host, good.digest);
    let limits = Limits { bytes_per_sec: None, bytes_per_day: Some(400_000) };
    let mut device = Device::new([(server.host.clone(), plain_http())]).trusting_digests();
    let mut days = 1;
    loop {
        device = device.with_traffic(limits, clock).restarted();
        let Err(failure) = device.pull(&image) else { break };
        assert_eq!((failure.reason.code, failure.permanent), (Code::DataBudget, false), "{failure:?}");
        assert!(failure.reason.text.contains("a day is used"), "{failure:?}");
        assert_eq!(failure.retry_after, Some(Duration::from_secs(86_400)));
        // On the same day, by another process too, it asks for nothing at all.
        device = device.with_traffic(limits, clock).restarted();
        let before = server.requests().len();
        assert_eq!(device.pull(&image).unwrap_err().reason.code, Code::DataBudget);
        assert_eq!(server.requests().len(), before);
        DAY.fetch_add(1, Ordering::Relaxed);
        days += 1;
        assert!(days < 9, "it gets no further");
    }
    assert_eq!(days, 3, "a little over a MiB");
}

#[test]
fn a_rate_limit_holds_for_all_that_comes() {
    fn now_ms() -> u64 {
        static BEGAN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        u64::try_from(BEGAN.get_or_init(Instant::now).elapsed().as_millis()).unwrap()
    }
    let good = Good::new();
    let server_has = good.clone();
    let server = FaultServer::start(move |request| server_has.answer(request));
    let limits = Limits { bytes_per_sec: Some(1 << 20), bytes_per_day: None };
    let device = Device::new([(server.host.clone(), plain_http())]).trusting_digests();
    let device = device.with_traffic(limits, Clock { boot_ms: now_ms, unix_secs: || 0 });
    let began = Instant::now();
    device.pull(&format!("{}/app@{}", server.host, good.digest)).unwrap();
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(950), "a MiB in {took:?}");
}

/// One layer of many files that do not compress, three MiB in all.
fn many_files(dir: &Path) -> (PathBuf, Digest) {
    let (root, layout) = (dir.join("root"), dir.join("layout"));
    std::fs::create_dir_all(&root).unwrap();
    let mut state = 1_u64;
    for number in 0..30 {
        let noise = (0..100 << 10).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        });
        std::fs::write(root.join(format!("file-{number}")), noise.collect::<Vec<u8>>()).unwrap();
    }
    let (layers, architecture) = (vec![root], architecture().to_owned());
    let spec = BuildSpec { layers, architecture, reference: "v1".to_owned(), ..BuildSpec::default() };
    let digest = build_layout(&spec, &layout).unwrap();
    (layout, digest)
}

#[test]
fn where_the_disk_has_no_room_for_both_a_slow_layer_is_unpacked_and_not_kept() {
    let good = Good::of(many_files);
    let registry = good.clone();
    let server = FaultServer::start(move |request| registry.answer(request));
    let image = format!("{}/app@{}", server.host, good.digest);
    tmpfs::own_mounts();
    // A MiB in reserve, three and a little for the layer, and as much again, or half of it, to keep it meanwhile.
    for (size_kib, kept) in [(8_000, true), (5_700, false)] {
        let device = Device::new([(server.host.clone(), plain_http())]).trusting_digests();
        tmpfs::mount_at(&device.ctx.data, &format!("size={size_kib}k"));
        let device = device.restarted().with_traffic(Limits::default(), SLOW);
        let most = std::cell::Cell::new(0);
        let seen = |_| most.set(most.get().max(device.partial_bytes()));
        let ready = pull::pull(&device.ctx, &image, &seen).unwrap();
        assert!(device.layer(&ready, 0).join("file-29").exists());
        assert_eq!(device.partial_bytes(), 0);
        assert_eq!(most.get() > 2 << 20, kept, "{} were kept of {}", most.get(), good.large_bytes());
    }
}
