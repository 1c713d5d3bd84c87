//! Each workload has ids of its own: root inside is nobody outside, and its data does not know the difference.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::rig::{Device, Factory, head, until};

const WALLS: &str = "resources: { memory: 16Mi, cpu: 200m }";

/// A workload that runs `script` and stays.
fn shell(name: &str, image: &str, script: &str, more: &str) -> String {
    format!(
        "  {name}:\n    image: {image}\n    command: [/bin/sh, -c, '{script}; echo done; sleep 10000']\n    {WALLS}\n{more}"
    )
}

/// The ids that process `pid` has on this machine: real uid and gid.
fn ids_outside(pid: i32) -> (u32, u32) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let first = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    (first("Uid:"), first("Gid:"))
}

/// Waits until the workload has said `done`, and gives what it said before.
fn told(device: &Device, name: &str) -> String {
    device.running(name);
    until(&format!("{name} to be done"), || {
        let said = device.ask(&["logs", name]);
        said.contains("done").then_some(said)
    })
}

/// What a command inside prints.
fn inside(device: &Device, name: &str, script: &str) -> String {
    let output = device.edgectl(&["exec", name, "sh", "-c", script]);
    assert!(output.status.success(), "{script}: {output:?}\n{}", device.said());
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn root_inside_is_nobody_outside_and_no_two_are_the_same() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    let volume = "    mounts: [{ source: { volume: kept }, target: /kept }]\n";
    let script = "busybox id -u; echo mine > /kept/root; busybox chmod 600 /kept/root; busybox chown 33:44 /kept";
    let yaml = format!(
        "{}volumes: {{ kept: {{}} }}\nworkloads:\n{}{}{}",
        head(1),
        shell("first", &image, script, volume),
        shell("second", &image, "busybox id -u; echo opened anew > /dev/stderr", "    user: \"33:44\"\n"),
        shell("alone", &image, "true", "    pids: 1\n").replace("cpu: 200m }\n    pids: 1", "cpu: 200m, pids: 1 }"),
    )
    // One process, and no shell that forks.
    .replace("command: [/bin/sh, -c, 'true; echo done; sleep 10000']", "command: [/bin/sleep, \"10000\"]");
    device.take(&factory.sign("first", &yaml));
    assert!(told(&device, "first").contains("0\n") && told(&device, "second").contains("33"));
    assert!(told(&device, "second").contains("opened anew"));
    let (first, second) = (device.pid("first"), device.pid("second"));
    let (of_first, of_second) = (ids_outside(first), ids_outside(second));
    assert!(of_first.0 >= 0x7000_0000 && of_first.0 == of_first.1, "{of_first:?}");
    assert_eq!((of_second.0 % 65_536, of_second.1 % 65_536), (33, 44));
    assert_ne!(of_first.0, of_second.0 - 33, "each has a range of its own");
    let alone = device.pid("alone");
    assert!(ids_outside(alone).0 >= 0x7000_0000, "a wall of one process is room enough");

    // The disk has the ids that the container sees.
    let kept = device.root().join("volumes/kept");
    let of = |path: std::path::PathBuf| fs::metadata(&path).map(|meta| (meta.uid(), meta.gid())).unwrap();
    assert_eq!((of(kept.clone()), of(kept.join("root"))), ((33, 44), (0, 0)));

    // A command is in the same namespace, as root of it.
    assert_eq!(inside(&device, "first", "busybox id -u"), "0");
    let namespace = fs::read_link(format!("/proc/{first}/ns/user")).unwrap();
    assert_eq!(inside(&device, "first", "busybox readlink /proc/self/ns/user"), namespace.to_string_lossy());
    assert_ne!(namespace, fs::read_link("/proc/self/ns/user").unwrap());
    assert_eq!(inside(&device, "second", "echo opened anew > /dev/stdout"), "opened anew");

    // The volume goes to another workload, with another range: what root wrote root can read.
    let next = format!(
        "{}volumes: {{ kept: {{}} }}\nworkloads:\n{}",
        head(2),
        shell("third", &image, "cat /kept/root; echo more >> /kept/root", volume)
    );
    device.take(&factory.sign("next", &next));
    assert!(told(&device, "third").contains("mine"));
    assert_eq!(fs::read_to_string(kept.join("root")).unwrap(), "mine\nmore\n");
    device.wait_for_generation(2, "good");
    until("the ranges of those that are gone", || {
        let table = fs::read_to_string(device.root().join("user-ids")).unwrap();
        (!table.contains("first") && table.contains("third")).then_some(())
    });
}

#[test]
fn everything_that_is_mounted_is_as_the_workload_expects_it() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let shared = factory.path("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("host"), "of the device\n").unwrap();
    let device = factory.device(&format!(
        "[allow]\nbind = [\"{}\"]\ndevices = [\"/dev/full\", \"/dev/kmsg\"]\nhost-network = true\n",
        shared.display()
    ));
    let script = "cat /run/secrets/word /shared/host; echo new > /shared/inside; echo x > /tmpfs/y; \
                  busybox stat -c %u:%g:%a /run/secrets/word /etc/hosts /dev/other /dev/null /shared/host; \
                  echo x > /dev/other || echo full; echo > /dev/null && echo null; busybox ls /sys/class/net; \
                  busybox ls /dev/pts /dev/shm /dev/mqueue; busybox touch /etc/x && echo writable";
    let more = format!(
        "    secrets: [word]\n    devices: [{{ path: /dev/full, target: /dev/other }}, {{ path: /dev/kmsg, target: /dev/deep/kmsg }}]\n    \
         mounts: [{{ source: {{ bind: {} }}, target: /shared }}, {{ source: {{ tmpfs: {{ size: 64Ki }} }}, target: /tmpfs }}]\n",
        shared.display()
    );
    let server = "    command: [/bin/httpd, -f, -p, \"80\", -h, /www]\n";
    let yaml = format!(
        "{}secrets: {{ word: {{ value: hush }} }}\nworkloads:\n{}{}{}{}  web:\n    image: {image}\n{server}    {WALLS}\n    \
         health: {{ probe: {{ http: {{ port: 80 }} }}, interval: 500ms }}\n",
        head(1),
        shell("all", &image, script, &more),
        shell(
            "none",
            &image,
            "busybox ls /sys/class/net; busybox nc -lp 7 & busybox netstat -ltn",
            "    networkMode: none\n"
        ),
        shell("host", &image, "busybox ls /sys/class/net", "    networkMode: host\n"),
        shell("sealed", &image, "echo x > /x || echo sealed", "    readOnly: true\n"),
    );
    device.take(&factory.sign("all", &yaml));
    let all = told(&device, "all");
    println!("{all}");
    for word in ["hush", "of the device", "full", "null", "lo", "writable"] {
        assert!(all.contains(word), "{word}: {all}");
    }
    assert_eq!(all.matches("0:0:").count(), 5, "all of it is root's: {all}");
    assert_eq!(fs::metadata(shared.join("inside")).unwrap().uid(), 0);
    let kmsg = fs::metadata("/dev/kmsg").unwrap();
    let seen = inside(&device, "all", "busybox stat -c %u:%g:%t:%T /dev/deep/kmsg");
    assert_eq!(seen, format!("{}:{}:1:b", kmsg.uid(), kmsg.gid()));
    let none = told(&device, "none");
    println!("{none}");
    assert!(none.contains("lo") && !none.contains("eth") && none.contains(":7 "), "{none}");
    let interfaces: Vec<_> = fs::read_dir("/sys/class/net").unwrap().flatten().collect();
    let host = told(&device, "host");
    assert!(interfaces.iter().all(|one| host.contains(one.file_name().to_str().unwrap())), "{host}");
    assert!(told(&device, "sealed").contains("sealed"));
    device.workload_that("web", "healthy on port 80", |w| w["health"] == "healthy");
    for name in ["all", "none", "host", "sealed", "web"] {
        assert!(ids_outside(device.pid(name)).0 >= 0x7000_0000, "{name}");
    }
}

#[test]
fn the_ids_of_the_device_are_for_those_that_it_allows() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    let yaml =
        |sequence| format!("{}workloads:\n{}", head(sequence), shell("w", &image, "true", "    usernsMode: host\n"));
    let why = device.refuse(&factory.sign("host", &yaml(1)));
    assert!(why.contains("workloads.w.usernsMode: host") && why.contains("allow.host-users"), "{why}");
    let short = |sequence| yaml(sequence).replace("usernsMode: host", "user: host");
    let why = device.refuse(&factory.sign("short", &short(2)));
    assert!(why.contains("workloads.w.user: host") && why.contains("allow.host-users"), "{why}");
    device.switch_off();
    let device = factory.device("[allow]\nhost-users = true\n");
    device.take(&factory.sign("host", &yaml(3)));
    assert_eq!(ids_outside(device.pid("w")), (0, 0));
    device.wait_for_generation(3, "good");
    device.take(&factory.sign("short", &short(4)));
    device.wait_for_generation(4, "good");
    assert_eq!(ids_outside(device.pid("w")), (0, 0));
}

#[test]
fn what_was_written_before_there_were_ranges_is_still_right() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let script = "busybox test -e /state && cat /state && busybox stat -c %u:%a /state; echo kept > /state; \
                  busybox chmod 600 /state; busybox rm -f /www/index.html";
    let yaml = format!("{}workloads:\n{}", head(1), shell("w", &image, script, ""));
    let device = factory.device("[runtime]\nuser-namespaces = false\n");
    device.take(&factory.sign("before", &yaml));
    told(&device, "w");
    assert_eq!(ids_outside(device.pid("w")), (0, 0));
    device.wait_for_generation(1, "good");
    device.switch_off();
    let device = factory.device("[runtime]\nuser-ids = { first = 2000000, count = 131072 }\n");
    until("what it kept", || device.ask(&["logs", "w"]).contains("0:600").then_some(()));
    assert_eq!(ids_outside(device.pid("w")), (2_000_000, 2_000_000));
    assert_eq!(inside(&device, "w", "cat /state; busybox ls /www"), "kept");
    device.switch_off();
    // And back again.
    let device = factory.device("[runtime]\nuser-namespaces = false\n");
    device.running("w");
    assert_eq!(inside(&device, "w", "busybox stat -c %u /state"), "0");
}

/// A file system that is mounted for one test.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// ramfs cannot be idmapped, as UBIFS and NFS cannot.
fn that_cannot_be_idmapped(path: std::path::PathBuf) -> Mounted {
    fs::create_dir_all(&path).unwrap();
    rustix::mount::mount("ramfs", &path, "ramfs", rustix::mount::MountFlags::empty(), None).unwrap();
    Mounted(path)
}

#[test]
fn where_mounts_cannot_be_idmapped_each_workload_has_its_copy_of_the_layers() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let mounted = that_cannot_be_idmapped(factory.path("device").join("layers"));
    let device = factory.device("");
    let script = "busybox id -u; busybox stat -c %u:%g /bin/busybox /www / /bin; echo more >> /www/index.html; \
                  busybox stat -c %u:%g /www/index.html; echo new > /data/file; busybox stat -c %u:%g /data/file; \
                  busybox rm /bin/test; busybox chown 33:44 /data; busybox stat -c %u:%g /data";
    let yaml =
        format!("{}workloads:\n{}{}", head(1), shell("one", &image, script, ""), shell("two", &image, "true", ""));
    device.take(&factory.sign("copies", &yaml));
    let said = told(&device, "one");
    assert_eq!(said.matches("0:0\n").count(), 6, "{said}\n{}", device.said());
    assert!(said.contains("33:44"), "{said}");
    assert!(ids_outside(device.pid("one")).0 >= 0x7000_0000);
    assert_eq!(inside(&device, "one", "busybox id -u; cat /www/index.html"), "0\nhere\nmore");
    told(&device, "two");
    // A volume is given to the ids of its user, and stays his as long as he runs.
    let _volumes = that_cannot_be_idmapped(factory.path("device").join("volumes"));
    let volume = "    mounts: [{ source: { volume: kept }, target: /kept }]\n";
    let keeps = "busybox stat -c %u:%g /kept; echo mine > /kept/file; busybox chown 33:44 /kept/file; \
                 busybox stat -c %u:%g /kept/file";
    let with_volume = shell("three", &image, keeps, volume);
    let before = yaml.replace("sequence: 1", "sequence: 2").replace("workloads:", "volumes: { kept: {} }\nworkloads:");
    device.take(&factory.sign("volume", &format!("{before}{with_volume}")));
    let said = told(&device, "three");
    assert!(said.contains(" 0:0\n") && said.contains(" 33:44\n"), "{said}\n{}", device.said());
    let file = device.root().join("volumes/kept/file");
    let (three, owner) = (ids_outside(device.pid("three")), fs::metadata(&file).unwrap());
    assert_eq!((owner.uid(), owner.gid()), (three.0 + 33, three.1 + 44));
    device.wait_for_generation(2, "good");
    let both = before.replace("sequence: 2", "sequence: 3");
    let four = shell("four", &image, "busybox stat -c %u:%g /kept/file; cat /kept/file", volume);
    device.take(&factory.sign("shared", &format!("{both}{with_volume}{four}")));
    let refused = device.workload_that("four", "refused", |w| w["why"].to_string().contains("one user at a time"));
    let why = refused["why"].to_string();
    for word in ["volume kept is three's", "/volumes/kept", "ext4"] {
        assert!(why.contains(word), "{word}: {why}");
    }
    assert_eq!(fs::metadata(&file).unwrap().uid(), three.0 + 33, "nothing was touched under its user");
    // With another user it goes to other ids.
    let alone = before.replace("sequence: 2", "sequence: 4");
    device.take(&factory.sign("other", &format!("{alone}{four}")));
    let said = told(&device, "four");
    assert!(said.contains(" 33:44\n") && said.contains(" mine\n"), "{said}");
    assert_ne!(ids_outside(device.pid("four")), three);
    let ranges = || fs::read_dir(device.root().join("layers/copies")).map_or(0, Iterator::count);
    assert!(ranges() >= 3, "one copy for each range");
    drop(device);
    drop(mounted);
}

#[test]
fn copies_of_layers_stay_for_a_rollback_and_go_with_the_last_generation_that_needs_them() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("[runtime]\nidmapped-layers = false\n");
    let both = |sequence, said: &str| {
        let one = shell("one", &image, &format!("echo {said}"), "");
        format!("{}workloads:\n{one}{}", head(sequence), shell("two", &image, "true", ""))
    };
    let alone = |sequence, said: &str| {
        format!(
            "{}workloads:\n{}",
            head(sequence),
            shell("one", &image, &format!("echo {said} >> /kept; cat /kept"), "")
        )
    };
    let copies = |device: &Device| fs::read_dir(device.root().join("layers/copies")).map_or(0, Iterator::count);
    device.take(&factory.sign("both", &both(1, "first")));
    device.wait_for_generation(1, "good");
    assert_eq!(copies(&device), 2);
    let used = device.ask(&["df", "-o", "json"]);
    let used: serde_json::Value = serde_json::from_str(&used).unwrap();
    let part = used["parts"].as_array().unwrap().iter().find(|part| part["what"] == "layer copies").unwrap();
    assert_eq!((&part["count"], &part["reclaimable"]), (&2.into(), &"0".into()), "{used}");
    assert!(part["size"].as_str().unwrap().ends_with("Ki"), "{used}");
    assert!(device.ask(&["image", "check"]).contains("copy for the ids from"));
    device.take(&factory.sign("alone", &alone(2, "second")));
    device.wait_for_generation(2, "good");
    assert_eq!(copies(&device), 2, "the last good generation needs them");
    let table = || fs::read_to_string(device.root().join("user-ids")).unwrap();
    assert!(table().contains("two"), "its copies have its ids");
    device.take(&factory.sign("next", &alone(3, "third")));
    device.wait_for_generation(3, "good");
    until("the copies that nobody needs to go", || (copies(&device) == 1 && !table().contains("two")).then_some(()));
    // Told when it is over.
    until("the story of it", || device.events().iter().any(|event| event.contains("were taken away")).then_some(()));

    // The same device learns to map: what runs next does so, and the copies go.
    device.switch_off();
    let device = factory.device("");
    device.running("one");
    until("it to have begun anew", || device.edgectl(&["exec", "one", "cat", "/kept"]).status.success().then_some(()));
    assert_eq!(inside(&device, "one", "busybox stat -c %u:%g /kept /www"), "0:0\n0:0");
    until("the copies to go", || {
        device.edgectl(&["prune"]);
        (copies(&device) == 0).then_some(())
    });
    assert_eq!(inside(&device, "one", "busybox stat -c %u:%g /kept /www"), "0:0\n0:0");
}

#[test]
fn copies_that_do_not_fit_are_refused_with_the_numbers_before_anything_is_touched() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let root = factory.path("device");
    fs::create_dir(&root).unwrap();
    // Room for the image, as it is guessed, and for one copy; 64 MiB are in reserve.
    let options = std::ffi::CString::new("size=69m").unwrap();
    rustix::mount::mount("tmpfs", &root, "tmpfs", rustix::mount::MountFlags::empty(), Some(options.as_c_str()))
        .unwrap();
    let mounted = Mounted(root);
    let device = factory.device("[runtime]\nidmapped-layers = false\n");
    let workloads: String = ["one", "two"].iter().map(|name| shell(name, &image, "true", "")).collect();
    device.take(&factory.sign("both", &format!("{}workloads:\n{workloads}", head(1))));
    let why = until("the refusal", || {
        let events = device.events();
        events.into_iter().find(|event| event.contains("a set of layer copies (for one, two"))
    });
    for word in ["needs about", "are free", "64Mi are in reserve"] {
        assert!(why.contains(word), "{word}: {why}");
    }
    assert_ne!(device.workload("one")["phase"], "running");
    drop(device);
    drop(mounted);
}
