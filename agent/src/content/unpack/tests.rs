use super::*;
use rustix::fs::XattrFlags;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use tar::{Builder, EntryType, Header};

fn unpack_in_bounds(archive: &[u8], dir: &Path, below: &[PathBuf]) -> Result<(), UnpackError> {
    unpack_with_nodes(archive, dir, below, DeviceNodes::Refuse)
}

fn unpack_with_nodes(
    archive: &[u8],
    dir: &Path,
    below: &[PathBuf],
    device_nodes: DeviceNodes,
) -> Result<(), UnpackError> {
    let disk_left = AtomicU64::new(100 << 20);
    let bounds =
        Bounds { bytes_max: 10 << 20, entries_max: 1000, disk_left: &disk_left, device_nodes, is_protected: false };
    unpack(archive, dir, &|| below.to_vec(), bounds).map(drop)
}

pub fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000);
    header
}

/// Adds an entry whose name is taken as it is: what the `tar` crate's own builder refuses to write.
pub fn raw(archive: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, link: &str, content: &[u8]) {
    let mut header = header(kind, content.len() as u64);
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    archive.append(&header, content).unwrap();
}

pub fn entries(list: &[(EntryType, &str, &str, &[u8])]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    for (kind, name, link, content) in list {
        raw(&mut archive, *kind, name, link, content);
    }
    archive.into_inner().unwrap()
}

/// A layer directory beside a file that must never change.
pub struct Ground {
    _dir: tempfile::TempDir,
    pub layer: PathBuf,
    pub outside: PathBuf,
}

impl Ground {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (layer, outside) = (dir.path().join("layer"), dir.path().join("outside"));
        std::fs::create_dir(&layer).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("secret"), "untouched").unwrap();
        Self { _dir: dir, layer, outside }
    }

    pub fn unpack(&self, archive: &[u8]) -> Result<(), UnpackError> {
        self.unpack_over(archive, &[])
    }

    pub fn unpack_over(&self, archive: &[u8], below: &[PathBuf]) -> Result<(), UnpackError> {
        let result = unpack_in_bounds(archive, &self.layer, below);
        let names: Vec<_> = std::fs::read_dir(&self.outside).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"], "something was written outside");
        assert_eq!(std::fs::read_to_string(self.outside.join("secret")).unwrap(), "untouched");
        result
    }
}

use EntryType::{Block, Char, Directory, Fifo, Link, Regular, Symlink};

#[test]
fn ordinary_entries_keep_what_their_headers_say() {
    let ground = Ground::new();
    let archive = entries(&[
        (Directory, "etc/", "", b""),
        (Regular, "etc/motd", "", b"hello"),
        (Symlink, "etc/link", "motd", b""),
        (Link, "etc/again", "etc/motd", b""),
        (Fifo, "etc/pipe", "", b""),
        (Regular, "a/deep/path/without/its/directories", "", b"x"),
    ]);
    ground.unpack(&archive).unwrap();
    let motd = std::fs::metadata(ground.layer.join("etc/motd")).unwrap();
    assert_eq!((motd.mtime(), motd.permissions().mode() & 0o7777, motd.nlink()), (1_000, 0o644, 2));
    assert_eq!(std::fs::metadata(ground.layer.join("etc")).unwrap().mtime(), 1_000);
    assert_eq!(std::fs::read_link(ground.layer.join("etc/link")).unwrap(), Path::new("motd"));
    assert!(std::fs::metadata(ground.layer.join("etc/pipe")).unwrap().file_type().is_fifo());
}

#[test]
fn names_that_lead_out_are_refused_or_stay_in() {
    for name in ["../outside/x", "a/../../outside/x", "/../../outside/x"] {
        let ground = Ground::new();
        let error = ground.unpack(&entries(&[(Regular, name, "", b"x")])).unwrap_err();
        assert!(matches!(error, UnpackError::LeadsOut { .. }), "{name}: {error}");
    }
    let ground = Ground::new();
    ground.unpack(&entries(&[(Regular, "/etc/passwd", "", b"mine")])).unwrap();
    assert_eq!(std::fs::read_to_string(ground.layer.join("etc/passwd")).unwrap(), "mine");
}

#[test]
fn links_do_not_lead_out() {
    let ground = Ground::new();
    let outside = ground.outside.to_str().unwrap().to_owned();
    // A link to the outside, then a file through it; the link replaced between two entries; a link to a link.
    let _ = ground.unpack(&entries(&[(Symlink, "way", &outside, b""), (Regular, "way/x", "", b"x")]));
    let _ = ground.unpack(&entries(&[
        (Directory, "d", "", b""),
        (Symlink, "d", "../outside", b""),
        (Regular, "d/x", "", b"x"),
    ]));
    let _ = ground.unpack(&entries(&[(Symlink, "up", "../../../../..", b""), (Regular, "up/x", "", b"x")]));
    let _ = ground.unpack(&entries(&[(Symlink, "file", "../outside/secret", b""), (Regular, "file", "", b"x")]));
    let _ = ground.unpack(&entries(&[(Link, "hard", "../outside/secret", b"")]));
    let _ = ground.unpack(&entries(&[
        (Symlink, "s", "../outside/secret", b""),
        (Link, "h", "s", b""),
        (Regular, "h", "", b"x"),
    ]));
    let escape = format!("{outside}/secret");
    assert!(matches!(ground.unpack(&entries(&[(Link, "abs", &escape, b"")])), Err(UnpackError::DanglingLink { .. })));
}

#[test]
fn devices_are_refused_by_name() {
    for kind in [Char, Block] {
        let error = Ground::new().unpack(&entries(&[(kind, "dev/sda", "", b"")])).unwrap_err();
        assert!(error.to_string().contains("`dev/sda`"), "{error}");
    }
}

#[test]
fn whiteouts_become_overlayfs_ones() {
    let (ground, below) = (Ground::new(), Ground::new());
    let lower = [(Regular, "dir/gone", "", &b""[..]), (Symlink, "link", "dir", b""), (Regular, "other/x", "", b"")];
    below.unpack(&entries(&lower)).unwrap();
    let archive = entries(&[
        (Regular, "dir/.wh.gone", "", b""),
        (Regular, "other/.wh..wh..opq", "", b""),
        // These hide nothing.
        (Regular, "dir/.wh.never", "", b""),
        (Regular, "nowhere/.wh.gone", "", b""),
        (Regular, "link/.wh.gone", "", b""),
        (Regular, "dir/gone/.wh.deeper", "", b""),
    ]);
    ground.unpack_over(&archive, std::slice::from_ref(&below.layer)).unwrap();
    let listed = |dir: &Path| std::fs::read_dir(dir).unwrap().count();
    assert_eq!((listed(&ground.layer), listed(&ground.layer.join("dir"))), (2, 1));
    let gone = std::fs::metadata(ground.layer.join("dir/gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    let mut value = [0; 8];
    let count = rustix::fs::getxattr(ground.layer.join("other"), "trusted.overlay.opaque", &mut value[..]).unwrap();
    assert_eq!(&value[..count], b"y");
    assert!(Ground::new().unpack(&entries(&[(Regular, "x/.wh...", "", b"")])).is_err(), "a whiteout of `..`");
}

#[test]
fn bounds_hold() {
    let many: Vec<_> = (0..1001).map(|n| format!("f{n}")).collect();
    let list: Vec<_> = many.iter().map(|name| (Regular, name.as_str(), "", &b""[..])).collect();
    assert!(matches!(Ground::new().unpack(&entries(&list)), Err(UnpackError::TooMany { .. })));
    // A header that claims 10 GB.
    let mut huge = header(Regular, 10 << 30);
    huge.set_path("zeros").unwrap();
    huge.set_cksum();
    assert!(matches!(Ground::new().unpack(huge.as_bytes()), Err(UnpackError::TooLarge { .. })));
}

/// All that a tree is, but the sizes of directories.
fn listing(dir: &Path) -> String {
    let script = r"find . -mindepth 1 -printf '%p|%y|%m|%U:%G|%s|%l|%n|%T@\n' | sed -E 's/^([^|]*\|d\|[^|]*\|[^|]*\|)[0-9]+/\1/' | LC_ALL=C sort
        find . -type f -exec sha256sum {} + | LC_ALL=C sort; getfattr -R -h -d -m 'user|security' . 2>/dev/null | LC_ALL=C sort";
    let output = std::process::Command::new("sh").args(["-ec", script]).current_dir(dir).output().unwrap();
    assert!(output.status.success() || !output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn tar(source: &Path, options: &[&str]) -> Vec<u8> {
    let output =
        std::process::Command::new("tar").args(options).args(["-cf", "-", "-C"]).arg(source).arg(".").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn the_same_tree_as_tar_gives() {
    let source = tempfile::tempdir().unwrap();
    let script = "mkdir -p a/b c && echo hi > a/b/f && chmod 4755 a/b/f && ln -s b/f a/l && ln a/b/f c/h && \
        mkfifo c/p && truncate -s 3M c/sparse && dd if=/dev/urandom of=c/sparse bs=64k seek=9 count=1 conv=notrunc status=none && \
        dd if=/dev/urandom of=c/sparse bs=4k seek=600 count=1 conv=notrunc status=none && truncate -s 1M c/hole && \
        touch -d @1234567890.123456789 a/b/f c && chown 12:34 a/b && chown -h 5:6 a/l && \
        mkdir -p c/$(printf 'x%.0s' $(seq 200))/$(printf 'y%.0s' $(seq 200)) && \
        echo long > c/$(printf 'x%.0s' $(seq 200))/$(printf 'y%.0s' $(seq 200))/end && chmod 1777 c && chown 70000:3000000 a/b/f";
    let made = std::process::Command::new("sh").args(["-ec", script]).current_dir(source.path()).status().unwrap();
    assert!(made.success());
    let whole_seconds = |text: String| {
        text.lines()
            .map(|line| line.rsplit_once('.').filter(|_| line.contains('|')).map_or(line, |(l, _)| l).to_owned())
            .collect::<Vec<_>>()
    };
    for options in [
        &["--format=gnu"][..],
        &["--format=gnu", "--sparse"],
        &["--format=pax"],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=1.0"],
    ] {
        let ground = Ground::new();
        ground.unpack(&tar(source.path(), options)).unwrap_or_else(|error| panic!("{options:?}: {error}"));
        let (ours, theirs) = (listing(&ground.layer), listing(source.path()));
        if options[0] == "--format=pax" {
            assert_eq!(ours, theirs, "{options:?}");
        } else {
            // The old form has no fractions of a second.
            assert_eq!(whole_seconds(ours), whole_seconds(theirs), "{options:?}");
        }
        let hole = std::fs::metadata(ground.layer.join("c/hole")).unwrap();
        assert!(hole.blocks() == 0 || !options.contains(&"--sparse"), "{options:?}: holes stay holes");
    }
}

#[test]
fn whiteouts_never_hide_what_the_same_layer_brings() {
    let (ground, below) = (Ground::new(), Ground::new());
    let under = ["a", "b", "d/under", "e/under", "f/under", "o/under"].map(|name| (Regular, name, "", &b"below"[..]));
    below.unpack(&entries(&under)).unwrap();
    let archive = entries(&[
        (Regular, "a", "", b"mine"),
        (Regular, ".wh.a", "", b""),
        (Regular, ".wh.b", "", b""),
        (Regular, "b", "", b"mine"),
        (Regular, ".wh.d", "", b""),
        (Directory, "d/", "", b""),
        (Regular, "d/x", "", b"mine"),
        (Regular, "e/x", "", b"mine"),
        (Regular, ".wh.e", "", b""),
        (Regular, ".wh.f", "", b""),
        (Regular, "f/x", "", b"mine"),
        (Regular, "o/x", "", b"mine"),
        (Regular, "o/.wh..wh..opq", "", b""),
        (Regular, ".wh..wh.plnk", "", b""),
    ]);
    ground.unpack_over(&archive, std::slice::from_ref(&below.layer)).unwrap();
    for name in ["a", "b", "d/x", "e/x", "f/x", "o/x"] {
        assert_eq!(std::fs::read_to_string(ground.layer.join(name)).unwrap(), "mine", "{name}");
    }
    for name in ["d", "e", "f", "o"] {
        let mut value = [0; 8];
        let length = rustix::fs::getxattr(ground.layer.join(name), "trusted.overlay.opaque", &mut value[..]);
        assert_eq!(length, Ok(1), "{name} does not show what is below it");
    }
    assert_eq!(std::fs::read_dir(&ground.layer).unwrap().count(), 6);
}

#[test]
fn a_layer_over_others_takes_what_it_needs_from_them() {
    let below = Ground::new();
    below
        .unpack(&entries(&[
            (Directory, "dir/", "", b""),
            (Regular, "dir/tool", "", b"tool"),
            (Regular, "gone", "", b""),
        ]))
        .unwrap();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    rustix::fs::setxattr(below.layer.join("dir/tool"), "security.capability", &capability, XattrFlags::empty())
        .unwrap();
    std::os::unix::fs::chown(below.layer.join("dir"), Some(7), Some(8)).unwrap();
    std::fs::set_permissions(below.layer.join("dir"), std::fs::Permissions::from_mode(0o700)).unwrap();
    let ground = Ground::new();
    let archive = entries(&[(Link, "dir/second", "dir/tool", b""), (Regular, ".wh..wh..opq", "", b"")]);
    ground.unpack_over(&archive, std::slice::from_ref(&below.layer)).unwrap();
    assert_eq!(std::fs::read_to_string(ground.layer.join("dir/second")).unwrap(), "tool");
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(ground.layer.join("dir/second"), "security.capability", &mut value[..]).unwrap();
    assert_eq!(value[..length], capability);
    let dir = std::fs::metadata(ground.layer.join("dir")).unwrap();
    assert_eq!((dir.uid(), dir.gid(), dir.mode() & 0o7777), (7, 8, 0o700), "as in the layer below");
    assert!(std::fs::metadata(ground.layer.join("gone")).unwrap().file_type().is_char_device(), "an opaque root");
}

/// What overlayfs makes of two layers, in a mount namespace of its own.
fn overlay_names(lower: &Path, upper: &Path) -> String {
    let script = format!(
        "mount -t overlay overlay -o ro,lowerdir={}:{} /mnt && cd /mnt && find . | LC_ALL=C sort",
        upper.display(),
        lower.display()
    );
    let output = std::process::Command::new("unshare").args(["-m", "sh", "-ec", &script]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().replace('\n', " ")
}

#[test]
fn overlayfs_understands_the_whiteouts() {
    let (lower, upper) = (Ground::new(), Ground::new());
    let files = ["gone", "kept", "dir/gone", "dir/kept", "opaque/old", "again/old"];
    lower.unpack(&entries(&files.map(|name| (Regular, name, "", &b""[..])))).unwrap();
    let archive = entries(&[
        (Regular, ".wh.gone", "", b""),
        (Regular, "dir/.wh.gone", "", b""),
        (Regular, "opaque/.wh..wh..opq", "", b""),
        (Regular, "opaque/new", "", b""),
        (Regular, ".wh.again", "", b""),
        (Regular, "again/new", "", b""),
    ]);
    upper.unpack_over(&archive, std::slice::from_ref(&lower.layer)).unwrap();
    let seen = overlay_names(&lower.layer, &upper.layer);
    assert_eq!(seen.trim(), ". ./again ./again/new ./dir ./dir/kept ./kept ./opaque ./opaque/new");
    // The whole root made anew.
    let anew = Ground::new();
    anew.unpack_over(
        &entries(&[(Regular, ".wh..wh..opq", "", b""), (Regular, "new", "", b"")]),
        std::slice::from_ref(&lower.layer),
    )
    .unwrap();
    assert_eq!(overlay_names(&lower.layer, &anew.layer).trim(), ". ./new");
}

#[test]
fn attributes_and_sub_second_times_of_pax_headers() {
    let mut archive = Builder::new(Vec::new());
    let value = [1, 0, 0, 2, b'\n', b'=', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    archive
        .append_pax_extensions([
            ("SCHILY.xattr.security.capability", &value[..]),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("mtime", b"77.5"),
        ])
        .unwrap();
    raw(&mut archive, Regular, "f", "", b"x");
    let ground = Ground::new();
    ground.unpack(&archive.into_inner().unwrap()).unwrap();
    let mut found = [0; 64];
    let length = rustix::fs::getxattr(ground.layer.join("f"), "security.capability", &mut found[..]).unwrap();
    assert_eq!(found[..length], value);
    assert!(rustix::fs::getxattr(ground.layer.join("f"), "trusted.overlay.redirect", &mut found[..]).is_err());
    let meta = std::fs::metadata(ground.layer.join("f")).unwrap();
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (77, 500_000_000));
}

/// A reader of a header that is followed by the same byte for ever: what it costs must not depend on what it claims.
struct Endless(std::io::Cursor<Vec<u8>>, u64);

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 => {
                self.1 += buffer.len() as u64;
                buffer.fill(b'a');
                Ok(buffer.len())
            }
            count => Ok(count),
        }
    }
}

#[test]
fn headers_that_claim_to_be_huge_cost_nothing() {
    let disk_left = AtomicU64::new(100 << 20);
    let bounds = Bounds {
        bytes_max: 10 << 20,
        entries_max: 1000,
        disk_left: &disk_left,
        device_nodes: DeviceNodes::Refuse,
        is_protected: false,
    };
    for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader, Regular] {
        let mut huge = header(kind, 1 << 40);
        huge.set_cksum();
        let mut endless = Endless(std::io::Cursor::new(huge.as_bytes().to_vec()), 0);
        let ground = Ground::new();
        unpack(io::BufReader::new(&mut endless), &ground.layer, &Vec::new, bounds).unwrap_err();
        assert!(endless.1 < 1 << 20, "{kind:?}: {} bytes were read", endless.1);
    }
    // A file that fits the bounds but not the disk.
    let disk_left = AtomicU64::new(5000);
    let bounds = Bounds { disk_left: &disk_left, ..bounds };
    let archive = entries(&[(Regular, "one", "", &[1; 700]), (Regular, "two", "", b"2")]);
    let error = unpack(archive.as_slice(), &Ground::new().layer, &Vec::new, bounds).unwrap_err();
    assert!(matches!(&error, UnpackError::DiskFull { name, .. } if name == "two"), "{error}");
}

fn device_archive(list: &[(EntryType, &str, &str, (u32, u32))]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    for (kind, name, link, (major, minor)) in list {
        let mut header = header(*kind, 0);
        header.set_mode(0o640);
        header.set_gid(5);
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_device_major(*major).unwrap();
        header.set_device_minor(*minor).unwrap();
        header.set_cksum();
        archive.append(&header, io::empty()).unwrap();
    }
    archive.into_inner().unwrap()
}

#[test]
fn device_nodes_are_refused_left_out_or_made_as_the_policy_says() {
    let list = [
        (Regular, "dev/zero", "", (0, 0)),
        (Char, "dev/zero", "", (1, 5)),
        (Block, "dev/sda", "", (8, 0x12345)),
        (Link, "dev/again", "dev/sda", (0, 0)),
        (Link, "dev/and-again", "dev/again", (0, 0)),
        (Regular, "file", "", (0, 0)),
    ];
    let archive = device_archive(&list);
    let unpacked = |nodes| {
        let ground = Ground::new();
        unpack_with_nodes(&archive, &ground.layer, &[], nodes).map(|()| ground)
    };
    let refused = unpacked(DeviceNodes::Refuse).err().unwrap();
    assert!(matches!(&refused, UnpackError::Refused { name, kind: "character device" } if name == "dev/zero"));
    let without = unpacked(DeviceNodes::Ignore).unwrap();
    let names = std::fs::read_dir(without.layer.join("dev")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), ["zero"], "what came before it stays");
    assert!(
        std::fs::metadata(without.layer.join("dev/zero")).unwrap().is_file() && without.layer.join("file").exists()
    );
    let with = unpacked(DeviceNodes::Allow).unwrap();
    let meta = |name: &str| std::fs::symlink_metadata(with.layer.join(name)).unwrap();
    let (zero, sda) = (meta("dev/zero"), meta("dev/sda"));
    assert!(zero.file_type().is_char_device() && sda.file_type().is_block_device());
    assert_eq!((zero.rdev(), sda.rdev()), (rustix::fs::makedev(1, 5), rustix::fs::makedev(8, 0x12345)));
    assert_eq!((zero.mode() & 0o7777, zero.gid(), zero.mtime()), (0o640, 5, 1_000));
    assert_eq!((meta("dev/again").ino(), meta("dev/and-again").ino()), (sda.ino(), sda.ino()));
    // Also where they are allowed: one that would hide what is below, and numbers that the kernel would cut to others.
    for (kind, numbers) in [(Char, (0, 0)), (Char, (0x1000, 0)), (Block, (8, 0x10_0000))] {
        let bad = device_archive(&[(kind, "bad", "", numbers)]);
        let error = unpack_with_nodes(&bad, &Ground::new().layer, &[], DeviceNodes::Allow).unwrap_err();
        assert!(matches!(&error, UnpackError::Refused { name, .. } if name == "bad"), "{error}");
    }
}

use proptest::prelude::*;

/// What an archive may hold, names from few letters so that entries meet each other.
fn any_entry() -> impl Strategy<Value = (EntryType, String, String, Vec<u8>)> {
    let name = "[ab](/[ab.]{1,2}){0,3}/?|(\\.\\./)?[ab]|/[ab]|\\.wh\\.[ab]|[ab]/\\.wh\\.\\.wh\\.\\.opq";
    let kind = prop::sample::select(vec![Regular, Directory, Symlink, Link, Fifo]);
    let target = "[ab](/[ab]){0,2}|\\.\\./outside/secret|/[ab]|\\.\\.";
    (kind, name, target, prop::collection::vec(any::<u8>(), 0..600)).prop_map(|(kind, name, target, content)| {
        (kind, name, target, if kind == Regular { content } else { Vec::new() })
    })
}

proptest! {
    // Each case starts several programs.
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Nothing outside ever changes (`Ground::unpack` looks), whatever the entries and wherever the archive is cut.
    #[test]
    fn nothing_is_ever_written_outside(list in prop::collection::vec(any_entry(), 1..12), cut in 0..40_usize) {
        let mut archive = Builder::new(Vec::new());
        for (kind, name, target, content) in &list {
            let target = if matches!(kind, Symlink | Link) { target.as_str() } else { "" };
            raw(&mut archive, *kind, name, target, content);
        }
        let mut bytes = archive.into_inner().unwrap();
        bytes.truncate(bytes.len() - cut * 61 % bytes.len());
        let _ = Ground::new().unpack(&bytes);
    }

    /// What tar takes as well looks the same: plain trees, no entry meets another.
    #[test]
    fn plain_archives_unpack_as_with_tar(
        files in prop::collection::btree_map("[a-d]{1,3}(/[a-d]{1,3}){0,3}", (0..0o7777_u32, 0..70_000_u64, prop::collection::vec(any::<u8>(), 0..2000)), 1..12),
    ) {
        let mut archive = Builder::new(Vec::new());
        let names: Vec<_> = files.keys().cloned().collect();
        for (name, (mode, owner, content)) in &files {
            if names.iter().any(|other| other.starts_with(&format!("{name}/"))) {
                continue;
            }
            let mut header = header(Regular, content.len() as u64);
            header.set_mode(*mode);
            header.set_uid(*owner);
            archive.append_data(&mut header, name, content.as_slice()).unwrap();
        }
        let bytes = archive.into_inner().unwrap();
        let ground = Ground::new();
        ground.unpack(&bytes).unwrap();
        let theirs = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("tar")
            .args(["-xpf", "-", "--numeric-owner", "--same-owner", "-C"]).arg(theirs.path())
            .stdin(std::process::Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        prop_assert!(child.wait().unwrap().success());
        // Directories that the archive does not name have the time of the unpacking.
        let files_only = |dir: &Path| listing(dir).lines().filter(|line| !line.contains("|d|")).map(str::to_owned).collect::<Vec<_>>();
        prop_assert_eq!(files_only(&ground.layer), files_only(theirs.path()));
    }
}

#[test]
fn an_entry_behind_a_link_of_a_layer_below_goes_where_the_link_leads() {
    let (below, ground) = (Ground::new(), Ground::new());
    let lower = [
        (Directory, "usr/bin/", "", &b""[..]),
        (Symlink, "bin", "usr/bin", b""),
        (Symlink, "sbin", "/usr/../bin", b""),
        (Symlink, "out", "../../../outside", b""),
        (Symlink, "loop", "loop", b""),
        (Symlink, "old", "usr", b""),
    ];
    below.unpack(&entries(&lower)).unwrap();
    let upper = [
        (Regular, "bin/one", "", &b"1"[..]),
        (Regular, "sbin/two", "", b"2"),
        (Regular, "out/three", "", b"3"),
        (Regular, ".wh.old", "", b""),
        (Regular, "old/four", "", b"4"),
    ];
    ground.unpack_over(&entries(&upper), std::slice::from_ref(&below.layer)).unwrap();
    let found = |path: &str| std::fs::read_to_string(ground.layer.join(path)).unwrap();
    assert_eq!(["usr/bin/one", "usr/bin/two", "outside/three", "old/four"].map(found), ["1", "2", "3", "4"]);
    let bad = Ground::new().unpack_over(&entries(&[(Regular, "loop/x", "", b"")]), std::slice::from_ref(&below.layer));
    assert!(matches!(bad, Err(UnpackError::Write { name, .. }) if name == "loop/x"));
}
