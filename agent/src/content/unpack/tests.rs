use super::*;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use tar::{Builder, Header};

const BOUNDS: Bounds = Bounds { bytes_max: 10 << 20, entries_max: 1000 };

fn header(kind: EntryType, size: u64) -> Header {
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
fn raw(archive: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, link: &str, content: &[u8]) {
    let mut header = header(kind, content.len() as u64);
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    archive.append(&header, content).unwrap();
}

fn entries(list: &[(EntryType, &str, &str, &[u8])]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    for (kind, name, link, content) in list {
        raw(&mut archive, *kind, name, link, content);
    }
    archive.into_inner().unwrap()
}

/// A layer directory beside a file that must never change.
struct Ground {
    _dir: tempfile::TempDir,
    layer: PathBuf,
    outside: PathBuf,
}

impl Ground {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (layer, outside) = (dir.path().join("layer"), dir.path().join("outside"));
        std::fs::create_dir(&layer).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("secret"), "untouched").unwrap();
        Self { _dir: dir, layer, outside }
    }

    fn unpack(&self, archive: &[u8]) -> Result<(), UnpackError> {
        let result = unpack(archive, &self.layer, &[], BOUNDS);
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
    let _ = ground.unpack(&entries(&[(Directory, "d", "", b""), (Symlink, "d", "../outside", b""), (Regular, "d/x", "", b"x")]));
    let _ = ground.unpack(&entries(&[(Symlink, "up", "../../../../..", b""), (Regular, "up/x", "", b"x")]));
    let _ = ground.unpack(&entries(&[(Symlink, "file", "../outside/secret", b""), (Regular, "file", "", b"x")]));
    let _ = ground.unpack(&entries(&[(Link, "hard", "../outside/secret", b"")]));
    let _ = ground.unpack(&entries(&[(Symlink, "s", "../outside/secret", b""), (Link, "h", "s", b""), (Regular, "h", "", b"x")]));
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
    let ground = Ground::new();
    ground.unpack(&entries(&[(Regular, "dir/.wh.gone", "", b""), (Regular, "other/.wh..wh..opq", "", b"")])).unwrap();
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

#[test]
fn cut_anywhere_it_is_refused_or_whole() {
    let archive = entries(&[(Regular, "one", "", &[1; 700]), (Regular, "two", "", b"2")]);
    let ground = Ground::new();
    for end in (1..archive.len()).step_by(97) {
        let _ = ground.unpack(&archive[..end]);
    }
    let mut wrong = archive;
    wrong[150] ^= 0x55;
    assert!(ground.unpack(&wrong).is_err(), "a wrong checksum");
}

#[test]
fn the_same_tree_as_tar_gives() {
    let source = tempfile::tempdir().unwrap();
    let script = "mkdir -p a/b c && echo hi > a/b/f && chmod 4755 a/b/f && ln -s b/f a/l && ln a/b/f c/h && \
        mkfifo c/p && truncate -s 1M c/sparse && touch -d @1234567890 a/b/f c && chown 12:34 a/b";
    let made = std::process::Command::new("sh").args(["-ec", script]).current_dir(source.path()).status().unwrap();
    assert!(made.success());
    let tar = std::process::Command::new("tar").args(["--sparse", "--format=gnu", "-cf", "-", "-C"]).arg(source.path()).arg(".").output().unwrap();
    let ground = Ground::new();
    ground.unpack(&tar.stdout).unwrap();
    let listing = |dir: &Path| {
        let find = "find . -printf '%p %y %m %U %G %s %l %n %T@\\n' | sed 's/\\.[0-9]*$//' | grep -v '^\\. ' | sort && cat a/b/f && md5sum c/sparse";
        let output = std::process::Command::new("sh").args(["-ec", find]).current_dir(dir).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let pax = std::process::Command::new("tar")
        .args(["--sparse", "--format=pax", "-cf", "-", "-C"])
        .arg(source.path())
        .arg(".")
        .output()
        .unwrap();
    assert!(Ground::new().unpack(&pax.stdout).unwrap_err().to_string().contains("sparse"), "told, not misread");
    let strip_directory_sizes = |text: String| text.lines().map(|line| line.to_owned()).filter(|l| !l.contains(" d ")).collect::<Vec<_>>();
    assert_eq!(strip_directory_sizes(listing(&ground.layer)), strip_directory_sizes(listing(source.path())));
}
