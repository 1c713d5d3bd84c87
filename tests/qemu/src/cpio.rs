//! The archive format of an initramfs: "newc" (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
//! The kernel takes several archives one after another, so a device's own files are laid behind a firmware that is
//! built once. Times are zero and inode numbers count up: the same files give the same bytes.

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written. Directories on the way to a file are made when they are first needed.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    made: std::collections::BTreeSet<String>,
    next_inode: u32,
}

impl Archive {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn directory(&mut self, path: &str, mode: u32) {
        let path = path.trim_matches('/');
        self.parents(path);
        if !path.is_empty() && self.made.insert(path.to_owned()) {
            self.entry(path, DIRECTORY | mode, (0, 0), &[]);
        }
    }

    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        let path = path.trim_matches('/');
        self.parents(path);
        self.entry(path, REGULAR | mode, (0, 0), content);
    }

    pub fn symlink(&mut self, path: &str, target: &str) {
        let path = path.trim_matches('/');
        self.parents(path);
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes());
    }

    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        let path = path.trim_matches('/');
        self.parents(path);
        self.entry(path, CHARACTER | mode, (major, minor), &[]);
    }

    fn parents(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            if self.made.insert(path[..at].to_owned()) {
                self.entry(&path[..at], DIRECTORY | 0o755, (0, 0), &[]);
            }
        }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let links = if mode & 0o170_000 == DIRECTORY { 2 } else { 1 };
        self.header(name, mode, links, device, content.len());
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn header(&mut self, name: &str, mode: u32, links: u32, device: (u32, u32), content_bytes: usize) {
        self.next_inode += 1;
        let size = u32::try_from(content_bytes).expect("newc holds files under 4 GiB");
        let name_bytes = u32::try_from(name.len() + 1).expect("a path is short");
        let fields = [self.next_inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_bytes, 0]
            .map(|f| format!("{f:08x}"));
        self.bytes.extend_from_slice(b"070701");
        self.bytes.extend_from_slice(fields.concat().as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.header("TRAILER!!!", 0, 1, (0, 0), 0);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn the_real_cpio_reads_what_we_write() {
        let mut archive = Archive::new();
        archive.file("/etc/edged/agent.toml", 0o644, b"x = 1\n");
        archive.symlink("init", "usr/bin/edged");
        archive.directory("proc", 0o555);
        let Ok(mut cpio) =
            Command::new("cpio").args(["-t", "--quiet"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
        else {
            return; // No cpio on this machine: the boot proves the same.
        };
        cpio.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        let output = cpio.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "etc\netc/edged\netc/edged/agent.toml\ninit\nproc\n");
    }
}
