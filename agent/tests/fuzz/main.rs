//! Every decoder that meets bytes from outside, against changed copies of real documents. Each target is a plain function
//! from bytes to nothing that panics when a promise is broken, so that any fuzzer can drive it; here it is a seeded
//! generator, a bounded number of inputs, in every test run.
//!
//! The corpus (`corpus/`, made by edgectl, cosign, skopeo, umoci and GNU tar) is where the changes begin. An input that
//! broke something is written to a file whose name is printed: put it into the corpus of its target and it is tried first
//! for ever. `EDGED_FUZZ_SECS=600 EDGED_FUZZ_SEED=7 cargo test -p edged --test fuzz` goes on for longer, elsewhere.

mod mutate;
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use edged_model::id::Digest;
use mutate::Mutator;

/// The same inputs in every run.
const SEED: u64 = 1;

fn home() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz")
}

/// The files of one folder of the corpus, by name.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let dir = home().join("corpus").join(name);
    let mut paths: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", dir.display());
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Something that was given along with the corpus: a key, a signed document.
fn given(name: &str) -> Vec<u8> {
    std::fs::read(home().join("given").join(name)).unwrap()
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

/// `seeds` as they are, then `count` changed ones (or as many as the time allows that was asked for).
fn drive(target: &str, seeds: &[Vec<u8>], count: u32, run: impl Fn(&[u8])) {
    let one = |input: &[u8]| {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(input))) {
            let file = format!("fuzz-{target}-{}", Digest::of(input).short());
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(file);
            std::fs::write(&path, input).unwrap();
            eprintln!("{target}: broken by {}", path.display());
            resume_unwind(panic);
        }
    };
    seeds.iter().for_each(|seed| one(seed));
    // Two ends that every decoder must find.
    one(b"");
    let mut mutator = Mutator::new(number("EDGED_FUZZ_SEED").unwrap_or(SEED));
    let until = number("EDGED_FUZZ_SECS").map(|secs| Instant::now() + Duration::from_secs(secs));
    let mut done = 0;
    while until.map_or(done < count, |until| Instant::now() < until) {
        one(&mutator.changed(seeds));
        done += 1;
    }
    println!("{target}: {done} inputs");
}

#[test]
fn strict_cbor_has_one_reading() {
    let seeds = [corpus("manifest"), corpus("trust-root")].concat();
    drive("cbor", &seeds, 20_000, targets::cbor);
}

#[test]
fn no_changed_manifest_is_believed() {
    let known = targets::Documents::load();
    drive("manifest", &corpus("manifest"), 6_000, |bytes| known.manifest(bytes));
}

#[test]
fn what_a_key_holder_signs_is_refused_in_words_or_taken_whole() {
    let seeds = targets::payloads(&corpus("manifest"), edged_model::envelope::Kind::Manifest);
    drive("manifest-content", &seeds, 6_000, targets::manifest_content);
}

#[test]
fn no_changed_trust_root_is_believed() {
    let known = targets::Documents::load();
    drive("trust-root", &corpus("trust-root"), 3_000, |bytes| known.trust_root(bytes));
}

#[test]
fn what_is_in_a_trust_root_is_sound_or_refused() {
    let seeds = targets::payloads(&corpus("trust-root"), edged_model::envelope::Kind::TrustRoot);
    drive("trust-root-content", &seeds, 3_000, targets::trust_root_content);
}

#[test]
fn no_changed_report_is_believed() {
    drive("report", &[targets::report()], 6_000, targets::changed_report);
}

#[test]
fn no_changed_image_signature_is_believed() {
    let image = targets::SignedImage::load();
    drive("signature", &corpus("signature"), 6_000, |bytes| image.signature(bytes));
}

#[test]
fn image_documents_of_every_shape_are_images_or_refused() {
    let stick = targets::Stick::new();
    let seeds = [corpus("oci"), stick.documents()].concat();
    drive("oci", &seeds, 1_500, |bytes| stick.document(bytes));
}

#[test]
fn no_archive_writes_outside_its_root() {
    let place = targets::Place::new();
    drive("tar", &corpus("tar"), 1_500, |bytes| place.archive(bytes));
}

#[test]
fn no_message_breaks_the_keeper() {
    drive("keeper", &targets::requests(), 20_000, edged_keeper::fuzz::message);
}

#[test]
fn names_are_read_as_they_are_written() {
    let seeds: Vec<Vec<u8>> = [
        "registry.example:5000/team/app:1@sha256:ce9345b6231ec0597dc8547562bfb2481ed615af0ab29aff30c35fecdf7ae3d5",
        "r.example/a:v1.0-rc_2",
        "oci:/media/stick:v1",
        "[::1]:5000/a/b@sha256:ce9345b6231ec0597dc8547562bfb2481ed615af0ab29aff30c35fecdf7ae3d5",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    drive("name", &seeds, 20_000, targets::name);
}
