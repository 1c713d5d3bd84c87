//! The locks with which workloads ask for peace: files of the volume `update-locks`, held by whoever mounts it. The files
//! are a workload's: no link of theirs is followed, no pipe waited for, and only the first bytes and names are read.

use std::io::Read;
use std::path::Path;

use edged_model::quantity::Span;
use rustix::fs::{FileType, Mode, OFlags};

/// What a file that says nothing asks for.
const LEASE: Span = Span::from_secs(15 * 60);
/// Nobody gets more at once; a workload that needs longer renews its lock.
const LEASE_MAX: Span = Span::from_secs(24 * 3600);
/// More are not looked at.
const LOCKS_MAX: usize = 64;
const CONTENT_MAX: u64 = 32;
const NAME_MAX: usize = 40;

/// A lock file as it lies there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockFile {
    pub name: String,
    /// Seconds and nanoseconds: changes whenever it is written or touched.
    pub modified: (i64, i64),
    pub lease: Span,
}

/// All there are now. A volume that is not there holds none.
pub fn look(volume: &Path) -> Vec<LockFile> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(dir) = rustix::fs::open(volume, flags, Mode::empty()) else { return Vec::new() };
    let Ok(entries) = rustix::fs::Dir::read_from(&dir) else { return Vec::new() };
    let names = entries.filter_map(Result::ok).map(|entry| entry.file_name().to_owned());
    let names = names.filter(|name| !matches!(name.to_bytes(), b"." | b".."));
    let files = names.take(LOCKS_MAX).filter_map(|name| {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&dir, &name, flags, Mode::empty()).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return None;
        }
        let mut text = String::new();
        let lease = match std::fs::File::from(file).take(CONTENT_MAX).read_to_string(&mut text) {
            Ok(_) => text.trim().parse().unwrap_or(LEASE).min(LEASE_MAX),
            Err(_) => LEASE,
        };
        let modified = (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0));
        Some(LockFile { name: shown(name.to_bytes()), modified, lease })
    });
    files.collect()
}

/// A workload chose this name; people read it.
fn shown(name: &[u8]) -> String {
    let fit = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    name.iter().take(NAME_MAX).map(|byte| if fit(byte) { char::from(*byte) } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_lock_and_what_a_workload_cannot_do_with_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("camera"), "2h\n").unwrap();
        std::fs::write(path("empty"), "").unwrap();
        std::fs::write(path("greedy"), "300days").unwrap();
        std::fs::write(path("huge"), vec![b'9'; 1 << 20]).unwrap();
        std::fs::write(path("bin"), [0xff, 0xfe]).unwrap();
        std::fs::write(path("\u{1b}[31m"), "1m").unwrap();
        std::fs::create_dir(path("dir")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path("link")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        let mut seen: Vec<_> = look(dir.path()).into_iter().map(|lock| (lock.name, lock.lease)).collect();
        seen.sort();
        let secs = Span::from_secs;
        let expected = [
            ("??31m", secs(60)),
            ("bin", LEASE),
            ("camera", secs(7200)),
            ("empty", LEASE),
            ("greedy", LEASE_MAX),
            ("huge", LEASE),
        ];
        assert_eq!(seen, expected.map(|(name, lease)| (name.to_owned(), lease)));
        assert_eq!(look(&path("nowhere")), []);
        for n in 0..200 {
            std::fs::write(path(&format!("n{n}")), "1s").unwrap();
        }
        assert!(look(dir.path()).len() <= LOCKS_MAX);
    }
}
