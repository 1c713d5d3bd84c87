//! A disk that is full at any write of what else writes to it than a pull from a layout: a pull that goes on with what it had
//! kept, `image load`, and a collection.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use edged::execute::pull::load::{self, Wish as LoadWish};
use edged::execute::pull::{self, PullFailure, ReadyImage};
use edged::execute::reclaim::{self, Wish};
use edged::registry::traffic::Limits;
use edged_model::api::GenerationRole;
use edged_model::disk::NeededBy;
use edged_model::id::Sequence;
use edged_model::quantity::Timestamp;
use edged_model::reason::Code;
use edged_plan::garbage::{Room, Rules};

use super::Device;
use super::broken_registry::{Good, plain_http};
use super::resume::{SLOW, breaking};
use super::small_disk::{PAGE, build, files, forget_whole_parts, on_disk, survives_every_full_write, used};
use super::support::tmpfs;

/// What free room is asked of another disk: this one is full by surprise.
fn by_surprise(device: &mut Device, dir: &Path) -> PathBuf {
    std::mem::replace(&mut device.ctx.data, dir.to_owned())
}

/// A file that is gone takes its blocks as long as somebody has it open: a program that another test is just starting, too.
fn until_used(disk: &Path, bytes: u64) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while used(disk).0 != bytes {
        assert!(Instant::now() < deadline, "{} bytes are in use, not {bytes}", used(disk).0);
        std::thread::yield_now();
    }
}

#[test]
fn a_load_from_a_stick_that_finds_the_disk_full_leaves_everything_as_it_was_whichever_write_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut device = on_disk("size=16m");
    let first = device.pull(&build(dir.path(), "first")).unwrap();
    build(dir.path(), "next");
    let stick = dir.path().join("next/layout");
    let disk = by_surprise(&mut device, dir.path());
    let load = || -> Result<ReadyImage, PullFailure> {
        let mut all = load::load(&device.ctx, &stick, &LoadWish::default(), &|_| {})?;
        assert_eq!(all.len(), 1);
        Ok(all.remove(0).image)
    };
    let bytes = used(&disk).0;
    survives_every_full_write(&device, &disk, &first, &load, &|more| format!("size={}", bytes + more * PAGE));
}

/// What is kept of a layer on its way may give its room up, and nothing else. If it is there, it is what came.
#[test]
fn a_pull_that_goes_on_with_what_it_kept_and_finds_the_disk_full_leaves_everything_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let good = Good::new();
    let (server, is_well) = breaking(&good, 700_000);
    let name = format!("{}/app@{}", server.host, good.digest);
    // Where room is tight the registry would be asked how large the layer is, and this one answers once.
    let mut device = on_disk("size=400m").with_traffic(Limits::default(), SLOW);
    device.ctx.registries.insert(server.host.clone(), plain_http());
    let first = device.pull(&build(dir.path(), "first")).unwrap();
    assert_eq!(device.pull(&name).unwrap_err().reason.code, Code::RegistryUnavailable);
    assert!(device.partial_bytes() > 600_000, "{}", device.partial_bytes());
    is_well.store(1, Ordering::Relaxed);

    let disk = by_surprise(&mut device, dir.path());
    let kept_at = fs::read_dir(disk.join("content/partial")).unwrap().next().unwrap().unwrap().path();
    let kept = fs::read(&kept_at).unwrap();
    let but_kept = || files(&disk).into_iter().filter(|(path, _)| *path != kept_at).collect::<BTreeSet<_>>();
    let (before, bytes) = (but_kept(), used(&disk).0);
    for (failures, more) in (0..1000).step_by(3).enumerate() {
        tmpfs::resize(&disk, "size=16m");
        fs::write(&kept_at, &kept).unwrap();
        until_used(&disk, bytes);
        tmpfs::resize(&disk, &format!("size={}", bytes + more * PAGE));
        let failure = match device.pull(&name) {
            Ok(ready) => {
                assert!(failures > 20, "only {failures} of them failed");
                assert_eq!(fs::read(device.layer(&ready, 1).join("data/noise")).unwrap().len(), (1 << 20) + 77);
                return assert!(!kept_at.exists(), "nobody needs it any more");
            }
            Err(failure) => failure,
        };
        assert_eq!((failure.reason.code, failure.permanent), (Code::DiskFull, false), "{failure:?}");
        assert!(pull::is_whole(&device.ctx.content, &first));
        if let Ok(now) = fs::read(&kept_at) {
            assert!(now.starts_with(&kept[..now.len().min(kept.len())]), "another content was kept");
        }
        forget_whole_parts(&device, &before);
        let after = but_kept();
        let changed: Vec<_> = before.symmetric_difference(&after).map(|(path, _)| path).collect();
        assert!(changed.is_empty(), "after `{}` these are not as before: {changed:?}", failure.reason);
    }
    panic!("the disk is large enough, and still it does not fit");
}

#[test]
fn a_collection_on_a_disk_without_a_block_or_an_inode_left_makes_room_and_keeps_what_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let mut device = on_disk("size=16m,nr_inodes=500");
    let [first, next] = ["first", "next"].map(|text| build(dir.path(), text));
    let needed = device.pull(&first).unwrap();
    let unneeded = device.pull(&next).unwrap();
    let disk = device.ctx.data.clone();
    let (bytes, inodes) = used(&disk);
    tmpfs::resize(&disk, &format!("size={bytes},nr_inodes={inodes}"));
    assert!(fs::write(disk.join("one-more"), "x").is_err(), "it is full");
    let of_the_needed = || -> BTreeSet<_> {
        let layers = needed.layers.iter().map(|layer| files(&device.ctx.content.layer(*layer)));
        layers.flatten().collect()
    };
    let before = of_the_needed();

    let by = NeededBy { generation: Sequence(1), role: GenerationRole::Active, workloads: Vec::new() };
    let wish = Wish {
        images: BTreeMap::from([(first.clone(), needed.clone()), (next.clone(), unneeded.clone())]),
        needed: BTreeMap::from([(first.clone(), vec![by])]),
        former: BTreeMap::new(),
        copies: BTreeMap::new(),
        workloads: BTreeSet::new(),
        rules: Rules { now: Timestamp(0), keep_unused_secs: 86_400, budget: None, room: Room::Short },
        dry_run: false,
    };
    let (pruned, broken) = reclaim::collect(&device.ctx.content, &wish).unwrap();
    assert_eq!(broken, [next.as_str()]);
    let gone: BTreeSet<_> = pruned.items.iter().map(|item| item.digest).collect();
    assert!(unneeded.layers.iter().all(|layer| gone.contains(layer) && !device.ctx.content.has_layer(*layer)));
    assert!(pull::is_whole(&device.ctx.content, &needed) && before == of_the_needed());
    assert_eq!(fs::read_dir(disk.join("layers/ingest")).unwrap().count(), 0, "nothing is left aside");
    let now = used(&disk);
    assert!(now.0 < bytes && now.1 < inodes, "no room was made: {now:?}");

    // In the room that it made the same image fits again, to the block (it is weighed with a block for each entry, and a
    // tmpfs takes none: what is free is asked of another disk).
    by_surprise(&mut device, dir.path());
    device.pull(&next).unwrap();
    assert!(pull::is_whole(&device.ctx.content, &needed));
}
