//! One function for each decoder, and what must hold whatever comes.

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;

use edged::config::DeviceNodes;
use edged::config::{ImagePolicy, Images, Places};
use edged::content::Content;
use edged::content::build::{BuildSpec, build_layout};
use edged::content::layer::{Compression, Expected, unpack_stream};
use edged::content::unpack::Bounds;
use edged::execute::pull::{self, PullContext};
use edged::registry::Reference;
use edged::registry::layout::LayoutReference;
use edged::registry::platform::architecture;
use edged::verify::cosign::{self, Claim, Wanted};
use edged::verify::{self, DeviceFacts, Verdict, trust};
use edged_model::cbor::{self, Keys};
use edged_model::envelope::{self, Kind};
use edged_model::id::{DeviceId, Digest, GroupName, Sequence};
use edged_model::keys::SecretKey;
use edged_model::manifest::Manifest;
use edged_model::quantity::{Bytes, Timestamp};
use edged_model::report::Report;
use edged_model::trust::{Role, RoleName, TrustRoot};
use edged_model::validate;
use tempfile::TempDir;

use super::{corpus, given};

const NOW: Timestamp = Timestamp(1_800_000_000);

fn key() -> SecretKey {
    SecretKey::from_seed(&[7; 32])
}

/// What is accepted is the very encoding that we would write.
pub fn cbor(bytes: &[u8]) {
    let checked = cbor::check(bytes, Keys::TextOrInteger);
    if cbor::check(bytes, Keys::Text).is_ok() {
        assert!(checked.is_ok(), "the narrower check lets in more");
        let value: serde_cbor::Value = serde_cbor::from_slice(bytes).expect("what is checked can be read");
        assert_eq!(cbor::encode(&value).unwrap(), bytes, "two encodings of one document");
    }
}

/// One of each message that the agent sends to the keeper.
pub fn requests() -> Vec<Vec<u8>> {
    use edged_model::keeper::{
        DeviceNode, IdMapping, LaunchSpec, MountStep, Request, RequestBody, Rootfs, ShutdownHow,
    };
    let text = str::to_owned;
    let mount =
        MountStep { source: text("tmpfs"), target: text("/dev"), fstype: text("tmpfs"), ..MountStep::default() };
    let node = DeviceNode { path: text("/dev/null"), kind: 'c', major: 1, minor: 3, mode: 0o666, uid: 0, gid: 0 };
    let launch = |key: &str| {
        RequestBody::Launch(Box::new(LaunchSpec {
            key: text(key),
            argv: vec![text("/bin/true")],
            rootfs: Some(Rootfs::Tree { tree_fd: 3, mount_at: text("/sys"), read_only: true }),
            uid_map: vec![IdMapping { inside: 0, outside: 1_000_000, count: 65_536 }],
            mounts: vec![mount.clone()],
            device_nodes: vec![node.clone()],
            seccomp: vec![6, 0, 0, 0, 0, 0, 255, 127],
            ..LaunchSpec::default()
        }))
    };
    let bodies = [
        RequestBody::Heartbeat,
        launch("web"),
        launch("running"),
        RequestBody::Signal { key: text("running"), signal: 15 },
        RequestBody::Note { key: text("running"), note: text("another") },
        RequestBody::List,
        RequestBody::Forget { key: text("ended") },
        RequestBody::Shutdown { how: ShutdownHow::Reboot },
        RequestBody::TimeFloor { unix_seconds: 1_800_000_000 },
        RequestBody::MoveClock { unix_ms: 1_800_000_000_000 },
        RequestBody::Version,
    ];
    bodies.into_iter().map(|body| serde_cbor::to_vec(&Request { id: 7, body }).unwrap()).collect()
}

pub fn payloads(envelopes: &[Vec<u8>], kind: Kind) -> Vec<Vec<u8>> {
    let payload = |bytes: &Vec<u8>| envelope::open(bytes, kind).unwrap().signed_by(&[]).unwrap().payload;
    envelopes.iter().map(payload).collect()
}

fn facts() -> DeviceFacts {
    DeviceFacts {
        id: DeviceId::parse("pump-1").unwrap(),
        groups: vec![GroupName::parse("pumps").unwrap()],
        highest_sequence: Sequence(0),
        newest_digest: None,
        now: NOW,
        knows_time: true,
    }
}

/// The documents of the corpus and the root that believes them.
pub struct Documents {
    root: TrustRoot,
    manifests: Vec<Vec<u8>>,
    roots: Vec<Vec<u8>>,
}

impl Documents {
    pub fn load() -> Self {
        let roots = corpus("trust-root");
        let known = Self {
            root: trust::factory(&roots[0]).unwrap(),
            manifests: payloads(&corpus("manifest"), Kind::Manifest),
            roots: payloads(&roots, Kind::TrustRoot),
        };
        for manifest in corpus("manifest") {
            assert!(matches!(verify::manifest(&manifest, &known.root, &facts()), Ok(Verdict::Accepted(_))));
        }
        known
    }

    /// Only what was really signed is believed, in whatever envelope.
    pub fn manifest(&self, bytes: &[u8]) {
        match verify::manifest(bytes, &self.root, &facts()) {
            Ok(Verdict::Accepted(verified)) => {
                let payload = payloads(&[bytes.to_vec()], Kind::Manifest).remove(0);
                assert!(self.manifests.contains(&payload), "a manifest that nobody signed");
                assert_eq!(verified.digest, Digest::of(bytes));
            }
            Ok(Verdict::Known { .. }) => panic!("none is known"),
            Err(why) => sentence(&why),
        }
    }

    pub fn trust_root(&self, bytes: &[u8]) {
        match trust::rotate(&self.root, bytes, NOW) {
            Ok(new) => {
                assert!(new.version > self.root.version);
                let payload = payloads(&[bytes.to_vec()], Kind::TrustRoot).remove(0);
                assert!(self.roots.contains(&payload), "a root that nobody signed");
            }
            Err(why) => sentence(&why),
        }
        let followed = trust::chain(&self.root, [bytes], NOW);
        assert_eq!(followed.root, trust::rotate(&self.root, bytes, NOW).ok());
    }
}

/// A reason is for people, on any terminal.
fn sentence(why: &edged_model::reason::Reason) {
    assert!(!why.text.is_empty() && why.text.chars().count() <= 2_001, "{} bytes", why.text.len());
    assert!(!why.text.chars().any(|c| c.is_control() && c != '\n'), "{:?}", why.text);
}

/// The key is right, the content anything.
pub fn manifest_content(payload: &[u8]) {
    let public = key().public();
    let id = public.id().unwrap();
    let root = TrustRoot {
        version: 1,
        expires: Timestamp(i64::MAX),
        keys: [(id, hex::encode(public.to_spki().unwrap()))].into(),
        roles: RoleName::ALL.map(|name| (name, Role { keys: vec![id], threshold: 1 })).into(),
        images: Vec::new(),
    };
    let envelope = envelope::sign(Kind::Manifest, payload.to_vec(), &[key()]).unwrap();
    match verify::manifest(&envelope, &root, &facts()) {
        Ok(Verdict::Accepted(verified)) => {
            assert!(validate::problems(&verified.manifest).is_empty());
            let again: Manifest = cbor::decode(&cbor::encode(&verified.manifest).unwrap()).unwrap();
            assert_eq!(again, verified.manifest, "what is stored is not what was signed");
        }
        Ok(Verdict::Known { .. }) => panic!("none is known"),
        Err(why) => sentence(&why),
    }
}

pub fn trust_root_content(payload: &[u8]) {
    let envelope = envelope::sign(Kind::TrustRoot, payload.to_vec(), &[key()]).unwrap();
    if let Err(why) = trust::factory(&envelope) {
        sentence(&why);
    } else {
        panic!("a stranger's key made a root that stands on its own");
    }
    if let Ok((_, root)) = trust::draft(&envelope)
        && trust::sound(&root).is_ok()
    {
        assert!(root.version > 0 && RoleName::ALL.iter().all(|name| !trust::role_spki(&root, *name).is_empty()));
    }
}

pub fn report() -> Vec<u8> {
    let content = serde_json::json!({
        "device": "pump-1", "bootId": "b", "number": 7, "at": "2026-01-01T00:00:00Z", "agentVersion": "1",
        "arch": "x86_64", "uptimeSecs": 60, "clockSource": "ntp",
        "trust": {"root": 1, "rootExpires": "2036-01-01T00:00:00Z"},
        "workloads": {"web": {"phase": "running", "memory": ["1Mi", "64Mi"]}},
    });
    envelope::sign1(Kind::Report, cbor::encode(&content).unwrap(), &key()).unwrap()
}

/// What a fleet does with a report.
pub fn changed_report(bytes: &[u8]) {
    let Ok(payload) = envelope::verify1(bytes, Kind::Report, &key().public()) else { return };
    let given = envelope::verify1(&report(), Kind::Report, &key().public()).unwrap();
    assert_eq!(payload, given, "a report that nobody signed");
    cbor::decode::<Report>(&payload).unwrap();
}

/// An image manifest that the real cosign has signed with two keys.
pub struct SignedImage {
    manifest: Vec<u8>,
    wanted: Wanted,
    simple_signature: String,
    genuine: Vec<Vec<u8>>,
}

impl SignedImage {
    pub fn load() -> Self {
        let wanted = Wanted { keys: vec![given("ed25519.der"), given("p256.der")], threshold: 1, ..Wanted::default() };
        let genuine = corpus("signature");
        let simple_signature = String::from_utf8(given("simple.sig")).unwrap();
        let image = Self { manifest: given("image-manifest.json"), wanted, simple_signature, genuine };
        for bytes in &image.genuine {
            let believed = image.claims(bytes).iter().any(|claim| image.check(claim).is_ok());
            assert!(believed, "{}", String::from_utf8_lossy(bytes));
        }
        image
    }

    fn claims(&self, bytes: &[u8]) -> [Claim; 2] {
        let simple = Claim::SimpleSigning { payload: bytes.to_vec(), signature: self.simple_signature.clone() };
        [Claim::Bundle { json: bytes.to_vec() }, simple]
    }

    fn check(&self, claim: &Claim) -> Result<(), edged_model::reason::Reason> {
        cosign::check("r.example/i:1", &self.manifest, std::slice::from_ref(claim), &self.wanted)
    }

    pub fn signature(&self, bytes: &[u8]) {
        for claim in self.claims(bytes) {
            let other = [self.manifest.as_slice(), b" "].concat();
            let elsewhere = cosign::check("r.example/i:1", &other, std::slice::from_ref(&claim), &self.wanted);
            assert!(elsewhere.is_err(), "it counts for another image too");
            match (self.check(&claim), &claim) {
                (Ok(()), Claim::SimpleSigning { payload, .. }) => {
                    assert!(self.genuine.contains(payload), "a payload that nobody signed");
                }
                // Around what is signed, JSON may be written as anybody likes.
                (Ok(()), Claim::Bundle { .. }) => {}
                (Err(why), _) => sentence(&why),
            }
        }
        // Either it is signed, or it is not: a higher threshold never believes more.
        let both = Wanted { threshold: 2, ..self.wanted.clone() };
        assert!(cosign::check("r.example/i:1", &self.manifest, &self.claims(bytes)[..1], &both).is_err());
    }
}

/// A layout whose documents are changed, with every digest on the way put right: so that it is read to its end.
pub struct Stick {
    dir: TempDir,
    layout: PathBuf,
    ctx: PullContext,
    manifest: Vec<u8>,
    config: Vec<u8>,
}

impl Stick {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (root, layout) = (dir.path().join("root"), dir.path().join("layout"));
        std::fs::create_dir_all(&root).unwrap();
        std::fs::write(root.join("motd"), "hello\n").unwrap();
        let spec = BuildSpec {
            layers: vec![root],
            architecture: architecture().to_owned(),
            entrypoint: vec!["/bin/app".to_owned()],
            env: vec!["A=b".to_owned()],
            workdir: Some("/data".to_owned()),
            user: Some("1:2".to_owned()),
            reference: "v1".to_owned(),
            ..BuildSpec::default()
        };
        let digest = build_layout(&spec, &layout).unwrap();
        let blob = |digest: Digest| std::fs::read(layout.join("blobs/sha256").join(digest.hex())).unwrap();
        let manifest = blob(digest);
        let value: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let config = blob(Digest::parse(value["config"]["digest"].as_str().unwrap()).unwrap());
        let places = Places::new(Some(&dir.path().join("device")), None);
        let ctx = PullContext {
            content: Content::open(&places).unwrap(),
            registries: Default::default(),
            images: Images { policy: ImagePolicy::Digest, layer_max: Bytes(1 << 20), ..Images::default() },
            keys: Vec::new(),
            threshold: 1,
            rules: Vec::new(),
            data: places.data().to_owned(),
            disk_reserve: Bytes(0),
            promises: std::sync::Arc::default(),
            slots: std::sync::Arc::default(),
            traffic: std::sync::Arc::new(edged::registry::traffic::Traffic::free()),
            floor: edged::registry::Floor::default(),
        };
        Self { dir, layout, ctx, manifest, config }
    }

    pub fn documents(&self) -> Vec<Vec<u8>> {
        let index = std::fs::read(self.layout.join("index.json")).unwrap();
        vec![self.manifest.clone(), self.config.clone(), index]
    }

    fn put(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let path = self.layout.join("blobs/sha256").join(digest.hex());
        if !path.exists() {
            std::fs::write(path, bytes).unwrap();
        }
        digest
    }

    /// The same bytes as manifest (or index) and as configuration.
    pub fn document(&self, bytes: &[u8]) {
        let before = self.blobs();
        let as_config = String::from_utf8_lossy(&self.manifest)
            .replace(&Digest::of(&self.config).to_string(), &self.put(bytes).to_string());
        for top in [self.put(bytes), self.put(as_config.as_bytes())] {
            let image = format!("oci:{}@{top}", self.layout.display());
            match pull::pull(&self.ctx, &image, &|_| {}) {
                Ok(ready) => assert!(pull::is_whole(&self.ctx.content, &ready) && !ready.layers.is_empty()),
                Err(failure) => sentence(&failure.reason),
            }
        }
        let staged = std::fs::read_dir(self.dir.path().join("device/layers/ingest")).unwrap().count();
        assert_eq!(staged, 0, "something half done is left");
        for name in self.blobs() {
            if !before.contains(&name) {
                std::fs::remove_file(self.layout.join("blobs/sha256").join(name)).unwrap();
            }
        }
    }

    fn blobs(&self) -> Vec<std::ffi::OsString> {
        let dir = std::fs::read_dir(self.layout.join("blobs/sha256")).unwrap();
        dir.map(|entry| entry.unwrap().file_name()).collect()
    }
}

/// A directory to unpack into, and one beside it that nobody may touch.
pub struct Place {
    dir: TempDir,
}

const UNPACKED_MAX: u64 = 4 << 20;

impl Place {
    pub fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "unpacking needs root: run this test as root");
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(dir.path().join("outside/kept"), "kept").unwrap();
        Self { dir }
    }

    /// As it is, and with the checksums of its headers put right, so that changes in them are read.
    pub fn archive(&self, bytes: &[u8]) {
        let compression = match bytes {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            _ => Compression::None,
        };
        self.unpack(bytes, compression);
        if compression == Compression::None {
            self.unpack(&with_checksums(bytes), compression);
        }
    }

    fn unpack(&self, bytes: &[u8], compression: Compression) {
        let root = self.dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let disk_left = AtomicU64::new(u64::MAX);
        let bounds = Bounds {
            bytes_max: UNPACKED_MAX,
            entries_max: 200,
            disk_left: &disk_left,
            device_nodes: DeviceNodes::default(),
            is_protected: true,
        };
        let expected = Expected { digest: Digest::of(bytes), diff_id: Digest::of(bytes), compression };
        if let Err(error) = unpack_stream(bytes, &expected, &root, &Vec::new, bounds) {
            assert!(!error.to_string().is_empty());
        }
        let names = |path: &std::path::Path| {
            let mut names: Vec<_> = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(self.dir.path()), ["outside", "root"], "written beside the root");
        let outside = self.dir.path().join("outside");
        assert_eq!(names(&outside), ["kept"], "written outside");
        assert_eq!(std::fs::read_to_string(outside.join("kept")).unwrap(), "kept", "changed outside");
        edged::content::remove::path(&root).unwrap();
        assert!(!root.exists());
    }
}

/// Every 512 bytes that look like a header get the checksum that POSIX wants (ustar, chksum).
fn with_checksums(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for header in bytes.chunks_exact_mut(512).filter(|header| header[257..262] == *b"ustar") {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    bytes
}

/// What is read as a name says the same when it is asked again.
pub fn name(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(reference) = Reference::parse(text) {
        let is_plain = |part: &str| !part.is_empty() && part != "." && part != "..";
        assert!(reference.repository.split('/').all(is_plain) && !LayoutReference::is_one(text), "{text}");
        assert_eq!(Reference::parse(text).unwrap().wanted(), reference.wanted());
    }
    if let Ok(reference) = LayoutReference::parse(text) {
        assert!(reference.path.is_absolute(), "{text}");
    }
}
