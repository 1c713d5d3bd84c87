use super::*;
use edged_model::api::FleetStatus;
use edged_model::id::{DeviceId, Digest, Sequence, WorkloadName};
use edged_model::quantity::Bytes;
use edged_model::reason::Code;
use edged_model::report::{DiskReport, PullReport, TrustReport};

fn workload(name: &str, phase: Phase) -> WorkloadStatus {
    let running = phase == Phase::Running;
    WorkloadStatus {
        name: WorkloadName::parse(name).unwrap(),
        image: "r.example/i:1".to_owned(),
        phase,
        health: if running { Health::Healthy } else { Health::Unchecked },
        pid: running.then_some(42),
        up_secs: running.then_some(3_700),
        restarts: 0,
        oom_kills: 0,
        last_exit: None,
        memory: running.then_some(Bytes(12 << 20)),
        memory_max: Some(Bytes(64 << 20)),
        cpu_milli: running.then_some(7),
        cpu_max_milli: Some(250),
        address: None,
        log_lines_dropped: 0,
        why: None,
    }
}

fn device(workloads: Vec<WorkloadStatus>) -> Status {
    Status {
        device: DeviceId::parse("pump-17").unwrap(),
        agent_version: "0.1.0".to_owned(),
        boot_id: "b".to_owned(),
        uptime_secs: 90_000,
        now: Timestamp(1_700_000_000),
        clock_source: "system".to_owned(),
        boot_cause: None,
        generation: Some(GenerationStatus {
            sequence: Sequence(4),
            digest: Digest::of(b"x"),
            state: GenerationState::Good,
            since: Timestamp(1_699_990_000),
            reason: None,
        }),
        candidate: None,
        workloads,
        pulls: Vec::new(),
        fleet: FleetStatus { url: None, last_contact: None, waiting_reports: 0, dropped_untold: 0, problem: None },
        disk: DiskReport { total: Bytes(2 << 30), free: Bytes(1 << 30) },
        memory_total: Bytes(192 << 20),
        memory_available: Bytes(128 << 20),
        supervisor: None,
        pressure: None,
        refused: None,
        upgrade: None,
        trust: TrustReport::default(),
        survived: edged_model::survived::Survived::default(),
        scrub: edged_model::scrub::ScrubStatus::default(),
    }
}

#[test]
fn what_has_expired_is_not_well_and_what_will_soon_is_only_said() {
    let mut status = device(vec![workload("web", Phase::Running)]);
    let soon = Reason::new(Code::Expiring, "manifest 4 expires at X, and no newer one has come").next("sign one");
    status.trust.concerns = vec![soon];
    assert_eq!(verdict(&status), Ok(()));
    let shown = super::status(&status, PLAIN);
    let said = "  trust       manifest 4 expires at X, and no newer one has come\n           -> sign one\n";
    assert!(shown.contains(said), "{shown}");
    let expired = Reason::new(Code::Expired, "manifest 4 expired at X, and no newer one has come").next("sign one");
    status.trust.concerns = vec![expired];
    assert_eq!(verdict(&status).unwrap_err(), "manifest 4 expired at X");
}

const PLAIN: Style = Style { color: false, raw_logs: false };

#[test]
fn one_look_at_a_device_that_is_not_well() {
    let mut hog = workload("hog", Phase::Waiting);
    (hog.restarts, hog.oom_kills) = (3, 3);
    let text =
        "hog reached its memory limit and was killed after 2s, peak memory 16Mi; again in 4s (failure 3 in a row)";
    hog.why = Some(Reason::new(Code::BackOff, text).next("raise resources.memory or find the leak"));
    let shown = status(&device(vec![workload("web", Phase::Running), hog]), PLAIN);
    let expected = "\
pump-17  NOT WELL: hog waiting
  up 1d1h, 2023-11-14T22:13:20Z (system clock), edged 0.1.0
  generation  4 good since 2023-11-14T19:26:40Z (2d711642b726)
  memory      64Mi of 192Mi   disk 1Gi of 2Gi
  fleet       none configured

NAME  STATE    UP    RESTARTS   MEMORY     CPU
web   healthy  1h1m  0          12Mi/64Mi  7m/250m
hog   waiting  -     3 (3 oom)  -/64Mi     -/250m
  hog reached its memory limit and was killed after 2s, peak memory 16Mi; again
  in 4s (failure 3 in a row)
  -> raise resources.memory or find the leak
";
    assert_eq!(shown, expected);
}

#[test]
fn an_image_on_its_way_is_shown_before_anything_runs() {
    let pull = |image: &str, total: Option<u64>| PullReport {
        image: image.to_owned(),
        generation: Sequence(1),
        since: Timestamp(1_700_000_000),
        done: total.map(|bytes| Bytes::mebi(bytes / 2)),
        total: total.map(Bytes::mebi),
        failures: u32::from(total.is_none()),
        why: total.is_none().then(|| Reason::new(Code::RegistryUnavailable, "db.example answers 503")),
        retry_at: total.is_none().then_some(Timestamp(1_700_000_060)),
    };
    let pulls = vec![pull("db.example/db:1", None), pull("web.example/web:1", Some(300))];
    let shown = status(&Status { generation: None, pulls, ..device(Vec::new()) }, PLAIN);
    let expected = "\n\x20 pulling     db.example/db:1 is tried again at 2023-11-14T22:14:20Z, for
              generation 1, since 2023-11-14T22:13:20Z; failed once: db.example
              answers 503
  pulling     web.example/web:1 150Mi of 300Mi, for generation 1, since
              2023-11-14T22:13:20Z
";
    assert!(shown.contains(expected), "{shown}");
}

#[test]
fn nothing_is_wider_than_eighty_columns() {
    let mut long = workload(&"w".repeat(63), Phase::Failed);
    long.why = Some(Reason::new(Code::Exited, "word ".repeat(60)).next("do ".repeat(60)));
    let mut wide = workload("wide", Phase::Failed);
    wide.why = Some(Reason::new(Code::Exited, "字".repeat(100)).next(format!("see {}", "u".repeat(200))));
    let mut status = device(vec![long, wide, workload("web", Phase::Running)]);
    status.fleet.url = Some(format!("https://{}.example", "f".repeat(100)));
    for line in super::status(&status, PLAIN).lines() {
        assert!(line.width() <= WIDTH, "{line}");
    }
}

#[test]
fn a_verdict_in_a_few_words() {
    assert_eq!(verdict(&device(vec![workload("web", Phase::Running), workload("job", Phase::Completed)])), Ok(()));
    let two = device(vec![workload("a", Phase::Failed), workload("b", Phase::Waiting)]);
    assert_eq!(verdict(&two), Err("2 of 2 workloads are not well".to_owned()));
    let new = Status { generation: None, ..device(Vec::new()) };
    assert_eq!(verdict(&new), Err("it has no manifest yet".to_owned()));
}

#[test]
fn what_a_workload_says_cannot_drive_the_terminal() {
    let text = "\u{1b}[2J\u{9b}31m\u{202e}gnp\tred\u{7}".to_owned();
    let line = LogLine { at_unix_ms: 1_500, stream: edged_model::api::Stream::Stdout, text: text.clone() };
    assert_eq!(answer(&Answer::Log(line.clone()), PLAIN), "1970-01-01T00:00:01.500Z �[2J�31m�gnp red�\n");
    // Into a file it goes as it was.
    assert!(answer(&Answer::Log(line), Style { raw_logs: true, ..PLAIN }).contains(&text));
    let mut hostile = workload("web", Phase::Failed);
    hostile.why = Some(Reason::new(Code::Exited, text.clone()).next(text));
    assert!(!super::status(&device(vec![hostile]), PLAIN).contains(['\u{1b}', '\u{9b}', '\u{202e}', '\u{7}']));
}

#[test]
fn colour_does_not_change_what_is_said() {
    let status = device(vec![workload("web", Phase::Running), workload("hog", Phase::Failed)]);
    let colored = super::status(&status, Style { color: true, ..PLAIN });
    assert!(colored.contains("\u{1b}[31mNOT WELL: hog failed\u{1b}[0m"), "{colored}");
    let plain = colored.replace("\u{1b}[31m", "").replace("\u{1b}[32m", "").replace("\u{1b}[0m", "");
    assert_eq!(plain, super::status(&status, PLAIN));
}
