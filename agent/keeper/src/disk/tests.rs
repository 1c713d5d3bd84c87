//! With files instead of disks, and the real programs.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use fastrand::Rng;

use super::*;

/// Smaller ones have no copy of the superblock.
const BYTES: u64 = 256 << 20;
const BLOCK: usize = 4096;
const KINDS: [(Filesystem, bool); 4] =
    [(Filesystem::Ext4, false), (Filesystem::Ext4, true), (Filesystem::F2fs, false), (Filesystem::F2fs, true)];

fn disk() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::File::create(&disk).unwrap().set_len(BYTES).unwrap();
    (dir, disk)
}

fn write(disk: &Path, at: u64, bytes: &[u8]) {
    fs::File::options().write(true).open(disk).unwrap().write_all_at(bytes, at).unwrap();
}

fn make(filesystem: Filesystem, protects: bool, disk: &Path, bytes: u64) {
    let size = format::size(filesystem, &fs::File::open(disk).unwrap(), bytes);
    done(filesystem.make(protects).arg(disk).arg(size), &[0]).unwrap();
}

#[test]
fn a_disk_is_only_formatted_when_it_is_empty() {
    let (_dir, disk) = disk();
    assert_eq!(content(&disk).unwrap(), Content::Empty);
    write(&disk, 1080, &[0x53, 0xef]);
    assert_eq!(content(&disk).unwrap(), Content::Ours(Filesystem::Ext4));
    write(&disk, 1080, &[0]);
    write(&disk, PROBE_BYTES as u64 - 1, &[1]);
    assert_eq!(content(&disk).unwrap(), Content::Foreign);
}

/// What the tools of today write is what is recognised.
#[test]
fn real_file_systems_are_recognised() {
    for (filesystem, protects) in KINDS {
        let (_dir, disk) = disk();
        format::format(filesystem, protects, &disk, false).unwrap();
        assert_eq!(content(&disk).unwrap(), Content::Ours(filesystem));
        let there = Superblock::of(&head(&fs::File::open(&disk).unwrap()).unwrap()).unwrap();
        assert!(there.is_named_ours && there.bytes < BYTES && there.bytes > BYTES - (4 << 20), "{there:?}");
        check_disk(filesystem, &disk).unwrap();
    }
}

/// A cut may leave the first sector of a superblock new and the second, with ext4's checksum, old.
#[test]
fn a_torn_superblock_is_mended() {
    for (filesystem, protects) in KINDS {
        let (_dir, disk) = disk();
        format::format(filesystem, protects, &disk, false).unwrap();
        // When it was written last, and f2fs's number of its file.
        let at = if filesystem == Filesystem::Ext4 { 0x30 } else { 108 };
        write(&disk, (SUPERBLOCK + at) as u64, &[0xa5]);
        assert_eq!(content(&disk).unwrap(), Content::Ours(filesystem));
        check_disk(filesystem, &disk).unwrap();
        let [(program, _), _] = filesystem.mend();
        let look: &[&str] = if filesystem == Filesystem::Ext4 { &["-f", "-n"] } else { &["--dry-run", "-f"] };
        done(Command::new(program).args(look).arg(&disk), &[0]).unwrap();
    }
}

/// Whatever part of what was written until the cut has reached the disk, and whether or not the last step has.
#[test]
fn a_cut_while_a_disk_is_formatted_is_noticed() {
    let mut rng = Rng::with_seed(11);
    for (filesystem, protects) in KINDS {
        let (_dir, whole) = disk();
        let open = fs::File::options().read(true).write(true).open(&whole).unwrap();
        let end = format::end(&open).unwrap().unwrap();
        let mut bytes = Vec::new();
        let made = format::under_mark(&open, end, || {
            assert_eq!(content(&whole).unwrap(), Content::Unfinished, "marked before mkfs begins");
            make(filesystem, protects, &whole, end);
            assert_eq!(content(&whole).unwrap(), Content::Unfinished, "mkfs leaves the mark alone");
            bytes = fs::read(&whole).unwrap();
            Ok(())
        });
        made.unwrap();
        assert_eq!(content(&whole).unwrap(), Content::Ours(filesystem));
        let written: Vec<usize> = bytes
            .chunks(BLOCK)
            .enumerate()
            .filter_map(|(at, block)| block.iter().any(|byte| *byte != 0).then_some(at))
            .collect();
        let mut looked_whole = 0;
        for _ in 0..100 {
            let (_dir, cut) = disk();
            format::set_mark(&cut, true);
            let chance = rng.f64();
            for at in written.iter().filter(|_| rng.f64() < chance) {
                write(&cut, (at * BLOCK) as u64, &bytes[at * BLOCK..][..BLOCK]);
            }
            assert_eq!(content(&cut).unwrap(), Content::Unfinished);
            // What it would have been taken for without the mark.
            format::set_mark(&cut, false);
            looked_whole += u32::from(content(&cut).unwrap() == Content::Ours(filesystem));
        }
        assert!(looked_whole > 10, "{filesystem:?}: {looked_whole}");
        // And it is made again over what is there.
        let (_dir, cut) = disk();
        write(&cut, 0, &bytes[..written[written.len() / 2] * BLOCK]);
        format::format(filesystem, protects, &cut, true).unwrap();
        assert_eq!(content(&cut).unwrap(), Content::Ours(filesystem));
        check_disk(filesystem, &cut).unwrap();
    }
}

/// A disk that was formatted whole has files where the mark would lie, and anybody may have written them.
#[test]
fn what_a_file_says_is_no_mark() {
    for (filesystem, protects) in KINDS {
        let (_dir, disk) = disk();
        make(filesystem, protects, &disk, BYTES);
        format::set_mark(&disk, true);
        assert_eq!(content(&disk).unwrap(), Content::Ours(filesystem));
    }
}

/// Left by a try that never came to its end, and somebody has used the disk for something else since.
#[test]
fn a_mark_that_was_left_behind_gives_nobody_away() {
    let (_dir, disk) = disk();
    let put = |at: u64, bytes: &[u8]| {
        format::set_mark(&disk, true);
        write(&disk, at, bytes);
        let found = content(&disk).unwrap();
        write(&disk, at, &vec![0; bytes.len()]);
        found
    };
    assert_eq!(put(0, &[]), Content::Unfinished);
    for (at, bytes) in [(0, &b"LUKS\xba\xbe"[..]), (0, b"XFSB"), (510, &[0x55, 0xaa])] {
        assert_eq!(put(at, bytes), Content::Foreign);
    }
    format::set_mark(&disk, false);
    write(&disk, 0x10040, b"_BHRfS_M");
    assert_eq!(content(&disk).unwrap(), Content::Foreign, "btrfs");
    write(&disk, 0x10040, &[0; 8]);
    // A smaller file system that is somebody's.
    for name in ["-L", "-l"] {
        let (program, by_force) = if name == "-L" { ("/sbin/mkfs.ext4", "-F") } else { ("/sbin/mkfs.f2fs", "-f") };
        let mut other = Command::new(program);
        other.args(["-q", by_force, name, "factory"]).arg(&disk).arg(if name == "-L" { "65536k" } else { "131072" });
        done(&mut other, &[0]).unwrap();
        format::set_mark(&disk, true);
        assert!(matches!(content(&disk).unwrap(), Content::Ours(_)), "{program}");
    }
}

#[test]
fn the_end_is_in_whole_mebibytes() {
    let (_dir, disk) = disk();
    let open = fs::File::options().read(true).write(true).open(&disk).unwrap();
    for (bytes, end) in
        [(0, None), (1 << 20, None), ((2 << 20) - 1, None), (2 << 20, Some(1)), ((3 << 20) + 512, Some(2))]
    {
        open.set_len(bytes).unwrap();
        let found = format::end(&open).unwrap();
        assert_eq!(found, end.map(|mib: u64| mib << 20), "{bytes}");
    }
}

/// A program that refuses, or is not there, has done nothing.
#[test]
fn a_format_that_never_began_leaves_no_mark() {
    let (_dir, disk) = disk();
    fs::File::options().write(true).open(&disk).unwrap().set_len(2 << 20).unwrap();
    assert!(format::format(Filesystem::F2fs, false, &disk, false).is_err(), "too small");
    assert_eq!(content(&disk).unwrap(), Content::Empty);
}

#[test]
fn another_kind_of_disk_is_named() {
    assert!(Filesystem::named("btrfs").unwrap_err().to_string().contains("edged.data-type=btrfs"));
}
