use super::*;
use crate::config::{DeviceNodes, Images};
use flate2::write::GzEncoder;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use tar::{Builder, EntryType, Header};

const GIB: u64 = 1 << 30;
const BLOCK: usize = 512;

fn header(kind: EntryType, name: &str, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_path(name).unwrap();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000);
    header.set_cksum();
    header
}

fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    for (name, content) in files {
        archive.append(&header(EntryType::Regular, name, content.len() as u64), *content).unwrap();
    }
    archive.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// One frame (RFC 8878) that begins with `head` as it is, and goes on with so many blocks of 128 KiB of zeros: four bytes
/// for each.
fn zstd_of_zeros_behind(head: &[u8], blocks: u64) -> Vec<u8> {
    assert!(head.len() <= 128 << 10);
    // No content size, a window of 8 MiB.
    let mut frame = [&0xfd2f_b528_u32.to_le_bytes()[..], &[0, 13 << 3]].concat();
    let block = |is_last: u32, kind: u32, size: usize| ((size as u32) << 3 | kind << 1 | is_last).to_le_bytes();
    frame.extend_from_slice(&block(0, 0, head.len())[..3]);
    frame.extend_from_slice(head);
    for _ in 0..blocks {
        frame.extend_from_slice(&block(0, 1, 128 << 10)[..3]);
        frame.push(0);
    }
    frame.extend_from_slice(&block(1, 0, 0)[..3]);
    frame
}

/// A layer's place beside a file that must never change, and what may be used of the disk.
struct Ground {
    dir: tempfile::TempDir,
    disk: AtomicU64,
}

const DISK: u64 = 64 << 20;

impl Ground {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("layer")).unwrap();
        std::fs::write(dir.path().join("secret"), "untouched").unwrap();
        Self { dir, disk: AtomicU64::new(DISK) }
    }

    fn layer(&self) -> PathBuf {
        self.dir.path().join("layer")
    }

    fn unpack(&self, bytes: &[u8], expected: &Expected) -> (Result<(), LayerError>, usize) {
        self.unpack_in(bytes, expected, Images::default().layer_max.0)
    }

    /// What comes of it, and how much was left unread.
    fn unpack_in(&self, mut bytes: &[u8], expected: &Expected, bytes_max: u64) -> (Result<(), LayerError>, usize) {
        let bounds = Bounds {
            bytes_max,
            entries_max: Images::default().layer_entries_max,
            disk_left: &self.disk,
            device_nodes: DeviceNodes::Refuse,
            is_protected: false,
        };
        let result = unpack_stream(&mut bytes, expected, &self.layer(), &Vec::new, bounds).map(drop);
        let mut names: Vec<_> =
            std::fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["layer", "secret"], "something was written outside");
        assert_eq!(std::fs::read_to_string(self.dir.path().join("secret")).unwrap(), "untouched");
        (result, bytes.len())
    }

    fn names(&self) -> usize {
        std::fs::read_dir(self.layer()).unwrap().count()
    }
}

fn expected(bytes: &[u8], diff_id: Digest, compression: Compression) -> Expected {
    Expected { digest: Digest::of(bytes), diff_id, compression }
}

#[test]
fn a_layer_whose_digest_is_right_and_whose_diff_id_is_not_is_refused_with_both() {
    let plain = archive(&[("file", b"content")]);
    let is = Digest::of(&plain);
    let packed = [
        (Compression::None, plain.clone()),
        (Compression::Gzip, gzip(&plain)),
        (Compression::Zstd, super::super::zstd::tests::zstd(&["-q", "-c"], &plain)),
    ];
    for (compression, bytes) in packed {
        Ground::new().unpack(&bytes, &expected(&bytes, is, compression)).0.unwrap();
        // Also that of the bytes as they travel is another one, where they are packed.
        let others = [
            Digest::of(b"another"),
            if compression == Compression::None { Digest::of(b"") } else { Digest::of(&bytes) },
        ];
        for other in others {
            let error = Ground::new().unpack(&bytes, &expected(&bytes, other, compression)).0.unwrap_err();
            let LayerError::WrongDiffId { wanted, found } = &error else { panic!("{compression:?}: {error}") };
            assert_eq!((*wanted, *found), (other, is));
            assert!(error.to_string().contains("diff id"), "{error}");
        }
        // The same entries with one byte more behind their end are another archive.
        let longer = [plain.as_slice(), &[0]].concat();
        let bytes = if compression == Compression::Gzip { gzip(&longer) } else { longer.clone() };
        let compression = if compression == Compression::Gzip { compression } else { Compression::None };
        let error = Ground::new().unpack(&bytes, &expected(&bytes, is, compression)).0.unwrap_err();
        assert!(matches!(error, LayerError::WrongDiffId { found, .. } if found == Digest::of(&longer)), "{error}");
    }
}

#[test]
fn ten_gigabytes_of_zeros_in_one_small_layer_are_refused_by_the_entrys_name_before_they_are_unpacked() {
    let head = header(EntryType::Regular, "zeros", 10 * GIB);
    let bytes = zstd_of_zeros_behind(head.as_bytes(), 10 * GIB / (128 << 10));
    assert!(bytes.len() < 330 << 10, "no zstd frame is smaller: {}", bytes.len());
    let expected = expected(&bytes, Digest::of(b""), Compression::Zstd);
    // By what one layer may be.
    let ground = Ground::new();
    let (result, unread) = ground.unpack(&bytes, &expected);
    let error = result.unwrap_err();
    assert!(
        matches!(&error, LayerError::Unpack(UnpackError::TooLarge { name, max }) if name == "zeros" && *max == 4 * GIB),
        "{error}"
    );
    assert!(unread > bytes.len() / 2 && ground.names() == 0, "{unread} of {} were not read", bytes.len());
    // By what the disk has.
    let ground = Ground::new();
    let error = ground.unpack_in(&bytes, &expected, 11 * GIB).0.unwrap_err();
    assert!(matches!(&error, LayerError::Unpack(UnpackError::DiskFull { name, .. }) if name == "zeros"), "{error}");
    assert!(ground.names() == 0 && ground.disk.into_inner() == DISK);
}

#[test]
fn zeros_in_several_files_end_at_the_bound_for_all_of_them_and_so_do_those_in_gzip() {
    const MIB: usize = 1 << 20;
    let zeros = vec![0; 4 * MIB];
    let plain = archive(&[("one", &zeros), ("two", &zeros), ("three", &zeros)]);
    let once = gzip(&plain);
    assert!(once.len() < 20 << 10, "{}", once.len());
    for (bytes, compression) in [(plain.clone(), Compression::None), (once.clone(), Compression::Gzip)] {
        let ground = Ground::new();
        let expected = expected(&bytes, Digest::of(&plain), compression);
        let error = ground.unpack_in(&bytes, &expected, 10 * MIB as u64).0.unwrap_err();
        assert!(matches!(&error, LayerError::Unpack(UnpackError::TooLarge { name, .. }) if name == "three"), "{error}");
        assert_eq!(ground.names(), 2);
        assert_eq!(ground.disk.into_inner(), DISK - 2 * (4 * MIB as u64 + 4096));
    }
    // A packing inside the packing is nobody's to take off: it is no archive.
    let twice = gzip(&once);
    assert!(twice.len() < 2 << 10, "{}", twice.len());
    let ground = Ground::new();
    let error = ground.unpack(&twice, &expected(&twice, Digest::of(&once), Compression::Gzip)).0.unwrap_err();
    assert!(matches!(error, LayerError::Unpack(UnpackError::Archive(_))) && ground.names() == 0, "{error}");
}

#[test]
fn what_follows_the_end_of_an_archive_ends_too() {
    let plain = archive(&[("file", b"content")]);
    let is_there = |ground: &Ground| std::fs::read(ground.layer().join("file")).unwrap() == b"content";
    // Ten gigabytes behind the end, which nobody counts as a file's.
    let bytes = zstd_of_zeros_behind(&plain, 10 * GIB / (128 << 10));
    let error = Ground::new().unpack(&bytes, &expected(&bytes, Digest::of(b""), Compression::Zstd)).0.unwrap_err();
    assert!(matches!(error, LayerError::Padding { max: PADDING_MAX_BYTES }), "{error}");
    // To the byte. The archive has its two blocks of zeros.
    for (more, is_refused) in [(0, false), (1, true)] {
        let padded = [plain.as_slice(), &vec![0; PADDING_MAX_BYTES as usize + more]].concat();
        let ground = Ground::new();
        let (result, _) = ground.unpack(&padded, &expected(&padded, Digest::of(&padded), Compression::None));
        match result {
            Ok(()) => assert!(!is_refused && is_there(&ground)),
            Err(error) => assert!(is_refused && matches!(error, LayerError::Padding { .. }), "{error}"),
        }
    }
    // Whoever sends other bytes than the manifest names is told so first.
    let wrong = Expected { digest: Digest::of(b"other"), ..expected(&bytes, Digest::of(b""), Compression::Zstd) };
    assert!(matches!(Ground::new().unpack(&bytes, &wrong).0, Err(LayerError::WrongDigest { .. })));
}

#[test]
fn headers_that_speak_of_no_file_do_not_go_on_for_ever() {
    // Of the whole archive, ten gigabytes; of the next entry, one after the other.
    let global = header(EntryType::XGlobalHeader, "global", 10 * GIB);
    let long_name = [header(EntryType::GNULongName, "././@LongLink", 4).as_bytes().as_slice(), b"name"].concat();
    let long_name = [long_name.as_slice(), &[0; BLOCK - 4]].concat();
    let record = b"13 comment=x\n";
    let comment = [header(EntryType::XHeader, "pax", 13).as_bytes().as_slice(), record, &[0; BLOCK - 13]].concat();
    let first = archive(&[("first", b"")]);
    let first = &first[..BLOCK];
    let endless = |part: &[u8]| [first, &part.repeat(8 << 20 >> 9)].concat();
    for (bytes, compression) in [
        (zstd_of_zeros_behind(&[first, global.as_bytes()].concat(), 10 * GIB / (128 << 10)), Compression::Zstd),
        (endless(&comment), Compression::None),
        (endless(&long_name), Compression::None),
    ] {
        let (result, unread) = Ground::new().unpack(&bytes, &expected(&bytes, Digest::of(b""), compression));
        let error = result.unwrap_err();
        let text = crate::store::inline_chain(&error);
        assert!(text.contains("`first`: its extended headers are too large"), "{text}");
        // What is wrong with it may be that it is not the layer: the rest is read for its digest, and not decoded.
        assert_eq!(unread, 0);
    }
}
