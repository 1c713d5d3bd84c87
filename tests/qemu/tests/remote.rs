//! The device and those who are far away: its fleet, and a technician over SSH.

use std::process::Command;

use edged_qemu::machine::Machine;
use edged_qemu::process;
use edged_qemu::site::{DEVICE, Site, console_shows};
use edged_qemu::story;
use edged_qemu::wait::{self, LONG};
use serde_json::Value;

const HEAD: &str = "apiVersion: edge/v1\ndevice: edge-1\nissued: 2026-01-01T00:00:00Z\nexpires: 2036-01-01T00:00:00Z\n";

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn reports_wait_while_the_cable_is_out_and_come_when_it_is_back() {
    story::tell("fleet", |firmware, dir| {
        let site = Site::start(dir, firmware.arch)?.with_fleet()?;
        let programs = site.publish("programs")?;
        let setup = site.device(&dir.join("device"))?;
        let mut device = Machine::boot(firmware, &dir.join("device"), &setup)?;
        let manifest = format!(
            "{HEAD}sequence: 1\nupdate: {{ probation: 2s }}\nworkloads:\n  steady:\n    image: {programs}\n    \
             args: [hang]\n    resources: {{ memory: 8Mi, cpu: 100m }}\n"
        );
        site.leave_at_fleet(&site.keys.sign("first", &manifest)?)?;
        let seen = report_that(&site, "of the good generation", |report| report["generation"]["state"] == "good")?;
        assert_eq!(seen["workloads"]["steady"]["phase"], "running", "{seen:#}");
        assert!(seen["bootId"].as_str().is_some_and(|id| id.len() > 30), "{seen:#}");
        let number = seen["number"].as_u64().unwrap_or_default();

        device.cable(false)?;
        console_shows(&mut device, "restart steady", "steady", LONG)?;
        console_shows(&mut device, "status", "reports wait", 2 * LONG)?;
        console_shows(&mut device, "ps", "running", LONG)?;
        device.cable(true)?;
        let later =
            report_that(&site, "after the cable was back", |report| report["number"].as_u64() > Some(number + 1))?;
        assert_eq!(later["dropped"], 0, "{later:#}");
        device.console.say("poweroff")?;
        device.wait_for_power_off(LONG)
    });
}

/// The last report of the device that the fleet holds.
fn report_that(site: &Site, what: &str, holds: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
    let fleet = site.fleet.as_ref().ok_or_else(|| anyhow::anyhow!("this site has no fleet"))?;
    let mut last = Value::Null;
    wait::until(&format!("report {what}"), 2 * LONG, || {
        let device: Value = serde_json::from_str(&fleet.tool(&["device", DEVICE])?)?;
        last = device["report"].clone();
        Ok(holds(&last).then(|| last.clone()))
    })
    .map_err(|error| error.context(format!("the last one was {last:#}")))
}

#[test]
#[ignore = "needs QEMU: cargo xtask test"]
fn a_technician_asks_for_the_status_over_ssh() {
    story::tell("ssh", |firmware, dir| {
        const PORT: u16 = 22;
        let site = Site::start(dir, firmware.arch)?;
        let image = site.publish("ssh")?;
        let key = dir.join("technician");
        process::run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key))?;
        let mut setup = site.device(&dir.join("device"))?;
        setup.forward.push(PORT);
        setup = setup.file("etc/edged/technicians/authorized_keys", std::fs::read(key.with_extension("pub"))?);
        let allow = "\n[allow]\nbind = [\"/run/edged\", \"/etc/edged/technicians\"]\nhost-users = true\n";
        let setup = setup.configure(allow);
        let mut device = Machine::boot(firmware, &dir.join("device"), &setup)?;
        let manifest = format!(
            "{HEAD}sequence: 1\nvolumes: {{ ssh-host-key: {{}} }}\nworkloads:\n  ssh:\n    image: {image}\n    user: host\n    \
             resources: {{ memory: 16Mi, cpu: 400m }}\n    ports: [{{ host: {PORT}, container: 22 }}]\n    mounts:\n    \
             - {{ source: {{ bind: /run/edged }}, target: /run/edged }}\n    \
             - {{ source: {{ bind: /etc/edged/technicians }}, target: /.ssh, readOnly: true }}\n    \
             - {{ source: {{ volume: ssh-host-key }}, target: /etc/dropbear }}\n    \
             capabilities: {{ add: [CAP_NET_BIND_SERVICE, CAP_SETUID, CAP_SETGID, CAP_CHOWN] }}\n"
        );
        site.push(&device, &site.keys.sign("first", &manifest)?)?;
        console_shows(&mut device, "ps", "running", 3 * LONG)?;
        let port = device.port(PORT)?;
        let mut log = String::new();
        let status = wait::until("status over SSH", LONG, || {
            log = device.console.ask("logs ssh", edged_qemu::site::PROMPT, LONG)?;
            let mut ssh = Command::new("ssh");
            ssh.args(["-p", &port.to_string(), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
            ssh.args(["-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR", "-i"]).arg(&key);
            ssh.args(["root@127.0.0.1", "edgectl", "status"]);
            process::read(&mut ssh).map(Some)
        })
        .map_err(|error| error.context(format!("the server's log:\n{log}")))?;
        assert!(status.contains(DEVICE) && status.contains("ssh"), "{status}");
        assert!(status.lines().all(|line| line.chars().count() <= 80), "{status}");
        device.console.say("poweroff")?;
        device.wait_for_power_off(LONG)
    });
}
