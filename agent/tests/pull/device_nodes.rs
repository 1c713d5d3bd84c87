//! Device nodes in layers: what the device's own configuration says becomes of them, by the image's name.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use edged::config::DeviceNodes;
use edged::content::reading::FromTheDisk;
use edged::execute::pull::load::{self, Wish};
use edged_model::reason::Code;

use super::Device;
use super::support::run;

/// An image whose layer has `dev/null`, and a link to it.
fn image(dir: &Path) -> PathBuf {
    let (root, layer, layout) = (dir.join("root"), dir.join("layer.tar"), dir.join("layout"));
    std::fs::create_dir_all(root.join("dev")).unwrap();
    std::fs::write(root.join("motd"), "hello\n").unwrap();
    run(Command::new("mknod").arg(root.join("dev/null")).args(["c", "1", "3"]));
    std::fs::hard_link(root.join("dev/null"), root.join("dev/zero")).unwrap();
    run(Command::new("tar").arg("-cf").arg(&layer).arg("-C").arg(&root).arg("."));
    let tagged = format!("{}:v1", layout.display());
    run(Command::new("umoci").args(["init", "--layout"]).arg(&layout));
    run(Command::new("umoci").args(["new", "--image", &tagged]));
    run(Command::new("umoci").args(["raw", "add-layer", "--image", &tagged]).arg(&layer));
    layout
}

#[test]
fn device_nodes_are_what_the_longest_prefix_says_and_each_policy_has_its_own_layer() {
    let dir = tempfile::tempdir().unwrap();
    let layout = image(dir.path());
    let other = dir.path().join("other");
    run(Command::new("cp").arg("-r").arg(&layout).arg(&other));
    let mut device = Device::new([]).trusting_digests();
    let refused = load::load(&device.ctx, &layout, &Wish::default(), &|_| {}).unwrap_err();
    assert_eq!(refused.reason.code, Code::LayerRefused, "{refused:?}");
    assert!(refused.reason.text.contains("` is a character device, which"), "{}", refused.reason);
    assert!(device.has_nothing_half_done());

    let prefix = |path: &Path| format!("oci:{}", path.display());
    device.ctx.images.device_nodes =
        [("oci:".to_owned(), DeviceNodes::Ignore), (prefix(&other), DeviceNodes::Allow)].into();
    let index = std::fs::read_to_string(layout.join("index.json")).unwrap();
    let digest = index.split('"').find(|part| part.starts_with("sha256:")).unwrap();
    let [without, with] = [&layout, &other].map(|path| device.pull(&format!("{}@{digest}", prefix(path))).unwrap());
    assert_ne!(without.layers, with.layers);
    let names = |at: &Path| std::fs::read_dir(at.join("dev")).unwrap().count();
    assert_eq!((names(&device.layer(&without, 0)), names(&device.layer(&with, 0))), (0, 2));
    for ready in [&without, &with] {
        assert_eq!(std::fs::read_to_string(device.layer(ready, 0).join("motd")).unwrap(), "hello\n");
        let found = device.ctx.content.check_layer(ready.layers[0], &mut FromTheDisk).unwrap().unwrap();
        assert_eq!(found.damage, [""; 0]);
    }
    let null = std::fs::symlink_metadata(device.layer(&with, 0).join("dev/zero")).unwrap();
    assert!(null.file_type().is_char_device());

    // They are not allowed any more: what is on the disk is not taken for it.
    device.ctx.images.device_nodes = [].into();
    let failure = device.pull(&format!("{}@{digest}", prefix(&other))).unwrap_err();
    assert_eq!(failure.reason.code, Code::LayerRefused, "{failure:?}");
}
