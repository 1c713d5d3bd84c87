//! Other owners for a tree, in place: a volume on a file system that cannot be idmapped has, on the disk, the ids of whoever
//! uses it. Each entry says by its own owner whether it was moved already, so what a power cut interrupts is simply done
//! again. Nobody may change the tree meanwhile; no link in it is followed all the same.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, XattrFlags, chownat, fchmod, fchown, fgetxattr, fsetxattr,
    fstat, openat2, syncfs,
};
use rustix::io::Errno;

use super::copies::capability_with_root;
use super::table::{Entry, Walk};

/// From which ranges of ids to which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shift {
    /// The first id of those that the tree is to have; 0: the ids that a container sees.
    pub to: u32,
    /// How many a range has.
    pub count: u32,
    /// Where ranges lie on this device: first and number.
    pub pool: (u32, u32),
    /// The range that the tree was given last, which may be of a former pool.
    pub former: u32,
}

impl Shift {
    /// What an owner becomes. Who is of no range stays, and is nobody inside.
    fn of(&self, id: u32) -> u32 {
        let above = |first: u32| id.checked_sub(first);
        let within = |first: u32| above(first).filter(|above| *above < self.count);
        if within(self.to).is_some() {
            return id;
        }
        let pooled = || above(self.pool.0).filter(|above| *above < self.pool.1).map(|above| above % self.count);
        let inside = within(self.former).or_else(pooled).or_else(|| within(0));
        inside.map_or(id, |inside| self.to + inside)
    }

    /// Whether the top of a tree has these ids: of a directory that was made anew it has not.
    pub fn has(&self, tree: &Path) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let owner = std::fs::symlink_metadata(tree)?.uid();
        Ok(self.of(owner) == owner)
    }
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

fn inside() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV
}

/// Gives everything in `tree`, itself too, and has it on the disk when it comes back.
pub fn give(tree: &Path, shift: &Shift) -> io::Result<()> {
    let top = rustix::fs::open(tree, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
    let mut walk = Walk::new(tree)?;
    while let Some(found) = walk.next(None)? {
        entry(&top, &found, shift)
            .map_err(|errno| io::Error::new(io::Error::from(errno).kind(), format!("{}: {errno}", found.escaped())))?;
    }
    Ok(syncfs(&top)?)
}

fn entry(top: &OwnedFd, found: &Entry, shift: &Shift) -> Result<(), Errno> {
    let stat = &found.stat;
    let (uid, gid) = (shift.of(stat.st_uid), shift.of(stat.st_gid));
    if (uid, gid) == (stat.st_uid, stat.st_gid) {
        return Ok(());
    }
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    let Some(name) = found.path.file_name() else { return fchown(top, uid, gid) };
    let parent = found.path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    let parent = openat2(top, parent, DIRECTORY, Mode::empty(), inside())?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return chownat(&parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW);
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(openat2(&parent, name, flags, Mode::empty(), inside())?);
    let opened = fstat(&file)?;
    if (opened.st_dev, opened.st_ino) != (stat.st_dev, stat.st_ino) {
        return Err(Errno::STALE);
    }
    let capability = capability(&file)?;
    fchown(&file, uid, gid)?;
    // A change of owner took them away.
    if stat.st_mode & 0o6000 != 0 {
        fchmod(&file, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    }
    if let Some(value) = capability {
        let value = capability_with_root(&value, |root| shift.of(root));
        fsetxattr(&file, CAPABILITY, &value, XattrFlags::empty())?;
    }
    Ok(())
}

const CAPABILITY: &str = "security.capability";

fn capability(file: &File) -> Result<Option<Vec<u8>>, Errno> {
    let mut value = [0; 64];
    match fgetxattr(file, CAPABILITY, &mut value[..]) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        length => Ok(Some(value[..length?].to_vec())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};

    const SHIFT: Shift = Shift { to: 2_000_000, count: 65_536, pool: (2_000_000, 1 << 20), former: 0 };

    #[test]
    fn owners_move_between_ranges_and_strangers_stay() {
        assert_eq!(SHIFT.of(33), 2_000_033);
        assert_eq!(SHIFT.of(2_000_033), 2_000_033, "it is there");
        assert_eq!(SHIFT.of(2_065_536 + 7), 2_000_007, "another workload had it");
        assert_eq!(SHIFT.of(1_500_000), 1_500_000, "of no range");
        assert_eq!(Shift { former: 1_500_000, ..SHIFT }.of(1_500_001), 2_000_001, "the pool has moved");
        let back = Shift { to: 0, ..SHIFT };
        assert_eq!((back.of(2_000_033), back.of(33)), (33, 33));
    }

    #[test]
    fn a_tree_is_given_with_all_that_it_has_and_no_link_leads_out() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::write(&outside, "").unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(tree.join("a/b/file"), "x").unwrap();
        chown(tree.join("a/b/file"), Some(33), Some(44)).unwrap();
        fs::set_permissions(tree.join("a/b/file"), fs::Permissions::from_mode(0o6755)).unwrap();
        fs::hard_link(tree.join("a/b/file"), tree.join("again")).unwrap();
        symlink(&outside, tree.join("link")).unwrap();
        lchown(tree.join("link"), Some(5), Some(6)).unwrap();
        symlink(dir.path(), tree.join("directory")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, tree.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(!SHIFT.has(&tree).unwrap());
        let of = |name: &str| fs::symlink_metadata(tree.join(name)).map(|meta| (meta.uid(), meta.gid())).unwrap();
        for shift in [SHIFT, SHIFT, Shift { to: 0, former: SHIFT.to, ..SHIFT }] {
            give(&tree, &shift).unwrap();
            assert!(shift.has(&tree).unwrap());
            let to = shift.to;
            assert_eq!((of(""), of("a/b"), of("fifo")), ((to, to), (to, to), (to, to)));
            assert_eq!((of("a/b/file"), of("link")), ((to + 33, to + 44), (to + 5, to + 6)));
            assert_eq!(fs::metadata(tree.join("again")).unwrap().mode() & 0o7777, 0o6755);
            assert_eq!(fs::metadata(&outside).unwrap().uid(), 0);
        }
    }
}
