//! Disks that are too small: known beforehand, or found out at any write.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use edged::config::FsVerity;
use edged::content::build::{BuildSpec, build_layout};
use edged::content::reading::FromTheDisk;
use edged::execute::pull::{self, PullFailure, ReadyImage};
use edged::registry::platform::architecture;
use edged_model::quantity::Bytes;
use edged_model::reason::Code;

use super::support::tmpfs;
use super::{Device, sample};

pub(super) const PAGE: u64 = 4096;

/// A device whose data lie on a disk of their own.
pub(super) fn on_disk(options: &str) -> Device {
    tmpfs::own_mounts();
    let mut device = Device::new([]).trusting_digests();
    tmpfs::mount_at(&device.ctx.data, options);
    let places = edged::config::Places::new(Some(&device.ctx.data), None);
    device.ctx.content = edged::content::Content::open(&places).unwrap();
    device
}

/// Two layers with a bit of everything that takes room on a disk.
pub(super) fn build(dir: &Path, text: &str) -> String {
    let (lower, upper) = (dir.join(text).join("lower"), dir.join(text).join("upper"));
    for (layer, root) in [&lower, &upper].into_iter().enumerate() {
        fs::create_dir_all(root.join("etc/deep")).unwrap();
        fs::write(root.join("etc/text"), format!("{text}{layer}").repeat(3_000)).unwrap();
        for number in 0..5 {
            fs::write(root.join(format!("etc/deep/{text}{layer}-{number}")), [number]).unwrap();
        }
        symlink("x".repeat(3_000), root.join("etc/long")).unwrap();
    }
    let layout = dir.join(text).join("layout");
    let spec = BuildSpec {
        layers: vec![lower, upper],
        architecture: architecture().to_owned(),
        entrypoint: vec!["/bin/app".to_owned()],
        reference: "v1".to_owned(),
        ..BuildSpec::default()
    };
    let digest = build_layout(&spec, &layout).unwrap();
    format!("oci:{}@{digest}", layout.display())
}

/// Every file and its bytes.
pub(super) fn files(root: &Path) -> BTreeSet<(PathBuf, Vec<u8>)> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        let meta = path.symlink_metadata().unwrap();
        if meta.is_dir() {
            all.extend(files(&path));
        }
        all.insert((path.clone(), if meta.is_file() { fs::read(&path).unwrap() } else { Vec::new() }));
    }
    all
}

/// Takes away what a pull that failed may leave: whole layers and documents, which the next one need not fetch again.
pub(super) fn forget_whole_parts(device: &Device, before: &BTreeSet<(PathBuf, Vec<u8>)>) {
    let content = &device.ctx.content;
    for layer in content.layers().unwrap() {
        let found = content.check_layer(layer.digest, &mut FromTheDisk).unwrap().expect("a table");
        assert_eq!(found.damage, [""; 0], "what is there is whole");
        if !before.iter().any(|(path, _)| *path == content.layer(layer.digest)) {
            content.remove_layer(layer.digest).unwrap();
        }
    }
    for document in content.documents().unwrap() {
        assert!(content.document(document.digest).is_some(), "what is there is whole");
        if !before.iter().any(|(path, _)| path.ends_with(document.digest.hex())) {
            content.remove_document(document.digest).unwrap();
        }
    }
}

/// Fetches onto disks from hardly larger than full to large enough, and looks at what every failure leaves.
pub(super) fn survives_every_full_write(
    device: &Device,
    disk: &Path,
    first: &ReadyImage,
    fetch: &dyn Fn() -> Result<ReadyImage, PullFailure>,
    options: &dyn Fn(u64) -> String,
) {
    let before = files(disk);
    for failures in 0..500 {
        tmpfs::resize(disk, &options(failures));
        let failure = match fetch() {
            Ok(ready) => {
                assert!(failures > 20, "{failures}");
                return assert!(device.layer(&ready, 1).join("etc/text").exists());
            }
            Err(failure) => failure,
        };
        assert_eq!((failure.reason.code, failure.permanent), (Code::DiskFull, false), "{failure:?}");
        assert!(pull::is_whole(&device.ctx.content, first));
        forget_whole_parts(device, &before);
        let after = files(disk);
        let changed: Vec<_> = before.symmetric_difference(&after).map(|(path, _)| path).collect();
        assert!(changed.is_empty(), "after `{}` these are not as before: {changed:?}", failure.reason);
    }
    panic!("the disk is large enough, and still it does not fit");
}

/// Blocks or inodes that are in use.
pub(super) fn used(disk: &Path) -> (u64, u64) {
    let stat = rustix::fs::statvfs(disk).unwrap();
    ((stat.f_blocks - stat.f_bfree) * stat.f_frsize, stat.f_files - stat.f_ffree)
}

#[test]
fn a_write_that_fails_on_a_full_disk_leaves_everything_as_it_was_whichever_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut device = on_disk("size=16m");
    let first = device.pull(&build(dir.path(), "first")).unwrap();
    let next = build(dir.path(), "next");
    // What is free is asked of another disk: this one is full by surprise.
    let disk = std::mem::replace(&mut device.ctx.data, dir.path().to_owned());
    let bytes = used(&disk).0;
    survives_every_full_write(&device, &disk, &first, &|| device.pull(&next), &|more| {
        format!("size={}", bytes + more * PAGE)
    });
}

#[test]
fn a_disk_without_inodes_leaves_everything_as_it_was_too() {
    let dir = tempfile::tempdir().unwrap();
    let device = on_disk("size=16m,nr_inodes=500");
    let first = device.pull(&build(dir.path(), "first")).unwrap();
    let next = build(dir.path(), "next");
    let disk = device.ctx.data.clone();
    let inodes = used(&disk).1;
    survives_every_full_write(&device, &disk, &first, &|| device.pull(&next), &|more| {
        format!("nr_inodes={}", inodes + more)
    });
}

#[test]
fn where_room_is_tight_the_archive_is_asked_how_large_it_is_and_what_does_not_fit_is_refused_with_the_numbers() {
    let dir = tempfile::tempdir().unwrap();
    // A MiB that does not compress: a guess by the rule of thumb would be three.
    let (layout, digest) = sample(dir.path());
    let image = format!("oci:{}@{digest}", layout.display());
    let mut device = on_disk("size=1600k");
    device.ctx.disk_reserve = Bytes(1 << 20);
    let failure = device.pull(&image).unwrap_err();
    assert_eq!((failure.reason.code, failure.permanent), (Code::DiskDoesNotFit, false), "{failure:?}");
    let text = &failure.reason.text;
    assert!(text.contains("needs about 1Mi,") && text.contains("1.5Mi are free"), "{text}");
    assert!(text.contains("1Mi are in reserve"), "{text}");
    assert!(device.has_nothing_half_done());
    device.ctx.disk_reserve = Bytes(64 << 10);
    device.pull(&image).unwrap();
}

#[test]
fn where_the_kernel_must_protect_layers_and_cannot_none_is_unpacked_and_else_they_keep_their_sums() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, digest) = sample(dir.path());
    let image = format!("oci:{}@{digest}", layout.display());
    // No kernel has fs-verity on a tmpfs.
    let mut device = on_disk("size=8m");
    let content = device.ctx.content.clone();
    device.ctx.content = content.clone().with_fs_verity(FsVerity::Required);
    let failure = device.pull(&image).unwrap_err();
    assert_eq!((failure.reason.code, failure.permanent), (Code::NotAllowedHere, true), "{failure:?}");
    assert!(failure.reason.text.contains("fs-verity") && failure.reason.next.contains("tune2fs"), "{failure:?}");
    assert!(device.has_nothing_half_done());
    device.ctx.content = content;
    let ready = device.pull(&image).unwrap();
    for layer in &ready.layers {
        let found = device.ctx.content.check_layer(*layer, &mut FromTheDisk).unwrap().unwrap();
        assert_eq!((found.damage, found.protected_bytes, found.unread), (Vec::new(), 0, 0));
    }
}
