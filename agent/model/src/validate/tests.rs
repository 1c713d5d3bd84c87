use super::*;
use crate::id::{DeviceId, Sequence};
use crate::manifest::{DependsOn, Health, Mount, MountSource, NetworkMode, Port, Probe, Secret, Workload};
use crate::quantity::{Bytes, MilliCpu, Span, Timestamp};

fn good() -> Manifest {
    let mut web = Workload::of_image("registry.example:5000/web:1");
    web.resources.memory = Some(Bytes::mebi(16));
    web.resources.cpu = Some(MilliCpu(100));
    Manifest {
        device: Some(DeviceId::parse("pump-1").unwrap()),
        sequence: Sequence(1),
        expires: Timestamp(1),
        workloads: [(WorkloadName::parse("web").unwrap(), web.into())].into(),
        ..Manifest::empty()
    }
}

fn texts(change: impl FnOnce(&mut Manifest, &mut Workload)) -> Vec<String> {
    let mut manifest = good();
    let name = WorkloadName::parse("web").unwrap();
    let mut web = manifest.workloads.remove(&name).unwrap();
    change(&mut manifest, &mut web);
    manifest.workloads.insert(name, web);
    problems(&manifest).iter().map(ToString::to_string).collect()
}

#[test]
fn a_good_one_has_no_problems() {
    assert!(problems(&good()).is_empty());
}

#[test]
fn each_problem_names_its_field() {
    let name = |n: &str| WorkloadName::parse(n).unwrap();
    assert_eq!(
        texts(|_, web| web.resources.memory = None),
        ["workloads.web.resources.memory: is required: no workload without a wall"]
    );
    assert_eq!(
        texts(|_, web| web.image = "nginx".to_owned()),
        [
            "workloads.web.image: `nginx` names no registry (`host[:port]/repository…`)",
            "workloads.web.image: `nginx` has neither a digest nor a tag"
        ]
    );
    assert_eq!(
        texts(|_, web| web.depends_on.extend([(name("db"), DependsOn::Healthy)])),
        ["workloads.web.dependsOn: there is no workload `db`"]
    );
    assert_eq!(
        texts(|_, web| web.depends_on.extend([(name("web"), DependsOn::Started)])),
        ["workloads.web.dependsOn: web -> web: none of them could ever start"]
    );
    let mount = |target: &str| Mount {
        source: MountSource::Tmpfs { size: Bytes(1) },
        target: target.to_owned(),
        read_only: false,
    };
    assert_eq!(texts(|_, web| web.mounts = vec![mount("/a/../b")]).len(), 1);
    assert_eq!(texts(|_, web| web.mounts = vec![mount("/a"), mount("/a")]).len(), 1);
    let port = Port { host: 80, container: 80, protocol: Default::default() };
    assert_eq!(
        texts(|_, web| web.ports = vec![port.clone(), port]),
        ["workloads.web.ports[1].host: port 80 of the device is taken by `web`"]
    );
    assert_eq!(texts(|manifest, _| manifest.device = None).len(), 1);
}

#[test]
fn a_misspelt_field_gets_the_nearest_one() {
    let text = "unknown field `memroy`, expected one of `memory`, `cpu`, `pids`";
    assert_eq!(explain(text), "unknown field; did you mean `memory`?");
    let text = "unknown field `xyzzyxyzzy`, expected one of `memory`, `cpu`";
    assert_eq!(explain(text), "unknown field; known are memory, cpu");
    let text = "unknown variant `alwys`, expected one of `always`, `on-failure`, `never`";
    assert_eq!(explain(text), "unknown value `alwys`; did you mean `always`?");
    let text = "unknown field `a`, expected `b`, expected `target` or `source`";
    assert_eq!(explain(text), "unknown field; known are target, source");
}

#[test]
fn a_secret_comes_from_one_folder() {
    let told = |file: &str| {
        texts(|manifest, _| drop(manifest.secrets.insert("s".parse().unwrap(), Secret::File(file.to_owned()))))
    };
    assert!(told("/etc/edged/secrets/token").is_empty());
    assert!(told("token").is_empty());
    for other in ["", "/etc/shadow", "/etc/edged/secrets/", "/etc/edged/secrets/../shadow", "a/b", ".."] {
        assert_eq!(told(other).len(), 1, "{other}");
    }
}

#[test]
fn what_is_referred_to_must_be_there() {
    assert_eq!(
        texts(|_, web| {
            web.networks.insert("lan".parse().unwrap(), Default::default());
            web.secrets = vec!["token".parse().unwrap(), "token".parse().unwrap()];
            web.mounts = vec![Mount {
                source: MountSource::Volume("data".parse().unwrap()),
                target: "/data".to_owned(),
                read_only: false,
            }];
        }),
        [
            "workloads.web.networks: there is no network `lan`",
            "workloads.web.secrets: there is no secret `token`",
            "workloads.web.secrets: there is no secret `token`",
            "workloads.web.secrets: `token` is there twice",
            "workloads.web.mounts[0].source.volume: there is no volume `data`",
        ]
    );
    let near = texts(|manifest, web| {
        manifest.workloads.insert("database".parse().unwrap(), limited().into());
        web.depends_on.insert("databse".parse().unwrap(), DependsOn::Started);
    });
    assert_eq!(near, ["workloads.web.dependsOn: there is no workload `databse`; did you mean `database`?"]);
}

fn limited() -> Workload {
    let mut workload = Workload::of_image("registry.example:5000/x:1");
    workload.resources.memory = Some(Bytes::mebi(16));
    workload.resources.cpu = Some(MilliCpu(100));
    workload
}

#[test]
fn a_ring_of_dependencies_is_told_once_and_in_full() {
    let needs = |workload: &mut Workload, name: &str| {
        workload.depends_on.insert(name.parse().unwrap(), DependsOn::Started);
    };
    let told = texts(|manifest, web| {
        for (name, need) in [("api", "db"), ("db", "web")] {
            let mut workload = limited();
            needs(&mut workload, need);
            manifest.workloads.insert(name.parse().unwrap(), workload.into());
        }
        needs(web, "api");
    });
    assert_eq!(told, ["workloads.api.dependsOn: api -> db -> web -> api: none of them could ever start"]);
}

#[test]
fn waiting_for_what_never_ends_is_a_mistake() {
    let told = texts(|manifest, web| {
        manifest.workloads.insert("migrate".parse().unwrap(), limited().into());
        web.depends_on.insert("migrate".parse().unwrap(), DependsOn::Completed);
    });
    assert_eq!(told, ["workloads.web.dependsOn: `migrate` never completes: its `restart.policy` is `always`"]);
}

/// Each wrong value alone makes exactly one problem, at its own place.
#[test]
fn one_wrong_value_is_one_problem_at_its_place() {
    type Change = fn(&mut Manifest, &mut Workload);
    let cases: [(&str, Change); 31] = [
        ("apiVersion", |m, _| m.api_version = "edge/v2".to_owned()),
        ("device", |m, _| m.device = None),
        ("group", |m, _| m.group = Some("pumps".parse().unwrap())),
        ("sequence", |m, _| m.sequence = Sequence(0)),
        ("expires", |m, _| m.issued = m.expires),
        ("update.maxUnavailable", |m, _| m.update.max_unavailable = 0),
        ("update.window", |m, _| m.update.apply = crate::moment::Apply::Window),
        ("update.deadline", |m, _| m.update.deadline = Span::from_secs(1)),
        ("secrets.s.file", |m, _| drop(m.secrets.insert("s".parse().unwrap(), Secret::File("../s".to_owned())))),
        ("workloads.web.image", |_, w| w.image = "r.example/web@sha256:12".to_owned()),
        ("workloads.web.image", |_, w| w.image = "r.example/web".to_owned()),
        ("workloads.web.resources.memory", |_, w| w.resources.memory = Some(Bytes(1))),
        ("workloads.web.resources.cpu", |_, w| w.resources.cpu = Some(MilliCpu(0))),
        ("workloads.web.resources.pids", |_, w| w.resources.pids = 0),
        ("workloads.web.resources.disk", |_, w| w.resources.disk = Some(Bytes(0))),
        ("workloads.web.resources.io.readOps", |_, w| {
            w.resources.io = Some(crate::manifest::Io { read_ops: Some(0), ..Default::default() });
        }),
        ("workloads.web.restart.backoff", |_, w| w.restart.backoff = Span::from_ms(0)),
        ("workloads.web.restart.backoffMax", |_, w| w.restart.backoff_max = Span::from_ms(1)),
        ("workloads.web.restart.noRestartExitCodes", |_, w| w.restart.no_restart_exit_codes = vec![256]),
        ("workloads.web.ports[0].container", |_, w| {
            w.ports = vec![Port { host: 80, container: 0, protocol: Default::default() }];
        }),
        ("workloads.web.networkMode", |_, w| {
            w.network_mode = NetworkMode::Host;
            w.ports = vec![Port { host: 80, container: 80, protocol: Default::default() }];
        }),
        ("workloads.web.stopSignal", |_, w| w.stop_signal = Some("SIGNOPE".to_owned())),
        ("workloads.web.env", |_, w| drop(w.env.insert("A=B".to_owned(), String::new()))),
        ("workloads.web.args", |_, w| w.args = vec!["a\0b".to_owned()]),
        ("workloads.web.workdir", |_, w| w.workdir = Some("srv".to_owned())),
        ("workloads.web.hostname", |_, w| w.hostname = Some("a b".to_owned())),
        ("workloads.web.user", |_, w| w.user = Some("1:2:3".to_owned())),
        ("workloads.web.capabilities.add", |_, w| w.capabilities.add = vec!["NET_ADMN".to_owned()]),
        ("workloads.web.devices[0].access", |_, w| {
            w.devices =
                vec![crate::manifest::Device { path: "/dev/ttyS1".to_owned(), target: None, access: "rx".to_owned() }];
        }),
        ("workloads.web.mounts[0].source.tmpfs.size", |_, w| {
            let source = MountSource::Tmpfs { size: Bytes::mebi(32) };
            w.mounts = vec![Mount { source, target: "/tmp".to_owned(), read_only: false }];
        }),
        ("workloads.web.mounts[0].target", |_, w| {
            let source = MountSource::Tmpfs { size: Bytes::mebi(1) };
            w.mounts = vec![Mount { source, target: "/proc".to_owned(), read_only: false }];
        }),
    ];
    for (path, change) in cases {
        let told = texts(change);
        assert_eq!(told.len(), 1, "{path}: {told:?}");
        assert!(told[0].starts_with(&format!("{path}: ")), "{path}: {told:?}");
    }
}

#[test]
fn each_wrong_probe_names_its_field() {
    let health = |probe: Probe| Health {
        probe,
        start_period: Span::from_secs(1),
        interval: Span::from_secs(1),
        timeout: Span::from_secs(1),
        retries: 1,
        action: Default::default(),
    };
    let cases = [
        (Probe::Exec { command: vec![] }, "probe.exec.command"),
        (Probe::Tcp { port: 0 }, "probe.tcp.port"),
        (Probe::Http { port: 0, path: "/".to_owned() }, "probe.http.port"),
        (Probe::Http { port: 80, path: "/ HTTP/1.1\r\nX: y".to_owned() }, "probe.http.path"),
    ];
    for (probe, field) in cases {
        let told = texts(|_, web| web.health = Some(health(probe)));
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].starts_with(&format!("workloads.web.health.{field}: ")), "{told:?}");
    }
}
