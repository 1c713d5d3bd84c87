//! `cargo xtask demo`: the whole way, in front of your eyes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use edged_qemu::artifacts::Artifacts;
use edged_qemu::lab::{DEVICE, Lab, PUSH_PORT, WEB_PORT};
use edged_qemu::registry::Signature;
use edged_qemu::run::wait_for;

use crate::build::{self, Arch};
use crate::setup::{self, Scope};
use crate::{image, samples, say};

/// Software emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// Everything that a lab for `arch` needs.
pub fn artifacts(arch: Arch) -> Result<Artifacts> {
    let (edgectl, edgefleet) = build::host()?;
    let image = image::build(arch)?;
    let images = samples::build(arch, &image.programs, &edgectl)?;
    let (kernel, initramfs, cosign) = (image.kernel, image.initramfs, samples::cosign()?);
    Ok(Artifacts { arch: arch.name().to_owned(), kernel, initramfs, edgectl, edgefleet, images, cosign })
}

fn manifest(image: &str) -> String {
    let workload = |name: &str, words: &str, memory: &str, more: &str| {
        format!("  {name}:\n    image: {image}\n    args: [{words}]\n    resources: {{ memory: {memory}, cpu: 200m }}\n{more}")
    };
    format!(
        "apiVersion: edge/v1\ndevice: {DEVICE}\nsequence: 1\nupdate: {{ probation: 5s, deadline: 1h }}\nworkloads:\n{}{}{}",
        workload(
            "web",
            "http, \"8080\"",
            "16Mi",
            "    ports: [{ host: 8080, container: 8080 }]\n    health: { probe: { http: { port: 8080 } }, interval: 2s }\n"
        ),
        workload("crasher", "crash", "16Mi", ""),
        workload("hog", "hog", "16Mi", ""),
    )
}

pub fn run(arch: Arch, keep: bool) -> Result<()> {
    let begin = Instant::now();
    setup::ensure(Scope::Everything)?;
    let artifacts = artifacts(arch)?;
    say::step("starting registry and fleet (TLS with a CA of their own)");
    let lab = Lab::new(artifacts, &build::root().join("target/demo"))?;
    lab.publish("sample", "sample", Some(("image", Signature::Bundle)))?;
    say::step(&format!("switching on a {} device in QEMU", arch.name()));
    let mut machine = lab.boot()?;
    machine.wait_for_console(PATIENCE)?;
    say::step("pushing a signed manifest to the fleet");
    print!("{}", lab.push("demo", &manifest(&lab.registry.image("sample")))?);
    say::step("waiting until the device runs it: one workload behaves, one crashes, one wants too much memory");
    wait_for("a crash and an out-of-memory kill", PATIENCE, || {
        let status = machine.ask_json("status")?;
        let find = |name: &str| status["workloads"].as_array().and_then(|list| list.iter().find(|w| w["name"] == name)).cloned();
        let (web, crasher, hog) = (find("web"), find("crasher"), find("hog"));
        let healthy = web.is_some_and(|web| web["health"] == "healthy");
        let crashed = crasher.is_some_and(|crasher| crasher["restarts"].as_u64() > Some(1));
        let killed = hog.is_some_and(|hog| hog["oomKills"].as_u64() > Some(0));
        if healthy && crashed && killed { Ok(()) } else { bail!("{status:#}") }
    })?;
    say::step("`status` on the device's serial line");
    print!("{}", machine.ask("status")?);
    say::step("`events --tail 8` there");
    print!("{}", machine.ask("events --tail 8")?);
    say::step("`edgefleet devices`, from the fleet's side");
    let table = wait_for("a report with all three workloads", PATIENCE, || {
        let report = lab.fleet.report(DEVICE)?;
        let hog = &report["workloads"]["hog"];
        if hog["oomKills"].as_u64() > Some(0) { lab.fleet.table() } else { bail!("{report:#}") }
    })?;
    print!("{table}");
    say::step("http://127.0.0.1 through the published port");
    let port = machine.port(WEB_PORT)?;
    let page = wait_for("the page", PATIENCE, || page(port))?;
    print!("{page}");
    say::done(&format!("\nThe demo took {} s.", begin.elapsed().as_secs()));
    if keep {
        say::done(&format!(
            "Left running: web http://127.0.0.1:{port}, push https://127.0.0.1:{}, fleet https://127.0.0.1:{}, \
             registry https://127.0.0.1:{}; keys and CA in target/demo/operator. Enter ends it.",
            machine.port(PUSH_PORT)?, lab.fleet.port, lab.registry.port
        ));
        std::io::stdin().read_line(&mut String::new()).context("stdin")?;
    }
    Ok(())
}

fn page(port: u16) -> Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).filter(|body| !body.is_empty()).context("no page")
}
