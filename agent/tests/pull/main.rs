//! Images from their registry to their layers: what a real registry and real signers give, and what a broken one does.

#[path = "../support/mod.rs"]
mod support;

mod broken_registry;
mod claims;
mod cuts;
mod device_nodes;
mod full_disk;
mod image_policy;
mod kinds;
mod load;
mod made;
mod many_layers;
mod memory;
mod real_registry;
mod resume;
mod same_tree;
mod shelf;
mod small_disk;
mod ways;
mod wrong_diff_id;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use edged::config::{self, ImagePolicy, Images, Places};
use edged::content::Content;
use edged::content::build::{BuildSpec, build_layout};
use edged::execute::pull::{self, PullContext, PullFailure, ReadyImage};
use edged::registry::platform::architecture;
use edged_model::id::Digest;
use edged_model::quantity::Bytes;

/// A device's places in a directory of their own.
struct Device {
    ctx: PullContext,
    _dir: tempfile::TempDir,
}

impl Device {
    fn new(registries: impl IntoIterator<Item = (String, config::Registry)>) -> Self {
        assert!(support::is_root(), "unpacking needs root: run this test as root");
        let dir = tempfile::tempdir().unwrap();
        let places = Places::new(Some(dir.path()), None);
        let ctx = PullContext {
            content: Content::open(&places).unwrap(),
            registries: registries.into_iter().collect::<BTreeMap<_, _>>(),
            images: Images::default(),
            keys: Vec::new(),
            threshold: 1,
            rules: Vec::new(),
            data: places.data().to_owned(),
            disk_reserve: Bytes::mebi(1),
            promises: std::sync::Arc::default(),
            slots: std::sync::Arc::default(),
            traffic: std::sync::Arc::new(edged::registry::traffic::Traffic::free()),
            floor: edged::registry::Floor::default(),
        };
        Self { ctx, _dir: dir }
    }

    /// Takes unsigned images by digest.
    fn trusting_digests(mut self) -> Self {
        self.ctx.images.policy = ImagePolicy::Digest;
        self
    }

    fn pull(&self, image: &str) -> Result<ReadyImage, PullFailure> {
        pull::pull(&self.ctx, image, &|_| {})
    }

    fn layer(&self, ready: &ReadyImage, index: usize) -> PathBuf {
        self.ctx.content.layer(ready.layers[index])
    }

    /// No layer that was not verified, nothing staged, and no name that means anything. (A layer that was whole before
    /// another one failed stays: it need not be fetched again.)
    fn has_nothing_half_done(&self) -> bool {
        let count = |dir: &str| std::fs::read_dir(self.ctx.data.join(dir)).unwrap().count();
        count("layers/ingest") == 0 && count("content/images") == 0 && count("layers") <= 2
    }
}

/// An image of two layers; the second is a little over a MiB that does not compress. Returns layout and digest.
fn sample(dir: &Path) -> (PathBuf, Digest) {
    let (lower, upper) = (dir.join("lower"), dir.join("upper"));
    std::fs::create_dir_all(lower.join("etc")).unwrap();
    std::fs::write(lower.join("etc/motd"), "hello\n").unwrap();
    std::fs::create_dir_all(upper.join("data")).unwrap();
    let mut state = 1_u64;
    let noise: Vec<u8> = (0..(1 << 20) + 77)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        })
        .collect();
    std::fs::write(upper.join("data/noise"), noise).unwrap();
    let layout = dir.join("layout");
    let spec = BuildSpec {
        layers: vec![lower, upper],
        architecture: architecture().to_owned(),
        entrypoint: vec!["/bin/app".to_owned()],
        cmd: vec!["--serve".to_owned()],
        env: vec!["PATH=/bin".to_owned()],
        workdir: Some("/data".to_owned()),
        user: Some("12:34".to_owned()),
        stop_signal: Some("SIGINT".to_owned()),
        reference: "v1".to_owned(),
    };
    let digest = build_layout(&spec, &layout).unwrap();
    (layout, digest)
}
