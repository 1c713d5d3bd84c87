//! What becomes more than the archive says of it is counted as what it becomes.

use super::account::DISK_BLOCK;
use super::tests::{Ground, entries, header};
use super::*;
use crate::content::verity;
use std::os::unix::fs::MetadataExt;
use tar::Builder;
use tar::EntryType::{self, Link, Regular};

const MIB: u64 = 1 << 20;

struct Limits {
    bytes_max: u64,
    entries_max: u64,
    disk: u64,
    is_protected: bool,
}

const WIDE: Limits = Limits { bytes_max: 1 << 40, entries_max: 1000, disk: 1 << 40, is_protected: false };

/// What unpacking gives, and what was taken of the disk.
fn unpacked(archive: &[u8], layer: &Path, below: &Path, limits: &Limits) -> (Result<(), UnpackError>, u64) {
    let disk_left = AtomicU64::new(limits.disk);
    let bounds = Bounds {
        bytes_max: limits.bytes_max,
        entries_max: limits.entries_max,
        disk_left: &disk_left,
        device_nodes: DeviceNodes::Refuse,
        is_protected: limits.is_protected,
    };
    let below = vec![below.to_owned()];
    let result = unpack(archive, layer, &|| below.clone(), bounds).map(drop);
    (result, limits.disk - disk_left.into_inner())
}

/// So many names, in a layer above, for one file of the layer below.
fn links(count: u64) -> Vec<u8> {
    let names: Vec<_> = (0..count).map(|number| format!("link-{number}")).collect();
    let list: Vec<(EntryType, &str, &str, &[u8])> =
        names.iter().map(|name| (Link, name.as_str(), "large", &b""[..])).collect();
    entries(&list)
}

fn stored(layer: &Path) -> u64 {
    std::fs::read_dir(layer).unwrap().map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

#[test]
fn many_links_to_one_large_file_of_a_layer_below_end_at_the_layers_bound() {
    let (below, ground) = (Ground::new(), Ground::new());
    // 4 GiB that take no room at all: one header in an archive.
    File::create(below.layer.join("large")).unwrap().set_len(4 << 30).unwrap();
    let limits = Limits { bytes_max: 9 << 30, ..WIDE };
    let (result, _) = unpacked(&links(5), &ground.layer, &below.layer, &limits);
    let error = result.unwrap_err();
    assert!(matches!(&error, UnpackError::TooLarge { name, max } if name == "link-2" && *max == 9 << 30), "{error}");
    assert!(stored(&ground.layer) < MIB, "holes were written out");
    assert!(!ground.layer.join("link-2").exists(), "it was written before it was counted");
}

#[test]
fn many_links_to_one_large_file_of_a_layer_below_end_at_the_disks_reserve() {
    let below = Ground::new();
    std::fs::write(below.layer.join("large"), vec![7; 1 << 20]).unwrap();
    for (is_protected, tree) in [(false, 0), (true, verity::extra_bytes(MIB))] {
        let ground = Ground::new();
        // Three of them but for one byte.
        let limits = Limits { disk: 3 * (MIB + DISK_BLOCK + tree) - 1, is_protected, ..WIDE };
        let (result, taken) = unpacked(&links(5), &ground.layer, &below.layer, &limits);
        let error = result.unwrap_err();
        assert!(
            matches!(&error, UnpackError::DiskFull { name, size } if name == "link-2" && *size == MIB + tree),
            "{error}"
        );
        assert!(taken <= limits.disk && stored(&ground.layer) <= 2 * (MIB + DISK_BLOCK));
        assert!(!ground.layer.join("link-2").exists(), "it was written before it was counted");
    }
}

#[test]
fn copies_of_files_below_that_fit_are_whole_keep_their_holes_and_are_counted_to_the_byte() {
    let (below, ground) = (Ground::new(), Ground::new());
    let large = File::create(below.layer.join("large")).unwrap();
    large.write_all_at(&[1; 8192], 0).unwrap();
    large.write_all_at(&[2; 4096], 3 * MIB).unwrap();
    // It ends in a hole too.
    large.set_len(5 * MIB + 1).unwrap();
    let limits = Limits { bytes_max: 2 * (5 * MIB + 1), ..WIDE };
    let (result, taken) = unpacked(&links(2), &ground.layer, &below.layer, &limits);
    result.unwrap();
    assert_eq!(taken, 2 * (8192 + 4096 + DISK_BLOCK));
    let was = std::fs::read(below.layer.join("large")).unwrap();
    for name in ["link-0", "link-1"] {
        assert!(std::fs::read(ground.layer.join(name)).unwrap() == was, "{name}");
    }
    assert!(stored(&ground.layer) <= 2 * (8192 + 2 * 4096), "{}", stored(&ground.layer));
    // Links among themselves cost nothing more.
    let second = [(Link, "one", "large", &b""[..]), (Link, "two", "one", b"")];
    let (result, taken) = unpacked(&entries(&second), &Ground::new().layer, &below.layer, &WIDE);
    result.unwrap();
    assert_eq!(taken, 8192 + 4096 + 2 * DISK_BLOCK);
}

#[test]
fn directories_that_no_entry_names_count_as_entries() {
    let below = Ground::new();
    // A path of two thousand directories in one entry.
    let deep = |first: &str| format!("{first}{}", "/d".repeat(1990));
    let mut archive = Builder::new(Vec::new());
    for first in ["a", "b"] {
        let mut header = header(Regular, 0);
        archive.append_data(&mut header, deep(first), io::empty()).unwrap();
    }
    let archive = archive.into_inner().unwrap();
    let ground = Ground::new();
    let limits = Limits { entries_max: 3000, ..WIDE };
    let error = unpacked(&archive, &ground.layer, &below.layer, &limits).0.unwrap_err();
    assert!(matches!(&error, UnpackError::TooMany { name, max: 3000 } if name.starts_with("b/d/d/d")), "{error}");
    let limits = Limits { disk: 1990 * DISK_BLOCK, ..WIDE };
    let error = unpacked(&archive, &Ground::new().layer, &below.layer, &Limits { entries_max: 9999, ..limits }).0;
    assert!(matches!(error.unwrap_err(), UnpackError::DiskFull { name, .. } if name.starts_with("a/d/d/d")));
    let limits = Limits { entries_max: 2 * 1991, ..WIDE };
    let (result, taken) = unpacked(&archive, &Ground::new().layer, &below.layer, &limits);
    result.unwrap();
    assert_eq!(taken, 2 * 1991 * DISK_BLOCK);
}

#[test]
fn attributes_count_as_bytes_of_the_layer() {
    let below = Ground::new();
    let mut archive = Builder::new(Vec::new());
    for number in 0..10 {
        archive.append_pax_extensions([("SCHILY.xattr.user.large", &[b'x'; 1000][..])]).unwrap();
        archive.append_data(&mut header(Regular, 0), format!("file-{number}"), io::empty()).unwrap();
    }
    let archive = archive.into_inner().unwrap();
    let each = 1000 + "user.large".len() as u64;
    // Their header, and their record with its length and key.
    let limits = Limits { bytes_max: 10 * (512 + each + "1035 SCHILY.xattr.=\n".len() as u64) - 1, ..WIDE };
    let error = unpacked(&archive, &Ground::new().layer, &below.layer, &limits).0.unwrap_err();
    assert!(matches!(&error, UnpackError::TooLarge { name, .. } if name == "file-9"), "{error}");
    let (result, taken) = unpacked(&archive, &Ground::new().layer, &below.layer, &WIDE);
    result.unwrap();
    assert_eq!(taken, 10 * (each + DISK_BLOCK));
}

#[test]
fn an_opaque_root_counts_each_name_that_it_hides() {
    let (below, ground) = (Ground::new(), Ground::new());
    (0..20).for_each(|number| std::fs::write(below.layer.join(format!("file-{number}")), "").unwrap());
    let opaque = entries(&[(Regular, ".wh..wh..opq", "", b"")]);
    let limits = Limits { entries_max: 20, ..WIDE };
    let error = unpacked(&opaque, &ground.layer, &below.layer, &limits).0.unwrap_err();
    assert!(matches!(&error, UnpackError::TooMany { name, .. } if name.starts_with("file-")), "{error}");
    let (result, taken) = unpacked(&opaque, &Ground::new().layer, &below.layer, &Limits { entries_max: 21, ..WIDE });
    result.unwrap();
    assert_eq!(taken, 21 * DISK_BLOCK);
}
