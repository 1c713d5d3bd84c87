//! The containers that the engines run, by the names they have in the scripts.

use serde_json::{Value, json};

/// Enough for every limit to be met at once and for the kernel to live on.
const MEMORY_LIMIT_BYTES: u64 = 32 << 20;

/// Numbers that the script puts the disk's own in for.
const MAJOR: i64 = 12_345;
const MINOR: i64 = 54_321;

const CONTEXT: &str = "system_u:system_r:container_t:s0:c1,c2";
const MOUNT_CONTEXT: &str = "system_u:object_r:container_file_t:s0:c1,c2";

pub struct Bundle {
    pub name: &'static str,
    script: &'static str,
    /// Beyond the template and its walls.
    change: fn(&mut Value),
}

impl Bundle {
    /// What the template becomes.
    pub fn write(&self, config: &mut Value) {
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = json!(["/bin/busybox", "sh", "-c", self.script]);
        config["root"]["readonly"] = false.into();
        // To make a device node, and see that it does not open.
        for set in ["bounding", "effective", "permitted"] {
            let names = &mut config["process"]["capabilities"][set];
            names.as_array_mut().expect("the template has capabilities").push("CAP_MKNOD".into());
        }
        config["linux"]["resources"] = json!({
            "memory": { "limit": MEMORY_LIMIT_BYTES, "swap": MEMORY_LIMIT_BYTES },
            "pids": { "limit": 8 },
            "cpu": { "quota": 50_000, "period": 100_000 },
            "devices": config["linux"]["resources"]["devices"],
        });
        (self.change)(config);
    }
}

const SLEEP: &str = "exec /bin/busybox sleep 1000";
const PROFILE: &str = "box=/bin/busybox; $box cat /proc/self/attr/apparmor/current; \
                       $box cat /forbidden 2> /dev/null || echo refused; $box id -u";

pub fn of_the_engine() -> Vec<Bundle> {
    let bundle = |name, script| Bundle { name, script, change: |_| {} };
    let resource = |name, change| Bundle { name, script: SLEEP, change };
    let mut all = vec![
        bundle("exits", "exit 7"),
        bundle("sleeps", SLEEP),
        bundle("walls", "cd /sys/fs/cgroup && /bin/busybox cat memory.max pids.max cpu.max"),
        bundle("hog", "/bin/busybox dd if=/dev/zero of=/dev/shm/full bs=1M count=100"),
        bundle("forks", "for n in 1 2 3 4 5 6 7 8 9 10; do /bin/busybox sleep 30 & done; wait"),
        resource("disks", |config| {
            let rate = |rate| json!([{ "major": MAJOR, "minor": MINOR, "rate": rate }]);
            config["linux"]["resources"]["blockIO"] = json!({
                "weight": 500,
                "weightDevice": [{ "major": MAJOR, "minor": MINOR, "weight": 1000 }],
                "throttleReadBpsDevice": rate(1_048_576),
                "throttleWriteIOPSDevice": rate(100),
            });
            config["linux"]["resources"]["hugepageLimits"] = json!([{ "pageSize": "2MB", "limit": 4_194_304 }]);
        }),
        resource("no_disk", |config| {
            let limit = json!([{ "major": 99, "minor": 99, "rate": 1 }]);
            config["linux"]["resources"]["blockIO"] = json!({ "throttleReadBpsDevice": limit });
        }),
        resource("no_rdma", |config| {
            config["linux"]["resources"]["rdma"] = json!({ "rxe0": { "hcaHandles": 3, "hcaObjects": 10_000 } });
        }),
        resource("no_pages", |config| {
            config["linux"]["resources"]["hugepageLimits"] = json!([{ "pageSize": "3MB", "limit": 0 }]);
        }),
    ];
    let confined = |name, script| Bundle {
        name,
        script,
        change: |config| config["process"]["apparmorProfile"] = "edged-test".into(),
    };
    all.extend([
        confined("confined", SLEEP),
        Bundle {
            name: "profile",
            script: PROFILE,
            change: |config| {
                config["process"]["apparmorProfile"] = "edged-test".into();
                config["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
            },
        },
        Bundle {
            name: "no_profile",
            script: PROFILE,
            change: |config| config["process"]["apparmorProfile"] = "no-such-profile".into(),
        },
        Bundle { name: "labelled", script: LABELS, change: label },
    ]);
    all
}

/// The context, the mounts that are labelled, and whether files may be written where they are and where they are not. Nobody
/// writes to a message queue as to a file: that it can be made is enough. The session keyring is seen by whose label it has.
const LABELS: &str = "box=/bin/busybox; $box tr -d '\\0' < /proc/self/attr/current; echo; \
    for path in /dev /dev/pts /dev/shm /secret; do \
    echo $path $($box grep \" $path \" /proc/self/mountinfo | $box grep -o 'context=\"[^\"]*\"'); done; \
    echo x > /dev/shm/x && echo written; $box touch /dev/mqueue/queue 2> /dev/null; $box ls /dev/mqueue; \
    (echo x > /bin/x) 2> /dev/null || echo refused; $box grep -c _ses /proc/keys";

fn label(config: &mut Value) {
    config["process"]["selinuxLabel"] = CONTEXT.into();
    config["linux"]["mountLabel"] = MOUNT_CONTEXT.into();
    let masked = config["linux"]["maskedPaths"].as_array_mut().expect("the template masks paths");
    masked.retain(|path| path != "/proc/keys");
    masked.push("/secret".into());
}

pub fn of_selinux() -> Vec<Bundle> {
    let plain = "/bin/busybox tr -d '\\0' < /proc/self/attr/current; echo; echo x > /bin/x && echo written";
    vec![
        Bundle { name: "plain", script: plain, change: |_| {} },
        Bundle { name: "labelled", script: LABELS, change: label },
        Bundle { name: "sleeps", script: SLEEP, change: label },
        Bundle {
            name: "no_label",
            script: SLEEP,
            change: |config| config["process"]["selinuxLabel"] = "system_u:system_r:nobody_t:s0".into(),
        },
        Bundle {
            name: "no_mount_label",
            script: SLEEP,
            change: |config| config["linux"]["mountLabel"] = "system_u:object_r:nobody_t:s0".into(),
        },
        Bundle {
            name: "profile",
            script: PROFILE,
            change: |config| config["process"]["apparmorProfile"] = "edged-test".into(),
        },
    ]
}
