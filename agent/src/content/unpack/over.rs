//! A layer among others: the directories that its entries go to and that it does not bring itself, and what it hides of the
//! layers below.

use std::ffi::{OsStr, OsString};
use std::io::BufRead;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{Mode, OFlags, mkdirat, openat};
use rustix::io::Errno;

use super::nodes::{self, Below};
use super::{OPAQUE, Stop, UnpackError, Unpacker};
use crate::content::archive::printable;

/// As many as the kernel follows (path_resolution(7)).
const LINKS_MAX: u32 = 40;

impl<R: BufRead> Unpacker<'_, R> {
    /// The directory that an entry goes to. One that the archive does not have looks as it does in the layers below:
    /// overlayfs shows the metadata of the topmost.
    pub(super) fn parent(&mut self, path: &Path) -> Result<Rc<OwnedFd>, Stop> {
        let wanted = path.parent().unwrap_or(Path::new(""));
        if let Some((known, fd)) = &self.parent
            && known == wanted
        {
            return Ok(Rc::clone(fd));
        }
        let fd = match self.open_directory(wanted) {
            Err(Errno::NOENT | Errno::NOTDIR) => self.make_directories(wanted)?,
            opened => opened?,
        };
        let fd = Rc::new(fd);
        self.parent = Some((wanted.to_owned(), Rc::clone(&fd)));
        Ok(fd)
    }

    fn open_directory(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let inside = rustix::fs::ResolveFlags::IN_ROOT | rustix::fs::ResolveFlags::NO_MAGICLINKS;
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        rustix::fs::openat2(&self.root, path, flags, Mode::empty(), inside)
    }

    /// Makes what is missing of a path. Where the layers below have a link (`bin` to `usr/bin`), the path goes on behind it:
    /// an entry `bin/tool` shall not put a directory in the link's place.
    fn make_directories(&mut self, wanted: &Path) -> Result<OwnedFd, Stop> {
        let mut left: Vec<OsString> = wanted.iter().rev().map(OsStr::to_owned).collect();
        let (mut walked, mut directory) = (PathBuf::new(), self.open_directory(Path::new(""))?);
        let mut links = 0;
        // A directory that was just made and has nothing below it: in it nothing needs to be looked up.
        let mut is_bare = false;
        while let Some(part) = left.pop() {
            if is_bare && part != ".." {
                walked.push(&part);
                directory = self.plain_directory(&directory, &part, &walked)?;
                continue;
            }
            is_bare = false;
            if part == ".." {
                walked.pop();
                directory = self.open_directory(&walked)?;
                continue;
            }
            let next = walked.join(&part);
            directory = match self.open_directory(&next) {
                Err(Errno::NOENT | Errno::NOTDIR) => {
                    if let Some(target) = self.link_below(&next) {
                        links += 1;
                        if links > LINKS_MAX {
                            return Err(Errno::LOOP.into());
                        }
                        if target.is_absolute() {
                            walked = PathBuf::new();
                            directory = self.open_directory(&walked)?;
                        }
                        let parts = target.components().rev().filter_map(|component| match component {
                            Component::Normal(_) | Component::ParentDir => Some(component.as_os_str().to_owned()),
                            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
                        });
                        left.extend(parts);
                        continue;
                    }
                    (directory, is_bare) = self.missing_directory(&directory, &part, &next)?;
                    walked = next;
                    continue;
                }
                opened => opened?,
            };
            walked = next;
        }
        Ok(directory)
    }

    /// Whether a whiteout or a mark of this layer stands between `path` and the layers below.
    fn is_hidden(&self, path: &Path) -> bool {
        self.hides_root
            || path.ancestors().any(|ancestor| self.whiteouts.contains(ancestor))
            || path.ancestors().skip(1).any(|ancestor| self.opaques.contains(ancestor))
    }

    /// Where a link of the layers below leads that shows through at `path`.
    fn link_below(&self, path: &Path) -> Option<PathBuf> {
        let shows = !self.is_hidden(path) && nodes::shows_below(&self.root, path);
        if shows { Below((self.below)()).link(path) } else { None }
    }

    /// One that looks as it does in the layers below, or like any other if they have none: then it is true.
    fn missing_directory(&mut self, parent: &OwnedFd, name: &OsStr, path: &Path) -> Result<(OwnedFd, bool), Stop> {
        let original = if self.is_hidden(path) { None } else { Below((self.below)()).directory(path) };
        let Some(original) = original else { return Ok((self.plain_directory(parent, name, path)?, true)) };
        let made = self.new_directory(parent, name, path)?;
        self.account.attributes(&|| shown(path), nodes::attribute_bytes(&original)?)?;
        nodes::copy_metadata(&original, &made)?;
        Ok((made, false))
    }

    fn plain_directory(&mut self, parent: &OwnedFd, name: &OsStr, path: &Path) -> Result<OwnedFd, Stop> {
        let made = self.new_directory(parent, name, path)?;
        nodes::plain_metadata(&made)?;
        Ok(made)
    }

    fn new_directory(&mut self, parent: &OwnedFd, name: &OsStr, path: &Path) -> Result<OwnedFd, Stop> {
        self.account.one_more(&|| shown(path))?;
        mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(parent, name, flags, Mode::empty())?)
    }

    /// Hides what the whiteouts name. Behind a link, or something else that this layer has on the way, nothing is to be seen
    /// of the layers below.
    pub(super) fn hide(&mut self) -> Result<(), UnpackError> {
        if self.whiteouts.is_empty() && self.opaques.is_empty() {
            return Ok(());
        }
        let below = Below((self.below)());
        for path in Rc::clone(&self.opaques).iter() {
            self.hide_directory(&below, path).map_err(|stop| stop.at(|| shown(path)))?;
        }
        for path in Rc::clone(&self.whiteouts).iter() {
            self.hide_name(&below, path).map_err(|stop| stop.at(|| shown(path)))?;
        }
        Ok(())
    }

    fn hide_directory(&mut self, below: &Below, path: &Path) -> Result<(), Stop> {
        let is_here = nodes::is_directory(&self.root, path);
        let shows = || !self.is_hidden(path) && nodes::shows_below(&self.root, path);
        if is_here || below.directory(path).is_some() && shows() {
            let directory = self.parent(&path.join(OsStr::from_bytes(OPAQUE)))?;
            nodes::mark_opaque(&directory)?;
        }
        Ok(())
    }

    fn hide_name(&mut self, below: &Below, path: &Path) -> Result<(), Stop> {
        let Some(name) = path.file_name() else { return Ok(()) };
        let parent = path.parent().unwrap_or(Path::new(""));
        if below.has(path) && !self.is_hidden(parent) && nodes::shows_below(&self.root, parent) {
            let parent = self.parent(path)?;
            nodes::whiteout(&parent, name)?;
        }
        Ok(())
    }

    /// Everything that the layers below have in their roots.
    pub(super) fn hide_root(&mut self) -> Result<(), UnpackError> {
        let root = nodes::reopen(&self.root).map_err(|errno| Stop::from(errno).at(|| "/".to_owned()))?;
        for layer in (self.below)() {
            let names = std::fs::read_dir(&layer).map_err(|source| Stop::Io(source).at(|| "/".to_owned()))?;
            for name in names.filter_map(Result::ok).map(|entry| entry.file_name()) {
                let shown = || shown(Path::new(&name));
                self.account.one_more(&shown)?;
                nodes::whiteout(&root, &name).map_err(|errno| Stop::from(errno).at(shown))?;
            }
        }
        Ok(())
    }
}

fn shown(path: &Path) -> String {
    printable(path.as_os_str().as_bytes())
}
