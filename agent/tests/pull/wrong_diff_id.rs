//! A layer that is what its manifest names, and unpacks to something else than its configuration names.

use std::io::Write;
use std::path::Path;

use edged::content::chain_id;
use edged::execute::pull::PullFailure;
use edged::execute::pull::load::{self, Wish};
use edged_model::id::Digest;
use edged_model::reason::Code;

use super::Device;
use super::broken_registry::plain_http;
use super::made::{Blob, Made};

fn archive(name: &str) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_size(7);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, name, &b"content"[..]).unwrap();
    archive.into_inner().unwrap()
}

/// Packed as the media type says.
fn packed(archive: &[u8], packing: &'static str) -> Blob {
    let bytes = match packing {
        "+gzip" => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(archive).unwrap();
            encoder.finish().unwrap()
        }
        _ => archive.to_vec(),
    };
    Blob { bytes, diff_id: Digest::of(archive), packing }
}

/// A layer that is right, and above it one that is not.
fn image(packing: &'static str, claimed: Option<Digest>) -> Made {
    let mut upper = packed(&archive("upper"), packing);
    upper.diff_id = claimed.unwrap_or(upper.diff_id);
    Made::of(vec![packed(&archive("lower"), packing), upper])
}

fn nothing_is_visible_of_it(device: &Device, failure: &PullFailure, claimed: Digest) {
    assert_eq!((failure.reason.code, failure.permanent), (Code::DigestMismatch, true), "{failure:?}");
    let (is, text) = (Digest::of(&archive("upper")), &failure.reason.text);
    assert!(text.contains(&format!("unpacks to {is}, not {claimed} (its diff id)")), "{text}");
    let lower = Digest::of(&archive("lower"));
    let content = &device.ctx.content;
    // Neither as what it was said to be, nor as what it is.
    for diff_id in [claimed, is] {
        let chain = chain_id(Some(lower), diff_id);
        assert!(!content.has_layer(chain), "{chain}");
        assert!(!device.ctx.data.join("content/tables").join(chain.hex()).exists());
    }
    assert!(device.has_nothing_half_done());
    assert!(content.check_layer(chain_id(Some(lower), claimed), &mut |_| true).unwrap().is_none());
}

/// The archive of the layer below is one that is there, and is not believed either.
fn claims() -> [Digest; 2] {
    [Digest::of(b"another archive"), Digest::of(&archive("lower"))]
}

#[test]
fn a_registry_that_serves_a_layer_with_another_diff_id_gives_no_image_and_nothing_is_visible() {
    for packing in ["", "+gzip"] {
        for claimed in claims() {
            let (server, name) = image(packing, Some(claimed)).serve();
            let device = Device::new([(server.host.clone(), plain_http())]).trusting_digests();
            let failure = device.pull(&name).unwrap_err();
            nothing_is_visible_of_it(&device, &failure, claimed);
            // Asked again it is judged again: nothing was remembered as good.
            nothing_is_visible_of_it(&device, &device.pull(&name).unwrap_err(), claimed);
        }
        let (server, name) = image(packing, None).serve();
        let device = Device::new([(server.host.clone(), plain_http())]).trusting_digests();
        let ready = device.pull(&name).unwrap();
        assert_eq!(std::fs::read(device.layer(&ready, 1).join("upper")).unwrap(), b"content");
    }
}

#[test]
fn an_image_on_a_stick_with_a_layer_of_another_diff_id_is_not_loaded_and_nothing_is_visible() {
    let dir = tempfile::tempdir().unwrap();
    for (number, claimed) in claims().into_iter().enumerate() {
        let to = dir.path().join(number.to_string());
        image("+gzip", Some(claimed)).layout(&to);
        let device = Device::new([]).trusting_digests();
        let load = |path: &Path| load::load(&device.ctx, path, &Wish::default(), &|_| {});
        nothing_is_visible_of_it(&device, &load(&to).unwrap_err(), claimed);
        let right = dir.path().join(format!("right-{number}"));
        image("+gzip", None).layout(&right);
        assert_eq!(load(&right).unwrap().len(), 1);
    }
}
