//! Pull and unpack: an image of one layer, 20,000 files, 300 MB, from a registry on loopback into memory, by edged and by those
//! who do the same, in turns; beside them `tar` on the same layer, which checks nothing. Both compressions. What a pull writes
//! is counted on the disk of this machine.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use edged_model::id::Digest;
use edged_qemu::artifacts::Artifacts;
use edged_qemu::process::{self, Service};
use edged_qemu::wait;
use serde_json::json;

use super::median_and_p95;
use crate::progress;
use crate::setup::{self, Need};

const ROUNDS: usize = 5;
const FILES: usize = 20_000;
const FILE_BYTES: usize = 15_000;
const FILES_IN_DIRECTORY: usize = 100;
/// The most that a pull may write, of what the layer unpacks to.
const WRITTEN_MAX: f64 = 1.1;
const MEMORY_MAX_KIB: u64 = 24 << 10;
const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

#[derive(Clone, Copy, PartialEq)]
enum Compression {
    Gzip,
    Zstd,
}

impl Compression {
    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

pub fn run() -> Result<()> {
    setup::ensure(&[Need::HostTests])?;
    let program = build_puller()?;
    // In memory, so that the disk of this machine is not what is measured.
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let tar = make_layer(dir.path())?;
    let layer_bytes = fs::metadata(&tar)?.len();
    let registry = Registry::start(dir.path())?;
    for compression in [Compression::Gzip, Compression::Zstd] {
        let image = Image::make(dir.path(), &tar, compression)?;
        registry.push(&image)?;
        measure(dir.path(), &program, &registry, &image)?;
        let (written, peak_kib) = written(&program, &registry, &image)?;
        let (name, ratio) = (compression.name(), written as f64 / layer_bytes as f64);
        println!(
            "{:<46} {ratio:>8.2} of what it unpacks to; {peak_kib} KiB of memory at most",
            format!("written to a disk, {name}")
        );
        ensure!(written > 0, "nothing is counted: the target directory lies in memory");
        ensure!(ratio <= WRITTEN_MAX, "{name}: a pull writes {ratio:.2} of what it unpacks, {WRITTEN_MAX} are allowed");
        ensure!(peak_kib <= MEMORY_MAX_KIB, "{name}: a pull takes {peak_kib} KiB, {MEMORY_MAX_KIB} are allowed");
    }
    Ok(())
}

/// The part of the agent that pulls, built as it is shipped.
fn build_puller() -> Result<PathBuf> {
    let root = Artifacts::find().root().to_owned();
    progress::step("building the puller, release");
    let mut cargo = Command::new("cargo");
    cargo.current_dir(&root).args(["build", "--package", "bench-puller", "--release"]);
    progress::run(&mut cargo)?;
    Ok(root.join("target/release/bench-puller"))
}

/// Files that compress to about a third, as programs do: words of which some come often, and noise.
fn make_layer(dir: &Path) -> Result<PathBuf> {
    let root = dir.join("root");
    let mut state = 1_u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    for number in 0..FILES {
        let directory = root.join(format!("usr/share/{}", number / FILES_IN_DIRECTORY));
        if number % FILES_IN_DIRECTORY == 0 {
            fs::create_dir_all(&directory)?;
        }
        let mut content = Vec::with_capacity(FILE_BYTES + 16);
        while content.len() < FILE_BYTES {
            if random() % 4 == 0 {
                content.extend_from_slice(&random().to_le_bytes()[..4]);
            } else {
                write!(content, "word{} ", random() % 64)?;
            }
        }
        content.truncate(FILE_BYTES);
        fs::write(directory.join(format!("file-{number}")), content)?;
    }
    let tar = dir.join("layer.tar");
    process::run(Command::new("tar").args(["--sort=name", "-cf"]).arg(&tar).arg("-C").arg(&root).arg("."))?;
    fs::remove_dir_all(&root)?;
    Ok(tar)
}

struct Image {
    name: &'static str,
    compression: Compression,
    layout: PathBuf,
    layer: PathBuf,
    digest: Digest,
}

impl Image {
    fn make(dir: &Path, tar: &Path, compression: Compression) -> Result<Self> {
        let name = compression.name();
        let layout = dir.join(format!("{name}.layout"));
        let blobs = layout.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        let put = |media_type: &str, bytes: &[u8]| -> Result<serde_json::Value> {
            let digest = Digest::of(bytes);
            fs::write(blobs.join(digest.hex()), bytes)?;
            Ok(json!({"mediaType": media_type, "size": bytes.len(), "digest": digest.to_string()}))
        };
        let diff_id = Digest::of(&fs::read(tar)?);
        let packed = Command::new(name).args(["-c", "-q"]).arg(tar).stderr(Stdio::inherit()).output()?.stdout;
        let layer = blobs.join(Digest::of(&packed).hex());
        let layer_type = format!("application/vnd.oci.image.layer.v1.tar+{name}");
        let descriptor = put(&layer_type, &packed)?;
        let rootfs = json!({"type": "layers", "diff_ids": [diff_id.to_string()]});
        let config = json!({"architecture": ARCHITECTURE, "os": "linux", "config": {}, "rootfs": rootfs});
        let config = put("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [descriptor]}).to_string();
        let mut top = put(media_type, manifest.as_bytes())?;
        top["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        fs::write(layout.join("index.json"), json!({"schemaVersion": 2, "manifests": [top]}).to_string())?;
        Ok(Self { name, compression, layout, layer, digest: Digest::of(manifest.as_bytes()) })
    }
}

/// docker-registry without encryption: what is measured is not that.
struct Registry {
    host: String,
    _service: Service,
}

impl Registry {
    fn start(dir: &Path) -> Result<Self> {
        let port = process::free_port()?;
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '127.0.0.1:{port}', secret: bench}}\n",
            dir.join("registry").display()
        );
        fs::write(&config, text)?;
        let mut command = Command::new("docker-registry");
        let service = Service::start("registry", command.arg("serve").arg(&config), &dir.join("registry.log"))?;
        wait::until("registry", Duration::from_secs(30), || {
            Ok(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok().then_some(()))
        })?;
        Ok(Self { host: format!("127.0.0.1:{port}"), _service: service })
    }

    fn push(&self, image: &Image) -> Result<()> {
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false"]);
        skopeo.arg(format!("oci:{}:latest", image.layout.display()));
        process::run(skopeo.arg(format!("docker://{}/{}:latest", self.host, image.name))).map(drop)
    }
}

/// Into a fresh directory, which is taken away again.
fn timed(dir: &Path, what: &dyn Fn(&Path) -> Result<()>) -> Result<f64> {
    let place = dir.join("place");
    fs::create_dir(&place)?;
    let begin = Instant::now();
    let result = what(&place);
    let took = begin.elapsed().as_secs_f64();
    process::run(Command::new("rm").arg("-rf").arg(&place))?;
    result.map(|()| took)
}

type Contender<'c> = (&'static str, Box<dyn Fn(&Path) -> Result<()> + 'c>);

fn measure(dir: &Path, program: &Path, registry: &Registry, image: &Image) -> Result<()> {
    let quiet = |command: &mut Command| -> Result<()> {
        let output = command.output().with_context(|| format!("{command:?}"))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { bail!("{}", said.lines().last().unwrap_or_default()) }
    };
    let remote = format!("{}/{}", registry.host, image.name);
    let ours = format!("{remote}@{}", image.digest);
    let contenders: [Contender<'_>; 5] = [
        ("edged", Box::new(|place| quiet(Command::new(program).arg(place).arg(&ours)))),
        (
            "skopeo copy, umoci unpack",
            Box::new(|place| {
                let layout = format!("oci:{}:latest", place.join("layout").display());
                let mut skopeo = Command::new("skopeo");
                skopeo.args(["--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"]);
                quiet(skopeo.arg(format!("docker://{remote}:latest")).arg(layout))?;
                let mut umoci = Command::new("umoci");
                umoci.args(["raw", "unpack", "--image"]).arg(place.join("layout"));
                quiet(umoci.arg(place.join("rootfs")))
            }),
        ),
        (
            "podman pull",
            Box::new(|place| {
                let mut podman = Command::new("podman");
                podman.arg("--root").arg(place.join("root")).arg("--runroot").arg(place.join("run"));
                podman.args(["--storage-driver", "overlay", "pull", "--quiet", "--tls-verify=false"]);
                quiet(podman.arg(format!("{remote}:latest")))
            }),
        ),
        (
            "tar, the layer from a file, unchecked",
            Box::new(|place| {
                let flag = format!("--{}", image.compression.name());
                quiet(Command::new("tar").arg(flag).arg("-xpf").arg(&image.layer).arg("-C").arg(place))
            }),
        ),
        (
            "decompression alone",
            Box::new(|_| quiet(Command::new(image.name).args(["-d", "-c"]).arg(&image.layer).stdout(Stdio::null()))),
        ),
    ];
    let mut times: Vec<Result<Vec<f64>>> = contenders.iter().map(|_| Ok(Vec::new())).collect();
    for round in 0..ROUNDS {
        for place in 0..contenders.len() {
            let at = (place + round) % contenders.len();
            let Ok(list) = &mut times[at] else { continue };
            match timed(dir, &*contenders[at].1) {
                Ok(took) => list.push(took),
                Err(error) => times[at] = Err(error),
            }
        }
    }
    println!("{:<46} {:>8} {:>10}", format!("pull and unpack, {}, s", image.compression.name()), "median", "to edged");
    let mut first = None;
    for ((name, _), times) in contenders.iter().zip(times) {
        match times {
            Ok(times) => {
                let (median, _) = median_and_p95(times);
                println!("{name:<46} {median:>8.2} {:>9.2}x", median / *first.get_or_insert(median));
            }
            Err(error) => {
                ensure!(first.is_some(), "{name}: {error:#}");
                println!("{name:<46} {:>8} ({error:#})", "-");
            }
        }
    }
    Ok(())
}

/// Bytes that one pull writes to a real disk, and its memory at most in KiB.
fn written(program: &Path, registry: &Registry, image: &Image) -> Result<(u64, u64)> {
    let dir = tempfile::tempdir_in(Artifacts::find().root().join("target"))?;
    let image = format!("{}/{}@{}", registry.host, image.name, image.digest);
    let said = process::read(Command::new(program).arg(dir.path()).arg(image))?;
    let mut fields = said.split_whitespace().skip(1).map(str::parse);
    let mut field = || fields.next().context("the puller says too little")?.context("no number");
    Ok((field()?, field()?))
}
