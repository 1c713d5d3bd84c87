//! A layer whose way is cut at every boundary of what the server writes, in each way in which a connection ends. What is
//! unpacked is always what was packed, and where the server has ranges no byte comes twice.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use edged::config;
use edged::content::build::{BuildSpec, build_layout};
use edged::registry::platform::architecture;
use edged_model::id::Digest;

use super::Device;
use super::support::faults::{Answer, Ending, FaultServer, Request, certificate};

const CHUNKS: usize = 64;
/// Pulls beside each other: what each of them does is wait before its second try.
const AT_ONCE: usize = 32;

/// An image of one layer that does not compress.
struct Image {
    layout: PathBuf,
    digest: Digest,
    /// The path of its layer ends so.
    layer: String,
    packed: Vec<u8>,
    noise: Vec<u8>,
    dir: tempfile::TempDir,
}

impl Image {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(&root).unwrap();
        let mut state = 1_u64;
        let noise: Vec<u8> = (0..CHUNKS * 1000 + 77)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.to_be_bytes()[0]
            })
            .collect();
        std::fs::write(root.join("noise"), &noise).unwrap();
        let layout = dir.path().join("layout");
        let spec = BuildSpec {
            layers: vec![root],
            architecture: architecture().to_owned(),
            entrypoint: vec!["/bin/app".to_owned()],
            cmd: Vec::new(),
            env: Vec::new(),
            workdir: None,
            user: None,
            stop_signal: None,
            reference: "v1".to_owned(),
        };
        let digest = build_layout(&spec, &layout).unwrap();
        let blobs = std::fs::read_dir(layout.join("blobs/sha256")).unwrap().map(|blob| blob.unwrap().path());
        let largest = blobs.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
        let layer = format!("sha256:{}", largest.file_name().unwrap().to_str().unwrap());
        let packed = std::fs::read(largest).unwrap();
        Self { layout, digest, layer, packed, noise, dir }
    }

    fn chunk_bytes(&self) -> usize {
        self.packed.len().div_ceil(CHUNKS)
    }

    fn is_layer(&self, request: &Request) -> bool {
        request.path.ends_with(&self.layer)
    }

    fn blob(&self, request: &Request) -> Option<Vec<u8>> {
        let (_, hex) = request.path.rsplit_once("sha256:")?;
        std::fs::read(self.layout.join("blobs/sha256").join(hex)).ok()
    }
}

/// One way to be cut.
#[derive(Debug, Clone, Copy)]
struct Way {
    is_chunked: bool,
    has_ranges: bool,
    is_encrypted: bool,
    ending: Ending,
}

impl Way {
    /// The layer's first answers break off after so many bytes of the layer, one after the other; the next is whole.
    fn answer(self, image: &Image, cuts: &[usize], request: &Request) -> Answer {
        let Some(bytes) = image.blob(request) else { return Answer::new(404, "") };
        if request.path.contains("/manifests/") {
            return Answer::new(200, bytes).header("Content-Type", "application/vnd.oci.image.manifest.v1+json");
        }
        let chunk_bytes = self.is_chunked.then(|| image.chunk_bytes());
        let from = request.from().filter(|_| self.has_ranges);
        let whole = match from {
            None => Answer::new(200, bytes),
            Some(from) => {
                let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
                Answer::new(206, &bytes[from..]).header("Content-Range", range)
            }
        };
        match cuts.get(request.before).filter(|_| image.is_layer(request)) {
            Some(cut) => {
                let cut = Some(cut.saturating_sub(from.unwrap_or(0)));
                Answer { chunk_bytes, cut, ending: self.ending, ..whole }
            }
            None => Answer { chunk_bytes, ..whole },
        }
    }

    /// Pulls with the layer cut so; what was asked for of it.
    fn pull(self, image: &Arc<Image>, cuts: Vec<usize>, tls: &(Arc<rustls::ServerConfig>, PathBuf)) -> Vec<Request> {
        let (server_has, told) = (Arc::clone(image), format!("{self:?} cut at {cuts:?}"));
        let config = self.is_encrypted.then(|| Arc::clone(&tls.0));
        let server = FaultServer::start_with(config, move |request| self.answer(&server_has, &cuts, request));
        let registry = match self.is_encrypted {
            true => config::Registry { ca: Some(tls.1.clone()), ..config::Registry::default() },
            false => config::Registry { insecure_http: true, ..config::Registry::default() },
        };
        let device = Device::new([(server.host.clone(), registry)]).trusting_digests();
        let pulled = device.pull(&format!("{}/app@{}", server.host, image.digest));
        let ready = pulled.unwrap_or_else(|failure| panic!("{told}: {}", failure.reason));
        let noise = std::fs::read(device.layer(&ready, 0).join("noise")).unwrap();
        assert!(noise == image.noise, "{told}: other bytes than were packed");
        server.requests().into_iter().filter(|request| image.is_layer(request)).collect()
    }
}

/// Calls `one` with each number below `count`, some at a time.
fn each(count: usize, one: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(number) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|number| *number < count) {
                    one(number);
                }
            });
        }
    });
}

/// After each chunk, and before the first.
fn at_every_boundary(ways: &[Way]) {
    let image = Arc::new(Image::new());
    let tls = certificate(image.dir.path());
    each(ways.len() * (CHUNKS + 1), |number| {
        let (way, chunks) = (ways[number / (CHUNKS + 1)], number % (CHUNKS + 1));
        let cut = (chunks * image.chunk_bytes()).min(image.packed.len());
        let asked = way.pull(&image, vec![cut], &tls);
        let from: Vec<_> = asked.iter().map(Request::from).collect();
        let told = format!("{way:?} cut after {chunks} chunks, {cut} of {} bytes: {from:?}", image.packed.len());
        match from.as_slice() {
            // All had come, whatever did not come after it.
            [None] => assert_eq!(cut, image.packed.len(), "{told}"),
            [None, None] => assert!(cut == 0 || way.ending == Ending::Reset, "{told}"),
            // A reset may overtake what was sent before it: that was never there.
            [None, Some(again)] if way.ending == Ending::Reset => assert!(*again <= cut, "{told}"),
            [None, Some(again)] => assert_eq!(*again, cut, "{told}"),
            _ => panic!("{told}"),
        }
    });
}

#[test]
fn a_layer_that_is_cut_at_any_chunk_comes_whole_and_nothing_of_it_twice() {
    let way = Way { is_chunked: false, has_ranges: true, is_encrypted: false, ending: Ending::Orderly };
    at_every_boundary(&[way, Way { is_chunked: true, ..way }]);
}

#[test]
fn a_layer_that_is_cut_at_any_chunk_comes_whole_from_a_registry_without_ranges_too() {
    let way = Way { is_chunked: false, has_ranges: false, is_encrypted: false, ending: Ending::Orderly };
    at_every_boundary(&[way, Way { is_chunked: true, ..way }]);
}

#[test]
fn a_connection_that_is_reset_at_any_chunk_is_taken_up_again() {
    let way = Way { is_chunked: false, has_ranges: true, is_encrypted: false, ending: Ending::Reset };
    at_every_boundary(&[way, Way { is_chunked: true, ..way }]);
}

#[test]
fn encryption_that_ends_at_any_chunk_with_or_without_notice_is_taken_up_again() {
    let way = Way { is_chunked: false, has_ranges: true, is_encrypted: true, ending: Ending::Orderly };
    let without = Way { ending: Ending::WithoutNotice, ..way };
    at_every_boundary(&[way, without, Way { is_chunked: true, ..way }, Way { is_chunked: true, ..without }]);
}

#[test]
fn a_layer_that_is_cut_again_and_again_comes_whole_and_nothing_of_it_twice() {
    let image = Arc::new(Image::new());
    let tls = certificate(image.dir.path());
    // Three pieces without progress enough would be the end of it: each of these brings 16 KiB.
    let cuts: Vec<usize> = (1..4).map(|part| part * 17 * image.chunk_bytes()).collect();
    for is_chunked in [false, true] {
        let way = Way { is_chunked, has_ranges: true, is_encrypted: is_chunked, ending: Ending::Orderly };
        let from: Vec<_> = way.pull(&image, cuts.clone(), &tls).iter().map(Request::from).collect();
        let expected: Vec<_> = [None].into_iter().chain(cuts.iter().copied().map(Some)).collect();
        assert_eq!(from, expected, "{way:?}");
    }
}
