//! Published escapes, performed: each test is the attack of one CVE, and shows it contained.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use edged_model::id::Digest;
use serde_json::json;

use crate::rig::{Bundle, program, until};

fn add_mount(bundle: &mut Bundle, mount: serde_json::Value) {
    bundle.config["mounts"].as_array_mut().unwrap().push(mount);
}

fn script(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A program of the container is `#!/proc/self/exe`: the kernel runs the runtime itself inside, and a process that waits
/// there opens `/proc/PID/exe` of everything that appears, to overwrite it.
#[test]
fn cve_2019_5736_the_program_file_cannot_be_overwritten() {
    let hunter = "echo up; while :; do for p in /proc/[0-9]*; do e=$(readlink $p/exe); \
        case $e in */busybox|'') ;; *) echo saw $e; (: > $p/exe) 2>&1 && echo OVERWRITTEN; (: >> $p/exe) 2>/dev/null && echo OVERWRITTEN;; \
        esac; done; done";
    let bundle = Bundle::new(hunter);
    script(&bundle.rootfs().join("bin/evil"), "#!/proc/self/exe\n");
    let before = Digest::of(&fs::read(program()).unwrap());
    bundle.create().good();
    bundle.start();
    bundle.wait_for_out("up");
    for _ in 0..30 {
        let evil = bundle.call(&["exec", &bundle.id, "/bin/evil"]);
        assert_ne!(evil.code, Some(0), "{evil:?}");
        bundle.call(&["exec", &bundle.id, "true"]).good();
    }
    assert!(!bundle.out().contains("OVERWRITTEN"), "{}", bundle.out());
    assert_eq!(Digest::of(&fs::read(program()).unwrap()), before);
}

/// The runtime's own process, looked at from the host while it waits inside: its file is on a read-only mount.
#[test]
fn cve_2019_5736_the_waiting_process_runs_from_a_sealed_file() {
    let bundle = Bundle::new("true");
    bundle.create().good();
    let exe = format!("/proc/{}/exe", bundle.state()["pid"]);
    // Kept, and tried when nothing runs it any more: "busy" lasts only so long.
    let kept = rustix::fs::open(&exe, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    let memory = fs::metadata(format!("/proc/{}/mem", bundle.state()["pid"])).unwrap();
    bundle.call(&["delete", &bundle.id]).good();
    use std::os::fd::AsRawFd;
    let kept = format!("/proc/self/fd/{}", kept.as_raw_fd());
    let kind = until("nobody runs the program", || {
        let kind = fs::File::options().write(true).open(&kept).unwrap_err().kind();
        (kind != std::io::ErrorKind::ExecutableFileBusy).then_some(kind)
    });
    assert_eq!(kind, std::io::ErrorKind::ReadOnlyFilesystem);
    // And nobody but root of the host may even look: it is not dumpable.
    use std::os::unix::fs::MetadataExt;
    assert_eq!(memory.uid(), 0);
}

/// Exchanges `a` and `b` again and again until dropped.
struct Exchange<'s> {
    stop: &'s AtomicBool,
}

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn race(a: &Path, b: &Path, body: impl FnOnce()) {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE);
            }
        });
        let _ends = Exchange { stop: &stop };
        body();
    });
}

/// A shared volume in which a directory and a link to `/` change places while mounts are made under it.
#[test]
fn cve_2021_30465_a_mount_target_that_changes_stays_inside() {
    let mut bundle = Bundle::new("");
    let (volume, other, host) =
        (bundle.dir.path().join("volume"), bundle.dir.path().join("other"), bundle.dir.path().join("host-only"));
    for dir in [&volume, &other, &host, &volume.join("inner"), &other.join("deeper")] {
        fs::create_dir_all(dir).unwrap();
    }
    symlink("/", volume.join("link")).unwrap();
    let look =
        format!("test -e {0} && echo ESCAPED; test -e /volume/inner{0} && echo ESCAPED; echo done", host.display());
    bundle.config["process"]["args"] = json!(["sh", "-c", look]);
    add_mount(&mut bundle, json!({ "destination": "/volume", "source": volume, "options": ["bind"] }));
    add_mount(&mut bundle, json!({ "destination": "/volume/inner/deeper", "source": other, "options": ["bind"] }));
    // Of this bundle only: other tests mount meanwhile.
    let mine = bundle.dir.path().to_string_lossy().into_owned();
    let mounts = || {
        let all = fs::read_to_string("/proc/self/mountinfo").unwrap();
        all.lines().filter(|line| line.contains(&mine)).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(mounts(), [""; 0]);
    race(&volume.join("inner"), &volume.join("link"), || {
        for _ in 0..40 {
            let seen = bundle.run();
            // A target that vanished under one's hands may be an error; outside it may not be.
            assert!(!seen.out.contains("ESCAPED"), "{seen:?}");
            assert!(seen.code == Some(0) || seen.err.contains("mounts"), "{seen:?}");
        }
    });
    assert_eq!(mounts(), [""; 0], "left on the host");
}

/// `release_agent` of a cgroup v1 hierarchy is a program that the kernel runs on the host.
#[test]
fn cve_2022_0492_no_release_agent_can_be_written() {
    let attack = "for f in /sys/fs/cgroup/*/release_agent /sys/fs/cgroup/release_agent; do echo /bin/evil 2>/dev/null > $f && echo WRITTEN; done; \
        mkdir -p /tmp/c; mount -t cgroup -o memory cgroup /tmp/c 2>&1 && echo MOUNTED; \
        unshare -UrmC sh -c 'mount -t cgroup -o rdma,memory cgroup /tmp/c && echo MOUNTED; echo /bin/evil > /tmp/c/release_agent && echo WRITTEN' 2>&1; \
        mkdir /sys/fs/cgroup/memory/x 2>/dev/null && echo MADE; echo done";
    let mut bundle = Bundle::new(attack);
    let profile = include_str!("../../../config/seccomp.json");
    bundle.config["linux"]["seccomp"] = serde_json::from_str(profile).unwrap();
    let text = bundle.run().good();
    assert!(text.contains("done"), "{text}");
    for word in ["WRITTEN", "MOUNTED", "MADE"] {
        assert!(!text.contains(word), "{text}");
    }
}

/// A descriptor of a host directory that leaked into the runtime, and a working directory that leads through it.
#[test]
fn cve_2024_21626_no_working_directory_is_outside() {
    let bundle = Bundle::new("");
    let host = bundle.dir.path().join("host-only");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("secret"), "").unwrap();
    let leak = format!("exec 3<{0} 5<{0} 7<{0} 8<{0}; exec \"$@\"", host.display());
    let with_leak = |words: &[&str], bundle: &Bundle| {
        let inner = bundle.command(words);
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &leak, "sh"]).arg(inner.get_program()).args(inner.get_args());
        let output = command.output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    let look = "ls; ls ..; ls /proc/self/fd/*/secret; cat ../../../../etc/hostname";
    let living = Bundle::new("echo up; while :; do sleep 0.05; done");
    living.create().good();
    living.start();
    living.wait_for_out("up");
    for number in 3..24 {
        for cwd in [format!("/proc/self/fd/{number}"), format!("/proc/self/fd/{number}/..")] {
            let mut one = Bundle::new(look);
            one.config["process"]["cwd"] = cwd.clone().into();
            one.save();
            let text = with_leak(&["run", "--bundle", one.dir.path().to_str().unwrap(), &one.id], &one);
            assert!(!text.contains("secret\n") && !text.contains("host-only"), "{cwd}: {text}");
            let text = with_leak(&["exec", "--cwd", &cwd, &living.id, "sh", "-c", look], &living);
            assert!(!text.contains("secret\n") && !text.contains("host-only"), "exec {cwd}: {text}");
        }
    }
}

/// A mount target that is to be made lies behind a link, or behind a directory that becomes one: nothing may be made on
/// the host.
#[test]
fn cve_2024_45310_nothing_is_made_outside() {
    let mut bundle = Bundle::new("true");
    let (volume, host) = (bundle.dir.path().join("volume"), bundle.dir.path().join("host-only"));
    fs::create_dir_all(volume.join("inner")).unwrap();
    fs::create_dir(&host).unwrap();
    let up = format!("{}{}", "../".repeat(20), host.strip_prefix("/").unwrap().display());
    symlink(&up, volume.join("relative")).unwrap();
    symlink(&host, volume.join("absolute")).unwrap();
    add_mount(&mut bundle, json!({ "destination": "/volume", "source": volume, "options": ["bind"] }));
    for (number, link) in ["relative", "absolute"].iter().enumerate() {
        for (kind, source) in [("dir", "/tmp"), ("file", "/etc/passwd")] {
            let destination = format!("/volume/{link}/{kind}{number}");
            add_mount(&mut bundle, json!({ "destination": destination, "source": source, "options": ["bind"] }));
        }
    }
    bundle.run();
    assert_eq!(fs::read_dir(&host).unwrap().count(), 0);

    let mut bundle = Bundle::new("true");
    add_mount(&mut bundle, json!({ "destination": "/volume", "source": volume, "options": ["bind"] }));
    let deep = json!({ "destination": "/volume/inner/a/b/c", "source": "/tmp", "options": ["bind"] });
    add_mount(&mut bundle, deep);
    race(&volume.join("inner"), &volume.join("relative"), || {
        for _ in 0..40 {
            bundle.run();
        }
    });
    assert_eq!(fs::read_dir(&host).unwrap().count(), 0);
}

/// `/dev/null` of the container is a link to a file of procfs: masking with it would mount that file, writable, over the
/// masked path.
#[test]
fn cve_2025_31133_a_false_dev_null_masks_nothing() {
    let kept = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    let attack = "echo '|/evil' > /proc/keys && echo WRITTEN; cat /proc/keys";
    for target in ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/data"] {
        let mut bundle = Bundle::new(attack);
        let dev = bundle.dir.path().join("dev");
        fs::create_dir_all(dev.join("pts")).unwrap();
        symlink(target, dev.join("null")).unwrap();
        for mount in bundle.config["mounts"].as_array_mut().unwrap() {
            if mount["destination"] == "/dev" {
                *mount = json!({ "destination": "/dev", "source": dev, "options": ["bind"] });
            }
        }
        bundle.config["mounts"].as_array_mut().unwrap().retain(|mount| {
            let at = mount["destination"].as_str().unwrap();
            !at.starts_with("/dev/")
        });
        bundle.config["linux"]["maskedPaths"] = json!(["/proc/keys"]);
        let seen = bundle.run();
        assert!(seen.err.contains("masked paths (/proc/keys)"), "{seen:?}");
        assert!(!seen.out.contains("WRITTEN"), "{seen:?}");
    }
    assert_eq!(fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap(), kept);
}

/// `/dev/console` of the container is a link to a file of procfs: the terminal would be mounted over it, before that
/// path is masked or made read-only.
#[test]
fn cve_2025_52565_a_false_console_gets_no_terminal() {
    let mut bundle = Bundle::new("echo RAN");
    let dev = bundle.dir.path().join("dev");
    fs::create_dir_all(dev.join("pts")).unwrap();
    symlink("/proc/sys/kernel/hostname", dev.join("console")).unwrap();
    for mount in bundle.config["mounts"].as_array_mut().unwrap() {
        if mount["destination"] == "/dev" {
            *mount = json!({ "destination": "/dev", "source": dev, "options": ["bind"] });
        }
    }
    bundle.config["mounts"].as_array_mut().unwrap().retain(|mount| {
        let at = mount["destination"].as_str().unwrap();
        !at.starts_with("/dev/") || at == "/dev/pts"
    });
    fs::write(dev.join("null"), "").unwrap();
    bundle.config["linux"]["maskedPaths"] = json!([]);
    bundle.config["process"]["terminal"] = true.into();
    let socket = bundle.dir.path().join("console");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let text = bundle.create_with(&["--console-socket", socket.to_str().unwrap()]).bad();
    drop(listener);
    assert!(text.contains("terminal"), "{text}");
}

/// What the runtime writes to procfs is redirected: by a mount over a part of it, or by a `/proc` that is none.
#[test]
fn cve_2025_52881_writes_to_procfs_are_not_redirected() {
    let kept = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    // The parameter's directory is a volume.
    let mut bundle = Bundle::new("true");
    let trap = bundle.dir.path().join("trap");
    fs::create_dir_all(&trap).unwrap();
    fs::write(trap.join("somaxconn"), "").unwrap();
    let over = json!({ "destination": "/proc/sys/net/core", "source": trap, "options": ["bind"] });
    add_mount(&mut bundle, over);
    bundle.config["linux"]["sysctl"] = json!({ "net.core.somaxconn": "7" });
    assert!(bundle.create().bad().contains("sysctls (net.core.somaxconn)"));
    assert_eq!(fs::read_to_string(trap.join("somaxconn")).unwrap(), "");

    // The file is another file of procfs itself: its type would not tell.
    let mut bundle = Bundle::new("true");
    let core = "/proc/sys/kernel/core_pattern";
    let over = json!({ "destination": "/proc/sys/net/core/somaxconn", "source": core, "options": ["bind"] });
    add_mount(&mut bundle, over);
    bundle.config["linux"]["sysctl"] = json!({ "net.core.somaxconn": "|/evil" });
    assert!(bundle.create().bad().contains("sysctls (net.core.somaxconn)"));
    assert_eq!(fs::read_to_string(core).unwrap(), kept);

    // `/proc` is a link to a directory of the image.
    let mut bundle = Bundle::new("true");
    fs::remove_dir(bundle.rootfs().join("proc")).unwrap();
    fs::create_dir(bundle.rootfs().join("elsewhere")).unwrap();
    symlink("/elsewhere", bundle.rootfs().join("proc")).unwrap();
    bundle.config["linux"]["sysctl"] = json!({ "net.core.somaxconn": "7" });
    assert!(bundle.create().bad().contains("proc at /proc"));

    // A label is written through the same door.
    let mut bundle = Bundle::new("true");
    let over = json!({ "destination": "/proc/self/attr", "source": trap, "options": ["bind"] });
    fs::write(trap.join("exec"), "").unwrap();
    add_mount(&mut bundle, over);
    bundle.config["process"]["apparmorProfile"] = "profile".into();
    bundle.run().bad();
    assert_eq!(fs::read_to_string(trap.join("exec")).unwrap(), "");
}

/// An `exec` that is still the runtime is inside the container for a moment: nobody there may trace it or look at its
/// files (CVE-2016-9962).
#[test]
fn the_runtime_inside_a_container_cannot_be_looked_at() {
    let spy = "echo up; while :; do for p in /proc/[0-9]*; do for f in exe root cwd fd/0 fd/1 fd/3; do \
        case $(readlink $p/$f) in *edged*) echo LOOKED $f;; esac; done; done; done";
    let bundle = Bundle::new(spy);
    bundle.create().good();
    bundle.start();
    bundle.wait_for_out("up");
    for _ in 0..30 {
        bundle.call(&["exec", &bundle.id, "true"]).good();
    }
    assert!(!bundle.out().contains("LOOKED"), "{}", bundle.out());
    until("it lives", || (bundle.state()["status"] == "running").then_some(()));
}
