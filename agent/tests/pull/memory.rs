//! What a pull takes of the memory, whatever the layer. Measured in a process of its own, which does nothing else.

use std::io::{self, BufWriter, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use edged_model::id::Digest;
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::Device;
use super::made::{Blob, Made};
use super::support::tmpfs;

/// Where the tests' own process is told to be the one that is measured: the image it shall pull.
const IMAGE: &str = "EDGED_TEST_PULL_MEASURED";

/// 8 MiB for the decoder's window, 1.3 between the threads; with names, sums and the rest. Of the 24 MiB, some are for the
/// program's text (`cargo xtask bench images` counts both).
const FILES_MAX_KIB: u64 = 13 << 10;
/// With all that may be kept until a layer's end.
const KEPT_MAX_KIB: u64 = 17 << 10;

/// More than twice what is remembered of files, and nearly four times what is of names. Half a million, as many as there may
/// be, take no more (12 MiB); only time.
const ENTRIES: u32 = 150_000;

/// Writes on, and takes the digest.
struct Hashed<W>(W, Sha256);

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.update(bytes);
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

type Archive = Builder<Hashed<BufWriter<std::process::ChildStdin>>>;

/// A zstd layer whose decoder needs the largest window there may be: 8 MiB.
fn zstd_layer(fill: impl FnOnce(&mut Archive)) -> Blob {
    let mut zstd = Command::new("zstd")
        .args(["-q", "-c", "-1", "--long=23"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("zstd is installed");
    let mut out = zstd.stdout.take().unwrap();
    let packed = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        out.read_to_end(&mut bytes).map(|_| bytes)
    });
    let mut archive = Builder::new(Hashed(BufWriter::new(zstd.stdin.take().unwrap()), Sha256::new()));
    fill(&mut archive);
    let Hashed(mut stdin, hash) = archive.into_inner().unwrap();
    stdin.flush().unwrap();
    drop(stdin);
    assert!(zstd.wait().unwrap().success());
    let bytes = packed.join().unwrap().unwrap();
    Blob { bytes, diff_id: Digest::from_bytes(hash.finalize().into()), packing: "+zstd" }
}

fn add(archive: &mut Archive, kind: EntryType, name: &str) {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000);
    archive.append_data(&mut header, name, io::empty()).unwrap();
}

/// Pulls the image in another process; what it took at most, in KiB, without the program's own text.
fn measured(test: &str, image: &str) -> u64 {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(IMAGE, image)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let peak = text.lines().find_map(|line| line.strip_prefix("peak: "));
    let peak = peak.unwrap_or_else(|| panic!("it says no peak: {text}")).parse().unwrap();
    println!("{test}: {peak} KiB");
    peak
}

/// In the other process: pulls, and says what it took.
fn pull_measured() -> bool {
    let Ok(image) = std::env::var(IMAGE) else { return false };
    tmpfs::own_mounts();
    let mut device = Device::new([]).trusting_digests();
    tmpfs::mount_at(&device.ctx.data, "size=90%,nr_inodes=2000000");
    let places = edged::config::Places::new(Some(&device.ctx.data), None);
    device.ctx.content = edged::content::Content::open(&places).unwrap();
    device.pull(&image).unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    println!("\npeak: {}", field("VmHWM:") - field("RssFile:"));
    true
}

fn layout(dir: &Path, layers: Vec<Blob>) -> String {
    Made::of(layers).layout(dir)
}

#[test]
fn a_layer_of_very_many_files_in_one_directory_is_pulled_in_the_memory_that_a_pull_has() {
    if pull_measured() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layer = zstd_layer(|archive| {
        for number in 0..ENTRIES {
            add(
                archive,
                EntryType::Regular,
                &format!("file-with-a-name-that-is-as-long-as-those-of-caches-{number:08}"),
            );
        }
    });
    let image = layout(dir.path(), vec![layer]);
    let test = "memory::a_layer_of_very_many_files_in_one_directory_is_pulled_in_the_memory_that_a_pull_has";
    let peak = measured(test, &image);
    assert!(peak <= FILES_MAX_KIB, "{peak} KiB");
}

#[test]
fn a_layer_of_very_many_files_in_many_directories_is_pulled_in_the_memory_that_a_pull_has() {
    if pull_measured() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layer = zstd_layer(|archive| {
        for number in 0..ENTRIES {
            if number % 25 == 0 {
                add(archive, EntryType::Directory, &format!("usr/share/some-package/directory-{:05}", number / 25));
                continue;
            }
            let name = format!("usr/share/some-package/directory-{:05}/file-{number:08}", number / 25);
            add(archive, EntryType::Regular, &name);
        }
    });
    let image = layout(dir.path(), vec![layer]);
    let test = "memory::a_layer_of_very_many_files_in_many_directories_is_pulled_in_the_memory_that_a_pull_has";
    let peak = measured(test, &image);
    assert!(peak <= FILES_MAX_KIB, "{peak} KiB");
}

/// They are kept until the layer's end. 150 bytes each, with what they cost besides; 6 MiB are the bound.
#[test]
fn a_layer_with_as_many_whiteouts_as_may_be_kept_is_pulled_in_the_memory_that_a_pull_has() {
    if pull_measured() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layer = zstd_layer(|archive| {
        // A large one before them, so that the decoder's window is in use.
        let mut header = Header::new_gnu();
        header.set_size(20 << 20);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        archive.append_data(&mut header, "large", io::repeat(7).take(20 << 20)).unwrap();
        for number in 0..40_000 {
            let name = format!("usr/lib/python3/dist-packages/some-package/__pycache__/.wh.module-{number:05}");
            add(archive, EntryType::Regular, &name);
        }
    });
    let image = layout(dir.path(), vec![layer]);
    let test = "memory::a_layer_with_as_many_whiteouts_as_may_be_kept_is_pulled_in_the_memory_that_a_pull_has";
    let peak = measured(test, &image);
    assert!(peak <= KEPT_MAX_KIB, "{peak} KiB");
}
