use std::os::unix::fs::{FileTypeExt, MetadataExt, chown, symlink};

use rustix::fs::XattrFlags;

use super::*;
use crate::config::Places;
use crate::content::reading::FromTheDisk;

const OWNERS: Owners = Owners { first: 1_879_048_192, count: 65_536 };
/// CAP_NET_BIND_SERVICE, permitted and effective, revision 2.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn set_attribute(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn attribute(path: &Path, name: &str) -> Vec<u8> {
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(path, name, &mut value[..]).unwrap();
    value[..length].to_vec()
}

/// A layer with everything that a layer may have.
fn layer(content: &Content) -> Digest {
    let chain = Digest::of(b"layer");
    let staged = content.stage(chain).unwrap().unwrap();
    let at = |name: &str| staged.path().join(name);
    for dir in ["bin", "etc", "hidden"] {
        fs::create_dir(at(dir)).unwrap();
    }
    fs::write(at("bin/tool"), vec![7; 300_000]).unwrap();
    chown(at("bin/tool"), Some(0), Some(33)).unwrap();
    fs::set_permissions(at("bin/tool"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::write(at("bin/ping"), "x").unwrap();
    set_attribute(&at("bin/ping"), "security.capability", &CAPABILITY);
    set_attribute(&at("bin/ping"), "user.note", b"kept");
    fs::hard_link(at("bin/tool"), at("etc/again")).unwrap();
    symlink("../etc", at("bin/link")).unwrap();
    std::os::unix::fs::lchown(at("bin/link"), Some(5), Some(6)).unwrap();
    fs::write(at("etc/strange"), "of nobody here").unwrap();
    chown(at("etc/strange"), Some(100_000), Some(65_535)).unwrap();
    let sparse = File::create(at("etc/sparse")).unwrap();
    sparse.set_len(10 << 20).unwrap();
    sparse.write_all_at(b"middle", 5 << 20).unwrap();
    let etc = File::open(at("etc")).unwrap();
    mknodat(&etc, "gone", FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    mknodat(&etc, "fifo", FileType::Fifo, Mode::from_raw_mode(0o640), 0).unwrap();
    set_attribute(&at("hidden"), "trusted.overlay.opaque", b"y");
    for name in ["bin/tool", "bin", "etc"] {
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(77, 500);
        File::open(at(name)).unwrap().set_modified(time).unwrap();
    }
    staged.publish(&Sums::default()).unwrap();
    chain
}

fn ground() -> (tempfile::TempDir, Content, Digest) {
    let dir = tempfile::tempdir().unwrap();
    let content = Content::open(&Places::new(Some(dir.path()), None)).unwrap();
    let chain = layer(&content);
    (dir, content, chain)
}

fn plenty() -> AtomicU64 {
    AtomicU64::new(1 << 30)
}

#[test]
fn a_copy_is_the_layer_with_other_owners() {
    let (_dir, content, chain) = ground();
    content.copy_layer(chain, OWNERS, &plenty()).unwrap();
    let (from, to) = (content.layer(chain), content.copy(chain, OWNERS.first));
    let owner = |name: &str| fs::symlink_metadata(to.join(name)).map(|meta| (meta.uid(), meta.gid())).unwrap();
    let first = OWNERS.first;
    assert_eq!(owner(""), (first, first));
    assert_eq!(owner("bin/tool"), (first, first + 33));
    assert_eq!(owner("bin/link"), (first + 5, first + 6));
    assert_eq!(owner("etc/strange"), (NOBODYS, first + 65_535));
    let mut walk = Walk::new(&from).unwrap();
    let mut entries = 0;
    while let Some(entry) = walk.next(None).unwrap() {
        let meta = fs::symlink_metadata(to.join(&entry.path)).unwrap();
        let was = fs::symlink_metadata(from.join(&entry.path)).unwrap();
        let look = |meta: &fs::Metadata| (meta.mode(), meta.mtime(), meta.mtime_nsec(), meta.nlink(), meta.rdev());
        assert_eq!(look(&meta), look(&was), "{}", entry.escaped());
        if meta.is_file() {
            assert_eq!(fs::read(to.join(&entry.path)).unwrap(), fs::read(from.join(&entry.path)).unwrap());
        }
        entries += 1;
    }
    assert_eq!(entries, 12);
    assert!(fs::metadata(to.join("etc/sparse")).unwrap().blocks() < 1000, "a hole stays one");
    assert!(fs::symlink_metadata(to.join("etc/gone")).unwrap().file_type().is_char_device());
    assert_eq!(fs::read_link(to.join("bin/link")).unwrap(), Path::new("../etc"));
    assert_eq!(attribute(&to.join("hidden"), "trusted.overlay.opaque"), b"y");
    assert_eq!(attribute(&to.join("bin/ping"), "user.note"), b"kept");
    let capability = attribute(&to.join("bin/ping"), "security.capability");
    assert_eq!(capability, [&[1, 0, 0, 3], &CAPABILITY[4..], &first.to_le_bytes()].concat());
}

/// The kernel's own word: a program with the copied capability, run by somebody in the range, has it.
#[test]
fn a_copied_capability_counts_for_the_range_and_for_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let content = Content::open(&Places::new(Some(dir.path()), None)).unwrap();
    let chain = Digest::of(b"capable");
    let staged = content.stage(chain).unwrap().unwrap();
    // It shows its own sets.
    fs::copy("/bin/busybox", staged.path().join("busybox")).expect("busybox-static is installed");
    set_attribute(&staged.path().join("busybox"), "security.capability", &CAPABILITY);
    staged.publish(&Sums::default()).unwrap();
    content.copy_layer(chain, OWNERS, &plenty()).unwrap();
    for dir in [dir.path(), &dir.path().join("layers"), &content.copies_home(), &content.copies_of(OWNERS.first)] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let program = content.copy(chain, OWNERS.first).join("busybox");
    let effective = |first: u32| {
        let ids = edged_model::keeper::IdMapping { inside: 0, outside: first, count: 65_536 };
        let made = edged_sys::owned::namespaces(&[ids], &[ids], false).unwrap();
        let joins = format!("--user=/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&made.user));
        let command = [joins.as_str(), "--setuid=1000", "--setgid=1000"];
        let mut nsenter = std::process::Command::new("nsenter");
        let output =
            nsenter.args(command).arg(&program).args(["grep", "CapEff", "/proc/self/status"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(effective(OWNERS.first), "CapEff:\t0000000000000400");
    // For the root of another range the file says nothing.
    assert_eq!(effective(OWNERS.first + 65_536), "CapEff:\t0000000000000000");
}

#[test]
fn every_revision_of_a_capability_is_moved() {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let owners = Owners { first: 1000, count: 10 };
    let of = |value: &[u32]| owners.of_capability(&words(value));
    assert_eq!(of(&[0x0100_0001, 2, 3]), words(&[0x0300_0001, 2, 3, 0, 0, 1000]));
    assert_eq!(of(&[0x0200_0000, 2, 3, 4, 5]), words(&[0x0300_0000, 2, 3, 4, 5, 1000]));
    assert_eq!(of(&[0x0300_0001, 2, 3, 4, 5, 7]), words(&[0x0300_0001, 2, 3, 4, 5, 1007]));
    assert_eq!(of(&[0x0300_0001, 2, 3, 4, 5, 70]), words(&[0x0300_0001, 2, 3, 4, 5, NOBODYS]));
    assert_eq!(of(&[0x0200_0000, 2]), words(&[0x0200_0000, 2]), "no capability");
    assert_eq!(owners.of_capability(b"xy"), b"xy");
}

#[test]
fn it_is_made_once_checked_and_taken_away_with_its_range() {
    let (_dir, content, chain) = ground();
    content.copy_layer(chain, OWNERS, &plenty()).unwrap();
    let inode = || fs::metadata(content.copy(chain, OWNERS.first)).unwrap().ino();
    let before = inode();
    content.copy_layer(chain, OWNERS, &AtomicU64::new(0)).unwrap();
    assert_eq!(inode(), before, "it was there");
    let whole = content.check_copy(chain, OWNERS.first, &mut FromTheDisk).unwrap();
    assert_eq!((whole.entries, whole.damage), (12, Vec::new()));
    File::options()
        .write(true)
        .open(content.copy(chain, OWNERS.first).join("bin/ping"))
        .unwrap()
        .write_all_at(b"y", 0)
        .unwrap();
    assert!(!content.check_copy(chain, OWNERS.first, &mut FromTheDisk).unwrap().damage.is_empty());
    let copies = content.copies().unwrap();
    assert_eq!((copies.len(), copies[0].first, copies[0].item.digest), (1, OWNERS.first, chain));
    assert!((300_000..500_000).contains(&copies[0].item.bytes), "{copies:?}");
    assert_eq!(content.layers().unwrap().len(), 1, "a copy is no layer");
    content.remove_copy(chain, OWNERS.first).unwrap();
    content.remove_copy(chain, OWNERS.first).unwrap();
    assert!(!content.has_copies(OWNERS.first) && content.has_layer(chain));
}

#[test]
fn what_does_not_fit_or_was_cut_leaves_nothing() {
    let (dir, content, chain) = ground();
    let error = content.copy_layer(chain, OWNERS, &AtomicU64::new(200_000)).unwrap_err();
    assert!(matches!(error, CopyError::DiskFull { .. }), "{error}");
    assert!(!content.has_copy(chain, OWNERS.first));
    assert_eq!(fs::read_dir(content.staging()).unwrap().count(), 0);
    // As a power cut leaves it: staged, its table written, not named.
    let home = content.copies_of(OWNERS.first);
    fs::create_dir_all(&home).unwrap();
    fs::write(home.join(format!("{}.table", chain.hex())), "half").unwrap();
    fs::create_dir(content.staging().join(format!("{}-{}", OWNERS.first, chain.hex()))).unwrap();
    let again = Content::open(&Places::new(Some(dir.path()), None)).unwrap();
    assert!(!again.has_copies(OWNERS.first));
    assert_eq!(fs::read_dir(again.staging()).unwrap().count(), 0);
    again.copy_layer(chain, OWNERS, &plenty()).unwrap();
    assert_eq!(again.check_copy(chain, OWNERS.first, &mut FromTheDisk).unwrap().damage, [""; 0]);
}
