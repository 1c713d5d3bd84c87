//! Who a workload runs as: `uid`, `uid:gid`, or names looked up in the image's own `/etc/passwd` and `/etc/group`
//! (image-spec config.md, `User`). Layers are read from the top down, each resolved inside itself, so that a hostile
//! image cannot point the look-up at the device's own files.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// A passwd file larger than this is not one.
const FILE_MAX_BYTES: u64 = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
    /// `HOME` of the passwd entry.
    pub home: Option<String>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    #[error("user `{name}` is not in the image's /etc/passwd")]
    NoSuchUser { name: String },
    #[error("group `{name}` is not in the image's /etc/group")]
    NoSuchGroup { name: String },
    #[error("{path}")]
    Read {
        path: PathBuf,
        #[source]
        source: Errno,
    },
}

/// Resolves `text` (empty: root) against the layers, lowest first.
pub fn resolve(text: &str, layers: &[PathBuf]) -> Result<User, UserError> {
    let passwd = read_from_top(layers, "etc/passwd")?.unwrap_or_default();
    let group = read_from_top(layers, "etc/group")?.unwrap_or_default();
    look_up(text, &passwd, &group)
}

fn look_up(text: &str, passwd: &str, group: &str) -> Result<User, UserError> {
    let (user_text, group_text) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user_text = if user_text.is_empty() { "0" } else { user_text };
    let wanted_uid = user_text.parse::<u32>().ok();
    let entry = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() >= 6
            && match wanted_uid {
                Some(uid) => fields[2].parse() == Ok(uid),
                None => fields[0] == user_text,
            }
    });
    let mut user = match (entry.as_deref(), wanted_uid) {
        (Some(fields), _) => User {
            uid: fields[2].parse().map_err(|_| UserError::NoSuchUser { name: user_text.to_owned() })?,
            gid: fields[3].parse().map_err(|_| UserError::NoSuchUser { name: user_text.to_owned() })?,
            additional_gids: groups_with(group, fields[0]),
            home: Some(fields[5].to_owned()),
        },
        (None, Some(uid)) => User { uid, ..User::default() },
        (None, None) => return Err(UserError::NoSuchUser { name: user_text.to_owned() }),
    };
    if let Some(name) = group_text {
        // A group that was named stands alone: the memberships of passwd do not apply (Docker and podman agree).
        user.additional_gids.clear();
        user.gid = match name.parse() {
            Ok(gid) => gid,
            Err(_) => gid_of(group, name).ok_or_else(|| UserError::NoSuchGroup { name: name.to_owned() })?,
        };
    }
    Ok(user)
}

fn gid_of(group: &str, name: &str) -> Option<u32> {
    group.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        if fields.len() >= 3 && fields[0] == name { fields[2].parse().ok() } else { None }
    })
}

fn groups_with(group: &str, member: &str) -> Vec<u32> {
    group
        .lines()
        .filter_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            let is_member = fields.len() >= 4 && fields[3].split(',').any(|name| name == member);
            if is_member { fields[2].parse().ok() } else { None }
        })
        .collect()
}

/// The file as the topmost layer that has it shows it; `None` when no layer has it, a layer above removed it, or it is no
/// text. What the disk does not give is an error: a user must not become another one for it.
fn read_from_top(layers: &[PathBuf], name: &str) -> Result<Option<String>, UserError> {
    for layer in layers.iter().rev() {
        let unread = |source| UserError::Read { path: layer.join(name), source };
        let mut text = String::new();
        match open_inside(layer, name) {
            Err(Errno::NOENT) => {}
            Err(errno @ (Errno::IO | Errno::BADMSG | Errno::UCLEAN | Errno::OPNOTSUPP)) => {
                return Err(unread(errno));
            }
            // Anything but a plain file, a whiteout among them, hides what is below.
            Err(_) => return Ok(None),
            Ok(file) => match file.take(FILE_MAX_BYTES).read_to_string(&mut text) {
                Ok(_) => return Ok(Some(text)),
                Err(error) => return Errno::from_io_error(&error).map_or(Ok(None), |errno| Err(unread(errno))),
            },
        }
    }
    Ok(None)
}

fn open_inside(root: &Path, name: &str) -> Result<File, Errno> {
    let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    edged_sys::resolve::open_file(root.as_fd(), Path::new(name), OFlags::empty()).map(File::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww:x:33:33::/var/www:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nwww:x:33:\ntty:x:5:www,other\n";

    #[test]
    fn users_by_name_number_and_group() {
        let of = |text| look_up(text, PASSWD, GROUP);
        assert_eq!(of("").unwrap().uid, 0);
        let www = of("www").unwrap();
        assert_eq!((www.uid, www.gid, www.additional_gids), (33, 33, vec![5]));
        assert_eq!(of("www:tty").unwrap().gid, 5);
        assert_eq!((of("4000").unwrap().uid, of("4000").unwrap().gid), (4000, 0));
        assert_eq!((of("4000:7").unwrap().uid, of("4000:7").unwrap().gid), (4000, 7));
        assert_eq!(of("nobody"), Err(UserError::NoSuchUser { name: "nobody".to_owned() }));
        assert_eq!(of("www:none"), Err(UserError::NoSuchGroup { name: "none".to_owned() }));
    }

    #[test]
    fn a_link_out_of_the_image_stays_inside_it() {
        let layer = tempfile::tempdir().unwrap();
        std::fs::create_dir(layer.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", layer.path().join("etc/passwd")).unwrap();
        // The link resolves to itself inside the image, never to the device's file.
        assert_eq!(read_from_top(&[layer.path().to_owned()], "etc/passwd"), Ok(None));
    }

    #[test]
    fn the_upper_layer_wins() {
        let (low, high) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (layer, uid) in [(&low, 1), (&high, 2)] {
            std::fs::create_dir(layer.path().join("etc")).unwrap();
            std::fs::write(layer.path().join("etc/passwd"), format!("app:x:{uid}:{uid}::/:/bin/sh\n")).unwrap();
        }
        let layers = [low.path().to_owned(), high.path().to_owned()];
        assert_eq!(resolve("app", &layers).unwrap().uid, 2);
        // What is no plain file hides what is below, and is not opened: a pipe would never come to an end.
        std::fs::remove_file(high.path().join("etc/passwd")).unwrap();
        let mode = Mode::from_raw_mode(0o600);
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, high.path().join("etc/passwd"), fifo, mode, 0).unwrap();
        assert_eq!(resolve("app", &layers), Err(UserError::NoSuchUser { name: "app".to_owned() }));
    }

    #[test]
    fn nobody_becomes_another_user_because_the_disk_gives_nothing() {
        use nix::mount::{MsFlags, mount};
        use nix::sched::{CloneFlags, unshare};
        assert!(rustix::process::geteuid().is_root(), "this mounts: run it as root");
        let layer = tempfile::tempdir().unwrap();
        std::fs::create_dir(layer.path().join("etc")).unwrap();
        let passwd = layer.path().join("etc/passwd");
        std::fs::write(&passwd, "").unwrap();
        // In mounts of its own, a file that answers EIO: nothing of this process lies at 0 (proc_pid_mem(5)).
        let layers = [layer.path().to_owned()];
        let found = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            mount(Some("/proc/self/mem"), &passwd, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
            resolve("0", &layers)
        });
        let error = found.join().unwrap().unwrap_err();
        let why = super::super::unread::failed(&edged_model::id::WorkloadName::parse("w").unwrap(), &error);
        assert_eq!(why.code, edged_model::reason::Code::LayerDamaged, "{why}");
        assert!(why.text.contains("etc/passwd") && why.text.contains("nput/output error"), "{why}");
    }
}
