//! The files of an upgrade, all beside the program, where only who may replace the program itself may write:
//!
//! | file | what |
//! |---|---|
//! | `edged` | what runs, or the newer one that is to |
//! | `edged.former` | a copy of the proved one while its successor is on trial: there also after a power cut |
//! | `edged.trial` | how often the one on trial was started by a boot |
//! | `edged.refused` | the last one that was sent away: the same bytes are not taken again |
//!
//! Where nothing can be written (a read-only system, a full disk) a descriptor of the former program is all there is: it
//! comes back, but not after a power cut.
//!
//! The keeper never waits: what takes time is done by a child ([`set_aside`], then [`crate::rehearse`] in the new program).

use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use edged_model::keeper::FileId;
use edged_sys::own_program;
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::resume;
use crate::trial::Looked;

/// First word of the child that sets the former program aside and tries the new one.
pub const SET_ASIDE: &str = "set-aside";
/// First word of the new program when it is tried.
pub const REHEARSE: &str = "rehearse";

/// What a program that is tried may say.
const WORDS_BYTES: u64 = 4096;

fn beside(place: &Path, what: &str) -> PathBuf {
    let mut name = place.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{what}"));
    place.with_file_name(name)
}

fn former(place: &Path) -> PathBuf {
    beside(place, "former")
}

fn refused(place: &Path) -> PathBuf {
    beside(place, "refused")
}

fn boots(place: &Path) -> PathBuf {
    beside(place, "trial")
}

pub fn id(path: &Path) -> io::Result<FileId> {
    let file = fs::metadata(path)?;
    Ok(FileId {
        device: file.dev(),
        inode: file.ino(),
        bytes: file.len(),
        modified_s: file.mtime(),
        modified_ns: file.mtime_nsec(),
    })
}

/// A child under way, and where it writes what it has to say.
pub struct Child {
    pub pid: i32,
    pub words: File,
}

/// Looks at the program that lies in our place, and has a child try it if it is another one. `table`: a copy of the
/// keeper's, for it to read.
pub fn look(
    place: &Path,
    agent_args: &[String],
    is_again: bool,
    refused_before: Option<FileId>,
    is_on_trial: bool,
    table: impl FnOnce() -> io::Result<File>,
) -> (Looked, Option<Child>) {
    let unusable = |error: io::Error| (Looked::Unusable { why: error.to_string() }, None);
    let (file, own) = match (id(place), id(Path::new(own_program::EXE))) {
        (Ok(file), Ok(own)) => (file, own),
        (Err(error), _) | (_, Err(error)) => return unusable(error),
    };
    if file == own {
        return (Looked::Same, None);
    }
    if is_again {
        // If it is not there, nobody had to insist.
        let _ = fs::remove_file(refused(place));
    } else if refused_before == Some(file) {
        return (Looked::RefusedBefore, None);
    }
    match table().and_then(|table| spawn(place, agent_args, is_on_trial, table)) {
        Ok(child) => (Looked::Trying { pid: child.pid, file }, Some(child)),
        Err(error) => unusable(error),
    }
}

fn spawn(place: &Path, agent_args: &[String], is_on_trial: bool, table: File) -> io::Result<Child> {
    let words = File::from(rustix::fs::memfd_create("edged-words", rustix::fs::MemfdFlags::CLOEXEC)?);
    let mut command = Command::new(own_program::EXE);
    command.arg0(std::env::args_os().next().unwrap_or_else(|| "edged".into()));
    // Its former is set aside already, and it is not to be taken for a proved one.
    command.arg(SET_ASIDE).arg(place).arg(if is_on_trial { "-" } else { "copy" }).args(agent_args);
    resume::for_rehearsal(&mut command, &table);
    let child = command.stdin(Stdio::null()).stdout(words.try_clone()?).stderr(words.try_clone()?).spawn()?;
    Ok(Child { pid: i32::try_from(child.id()).map_err(io::Error::other)?, words })
}

impl Child {
    pub fn said(&mut self) -> String {
        let mut bytes = Vec::new();
        let read = self.words.rewind().and_then(|()| (&self.words).take(WORDS_BYTES).read_to_end(&mut bytes));
        if read.is_err() {
            return String::new();
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// The child's part, in the program that runs: `words` are the place, whether to copy, and what the new one is told.
/// Comes back only when something is wrong.
pub fn set_aside(words: &[OsString]) -> ExitCode {
    let [place, copy, args @ ..] = words else { return ExitCode::FAILURE };
    let place = Path::new(place);
    match is_same(place, &refused(place)) {
        Ok(false) => {}
        Ok(true) => {
            println!("this program ran here before and was sent away");
            return ExitCode::FAILURE;
        }
        Err(error) => {
            println!("{error}");
            return ExitCode::FAILURE;
        }
    }
    if copy == "copy"
        && let Err(error) = copy_own(place)
    {
        println!("a power cut would not bring this program back: {}: {error}", former(place).display());
    }
    let limit = Rlimit { current: Some(WORDS_BYTES), maximum: Some(WORDS_BYTES) };
    if let Err(errno) = setrlimit(Resource::Fsize, limit) {
        println!("{errno}");
        return ExitCode::FAILURE;
    }
    println!("{}", rehearsal(place, args));
    ExitCode::FAILURE
}

/// Comes back only with an error. Not `Command::exec`: execvp(3) gives a file of another machine to a shell.
fn rehearsal(place: &Path, args: &[OsString]) -> io::Error {
    let first = [place.as_os_str(), REHEARSE.as_ref()];
    let words = first.into_iter().chain(args.iter().map(OsString::as_os_str));
    let words: Result<Vec<_>, _> = words.map(|word| CString::new(word.as_bytes())).collect();
    let environment = std::env::vars_os().map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        CString::new(name.into_vec())
    });
    match (words, environment.collect::<Result<Vec<_>, _>>()) {
        (Ok(words), Ok(environment)) => match nix::unistd::execve(&words[0], &words, &environment) {
            Err(errno) => errno.into(),
        },
        (Err(error), _) | (_, Err(error)) => error.into(),
    }
}

/// Byte for byte; what is not there is like nothing.
fn is_same(one: &Path, other: &Path) -> io::Result<bool> {
    let mut one = File::open(one)?;
    let mut other = match File::open(other) {
        Ok(other) => other,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let count = one.read(&mut left)?;
        if count == 0 {
            return Ok(true);
        }
        match other.read_exact(&mut right[..count]) {
            Ok(()) if left[..count] == right[..count] => {}
            _ => return Ok(false),
        }
    }
}

/// What lies in memory goes with the power, whatever its name.
fn is_in_memory(dir: &Path) -> io::Result<bool> {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    let kind = u64::try_from(rustix::fs::statfs(dir)?.f_type).unwrap_or(0);
    Ok(kind == TMPFS || kind == RAMFS)
}

fn copy_own(place: &Path) -> io::Result<()> {
    let dir = place.parent().unwrap_or(Path::new("/"));
    if is_in_memory(dir)? {
        return Ok(());
    }
    let new = beside(place, "former.new");
    let copied = (|| {
        let mut to = File::options().write(true).create(true).truncate(true).mode(0o755).open(&new)?;
        io::copy(&mut File::open(own_program::EXE)?, &mut to)?;
        to.sync_all()?;
        fs::rename(&new, former(place))?;
        File::open(dir)?.sync_all()
    })();
    if copied.is_err() {
        let _ = fs::remove_file(&new);
    }
    copied
}

/// The program has proved itself, or was never started.
pub fn drop_former(place: &Path) {
    for path in [boots(place), former(place)] {
        // If it is still there after a power cut, the trial goes on for another minute.
        let _ = fs::remove_file(path);
    }
}

/// At a boot: how often the program on trial has been started by one, this time included; `None` if none is on trial.
pub fn boots_on_trial(place: &Path) -> Option<u32> {
    if !former(place).is_file() {
        return None;
    }
    // It was being sent away when the power went.
    if id(place).ok() == id(&refused(place)).ok() {
        return Some(u32::MAX);
    }
    let before = fs::read_to_string(boots(place)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0_u32);
    let now = before.saturating_add(1);
    // Where this cannot be written, falls alone are counted.
    let _ = File::create(boots(place)).and_then(|mut file| {
        file.write_all(now.to_string().as_bytes())?;
        file.sync_all()
    });
    Some(now)
}

/// A stop in order is no failed start.
pub fn ended_in_order(place: &Path) {
    let _ = fs::remove_file(boots(place));
}

/// The former program takes its place again, and what lay there is kept under another name. At each moment one of the two
/// is there.
pub fn put_back(place: &Path) -> io::Result<()> {
    if !former(place).is_file() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "there is no copy of the former program"));
    }
    let _ = fs::remove_file(refused(place));
    // A file system without links loses the refused one's bytes, no more.
    let _ = fs::hard_link(place, refused(place));
    fs::rename(former(place), place)?;
    let _ = fs::remove_file(boots(place));
    File::open(place.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// The image that runs, whatever becomes of its name.
pub fn hold() -> io::Result<OwnedFd> {
    own_program::open(Path::new(own_program::EXE)).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("edged");
        fs::write(&place, "new").unwrap();
        (dir, place)
    }

    #[test]
    fn the_former_program_comes_back_and_the_refused_one_is_kept() {
        let (_dir, place) = place();
        assert!(put_back(&place).is_err(), "nothing was set aside");
        assert_eq!(fs::read_to_string(&place).unwrap(), "new");
        fs::write(former(&place), "old").unwrap();
        assert_eq!(boots_on_trial(&place), Some(1));
        assert_eq!(boots_on_trial(&place), Some(2));
        ended_in_order(&place);
        assert_eq!(boots_on_trial(&place), Some(1));
        put_back(&place).unwrap();
        assert_eq!(fs::read_to_string(&place).unwrap(), "old");
        assert_eq!(fs::read_to_string(refused(&place)).unwrap(), "new");
        assert_eq!(boots_on_trial(&place), None);
        // The same bytes in another file.
        let again = place.with_file_name("again");
        fs::write(&again, "new").unwrap();
        assert!(is_same(&again, &refused(&place)).unwrap());
        fs::write(&again, "neu").unwrap();
        assert!(!is_same(&again, &refused(&place)).unwrap());
    }

    /// A file system gives the number of a file that was removed to the next one.
    #[test]
    fn another_file_of_the_same_number_is_another() {
        let (_dir, place) = place();
        let before = id(&place).unwrap();
        fs::write(&place, "a newer one").unwrap();
        let now = id(&place).unwrap();
        assert_eq!(before.inode, now.inode);
        assert_ne!(before, now);
    }

    /// The power went between the two steps of sending it away.
    #[test]
    fn a_return_that_was_cut_short_is_gone_on_with() {
        let (_dir, place) = place();
        fs::write(former(&place), "old").unwrap();
        fs::hard_link(&place, refused(&place)).unwrap();
        assert_eq!(boots_on_trial(&place), Some(u32::MAX));
        put_back(&place).unwrap();
        assert_eq!(fs::read_to_string(&place).unwrap(), "old");
        assert_eq!(fs::read_to_string(refused(&place)).unwrap(), "new");
    }

    #[test]
    fn a_trial_that_is_over_leaves_nothing() {
        let (dir, place) = place();
        fs::write(former(&place), "old").unwrap();
        assert_eq!(boots_on_trial(&place), Some(1));
        drop_former(&place);
        assert_eq!(boots_on_trial(&place), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
