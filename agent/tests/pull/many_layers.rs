//! An image of more layers than mount(2) takes at once.

use super::*;

#[test]
fn an_image_of_a_hundred_layers_is_pulled_and_can_be_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let layers: Vec<PathBuf> = (0..100).map(|number| dir.path().join(format!("l{number}"))).collect();
    for (number, layer) in layers.iter().enumerate() {
        std::fs::create_dir(layer).unwrap();
        std::fs::write(layer.join(format!("file-{number}")), number.to_string()).unwrap();
    }
    let layout = dir.path().join("layout");
    let spec = BuildSpec {
        layers,
        architecture: architecture().to_owned(),
        entrypoint: vec!["/bin/app".to_owned()],
        reference: "v1".to_owned(),
        ..BuildSpec::default()
    };
    let digest = build_layout(&spec, &layout).unwrap();
    let device = Device::new([]).trusting_digests();
    let pulled = device.pull(&format!("oci:{}@{digest}", layout.display()));
    let lower = |ready: &ReadyImage| -> Vec<String> {
        (0..ready.layers.len()).rev().map(|at| device.layer(ready, at).to_str().unwrap().to_owned()).collect()
    };
    match pulled {
        Ok(ready) => {
            let names = lower(&ready);
            let options: Vec<_> = names.iter().map(|name| ("lowerdir+", Some(name.as_str()))).collect();
            assert_eq!(options.len(), 100);
            edged_sys::mount::new_filesystem_of("overlay", "overlay", options, 0).unwrap();
        }
        // A kernel without `lowerdir+` says so before a layer is fetched.
        Err(failure) => {
            assert!(failure.permanent && failure.reason.text.contains("100 layers"), "{failure:?}");
            let (one, other) = (device.ctx.data.join("layers"), device.ctx.data.join("content"));
            let options = [("lowerdir+", one.to_str()), ("lowerdir+", other.to_str())];
            assert!(edged_sys::mount::new_filesystem_of("overlay", "overlay", options, 0).is_err());
        }
    }
}
