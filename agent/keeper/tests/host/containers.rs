//! What the inside of a container looks like.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use edged_model::keeper::{CgroupEntry, LaunchSpec, MountStep, ReplyBody, RequestBody, Rootfs, Stdio};

use crate::Story;
use crate::rig::{NAMESPACES, Rig, line, until};

pub const STORIES: &[Story] = &[
    ("namespaces_are_its_own", namespaces_are_its_own),
    ("overlay_writes_go_to_the_upper", overlay_writes_go_to_the_upper),
    ("an_image_of_eighty_layers_mounts", an_image_of_eighty_layers_mounts),
    ("masked_and_read_only_paths_hold", masked_and_read_only_paths_hold),
    ("a_read_only_root_is_read_only", a_read_only_root_is_read_only),
    ("links_of_an_image_lead_nowhere_outside", links_of_an_image_lead_nowhere_outside),
    ("power_is_given_up", power_is_given_up),
    ("a_filter_forbids_with_and_without_no_new_privs", a_filter_forbids_with_and_without_no_new_privs),
    ("exec_joins_a_living_container", exec_joins_a_living_container),
    ("an_init_passes_signals_on_reaps_and_tells_the_code", an_init_passes_signals_on_reaps_and_tells_the_code),
    ("a_user_namespace_is_mapped_and_entered", a_user_namespace_is_mapped_and_entered),
    ("a_terminal_is_the_containers_own", a_terminal_is_the_containers_own),
    ("a_given_network_namespace_is_entered", a_given_network_namespace_is_entered),
    ("cgroups_of_both_versions_are_entered", cgroups_of_both_versions_are_entered),
];

fn namespaces_are_its_own() {
    let (rig, mut link) = Rig::start();
    let script = "echo $$; hostname; ls / | grep -c work; ls -d /proc/[0-9]* | grep -c .; cat /proc/net/dev | grep -c :; \
                  readlink /dev/fd; echo x > /dev/null && echo null";
    let (code, out, err) = link.run(rig.spec("ns", script));
    assert_eq!(code, Some(0), "{err}");
    let lines: Vec<_> = out.lines().collect();
    // Its own pid space, name, root; few processes; an interface `lo` (and what the kernel adds); links; devices.
    assert_eq!((lines[0], lines[1], lines[2]), ("1", "inside", "0"), "{out}");
    assert!(lines[3].parse::<u32>().unwrap() <= 4, "{out}");
    assert_eq!(lines[5..], ["/proc/self/fd", "null"], "{out}");
    for name in ["pid", "mnt", "uts", "ipc", "net", "cgroup"] {
        let ours = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        let (_, out, _) = link.run(rig.spec("ns", &format!("readlink /proc/self/ns/{name}")));
        assert_ne!(Path::new(out.trim()), ours, "{name}");
    }
}

/// An overlay of `layers` directories; the lowest is the rig's root.
fn overlay(rig: &Rig, layers: usize) -> Rootfs {
    let base = rig.dir.path().join("overlay");
    let make = |name: &str| {
        let path = base.join(name);
        fs::create_dir_all(&path).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let mut lower: Vec<_> = (1..layers).rev().map(|number| make(&format!("{number:064}"))).collect();
    for (number, layer) in lower.iter().enumerate() {
        fs::write(Path::new(layer).join(format!("layer-{number}")), layer).unwrap();
    }
    lower.push(rig.rootfs().to_str().unwrap().to_owned());
    Rootfs::Overlay {
        lower,
        upper: make("upper"),
        work: make("work"),
        mount_at: make("merged"),
        volatile: true,
        read_only: false,
    }
}

fn overlay_writes_go_to_the_upper() {
    let (rig, mut link) = Rig::start();
    let mut spec = rig.spec("overlay", "echo new > /tmp/file; cat /layer-0; echo; cat /tmp/file");
    spec.rootfs = Some(overlay(&rig, 3));
    let (code, out, err) = link.run(spec);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.ends_with("\nnew\n"), "{out}");
    assert_eq!(fs::read_to_string(rig.dir.path().join("overlay/upper/tmp/file")).unwrap(), "new\n");
    assert!(!rig.rootfs().join("tmp/file").exists());
    // The mount was the container's alone.
    assert!(fs::read_dir(rig.dir.path().join("overlay/merged")).unwrap().next().is_none());
}

fn an_image_of_eighty_layers_mounts() {
    let (rig, mut link) = Rig::start();
    let mut spec = rig.spec("deep", "ls / | grep -c layer-");
    spec.rootfs = Some(overlay(&rig, 80));
    let (code, out, err) = link.run(spec);
    assert_eq!((code, out.trim()), (Some(0), "79"), "{err}");
}

fn masked_and_read_only_paths_hold() {
    let (rig, mut link) = Rig::start();
    fs::create_dir(rig.rootfs().join("etc/secret")).unwrap();
    fs::write(rig.rootfs().join("etc/secret/key"), "key").unwrap();
    let mut spec = rig.spec(
        "masks",
        "cat /proc/timer_list | grep -c .; ls /etc/secret | grep -c .; echo x > /proc/sys/kernel/domainname",
    );
    spec.masked_paths = vec!["/proc/timer_list".into(), "/etc/secret".into(), "/not/there".into()];
    spec.readonly_paths = vec!["/proc/sys".into()];
    let (code, out, err) = link.run(spec);
    assert_eq!(out, "0\n0\n", "{err}");
    assert_eq!(code, Some(1));
    assert!(err.contains("Read-only file system"), "{err}");
}

fn a_read_only_root_is_read_only() {
    let (rig, mut link) = Rig::start();
    let mut spec = rig.spec("ro", "echo x > /tmp/file");
    spec.rootfs = Some(Rootfs::Directory { path: rig.rootfs().to_str().unwrap().into(), read_only: true });
    let (_, _, err) = link.run(spec);
    assert!(err.contains("Read-only file system"), "{err}");
}

/// An image whose `/data` is a link to the host's directory: the bind must land inside.
fn links_of_an_image_lead_nowhere_outside() {
    let (rig, mut link) = Rig::start();
    let outside = rig.dir.path().join("outside");
    let source = rig.dir.path().join("source");
    for dir in [&outside, &source] {
        fs::create_dir(dir).unwrap();
    }
    fs::write(source.join("file"), "of the source").unwrap();
    std::os::unix::fs::symlink(&outside, rig.rootfs().join("data")).unwrap();
    fs::create_dir_all(rig.rootfs().join(outside.strip_prefix("/").unwrap())).unwrap();
    let mut spec = rig.spec("link", "cat /data/file");
    spec.mounts.push(MountStep {
        source: source.to_str().unwrap().into(),
        target: "/data".into(),
        bind: true,
        ..MountStep::default()
    });
    let (code, out, err) = link.run(spec);
    assert_eq!((code, out.as_str()), (Some(0), "of the source"), "{err}");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

fn power_is_given_up() {
    let (rig, mut link) = Rig::start();
    let mut spec = rig.spec("user", "id -u; id -G; grep -E 'Cap(Prm|Eff|Amb)|NoNewPrivs' /proc/self/status; umask");
    (spec.uid, spec.gid, spec.additional_gids) = (1000, 1001, vec![7]);
    spec.umask = Some(0o027);
    spec.capabilities.permitted = 1 << 10;
    spec.capabilities.effective = 1 << 10;
    spec.capabilities.inheritable = 1 << 10;
    spec.capabilities.ambient = 1 << 10;
    let (code, out, err) = link.run(spec);
    assert_eq!(code, Some(0), "{err}");
    let kept = "0000000000000400";
    let wanted = format!("1000\n1001 7\nCapPrm:\t{kept}\nCapEff:\t{kept}\nCapAmb:\t{kept}\nNoNewPrivs:\t1\n0027\n");
    assert_eq!(out, wanted);
}

/// `mkdir` gives EPERM, everything else is allowed (seccomp(2), linux/filter.h).
fn no_mkdir() -> Vec<u8> {
    let numbers: &[u32] = if cfg!(target_arch = "x86_64") { &[83, 258] } else { &[34, 323] };
    let instruction =
        |code: u16, jt: u8, jf: u8, k: u32| [&code.to_ne_bytes()[..], &[jt, jf], &k.to_ne_bytes()].concat();
    let refuse = |number: &u32| [instruction(0x15, 0, 1, *number), instruction(0x06, 0, 0, 0x0005_0001)].concat();
    let mut program = instruction(0x20, 0, 0, 0);
    program.extend(numbers.iter().flat_map(refuse));
    program.extend(instruction(0x06, 0, 0, 0x7fff_0000));
    program
}

fn a_filter_forbids_with_and_without_no_new_privs() {
    let (rig, mut link) = Rig::start();
    for no_new_privs in [true, false] {
        let mut spec = rig.spec("filter", "mkdir /tmp/x; grep NoNewPrivs /proc/self/status");
        spec.seccomp = no_mkdir();
        spec.no_new_privs = no_new_privs;
        let (_, out, err) = link.run(spec);
        assert!(err.contains("Operation not permitted"), "{err}");
        assert_eq!(out, format!("NoNewPrivs:\t{}\n", u8::from(no_new_privs)));
    }
}

fn joining(rig: &Rig, key: &str, target: &str, script: &str) -> LaunchSpec {
    LaunchSpec {
        join: Some(target.into()),
        namespaces: 0,
        rootfs: None,
        hostname: None,
        mounts: Vec::new(),
        device_nodes: Vec::new(),
        symlinks: Vec::new(),
        ..rig.spec(key, script)
    }
}

fn exec_joins_a_living_container() {
    let (rig, mut link) = Rig::start();
    let (_, mut outputs) =
        link.launch(rig.spec("web", "hostname changed; echo inside > /dev/shared; echo up; exec sleep 100"));
    // No CAP_SYS_ADMIN inside: the name cannot be changed, the file can be written.
    assert_eq!(line(&mut outputs[0]), "up");
    let names = "pid mnt uts ipc net cgroup".replace(' ', " /proc/self/ns/");
    let script = format!("cat /dev/shared; hostname; readlink /proc/self/ns/{names}; readlink /proc/1/ns/pid; echo $$");
    let (code, out, err) = link.run(joining(&rig, "web/exec-1", "web", &script));
    assert_eq!(code, Some(0), "{err}");
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines[..2], ["inside", "inside"], "{out}");
    assert_ne!(lines.last(), Some(&"1"));
    assert_eq!(lines[2], lines[lines.len() - 2], "the pid namespace is that of the container");
    // The keeper's next child is born in the keeper's own pid namespace again, and so below nobody.
    let mut spec = rig.spec("host", "readlink /proc/self/ns/pid");
    spec.namespaces = NAMESPACES & !0x2000_0000;
    let (_, out, err) = link.run(spec);
    assert_eq!(Path::new(out.trim()), fs::read_link("/proc/self/ns/pid").unwrap(), "{err}");
    // When the container ends, what was joined to it ends too.
    let (_, _) = link.launch(joining(&rig, "web/exec-2", "web", "sleep 100"));
    link.ask(RequestBody::Signal { key: "web".into(), signal: 9 }, &[]);
    assert_eq!(link.exit_of("web/exec-2").signal, Some(9));
    assert_eq!(link.exit_of("web").signal, Some(9));
    let (answer, _) = link.ask(RequestBody::Launch(Box::new(joining(&rig, "web/exec-3", "web", "true"))), &[]);
    assert!(matches!(answer, ReplyBody::Refused { .. }), "{answer:?}");
}

fn a_terminal_is_the_containers_own() {
    let (rig, mut link) = Rig::start();
    let mut spec = rig.spec("tty", "tty; stty size; ls -l /dev/console | grep -c '^c'; cat");
    spec.stdio = Stdio::Terminal { rows: 33, columns: 99 };
    let (_, mut outputs) = link.launch(spec);
    let [master] = &mut outputs[..] else { panic!("one master was awaited: {outputs:?}") };
    assert_eq!([line(master), line(master), line(master)], ["/dev/pts/0", "33 99", "1"]);
    // The other side of the terminal: what is typed comes back, by the echo and by cat; ^D ends it.
    master.write_all(b"typed\n\x04").unwrap();
    assert_eq!([line(master), line(master)], ["typed", "typed"]);
    assert_eq!(link.exit_of("tty").code, Some(0));
    let mut rest = Vec::new();
    // EIO: nobody has the other side any more (pty(7)).
    let _ = master.read_to_end(&mut rest);
}

fn a_given_network_namespace_is_entered() {
    let (rig, mut link) = Rig::start();
    let mut spec = rig.spec("net", "readlink /proc/self/ns/net");
    spec.namespaces = NAMESPACES & !0x4000_0000;
    spec.netns_fd = Some(0);
    let (holder_pid, mut up) = link.launch(rig.spec("holder", "echo up; exec sleep 100"));
    assert_eq!(line(&mut up[0]), "up");
    let path = format!("/proc/{holder_pid}/ns/net");
    let wanted = fs::read_link(&path).unwrap();
    let (_, mut outputs) = link.launch_with(spec, &[OwnedFd::from(fs::File::open(&path).unwrap())]);
    assert_eq!(Path::new(&line(&mut outputs[0])), wanted);
}

/// A cgroup directory of this test alone, removed at its end.
struct Group(std::path::PathBuf);

impl Group {
    fn make(hierarchy: &str) -> Option<Self> {
        let path = Path::new(hierarchy).join(format!("edged-keeper-test-{}", std::process::id()));
        fs::create_dir(&path).ok().map(|()| Self(path))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Busy until the kernel has let go of the last process.
        until("the cgroup's end", || fs::remove_dir(&self.0).ok());
    }
}

impl Group {
    fn holds_alone(&self, pid: i32) {
        until("the child alone in its cgroup", || {
            let procs = fs::read_to_string(self.0.join("cgroup.procs")).unwrap();
            (procs.trim() == pid.to_string()).then_some(())
        });
    }
}

fn cgroups_of_both_versions_are_entered() {
    let v2 = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
    let v2 = v2.into_iter().find(|dir| Path::new(dir).join("cgroup.controllers").exists()).and_then(Group::make);
    let v1 = Group::make("/sys/fs/cgroup/pids");
    println!("  (kinds of cgroup that can be tried: {} of 2)", v1.iter().chain(&v2).count());
    // After the groups, so that it has ended all children when they are removed.
    let (rig, mut link) = Rig::start();
    if let Some(group) = &v1 {
        let procs = fs::File::options().write(true).open(group.0.join("cgroup.procs")).unwrap();
        let mut spec = rig.spec("v1", "exec sleep 100");
        spec.cgroup = CgroupEntry::V1 { procs_fds: vec![0] };
        let (pid, _outputs) = link.launch_with(spec, &[procs.into()]);
        group.holds_alone(pid);
    }
    if let Some(group) = &v2 {
        let dir = fs::File::open(&group.0).unwrap();
        let mut spec = rig.spec("v2", "grep ^0: /proc/self/cgroup; exec sleep 100");
        spec.cgroup = CgroupEntry::V2 { dir_fd: 0 };
        let (pid, mut outputs) = link.launch_with(spec, &[dir.into()]);
        // The cgroup namespace was made inside the group: it is its root.
        assert_eq!(line(&mut outputs[0]), "0::/");
        group.holds_alone(pid);
    }
}

fn an_init_passes_signals_on_reaps_and_tells_the_code() {
    let (rig, mut link) = Rig::start();
    let with_init = |key: &str, script: &str| LaunchSpec { init: true, ..rig.spec(key, script) };
    // Not process 1; what it leaves behind is nobody's zombie; its code is told.
    let orphans = "(sh -c 'exit 3' &); (sh -c 'exit 3' &); [ $$ != 1 ] && echo not first; \
        while grep -q ') Z' /proc/[0-9]*/stat 2>/dev/null; do sleep 0.01; done; echo reaped; exit 7";
    let (code, out, err) = link.run(with_init("orphans", orphans));
    assert_eq!((code, out.as_str(), err.as_str()), (Some(7), "not first\nreaped\n", ""));

    let (_, mut outputs) = link.launch(with_init("asked", "trap 'exit 6' TERM; echo up; while :; do sleep 0.01; done"));
    assert_eq!(line(&mut outputs[0]), "up");
    link.ask(RequestBody::Signal { key: "asked".into(), signal: 15 }, &[]);
    assert_eq!(link.exit_of("asked").code, Some(6));
    let (code, ..) = link.run(with_init("killed", "kill -9 $$"));
    assert_eq!(code, Some(128 + 9));

    // A program that cannot be executed is told by its step, as without an init.
    let mut spec = with_init("x", "");
    spec.argv = vec!["/etc".into()];
    assert_eq!(link.fails(spec), ("exec (/etc)".into(), 13));
}

fn a_user_namespace_is_mapped_and_entered() {
    use edged_model::keeper::IdMapping;
    const NEW_USER: u64 = 0x1000_0000;
    let (rig, mut link) = Rig::start();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(rig.dir.path(), open).unwrap();
    let map = vec![IdMapping { inside: 0, outside: 300_000, count: 1000 }];
    let mut spec = rig.spec("mapped", "id -u; cat /proc/self/uid_map; echo up; exec sleep 1000");
    spec.namespaces |= NEW_USER;
    (spec.uid_map, spec.gid_map) = (map.clone(), map);
    spec.device_nodes.clear();
    let (_, mut outputs) = link.launch(spec);
    assert_eq!(line(&mut outputs[0]), "0");
    assert!(line(&mut outputs[0]).split_whitespace().eq(["0", "300000", "1000"]));
    assert_eq!(line(&mut outputs[0]), "up");
    // A second process in it is in the same user namespace.
    let mut inside = rig.spec("mapped/exec-1", "cat /proc/self/uid_map");
    inside.join = Some("mapped".into());
    (inside.namespaces, inside.rootfs, inside.hostname) = (0, None, None);
    inside.mounts.clear();
    inside.device_nodes.clear();
    inside.symlinks.clear();
    let (code, out, _) = link.run(inside);
    assert_eq!(code, Some(0));
    assert!(out.split_whitespace().eq(["0", "300000", "1000"]), "{out}");
    link.ask(RequestBody::Signal { key: "mapped".into(), signal: 9 }, &[]);
    assert_eq!(link.exit_of("mapped").signal, Some(9));
}
