//! Workloads as they live: probed, killed, restarted, stopped, and always outliving the agent.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::Instant;

use edged_qemu::process;

use crate::rig::{Device, Factory, head, until};

fn manifest(image: &str, port: u16) -> String {
    format!(
        "{}workloads:\n  \
         web:\n    image: {image}\n    command: [/bin/httpd, -f, -p, \"8080\", -h, /www]\n    \
         resources: {{ memory: 16Mi, cpu: 100m }}\n    ports: [{{ host: {port}, container: 8080 }}]\n    \
         health: {{ probe: {{ http: {{ port: 8080 }} }}, interval: 500ms }}\n  \
         ticker:\n    image: {image}\n    command: [/bin/sh, -c, 'n=0; while true; do echo tick $n; n=$((n+1)); sleep 0.1; done']\n    \
         resources: {{ memory: 8Mi, cpu: 100m }}\n",
        head(1)
    )
}

fn page(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.contains("here").then_some(answer)
}

fn ticks(device: &Device) -> Vec<u64> {
    let log = device.ask(&["logs", "ticker", "--tail", "2000"]);
    log.lines().filter_map(|line| line.rsplit_once("tick ")?.1.trim().parse().ok()).collect()
}

#[test]
fn workloads_outlive_the_agent_with_their_pids_ports_and_logs() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let port = process::free_port().unwrap();
    let device = factory.device("");
    device.take(&factory.sign("first", &manifest(&image, port)));
    device.workload_that("web", "healthy", |web| web["health"] == "healthy");
    until("the page through the published port", || page(port));
    let (web, ticker) = (device.pid("web"), device.pid("ticker"));
    until("some ticks", || (ticks(&device).len() > 5).then_some(()));

    let before = device.agent_pid();
    device.kill_agent();
    let killed = Instant::now();
    until("another agent that answers", || {
        let output = device.edgectl(&["status", "-o", "json"]);
        (output.status.success() && device.agent_pid() != before).then_some(())
    });
    let took = killed.elapsed();

    assert_eq!((device.pid("web"), device.pid("ticker")), (web, ticker), "adopted, not restarted");
    assert_eq!(device.workload("web")["restarts"], 0);
    until("the page after the agent came back", || page(port));
    // Not one line is missing or there twice, across the change of agents.
    let last = *ticks(&device).last().unwrap();
    until("more ticks", || (*ticks(&device).last()? > last + 5).then_some(()));
    let all = ticks(&device);
    assert!(all.windows(2).all(|pair| pair[1] == pair[0] + 1), "a gap in {all:?}");
    assert!(device.events().iter().any(|text| text.contains("takes over 2 running workloads")));
    eprintln!("the new agent answered after {took:?}");
}

/// Not dead, but it says nothing any more: after half a minute of that the keeper has another one.
#[test]
fn an_agent_that_hangs_is_replaced_and_no_workload_notices() {
    use nix::sys::signal::{Signal, kill};
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    device.take(&factory.sign("first", &manifest(&image, process::free_port().unwrap())));
    device.workload_that("web", "healthy", |web| web["health"] == "healthy");
    let (web, ticker, hung) = (device.pid("web"), device.pid("ticker"), device.agent_pid());
    kill(nix::unistd::Pid::from_raw(hung), Signal::SIGSTOP).unwrap();
    let begin = Instant::now();
    until("another agent", || device.agent().filter(|agent| *agent != hung));
    assert!(begin.elapsed().as_secs() >= 20, "a pause is no hang: replaced after {:?}", begin.elapsed());
    until("its answer", || device.edgectl(&["status"]).status.success().then_some(()));
    assert_eq!((device.pid("web"), device.pid("ticker")), (web, ticker), "adopted, not restarted");
    assert!(device.said().contains("gives no sign of life"));
}

#[test]
fn an_operator_restarts_stops_and_starts_and_reads_why() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    device.take(&factory.sign("first", &manifest(&image, process::free_port().unwrap())));
    device.workload_that("web", "healthy", |web| web["health"] == "healthy");
    device.wait_for_generation(1, "good");
    let (web, ticker) = (device.pid("web"), device.pid("ticker"));

    device.ask(&["restart", "web"]);
    device.workload_that("web", "with another pid", |w| w["phase"] == "running" && w["pid"] != web);
    device.ask(&["stop", "web"]);
    let stopped = device.workload_that("web", "stopped", |web| web["phase"] == "stopped");
    assert_eq!(stopped["why"]["code"], "operatorStopped", "{stopped:#}");
    // The operator's word outlives the agent.
    device.kill_agent();
    device.workload_that("web", "still stopped", |web| web["phase"] == "stopped");
    device.ask(&["start", "web"]);
    device.workload_that("web", "healthy again", |web| web["health"] == "healthy");
    assert_eq!(device.pid("ticker"), ticker, "the neighbour was not touched");

    let nobody = device.edgectl(&["restart", "wbe"]);
    let why = String::from_utf8_lossy(&nobody.stderr).into_owned();
    assert!(!nobody.status.success() && why.contains("wbe"), "{why}");
    let limits = device.ask(&["inspect", "web"]);
    assert!(limits.contains("16"), "{limits}");
}

#[test]
fn logs_follow_what_is_printed_from_now_on() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    device.take(&factory.sign("first", &manifest(&image, process::free_port().unwrap())));
    device.running("ticker");
    let mut follow = device.command().args(["logs", "-f", "ticker"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let later = lines.nth(20).unwrap().unwrap();
    assert!(first.contains("tick ") && later.contains("tick "), "{first} … {later}");
    follow.kill().unwrap();
    follow.wait().unwrap();
}

#[test]
fn a_crash_a_kill_and_the_memory_wall_are_told_apart() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    let walls = "resources: { memory: 8Mi, cpu: 200m }";
    let yaml = format!(
        "{}workloads:\n  \
         crash:\n    image: {image}\n    command: [/bin/sh, -c, 'exit 7']\n    {walls}\n  \
         killed:\n    image: {image}\n    command: [/bin/sleep, \"1000\"]\n    {walls}\n  \
         greedy:\n    image: {image}\n    command: [/bin/dd, if=/dev/zero, of=/dev/null, bs=64M]\n    {walls}\n  \
         job:\n    image: {image}\n    command: [/bin/true]\n    restart: {{ policy: on-failure }}\n    {walls}\n",
        head(1)
    );
    device.take(&factory.sign("first", &yaml));
    let crash = device.workload_that("crash", "restarted twice", |w| w["restarts"].as_u64() >= Some(2));
    assert_eq!(crash["lastExit"]["kind"], "code", "{crash:#}");
    assert_eq!(crash["lastExit"]["code"], 7);
    let waiting = device.workload_that("crash", "in its back-off", |w| w["why"]["code"] == "backOff");
    assert!(waiting["why"]["text"].as_str().unwrap().contains("exit code 7"), "{waiting:#}");
    // PID 1 of a namespace cannot kill itself: somebody outside does it, and that is no lack of memory.
    let pid = device.pid("killed");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    let killed = device.workload_that("killed", "restarted", |w| w["restarts"].as_u64() >= Some(1));
    assert_eq!(killed["lastExit"]["kind"], "signal", "{killed:#}");
    assert_eq!(killed["lastExit"]["signal"], 9);
    let greedy = device.workload_that("greedy", "killed for memory", |w| w["oomKills"].as_u64() >= Some(1));
    assert_eq!(greedy["lastExit"]["kind"], "outOfMemory", "{greedy:#}");
    let job = device.workload_that("job", "completed", |w| w["phase"] == "completed");
    assert_eq!(job["restarts"], 0);
    assert!(device.events().iter().any(|text| text.contains("greedy reached its memory limit")));
}

#[test]
fn an_exec_probe_that_fails_restarts_what_it_probes() {
    let factory = Factory::start();
    let image = factory.publish_busybox();
    let device = factory.device("");
    let yaml = format!(
        "{}workloads:\n  sick:\n    image: {image}\n    \
         command: [/bin/sh, -c, 'echo well > /tmp/well; sleep 1; echo > /tmp/sick; sleep 1000']\n    \
         resources: {{ memory: 8Mi, cpu: 200m }}\n    \
         health: {{ probe: {{ exec: {{ command: [/bin/test, '!', -e, /tmp/sick] }} }}, interval: 200ms, retries: 2 }}\n",
        head(1)
    );
    device.take(&factory.sign("first", &yaml));
    let sick = device.workload_that("sick", "restarted", |w| w["restarts"].as_u64() >= Some(1));
    let events = device.events();
    assert!(
        events.iter().any(|text| text.starts_with("sick ") && text.contains("health check")),
        "{events:#?}\n{sick:#}"
    );
}
