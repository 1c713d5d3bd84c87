//! Archives that nobody makes by accident. Each is refused where its bound is, by the entry's name, and nothing is outside
//! (`Ground::unpack` looks).

use super::tests::{Ground, entries, header, raw};
use super::*;
use crate::config::Images;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use tar::Builder;
use tar::EntryType::{self, Directory, Fifo, GNULongLink, GNULongName, GNUSparse, Link, Regular, Symlink, XHeader};

const BLOCK: usize = 512;

/// The same bytes again and again.
struct Repeated<'b> {
    bytes: &'b [u8],
    times: u64,
    at: usize,
}

impl Read for Repeated<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.bytes.len() {
            (self.at, self.times) = (0, self.times - 1);
        }
        if self.times == 0 {
            return Ok(0);
        }
        let count = (&self.bytes[self.at..]).read(buffer)?;
        self.at += count;
        Ok(count)
    }
}

#[test]
fn of_a_million_entries_the_first_beyond_the_bound_is_refused_by_its_name() {
    // A name that nothing is made for, so that only their number counts.
    let mut entry = header(Regular, 0);
    entry.set_path("dir/.wh..wh.plnk").unwrap();
    entry.set_cksum();
    let max = Images::default().layer_entries_max;
    assert_eq!(max, 500_000, "as docs/images.md says");
    let disk_left = AtomicU64::new(u64::MAX);
    let bounds = Bounds {
        bytes_max: 1 << 30,
        entries_max: max,
        disk_left: &disk_left,
        device_nodes: DeviceNodes::Refuse,
        is_protected: false,
    };
    let million = Repeated { bytes: entry.as_bytes(), times: 1_000_000, at: 0 };
    let mut million = io::BufReader::new(million);
    let ground = Ground::new();
    let error = unpack(&mut million, &ground.layer, &Vec::new, bounds).unwrap_err();
    assert!(matches!(&error, UnpackError::TooMany { name, max: 500_000 } if name == "dir/.wh..wh.plnk"), "{error}");
    assert!(million.get_ref().times >= 499_000, "it read on: {} are left", million.get_ref().times);
    assert_eq!(std::fs::read_dir(&ground.layer).unwrap().count(), 0);
    // As many as may be are fine.
    let most = io::BufReader::new(Repeated { bytes: entry.as_bytes(), times: max, at: 0 });
    unpack(most, &ground.layer, &Vec::new, bounds).unwrap();
}

/// An entry of this type with its body, padded.
fn block_of(kind: EntryType, body: &[u8]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    raw(&mut archive, kind, "x", "", body);
    let mut bytes = archive.into_inner().unwrap();
    bytes.truncate(bytes.len() - 2 * BLOCK);
    bytes
}

fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (rest..).find(|length| length.to_string().len() + rest == *length).unwrap();
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

#[test]
fn names_of_64_kilobytes_are_refused_whichever_way_they_are_written_and_what_came_before_is_named() {
    let long = vec![b'n'; 64 << 10];
    let first = block_of(Regular, b"");
    let ways = [
        block_of(XHeader, &pax_record("path", &long)),
        block_of(XHeader, &pax_record("linkpath", &long)),
        block_of(XHeader, &pax_record("GNU.sparse.name", &long)),
        block_of(GNULongName, &long),
        block_of(GNULongLink, &long),
    ];
    for (way, bytes) in ways.iter().enumerate() {
        let archive = [first.as_slice(), bytes, &entries(&[(Regular, "victim", "", b"x")])].concat();
        let ground = Ground::new();
        let error = ground.unpack(&archive).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("after entry `x`") && text.contains("name is too long"), "{way}: {text}");
        assert!(!ground.layer.join("victim").exists(), "{way}");
    }
    // What fits the header's bound and no file system.
    let part = vec![b'p'; 300];
    let archive = [block_of(GNULongName, &part), block_of(Regular, b"x")].concat();
    let error = Ground::new().unpack(&archive).unwrap_err();
    assert!(matches!(&error, UnpackError::Write { name, .. } if name.starts_with("ppp")), "{error}");
}

#[test]
fn what_commands_overlayfs_is_never_kept_of_an_archive_nor_copied_from_a_layer_below() {
    let commands = ["trusted.overlay.opaque", "trusted.overlay.redirect", "trusted.overlay.metacopy", "trusted.other"];
    let records: Vec<u8> = commands
        .iter()
        .chain(&["security.selinux", "system.posix_acl_access"])
        .flat_map(|name| pax_record(&format!("SCHILY.xattr.{name}"), b"y"))
        .chain(pax_record("SCHILY.xattr.user.kept", b"y"))
        .collect();
    let mut archive = Vec::new();
    for entry in [(Directory, "dir/"), (Regular, "dir/file")] {
        archive.extend(block_of(XHeader, &records));
        archive.extend_from_slice(&entries(&[(entry.0, entry.1, "", b"")])[..BLOCK]);
    }
    let (ground, below) = (Ground::new(), Ground::new());
    ground.unpack(&archive).unwrap();
    let names = |path: &Path| -> Vec<_> {
        let file = File::open(path).unwrap();
        nodes::attributes(&file, |_| true).unwrap().into_iter().map(|name| name.into_string().unwrap()).collect()
    };
    for path in ["dir", "dir/file"] {
        assert_eq!(names(&ground.layer.join(path)), ["user.kept"], "{path}");
    }
    // A layer below may have them: overlayfs' own marks, made by whiteouts.
    std::fs::create_dir(below.layer.join("dir")).unwrap();
    std::fs::write(below.layer.join("dir/file"), "x").unwrap();
    for (path, name) in ["dir", "dir/file"].into_iter().flat_map(|path| commands.map(|name| (path, name))) {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(below.layer.join(path), name, b"y", flags).unwrap();
    }
    let above = Ground::new();
    let copied = entries(&[(Link, "dir/copy", "dir/file", b"")]);
    above.unpack_over(&copied, std::slice::from_ref(&below.layer)).unwrap();
    for path in ["dir", "dir/copy"] {
        assert_eq!(names(&above.layer.join(path)), [""; 0], "{path}");
    }
}

#[test]
fn of_a_name_that_comes_twice_the_later_entry_counts_whatever_both_are() {
    let kinds = [
        (Regular, "", &b"first"[..]),
        (Regular, "", b"second"),
        (Directory, "", b""),
        (Symlink, "../outside", b""),
        (Symlink, "../outside/secret", b""),
        (Link, "other", b""),
        (Fifo, "", b""),
    ];
    for earlier in kinds {
        for later in kinds {
            let list = [
                (Regular, "other", "", &b"other"[..]),
                (earlier.0, "name", earlier.1, earlier.2),
                (Regular, "between", "", b""),
                (later.0, "name", later.1, later.2),
            ];
            let ground = Ground::new();
            let disk_left = AtomicU64::new(1 << 30);
            let bounds = Bounds {
                bytes_max: 1 << 20,
                entries_max: 100,
                disk_left: &disk_left,
                device_nodes: DeviceNodes::Refuse,
                is_protected: false,
            };
            let sums = unpack(entries(&list).as_slice(), &ground.layer, &Vec::new, bounds).unwrap();
            let (name, is) = (ground.layer.join("name"), format!("{:?} after {:?}", later.0, earlier.0));
            let meta = std::fs::symlink_metadata(&name).unwrap();
            match later.0 {
                Regular => assert_eq!(std::fs::read(&name).unwrap(), later.2, "{is}"),
                Link => assert_eq!((std::fs::read(&name).unwrap(), meta.nlink()), (b"other".to_vec(), 2), "{is}"),
                Symlink => assert_eq!(std::fs::read_link(&name).unwrap(), Path::new(later.1), "{is}"),
                Directory => assert!(meta.is_dir(), "{is}"),
                _ => assert!(meta.file_type() == std::fs::metadata(&name).unwrap().file_type() && !meta.is_file()),
            }
            assert_eq!(std::fs::read_to_string(ground.outside.join("secret")).unwrap(), "untouched", "{is}");
            assert_eq!(std::fs::read(ground.layer.join("other")).unwrap(), b"other", "{is}");
            // Inodes come back: no sum of a file that is gone may be taken for that of another.
            let table = ground.outside.join("table");
            crate::content::table::write(&ground.layer, &sums, &table, crate::config::FsVerity::Off).unwrap();
            let found = crate::content::table::check(&ground.layer, &table, &mut |_| true).unwrap();
            assert_eq!(found.damage, [""; 0], "{is}");
        }
    }
}

/// Small archives, each of one kind of entry and its headers, and how much of their last block is only filled up.
fn every_kind() -> Vec<(Vec<u8>, usize)> {
    let mut sparse = header(GNUSparse, 4);
    let gnu = sparse.as_gnu_mut().unwrap();
    gnu.set_real_size(9000);
    gnu.sparse[0].set_offset(4096);
    gnu.sparse[0].set_length(4);
    gnu.name[..6].copy_from_slice(b"sparse");
    sparse.set_cksum();
    let sparse = [sparse.as_bytes().as_slice(), b"data", &[0; BLOCK - 4]].concat();
    let records = [pax_record("mtime", b"77.5"), pax_record("SCHILY.xattr.user.x", b"y")].concat();
    let map = [
        pax_record("GNU.sparse.major", b"1"),
        pax_record("GNU.sparse.realsize", b"9000"),
        pax_record("GNU.sparse.name", b"sparse-2"),
    ]
    .concat();
    let map_body = [b"1\n4096\n4\n".as_slice(), &[0; BLOCK - 9], b"data"].concat();
    let named = |kind, name: &str, link: &str, body: &[u8]| {
        let mut archive = Builder::new(Vec::new());
        raw(&mut archive, kind, name, link, body);
        let bytes = archive.into_inner().unwrap();
        bytes[..bytes.len() - 2 * BLOCK].to_vec()
    };
    vec![
        (named(Directory, "dir/", "", b""), 0),
        (named(Regular, "dir/file", "", b"content"), BLOCK - 7),
        (named(Symlink, "link", "dir/file", b""), 0),
        (named(Link, "again", "there", b""), 0),
        (named(Fifo, "pipe", "", b""), 0),
        ([block_of(GNULongName, b"long-name\0"), named(Regular, "short", "", b"x")].concat(), BLOCK - 1),
        ([block_of(GNULongLink, b"dir\0"), named(Symlink, "to", "short", b"")].concat(), 0),
        ([block_of(XHeader, &records), named(Regular, "pax", "", b"z")].concat(), BLOCK - 1),
        (named(Regular, "dir/.wh.gone", "", b""), 0),
        (sparse, BLOCK - 4),
        ([block_of(XHeader, &map), named(Regular, "sparse-2", "", &map_body)].concat(), BLOCK - 4),
    ]
}

#[test]
fn cut_at_any_byte_of_any_kind_of_entry_an_archive_is_refused() {
    let (ground, mut all) = (Ground::new(), Vec::new());
    let empty = || {
        crate::content::remove::path(&ground.layer).unwrap();
        std::fs::create_dir(&ground.layer).unwrap();
        // What a link may lead to.
        std::fs::write(ground.layer.join("there"), "there").unwrap();
    };
    empty();
    for (number, (archive, padding)) in every_kind().into_iter().enumerate() {
        for end in 1..=archive.len() {
            let result = ground.unpack(&archive[..end]);
            let is_whole = end >= archive.len() - padding;
            match &result {
                Ok(()) => assert!(is_whole, "the {number}th, cut at {end} of {}, is taken for whole", archive.len()),
                Err(UnpackError::Archive(_)) => assert!(!is_whole, "the {number}th, cut at {end}: {result:?}"),
                Err(error) => panic!("the {number}th, cut at {end}: {error}"),
            }
            if std::fs::read_dir(&ground.layer).unwrap().count() > 1 {
                empty();
            }
        }
        all.extend(archive);
    }
    // All of them, and in the blocks that end them.
    for end in [0, 1, 511, 512, 513, 1023, 1024] {
        empty();
        let result = ground.unpack(&[all.as_slice(), &vec![0; end]].concat());
        assert_eq!(result.is_ok(), end % BLOCK == 0, "{end}: {result:?}");
        let names = std::fs::read_dir(&ground.layer).unwrap().count();
        assert_eq!(names, 10, "all was there before the end");
    }
}

#[test]
fn a_header_with_any_byte_changed_is_refused_by_its_checksum_and_what_came_before_is_named() {
    let archive = entries(&[(Regular, "first", "", b"1"), (Regular, "second", "", b"2"), (Regular, "third", "", b"3")]);
    let ground = Ground::new();
    // The second one's: behind a header and a body.
    for at in 2 * BLOCK..3 * BLOCK {
        for flip in [0x01, 0x55, 0x80] {
            let mut wrong = archive.clone();
            wrong[at] ^= flip;
            let result = ground.unpack(&wrong);
            // In the sum's own field (148 to 155) there is room for spaces.
            if result.is_ok() && (148..156).contains(&(at - 2 * BLOCK)) {
                assert_eq!(std::fs::read(ground.layer.join("second")).unwrap(), b"2");
                continue;
            }
            let text = result.unwrap_err().to_string();
            assert!(text.contains("after entry `first`") && text.contains("wrong checksum"), "{at}: {text}");
            assert!(!ground.layer.join("third").exists() || at - 2 * BLOCK >= 148, "{at}: it went on");
        }
    }
}

#[test]
fn a_hole_of_ten_gigabytes_is_refused_by_its_name_and_one_that_may_be_takes_no_room() {
    const GIB: u64 = 1 << 30;
    let gnu = |size: u64| {
        let mut header = header(GNUSparse, 0);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.set_real_size(size);
        gnu.sparse[0].set_offset(size);
        gnu.sparse[0].set_length(0);
        gnu.name[..4].copy_from_slice(b"hole");
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let pax = |size: u64, version: &str| {
        let (major, map) = match version {
            "1.0" => (pax_record("GNU.sparse.major", b"1"), Vec::new()),
            _ => (Vec::new(), pax_record("GNU.sparse.map", format!("{size},0").as_bytes())),
        };
        let real = pax_record("GNU.sparse.realsize", size.to_string().as_bytes());
        let records = [major, real, pax_record("GNU.sparse.name", b"hole"), map].concat();
        let body = if version == "1.0" { format!("1\n{size}\n0\n").into_bytes() } else { Vec::new() };
        let body = if body.is_empty() { body } else { [body.as_slice(), &vec![0; BLOCK - body.len()]].concat() };
        [block_of(XHeader, &records), block_of(Regular, &body)].concat()
    };
    for make in [&gnu as &dyn Fn(u64) -> Vec<u8>, &|size| pax(size, "0.1"), &|size| pax(size, "1.0")] {
        let unpacked = |size: u64| {
            let disk_left = AtomicU64::new(1 << 20);
            let bounds = Bounds {
                bytes_max: Images::default().layer_max.0,
                entries_max: 100,
                disk_left: &disk_left,
                device_nodes: DeviceNodes::Refuse,
                is_protected: false,
            };
            let ground = Ground::new();
            unpack(make(size).as_slice(), &ground.layer, &Vec::new, bounds).map(|_| ground)
        };
        let error = unpacked(10 * GIB).err().expect("it is too large");
        assert!(matches!(&error, UnpackError::TooLarge { name, .. } if name == "hole"), "{error}");
        let ground = unpacked(3 * GIB).unwrap();
        let hole = std::fs::metadata(ground.layer.join("hole")).unwrap();
        assert_eq!((hole.len(), hole.blocks()), (3 * GIB, 0));
    }
}
