//! Which image of an index is for this machine (image-spec image-index.md): os, architecture and variant in GOARCH's
//! words.

use oci_spec::image::{Descriptor, ImageIndex};

/// This machine in the words of GOARCH.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

/// Variants that run on a machine of this architecture, best first; the empty one is an image that names none.
fn variants(architecture: &str) -> &'static [&'static str] {
    match architecture {
        // edged is built for ARMv7 (armv7-unknown-linux-gnueabihf), which runs what was made for older ones.
        "arm" => &["v7", "", "v6", "v5"],
        "arm64" => &["v8", "", "v8.0"],
        "amd64" => &["", "v1"],
        _ => &[""],
    }
}

/// The manifest that suits `architecture` best.
pub fn choose<'i>(index: &'i ImageIndex, architecture: &str) -> Option<&'i Descriptor> {
    let rank = |descriptor: &Descriptor| {
        let platform = descriptor.platform().as_ref()?;
        let fits = platform.os().to_string() == "linux" && platform.architecture().to_string() == architecture;
        let variant = platform.variant().as_deref().unwrap_or("");
        variants(architecture).iter().position(|known| *known == variant).filter(|_| fits)
    };
    index
        .manifests()
        .iter()
        .filter_map(|descriptor| Some((rank(descriptor)?, descriptor)))
        .min_by_key(|(rank, _)| *rank)
        .map(|(_, descriptor)| descriptor)
}

/// What an index has, for people: `linux/amd64, linux/arm/v7`.
pub fn list(index: &ImageIndex) -> String {
    let platforms = index.manifests().iter().filter_map(|descriptor| {
        let platform = descriptor.platform().as_ref()?;
        let variant = platform.variant().as_deref().map(|variant| format!("/{variant}")).unwrap_or_default();
        Some(format!("{}/{}{variant}", platform.os(), platform.architecture()))
    });
    platforms.take(16).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(platforms: &[&str]) -> ImageIndex {
        let manifests: Vec<_> = platforms
            .iter()
            .enumerate()
            .map(|(number, platform)| {
                let mut parts = platform.split('/');
                let digest = edged_model::id::Digest::of(&[u8::try_from(number).unwrap()]);
                let mut platform = serde_json::json!({"os": parts.next(), "architecture": parts.next()});
                if let Some(variant) = parts.next() {
                    platform["variant"] = variant.into();
                }
                let media_type = "application/vnd.oci.image.manifest.v1+json";
                serde_json::json!({"mediaType": media_type, "size": 1, "digest": digest, "platform": platform})
            })
            .collect();
        serde_json::from_value(serde_json::json!({"schemaVersion": 2, "manifests": manifests})).unwrap()
    }

    fn chosen(platforms: &[&str], architecture: &str) -> Option<String> {
        let index = index(platforms);
        choose(&index, architecture).map(|descriptor| {
            let at = index.manifests().iter().position(|other| other == descriptor).unwrap();
            platforms[at].to_owned()
        })
    }

    #[test]
    fn the_best_that_runs_here() {
        let all = ["linux/amd64", "windows/amd64", "linux/arm/v6", "linux/arm/v7", "linux/arm64/v8", "unknown/unknown"];
        assert_eq!(chosen(&all, "amd64").as_deref(), Some("linux/amd64"));
        assert_eq!(chosen(&all, "arm").as_deref(), Some("linux/arm/v7"));
        assert_eq!(chosen(&all, "arm64").as_deref(), Some("linux/arm64/v8"));
        assert_eq!(chosen(&all, "riscv64"), None);
        assert_eq!(chosen(&["linux/amd64/v3"], "amd64"), None, "a variant that this machine may not run");
        assert_eq!(chosen(&["linux/arm/v6", "linux/arm/v8"], "arm").as_deref(), Some("linux/arm/v6"));
    }
}
