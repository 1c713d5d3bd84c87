//! What fs-verity adds to the time of a pull: the same image on the same device, made anew for each pull, with it and without
//! it in turns. In QEMU, because the kernel of a machine that builds often has none; so the kernel's SHA-256 is emulated as
//! everything else is. What is told is processor time of QEMU, which what else this machine does changes little, from the answer
//! to the push, before which nothing is fetched, to the line of the story that says the image is on the disk.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use edged_qemu::arch::Arch;
use edged_qemu::artifacts::{Artifacts, Firmware};
use edged_qemu::filesystem::Filesystem;
use edged_qemu::machine::Machine;
use edged_qemu::process;
use edged_qemu::registry::SignatureForm;
use edged_qemu::site::{PROMPT, Site};
use edged_qemu::wait::LONG;

use super::boot;
use super::device::children;
use super::median_and_p95;
use crate::image;
use crate::setup::{self, Need};
use crate::toolchain::Profile;
use crate::workloads;

const ROUNDS: usize = 5;
const WAYS: [&str; 2] = ["off", "auto"];
/// Of noise, in files of one size: what each file costs beside its bytes.
const NOISE_BYTES: usize = 24 << 20;
const FILE_BYTES: [usize; 2] = [256 << 10, 4 << 20];

pub fn run() -> Result<()> {
    let arch = Arch::X86_64;
    setup::cosign(&Artifacts::find())?;
    crate::test::host_programs()?;
    setup::ensure(&[Need::Boot(arch)])?;
    // As the stories boot it: both sides have the same program.
    let firmware = image::build(arch, Filesystem::Ext4, Profile::Firmware, None)?;
    workloads::build_all(arch)?;
    println!("{:<12} {:>8} {:>8} {:>8} {:>10}", "processor ms", "off", "auto", "more", "protected");
    let dir = Artifacts::find().run_dir("bench-verity", arch)?;
    let site = Site::start(&dir, arch)?;
    let mut images = vec![("redis".to_owned(), site.publish("redis")?)];
    for bytes in FILE_BYTES {
        let name = format!("{}-of-{}k", NOISE_BYTES / bytes, bytes >> 10);
        images.push((name.clone(), publish_noise(&site, &dir, &name, bytes)?));
    }
    for (name, image) in images {
        let (mut times, mut protected) = ([const { Vec::new() }; 2], String::new());
        for round in 0..ROUNDS {
            // Who is first has the colder caches: in turns.
            for step in 0..WAYS.len() {
                let way = (round + step) % WAYS.len();
                let home = dir.join(format!("{name}-{round}-{}", WAYS[way]));
                let (took, line) = pull(&site, &firmware, &home, &image, WAYS[way])?;
                ensure!(line.contains("no layer is under fs-verity") == (way == 0), "fs-verity {}: {line}", WAYS[way]);
                times[way].push(took);
                if way == 1 {
                    protected = line.split(' ').next().unwrap_or_default().to_owned();
                }
                fs::remove_dir_all(&home)?;
            }
        }
        let [off, auto] = times;
        let more: Vec<f64> = off.iter().zip(&auto).map(|(off, auto)| auto - off).collect();
        let all = more.iter().map(|more| format!("{more:+.0}")).collect::<Vec<_>>().join(" ");
        let ((off, _), (auto, _), (more, _)) = (median_and_p95(off), median_and_p95(auto), median_and_p95(more));
        println!("{name:<12} {off:>8.0} {auto:>8.0} {more:>+8.0} {protected:>10}   pairs: {all}");
    }
    dir.remove();
    Ok(())
}

/// One layer of noise in files of so many bytes, signed.
fn publish_noise(site: &Site, dir: &Path, name: &str, file_bytes: usize) -> Result<String> {
    let (root, layout) = (dir.join(name), dir.join(format!("{name}.layout")));
    fs::create_dir_all(&root)?;
    let mut state = 1_u64;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    };
    for number in 0..NOISE_BYTES / file_bytes {
        fs::write(root.join(number.to_string()), (0..file_bytes).map(|_| noise()).collect::<Vec<u8>>())?;
    }
    let mut build = site.keys.edgectl();
    build.args(["image", "build", "--arch", Arch::X86_64.oci().0, "--output"]).arg(&layout).arg(&root);
    process::run(&mut build)?;
    let digest = site.registry.push(&layout, name, "latest")?;
    site.registry.sign(name, &digest, &site.keys.private("image"), SignatureForm::Bundle)?;
    Ok(site.image(name, &digest))
}

/// On an empty disk; milliseconds, and what `df` says of fs-verity.
fn pull(site: &Site, firmware: &Firmware, home: &Path, image: &str, way: &str) -> Result<(f64, String)> {
    let setup = site.device(home)?.configure(&format!("\n[images]\nfs-verity = \"{way}\"\n"));
    let mut device = Machine::boot(firmware, home, &setup)?;
    let manifest = boot::idle_manifest(image, 1, "32Mi", "100m");
    let signed = site.keys.sign("verity", &manifest)?;
    site.push(&device, &signed)?;
    let begin = emulated_ms()?;
    device.kernel.wait_for("is on disk and verified", 3 * LONG)?;
    let took = emulated_ms()? - begin;
    let df = device.console.ask("df", PROMPT, LONG)?;
    let line = df.lines().find(|line| line.contains("fs-verity")).unwrap_or_default().trim().to_owned();
    device.kill()?;
    Ok((took, line))
}

/// What the machine under test has had of this machine's processors (proc_pid_stat(5)): it is our only child, and whatever
/// else runs here takes time, but none of this.
fn emulated_ms() -> Result<f64> {
    let own = std::process::id();
    let of = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (before, after) = stat.rsplit_once(") ")?;
        let ticks: f64 = after.split(' ').skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum();
        // In hundredths of a second, whatever the kernel's own tick is (time(7)).
        before.contains("(qemu-system").then_some(ticks * 10.0)
    };
    children(own)?.into_iter().find_map(of).context("QEMU does not run")
}
