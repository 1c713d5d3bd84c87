//! What a layer was when it was unpacked: one line for each entry with its metadata and a sum over its content, written
//! beside the layer and synced with it. After an unclean stop the layer is held against it.
//!
//! ```text
//! <path> TAB <kind, mode, owner, time, size or target> TAB <attributes> TAB <sum of the content> [TAB <fs-verity digest>]
//! …
//! end TAB <entries> TAB <sum of all lines above>
//! ```
//! The first tables had the time of the layer's own directory too; it is not looked at.
//!
//! A file with the last field is protected by the kernel (`verity`): it is enough to ask by what. An edged that does not know
//! the field reads the rest of the line as ever, and lines without it are those of files that are not protected.
//!
//! The sum is xxHash (XXH64): it finds what a disk does to bytes, at the speed of memory. It keeps nobody out: who can
//! write to the disk could write the table too. What an image is was settled by its digests before the table was made.

use std::ffi::CString;
use std::fs::File;
use std::hash::Hasher;
use std::io::{self, BufRead, BufReader, BufWriter, Read as _, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, openat, readlinkat, statat};
use rustix::io::Errno;
use twox_hash::XxHash64;

use super::names::{self, Names};
use super::reading::{self, Buffer, Content, Reader};
use super::verity;
use crate::config::FsVerity;

/// Longer than any line that is written: two names of 4 KiB, four characters for each byte.
const LINE_MAX_BYTES: u64 = 64 << 10;
/// Differences that are named.
const NAMED_MAX: usize = 5;
const READ_BYTES: usize = 128 << 10;
/// Attributes that could not be asked for: a path too long for it. They are like any others.
const UNKNOWN: &str = "?";
/// What the system may set on its own (security.selinux) is not what the image says.
const ATTRIBUTES: [&[u8]; 3] = [b"security.capability", b"trusted.overlay.", b"user."];
const ATTRIBUTE_MAX_BYTES: usize = 64 << 10;

/// Sums that are remembered, in 1 MiB. Files beyond them are read again: 20,000 of an ordinary layer are not.
const SUMS_MAX: usize = 1 << 16;

/// Sums of contents that were taken while they were written, by inode: nothing is read twice, as long as there are not too
/// many.
#[derive(Debug, Default)]
pub struct Sums {
    written: Vec<Written>,
    /// Something was taken away again: its inode may have come back as another file, so none of them is believed.
    forgotten: bool,
}

#[derive(Debug, Clone, Copy)]
struct Written {
    /// Its highest bit says that the file has attributes.
    inode: u64,
    sum: u64,
}

const HAS_ATTRIBUTES: u64 = 1 << 63;

impl Written {
    fn inode(&self) -> u64 {
        self.inode & !HAS_ATTRIBUTES
    }
}

impl Sums {
    pub fn note(&mut self, inode: u64, sum: u64, has_attributes: bool) {
        // No file system on a disk has inodes of 63 bits; one that does has its files read again.
        if !self.forgotten && self.written.len() < SUMS_MAX && inode & HAS_ATTRIBUTES == 0 {
            let mark = if has_attributes { HAS_ATTRIBUTES } else { 0 };
            self.written.push(Written { inode: inode | mark, sum });
        }
    }

    pub fn forget(&mut self) {
        *self = Self { forgotten: true, ..Self::default() };
    }

    /// To be found in. Inodes mostly come in order already.
    #[must_use]
    pub fn sorted(mut self) -> Self {
        self.written.sort_by_key(Written::inode);
        self
    }

    fn of(&self, inode: u64) -> Option<Written> {
        let at = self.written.binary_search_by_key(&inode, Written::inode).ok()?;
        self.written.get(at).copied()
    }

    fn is_without_attributes(&self, inode: u64) -> bool {
        self.of(inode).is_some_and(|written| written.inode & HAS_ATTRIBUTES == 0)
    }
}

/// A sum that grows with what is written.
#[derive(Default)]
pub struct Sum(XxHash64);

impl Sum {
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    pub fn value(&self) -> u64 {
        self.0.finish()
    }
}

/// How a layer was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    pub entries: u64,
    pub read_bytes: u64,
    /// Of files that the kernel checks whenever it reads them, by what was made when they were unpacked.
    pub protected_bytes: u64,
    /// What is not as it was; at most a few.
    pub damage: Vec<String>,
    /// Contents that were not read because there was no time for it.
    pub unread: u64,
}

/// A content that could be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    pub bytes: u64,
    /// The kernel will refuse whatever of it is not as it was.
    pub is_protected: bool,
}

/// What is said of an entry, in one line.
type Said = (Entry, Option<u64>, Option<Protection>);

/// Entries that are handed over together: at most so many, and so many bytes of names; and how many times that are on their
/// way.
const BATCH: usize = 256;
const BATCH_NAME_BYTES: usize = 32 << 10;
const BATCHES: usize = 4;

/// Writes the table of the layer that lies at `layer` to `path`, and has the kernel protect what it can. Syncing is the
/// caller's. Another thread makes the lines: nothing else of the layer is left to do while it is walked through.
pub fn write(layer: &Path, sums: &Sums, path: &Path, fs_verity: FsVerity) -> io::Result<()> {
    let out = BufWriter::with_capacity(READ_BYTES, File::create(path)?);
    let (walked, written) = std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(BATCHES);
        let writer = scope.spawn(move || write_lines(out, receiver));
        let walked = walk_through(layer, sums, fs_verity, sender);
        (walked, writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    // Without its end it is no table: who could not walk to the end does not write one.
    let (mut out, entries, all) = written?;
    walked?;
    writeln!(out, "end\t{entries}\t{:016x}", all.value())?;
    out.into_inner().map_err(io::IntoInnerError::into_error).map(drop)
}

fn walk_through(layer: &Path, sums: &Sums, fs_verity: FsVerity, lines: SyncSender<Vec<Said>>) -> io::Result<()> {
    let (mut batch, mut buffer) = (Vec::with_capacity(BATCH), Buffer::new(READ_BYTES));
    let (mut walk, mut name_bytes) = (Walk::new(layer)?, 0);
    while let Some(entry) = walk.next(Some(sums))? {
        let sum = match (entry.is_file(), sums.of(entry.stat.st_ino)) {
            (false, _) => None,
            (true, Some(written)) => Some(written.sum),
            (true, None) => Some(walk.content_sum(&entry, false, &mut buffer, &mut |_: Asked| true)?.0),
        };
        let protected = walk.protect(&entry, fs_verity)?;
        name_bytes += entry.path.as_os_str().len() + entry.target.as_ref().map_or(0, Vec::len);
        batch.push((entry, sum, protected));
        if batch.len() < BATCH && name_bytes < BATCH_NAME_BYTES {
            continue;
        }
        name_bytes = 0;
        if lines.send(std::mem::replace(&mut batch, Vec::with_capacity(BATCH))).is_err() {
            // Whoever takes no more lines says why.
            return Ok(());
        }
    }
    let _ = lines.send(batch);
    Ok(())
}

/// All that come, how many they were, and the sum over them.
fn write_lines(mut out: BufWriter<File>, batches: Receiver<Vec<Said>>) -> io::Result<(BufWriter<File>, u64, Sum)> {
    let (mut entries, mut all) = (0, Sum::default());
    for (entry, sum, protected) in batches.into_iter().flatten() {
        let line = entry.line(sum, protected);
        all.add(line.as_bytes());
        out.write_all(line.as_bytes())?;
        entries += 1;
    }
    Ok((out, entries, all))
}

/// How much of a layer the kernel checks whenever it is read, by its table.
pub fn protected_bytes(path: &Path) -> io::Result<u64> {
    let (mut table, mut bytes) = (Table::open(path)?, 0);
    while let Some(line) = table.next()? {
        if !line.protected().is_empty() {
            bytes += line.size();
        }
    }
    Ok(bytes)
}

/// Holds the layer against its table. `reader` is asked before each content.
pub fn check(layer: &Path, path: &Path, reader: &mut dyn Reader) -> io::Result<Found> {
    let mut found = Found::default();
    let mut table = Table::open(path)?;
    let (mut walk, mut buffer) = (Walk::new(layer)?, Buffer::new(READ_BYTES));
    let mut is = walk.next(None)?;
    loop {
        let name = is.as_ref().map(Entry::escaped).unwrap_or_default();
        let Ok(was) = table.next() else {
            note(&mut found, "its table cannot be read".to_owned());
            return Ok(found);
        };
        match (was, &is) {
            (None, None) => return Ok(found),
            (Some(was), Some(entry)) if was.path() == name => {
                compare(&mut found, &was, entry, &walk, &mut buffer, reader);
                is = walk.next(None)?;
            }
            // Both are in the same order: what is behind where it should be is missing, what is before it is too much.
            (Some(was), Some(_)) if was.order() > order(&name) => {
                note(&mut found, format!("{name} was not there"));
                table.again(was);
                is = walk.next(None)?;
            }
            (Some(was), _) => note(&mut found, format!("{} is missing", was.path())),
            (None, Some(_)) => {
                note(&mut found, format!("{name} was not there"));
                is = walk.next(None)?;
            }
        }
    }
}

fn compare(found: &mut Found, was: &Line, entry: &Entry, walk: &Walk, buffer: &mut Buffer, reader: &mut dyn Reader) {
    found.entries += 1;
    let (name, meta) = (was.path(), entry.meta());
    let same_attributes =
        was.attributes() == entry.attributes || [was.attributes(), &entry.attributes].contains(&UNKNOWN);
    if was.meta_as_now() != meta || !same_attributes {
        return note(found, format!("{name} is `{meta}`, it was `{}`", was.meta()));
    }
    if !entry.is_file() {
        return;
    }
    let is_protected = match walk.is_protected(was, entry) {
        Ok(is_protected) => is_protected,
        Err(why) => return note(found, format!("{name} {why}")),
    };
    if is_protected {
        found.protected_bytes += entry.size();
    }
    if !reader.may_read(Asked { bytes: entry.size(), is_protected }) {
        found.unread += u64::from(!is_protected);
        return;
    }
    match walk.content_sum(entry, is_protected, buffer, reader) {
        Ok((sum, bytes)) => {
            found.read_bytes += bytes;
            if format!("{sum:016x}") != was.sum() {
                note(found, format!("{name} has another content"));
            }
        }
        Err(error) => note(found, format!("{name} cannot be read: {error}")),
    }
}

fn note(found: &mut Found, what: String) {
    if found.damage.len() < NAMED_MAX {
        found.damage.push(what);
    }
}

/// Names sort part by part, as a walk meets them.
fn order(escaped: &str) -> Vec<&str> {
    escaped.split('/').collect()
}

/// The table as it was written.
struct Table {
    reader: BufReader<File>,
    sum: Sum,
    entries: u64,
    again: Option<Line>,
}

struct Line(String);

impl Line {
    fn field(&self, index: usize) -> &str {
        self.0.trim_end_matches('\n').split('\t').nth(index).unwrap_or_default()
    }
    fn path(&self) -> &str {
        self.field(0)
    }
    fn meta(&self) -> &str {
        self.field(1)
    }
    /// Without what is not written any more.
    fn meta_as_now(&self) -> &str {
        match self.meta().match_indices(' ').nth(2) {
            Some((at, _)) if self.path() == "." => &self.meta()[..at],
            _ => self.meta(),
        }
    }
    fn attributes(&self) -> &str {
        self.field(2)
    }
    fn sum(&self) -> &str {
        self.field(3)
    }
    /// By what the kernel protects it; empty if it does not.
    fn protected(&self) -> &str {
        self.field(4)
    }
    /// Of a file.
    fn size(&self) -> u64 {
        self.meta().rsplit(' ').next().and_then(|size| size.parse().ok()).unwrap_or(0)
    }
    fn order(&self) -> Vec<&str> {
        order(self.path())
    }
}

impl Table {
    fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { reader: BufReader::new(File::open(path)?), sum: Sum::default(), entries: 0, again: None })
    }

    /// The next line; `None` at an end that agrees with all that came before.
    fn next(&mut self) -> io::Result<Option<Line>> {
        if let Some(line) = self.again.take() {
            return Ok(Some(line));
        }
        let bad = || io::Error::from(io::ErrorKind::InvalidData);
        let mut bytes = Vec::new();
        (&mut self.reader).take(LINE_MAX_BYTES).read_until(b'\n', &mut bytes)?;
        let text = String::from_utf8(bytes).map_err(|_| bad())?;
        if let Some(end) = text.strip_prefix("end\t") {
            let expected = format!("{}\t{:016x}\n", self.entries, self.sum.value());
            // No path is `end`: they all begin with a dot.
            return if end == expected { Ok(None) } else { Err(bad()) };
        }
        if !text.ends_with('\n') {
            return Err(bad());
        }
        self.sum.add(text.as_bytes());
        self.entries += 1;
        Ok(Some(Line(text)))
    }

    fn again(&mut self, line: Line) {
        self.again = Some(line);
    }
}

/// All entries of a tree, each directory before what is in it, names in order.
pub(super) struct Walk {
    root: PathBuf,
    top: OwnedFd,
    /// The directory that is walked through now.
    path: Vec<u8>,
    /// Those on the way, it at last: how long the path of the one before is, and what is left of each.
    open: Vec<(usize, Names)>,
    begun: bool,
    /// The directory that was looked into last: names are looked up in it.
    at: Option<(PathBuf, OwnedFd)>,
}

pub(super) struct Entry {
    pub(super) path: PathBuf,
    pub(super) stat: Stat,
    /// Of a link.
    target: Option<Vec<u8>>,
    attributes: String,
}

type Protection = [u8; edged_sys::verity::DIGEST_BYTES];

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Walk {
    pub(super) fn new(root: &Path) -> io::Result<Self> {
        let top = rustix::fs::open(root, DIRECTORY, Mode::empty())?;
        Ok(Self { root: root.to_owned(), top, path: Vec::new(), open: Vec::new(), begun: false, at: None })
    }

    /// `known`: what is known of files without asking.
    pub(super) fn next(&mut self, known: Option<&Sums>) -> io::Result<Option<Entry>> {
        let path = if self.begun {
            match self.next_path()? {
                None => return Ok(None),
                Some(path) => path,
            }
        } else {
            self.begun = true;
            PathBuf::from(".")
        };
        let stat = self.stat(&path)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            self.enter(&path)?;
        }
        let is_link = kind == FileType::Symlink;
        let target = is_link.then(|| readlinkat(&self.top, &path, Vec::new())).transpose()?.map(CString::into_bytes);
        let is_bare = known.is_some_and(|known| known.is_without_attributes(stat.st_ino));
        let attributes = match kind {
            FileType::RegularFile if is_bare => String::new(),
            FileType::RegularFile | FileType::Directory => self.attributes(&path),
            _ => String::new(),
        };
        Ok(Some(Entry { path, stat, target, attributes }))
    }

    fn next_path(&mut self) -> io::Result<Option<PathBuf>> {
        loop {
            let Some((above, names)) = self.open.last_mut() else { return Ok(None) };
            if let Some(name) = names.next() {
                let path = [self.path.as_slice(), b"/", name].concat();
                return Ok(Some(PathBuf::from(std::ffi::OsString::from_vec(path))));
            }
            if let Some(last) = names.goes_on_after() {
                let directory = openat(&self.top, self.path.as_slice(), DIRECTORY, Mode::empty())?;
                *names = Names::read(directory, Some(last), names::KEPT_MAX_BYTES)?;
                continue;
            }
            self.path.truncate(*above);
            self.open.pop();
        }
    }

    /// Those on the way are read again, after all that is in this one, if all their names together would be too many.
    fn enter(&mut self, path: &Path) -> io::Result<()> {
        let directory = openat(&self.top, path, DIRECTORY, Mode::empty())?;
        let names = Names::read(directory, None, names::KEPT_MAX_BYTES)?;
        let mut kept = names.bytes() + self.open.iter().map(|(_, names)| names.bytes()).sum::<usize>();
        for (_, outer) in &mut self.open {
            if kept <= names::KEPT_MAX_BYTES {
                break;
            }
            kept -= outer.bytes();
            outer.drop_kept();
        }
        self.open.push((self.path.len(), names));
        self.path = path.as_os_str().as_bytes().to_vec();
        Ok(())
    }

    fn stat(&mut self, path: &Path) -> io::Result<Stat> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(statat(&self.top, path, AtFlags::SYMLINK_NOFOLLOW)?);
        };
        let fd = match &self.at {
            Some((directory, fd)) if directory == parent => fd,
            _ => &self.at.insert((parent.to_owned(), openat(&self.top, parent, DIRECTORY, Mode::empty())?)).1,
        };
        Ok(statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// A sum over the attributes that belong to the image, names in order; empty without any.
    fn attributes(&self, path: &Path) -> String {
        let path = self.root.join(path);
        let mut buffer = vec![0; ATTRIBUTE_MAX_BYTES];
        let names = match rustix::fs::llistxattr(&path, &mut buffer) {
            Ok(count) => buffer[..count].to_vec(),
            Err(Errno::OPNOTSUPP) => Vec::new(),
            Err(_) => return UNKNOWN.to_owned(),
        };
        let mut names: Vec<&[u8]> = names.split(|byte| *byte == 0).filter(|name| is_of_the_image(name)).collect();
        names.sort_unstable();
        let mut sum = Sum::default();
        for name in &names {
            let Ok(count) = rustix::fs::lgetxattr(&path, *name, &mut buffer) else { return UNKNOWN.to_owned() };
            sum.add(name);
            sum.add(&buffer[..count]);
        }
        if names.is_empty() { String::new() } else { format!("{:016x}", sum.value()) }
    }

    /// Has the kernel protect a file that is worth it. Where it may be done without, what cannot be protected (a file too
    /// large, a disk too full for its tree) has its sum.
    fn protect(&self, entry: &Entry, fs_verity: FsVerity) -> io::Result<Option<Protection>> {
        if fs_verity == FsVerity::Off || !entry.is_file() || entry.size() < verity::LEAST_BYTES {
            return Ok(None);
        }
        match verity::protect(&self.top, &entry.path, &entry.stat) {
            Ok(digest) => Ok(Some(digest)),
            Err(errno) if fs_verity == FsVerity::Required || errno == Errno::IO => Err(errno.into()),
            Err(_) => Ok(None),
        }
    }

    /// Whether the kernel holds a file against what it was protected by when it was unpacked; an error says what is wrong.
    fn is_protected(&self, was: &Line, entry: &Entry) -> Result<bool, String> {
        if was.protected().is_empty() {
            return Ok(false);
        }
        match verity::measured(&self.top, &entry.path) {
            Ok(Some(digest)) if hex::encode(digest) == was.protected() => Ok(true),
            Ok(Some(_)) => Err("has another fs-verity digest".to_owned()),
            Ok(None) => Ok(false),
            Err(Errno::NODATA) => Err("has lost its fs-verity".to_owned()),
            // A kernel without it does not even open the file (EOPNOTSUPP).
            Err(errno) => Err(format!("cannot be opened: {}", io::Error::from(errno))),
        }
    }

    fn content_sum(
        &self,
        entry: &Entry,
        is_protected: bool,
        buffer: &mut Buffer,
        reader: &mut dyn Reader,
    ) -> io::Result<(u64, u64)> {
        let mut sum = Sum::default();
        let content = Content { directory: &self.top, path: &entry.path, bytes: entry.size(), is_protected };
        let bytes = reading::read(content, buffer, reader, &mut |piece| sum.add(piece))?;
        Ok((sum.value(), bytes))
    }
}

fn is_of_the_image(name: &[u8]) -> bool {
    !name.is_empty() && ATTRIBUTES.iter().any(|known| name.starts_with(known))
}

impl Entry {
    pub(super) fn escaped(&self) -> String {
        escaped(self.path.as_os_str().as_bytes())
    }

    fn meta(&self) -> String {
        let stat = &self.stat;
        let mut text = format!("{:o} {} {}", stat.st_mode, stat.st_uid, stat.st_gid);
        // The layer's own directory is renamed into its place, and f2fs takes that for a change of it.
        if self.path != Path::new(".") {
            text.push_str(&format!(" {}.{:09}", stat.st_mtime, stat.st_mtime_nsec));
        }
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => text.push_str(&format!(" {}", stat.st_size)),
            FileType::CharacterDevice | FileType::BlockDevice => text.push_str(&format!(" {}", stat.st_rdev)),
            _ => {}
        }
        if let Some(target) = &self.target {
            text.push_str(&format!(" {}", escaped(target)));
        }
        text
    }

    fn is_file(&self) -> bool {
        FileType::from_raw_mode(self.stat.st_mode) == FileType::RegularFile
    }

    fn size(&self) -> u64 {
        u64::try_from(self.stat.st_size).unwrap_or(0)
    }

    fn line(&self, sum: Option<u64>, protected: Option<Protection>) -> String {
        let sum = sum.map(|sum| format!("{sum:016x}")).unwrap_or_default();
        let protected = protected.map(|digest| format!("\t{}", hex::encode(digest))).unwrap_or_default();
        format!("{}\t{}\t{}\t{sum}{protected}\n", self.escaped(), self.meta(), self.attributes)
    }
}

/// Names may have any byte: tabs and line ends too.
pub(super) fn escaped(raw: &[u8]) -> String {
    let mut text = String::with_capacity(raw.len());
    for byte in raw {
        if is_escaped(*byte) {
            text.push_str(&format!("\\x{byte:02x}"));
        } else {
            text.push(char::from(*byte));
        }
    }
    text
}

pub(super) fn is_escaped(byte: u8) -> bool {
    matches!(byte, b'\\' | 0..=b' ' | 0x7f..)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{FileExt, PermissionsExt, symlink};

    fn layer(root: &Path) {
        fs::create_dir_all(root.join("bin/deep")).unwrap();
        fs::write(root.join("bin/app"), vec![1; 300_000]).unwrap();
        fs::write(root.join("bin/deep/a b\tc"), "x").unwrap();
        fs::write(root.join("bin-2"), "between, as bytes sort").unwrap();
        fs::write(root.join("empty"), "").unwrap();
        fs::write(root.join("last"), "y").unwrap();
        symlink("bin/app", root.join("link")).unwrap();
    }

    fn checked(root: &Path, table: &Path) -> Found {
        check(root, table, &mut |_: Asked| true).unwrap()
    }

    #[test]
    fn whatever_a_disk_does_to_a_layer_is_found_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let (root, table) = (dir.path().join("layer"), dir.path().join("table"));
        type Harm = (&'static str, fn(&Path), &'static str);
        let harms: [Harm; 9] = [
            (
                "a bit flips",
                |root| {
                    let path = root.join("bin/app");
                    let before = fs::metadata(&path).unwrap().modified().unwrap();
                    let file = File::options().write(true).open(path).unwrap();
                    file.write_all_at(&[0], 150_000).unwrap();
                    file.set_modified(before).unwrap();
                },
                "./bin/app has another content",
            ),
            (
                "a file is shorter",
                |root| File::options().write(true).open(root.join("bin/app")).unwrap().set_len(9).unwrap(),
                "./bin/app is",
            ),
            (
                "a file is gone",
                |root| fs::remove_file(root.join("bin/deep/a b\tc")).unwrap(),
                "./bin/deep/a\\x20b\\x09c is missing",
            ),
            ("the last is gone", |root| fs::remove_file(root.join("last")).unwrap(), "./last is missing"),
            ("a directory is gone", |root| fs::remove_dir_all(root.join("bin")).unwrap(), "./bin/app is missing"),
            ("a file too many", |root| fs::write(root.join("bin/new"), "").unwrap(), "./bin/new was not there"),
            ("a file too many at the end", |root| fs::write(root.join("zz"), "").unwrap(), "./zz was not there"),
            (
                "another mode",
                |root| fs::set_permissions(root.join("empty"), fs::Permissions::from_mode(0o4755)).unwrap(),
                "./empty is",
            ),
            (
                "another target",
                |root| {
                    fs::remove_file(root.join("link")).unwrap();
                    symlink("x", root.join("link")).unwrap();
                },
                "./link is",
            ),
        ];
        for (what, harm, said) in harms {
            let _ = fs::remove_dir_all(&root);
            layer(&root);
            write(&root, &Sums::default(), &table, FsVerity::Auto).unwrap();
            let whole = checked(&root, &table);
            assert_eq!((whole.damage, whole.entries, whole.read_bytes), (Vec::new(), 9, 300_024), "{what}");
            harm(&root);
            let found = checked(&root, &table);
            assert!(found.damage.iter().any(|damage| damage.starts_with(said)), "{what}: {found:?}");
        }
    }

    #[test]
    fn a_table_that_is_damaged_itself_proves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (root, table) = (dir.path().join("layer"), dir.path().join("table"));
        layer(&root);
        write(&root, &Sums::default(), &table, FsVerity::Auto).unwrap();
        let bytes = fs::read(&table).unwrap();
        for at in (0..bytes.len()).step_by(7) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            fs::write(&table, damaged).unwrap();
            assert!(!checked(&root, &table).damage.is_empty(), "flipped at {at}");
            fs::write(&table, &bytes[..at]).unwrap();
            assert!(!checked(&root, &table).damage.is_empty(), "cut at {at}");
        }
    }

    #[test]
    fn what_there_is_no_time_for_is_counted_and_the_rest_is_looked_at_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (root, table) = (dir.path().join("layer"), dir.path().join("table"));
        layer(&root);
        write(&root, &Sums::default(), &table, FsVerity::Auto).unwrap();
        let found = check(&root, &table, &mut |asked: Asked| asked.bytes < 1000).unwrap();
        assert_eq!((found.unread, found.read_bytes, found.damage), (1, 24, Vec::new()));
        fs::remove_file(root.join("bin/app")).unwrap();
        assert!(!check(&root, &table, &mut |_: Asked| false).unwrap().damage.is_empty());
    }

    /// By their number, and by their names.
    #[test]
    fn no_line_is_lost_between_batches() {
        for (files, name_bytes) in [(3 * BATCH + 1, 4), (BATCH - 1, 250)] {
            let dir = tempfile::tempdir().unwrap();
            let (root, table) = (dir.path().join("layer"), dir.path().join("table"));
            let name = |number: usize| root.join(format!("{number:0name_bytes$}"));
            fs::create_dir(&root).unwrap();
            (0..files).for_each(|number| fs::write(name(number), number.to_string()).unwrap());
            write(&root, &Sums::default(), &table, FsVerity::Off).unwrap();
            let found = checked(&root, &table);
            assert_eq!((found.entries, found.damage), (files as u64 + 1, Vec::new()), "{name_bytes}");
            for number in [BATCH - 1, BATCH, files - 1].into_iter().filter(|number| *number < files) {
                fs::write(name(number), "another").unwrap();
                assert!(!checked(&root, &table).damage.is_empty(), "{number} is not in the table");
                fs::remove_file(name(number)).unwrap();
                assert!(!checked(&root, &table).damage.is_empty(), "{number} is not missed");
            }
        }
    }

    #[test]
    fn the_sums_of_half_a_million_files_take_a_mebibyte_and_those_of_an_ordinary_layer_are_all_there() {
        let mut sums = Sums::default();
        // Not in order, as some file systems give them.
        (0..500_000_u64).for_each(|file| sums.note(1 + (file ^ 1), file, file % 2 == 0));
        assert!(sums.written.capacity() * size_of::<Written>() <= 1 << 20);
        let sums = sums.sorted();
        for file in 0..20_000 {
            let inode = 1 + (file ^ 1);
            assert_eq!(sums.of(inode).map(|written| written.sum), Some(file));
            assert_eq!(sums.is_without_attributes(inode), file % 2 == 1);
        }
        assert!(sums.of(500_000).is_none() && !sums.is_without_attributes(500_000), "it is read again");
    }

    /// Also when the names do not fit what is kept of them, of one directory or of those on the way to it.
    #[test]
    fn a_walk_meets_every_entry_once_and_in_order_whatever_it_may_keep() {
        let dir = tempfile::tempdir().unwrap();
        let (root, table) = (dir.path().join("layer"), dir.path().join("table"));
        let long = "n".repeat(240);
        let mut wanted = 1;
        for outer in ["a", "a/b", "a/c", "d"] {
            fs::create_dir_all(root.join(outer)).unwrap();
            // Together more than four times what is kept, and two of them on the way to the deepest.
            (0..4500).for_each(|number| fs::write(root.join(outer).join(format!("{number:04}{long}")), "").unwrap());
            wanted += 4501;
        }
        write(&root, &Sums::default(), &table, FsVerity::Off).unwrap();
        let found = checked(&root, &table);
        assert_eq!((found.entries, found.damage), (wanted, Vec::new()));
        let text = fs::read_to_string(&table).unwrap();
        let names: Vec<_> = text.lines().map(|line| order(line.split('\t').next().unwrap())).collect();
        assert!(names[..names.len() - 1].windows(2).all(|pair| pair[0] < pair[1]), "not in order, or twice");
    }

    #[test]
    fn a_layer_that_was_renamed_into_its_place_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (root, table) = (dir.path().join("layer"), dir.path().join("table"));
        layer(&root);
        write(&root, &Sums::default(), &table, FsVerity::Auto).unwrap();
        // As f2fs does when a directory comes under another one.
        File::open(&root).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(checked(&root, &table).damage, [""; 0]);
        File::open(root.join("bin")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        assert!(checked(&root, &table).damage[0].starts_with("./bin is"), "any other directory's time is the image's");
    }

    #[test]
    fn sums_taken_while_writing_are_believed_until_something_was_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let (root, table) = (dir.path().join("layer"), dir.path().join("table"));
        layer(&root);
        let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(root.join("last")).unwrap());
        let mut sums = Sums::default();
        sums.note(inode, 7, false);
        write(&root, &sums, &table, FsVerity::Auto).unwrap();
        assert_eq!(checked(&root, &table).damage, ["./last has another content"], "the sum was wrong, and was taken");
        // So are attributes: a file that was made without any is not asked for them.
        rustix::fs::setxattr(root.join("last"), "user.test", b"1", rustix::fs::XattrFlags::empty()).unwrap();
        write(&root, &sums, &table, FsVerity::Auto).unwrap();
        assert!(checked(&root, &table).damage[0].starts_with("./last is"), "it has one after all");
        sums.note(inode, XxHash64::oneshot(0, b"y"), true);
        write(&root, &sums, &table, FsVerity::Auto).unwrap();
        assert_eq!(checked(&root, &table).damage, [""; 0]);
        sums.forget();
        sums.note(inode, 7, false);
        write(&root, &sums, &table, FsVerity::Auto).unwrap();
        assert_eq!(checked(&root, &table).damage, Vec::<String>::new());
    }
}
