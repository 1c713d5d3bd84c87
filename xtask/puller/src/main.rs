//! Pulls one image and says how long it took in milliseconds, and what was written (proc_pid_io(5)), for `cargo xtask bench images`: what the agent does, without the agent.
//!
//! `pull ROOT REGISTRY/REPOSITORY@DIGEST` from a registry on loopback without encryption.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use edged::config::{ImagePolicy, Images, Places, Registry};
use edged::content::Content;
use edged::execute::pull::{PullContext, pull};
use edged::registry::Floor;
use edged::registry::traffic::Traffic;
use edged_model::quantity::Bytes;

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let (root, image) = words.next().zip(words.next()).context("usage: pull ROOT IMAGE")?;
    let host = image.split('/').next().unwrap_or_default().to_owned();
    let places = Places::new(Some(Path::new(&root)), None);
    let ctx = PullContext {
        content: Content::open(&places)?,
        registries: [(host, Registry { insecure_http: true, ..Registry::default() })].into(),
        images: Images { policy: ImagePolicy::Digest, ..Images::default() },
        keys: Vec::new(),
        threshold: 1,
        rules: Vec::new(),
        data: places.data().to_owned(),
        disk_reserve: Bytes(0),
        promises: Arc::default(),
        slots: Arc::default(),
        traffic: Arc::new(Traffic::free()),
        floor: Floor::default(),
    };
    let begin = Instant::now();
    pull(&ctx, &image, &|_| {}).map_err(|failure| anyhow!("{}", failure.reason))?;
    let took_ms = begin.elapsed().as_secs_f64() * 1000.0;
    // Dirty pages are counted when they are made: none is still to come.
    let counters = std::fs::read_to_string("/proc/self/io")?;
    let field = |name: &str| counters.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    println!("{took_ms:.1} {} {}", field("write_bytes:"), peak.trim_end_matches("kB").trim());
    Ok(())
}
