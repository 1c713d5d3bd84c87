//! The whole way, in front of your eyes: a registry with a signed image, a fleet server, a device in QEMU, a signed
//! manifest pushed; a workload that behaves, one that crashes, one that wants too much memory.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::Artifacts;
use edged_qemu::filesystem::Filesystem;
use edged_qemu::machine::Machine;
use edged_qemu::process;
use edged_qemu::site::{DEVICE, PROMPT, PUSH_PORT, Site, console_shows};
use edged_qemu::wait::{self, LONG};

use crate::image;
use crate::progress;
use crate::setup::{self, Need};
use crate::toolchain::Profile;
use crate::workloads;

/// Software emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// Where the demo's `web` answers, on the device.
const WEB_PORT: u16 = 8080;

fn manifest(image: &str) -> String {
    format!(
        "apiVersion: edge/v1\ndevice: {DEVICE}\nsequence: 1\nissued: 2026-01-01T00:00:00Z\nexpires: 2036-01-01T00:00:00Z\n\
         update: {{ probation: 10s, deadline: 1h }}\nworkloads:\n  \
         web:\n    image: {image}\n    args: [http, \"{WEB_PORT}\"]\n    resources: {{ memory: 16Mi, cpu: 200m }}\n    \
         ports: [{{ host: {WEB_PORT}, container: {WEB_PORT} }}]\n    \
         health: {{ probe: {{ http: {{ port: {WEB_PORT} }} }}, startPeriod: 60s, interval: 2s }}\n  \
         crasher:\n    image: {image}\n    args: [crash]\n    resources: {{ memory: 16Mi, cpu: 200m }}\n  \
         hog:\n    image: {image}\n    args: [hog]\n    resources: {{ memory: 16Mi, cpu: 200m }}\n"
    )
}

/// Builds what the demo needs and shows it.
pub fn run(arch: Arch, keep: bool) -> Result<()> {
    setup::ensure(&[Need::HostTests, Need::Build(arch), Need::Boot(arch)])?;
    let artifacts = Artifacts::find();
    setup::cosign(&artifacts)?;
    progress::step("building the programs of this machine");
    for package in ["edged", "edge-fleet"] {
        progress::run(Command::new("cargo").args(["build", "--quiet", "--package", package]))?;
    }
    let firmware = image::build(arch, Filesystem::Ext4, Profile::Firmware, None)?;
    workloads::build_all(arch)?;
    let begin = Instant::now();
    let dir = artifacts.run_dir("demo", arch)?;

    progress::step("a registry and a fleet server, over TLS with a CA of their own; a signed image");
    let site = Site::start(&dir, arch)?.with_fleet()?;
    let image = site.publish("programs")?;
    progress::step(&format!("switching on a device ({arch})"));
    let home = dir.join("device");
    let mut setup = site.device(&home)?;
    setup.forward.push(WEB_PORT);
    let mut device = Machine::boot(&firmware, &home, &setup)?;
    device.console.wait_for(PROMPT, PATIENCE)?;

    progress::step("signing a manifest and leaving it at the fleet");
    let signed = site.keys.sign("demo", &manifest(&image))?;
    let fleet = site.fleet.as_ref().context("the site has a fleet")?;
    let mut push = site.keys.edgectl();
    push.args(["push", "--device", DEVICE, "--to", &fleet.url_seen_from_host(), "--ca"]).arg(fleet.ca());
    print!("{}", process::read(push.env("EDGED_TOKEN", fleet.operator_token()?).arg(&signed))?);

    progress::step("the device fetches and runs it; one workload crashes, one reaches its memory limit");
    console_shows(&mut device, "ps", "healthy", PATIENCE)?;
    console_shows(&mut device, "inspect hog", "out of memory at", PATIENCE)?;
    console_shows(&mut device, "inspect crasher", "exit 3", PATIENCE)?;
    for verb in ["status", "events --tail 8"] {
        progress::step(&format!("`{verb}` on the device's serial line"));
        println!("{}", device.console.ask(verb, PROMPT, LONG)?);
    }
    progress::step("`edgefleet devices`, from the fleet's side");
    let table = wait::until("report with the workload that ran out of memory", PATIENCE, || {
        let table = fleet.tool(&["devices"])?;
        Ok(table.contains("hog").then_some(table))
    })?;
    print!("{table}");
    progress::step("the page that `web` serves, through its published port");
    let port = device.port(WEB_PORT)?;
    let page = wait::until("page", LONG, || Ok(page(port).ok()))?;
    print!("{page}");
    println!("\nFrom power-on to here: {} s.", begin.elapsed().as_secs());
    if keep {
        println!(
            "Left running: web http://127.0.0.1:{port}, push https://127.0.0.1:{}, fleet {}, registry {}; keys and CA are \
             in {}. Enter ends it.",
            device.port(PUSH_PORT)?,
            fleet.url_seen_from_host(),
            site.registry.seen_from_host(),
            dir.display()
        );
        std::io::stdin().read_line(&mut String::new()).context("stdin")?;
    }
    drop(device);
    dir.remove();
    Ok(())
}

/// `GET /` by hand: the demo shows what came, whatever it is.
fn page(port: u16) -> Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).filter(|body| !body.is_empty());
    body.context("no page came")
}
