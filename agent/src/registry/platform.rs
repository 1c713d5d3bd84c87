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

/// What a machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    pub architecture: &'static str,
    /// Best first; the empty one is an image that names none.
    pub variants: &'static [&'static str],
}

impl Machine {
    /// `amd64_level`: 1 to 4, as the x86-64 psABI numbers them.
    fn of(architecture: &'static str, amd64_level: usize) -> Self {
        let variants: &[&str] = match architecture {
            // edged is built for ARMv7 (armv7-unknown-linux-gnueabihf), which runs what was made for older ones.
            "arm" => &["v7", "", "v6", "v5"],
            "arm64" => &["v8", "", "v8.0"],
            "amd64" => {
                const ALL: [&str; 5] = ["v4", "v3", "v2", "", "v1"];
                &ALL[4 - amd64_level.clamp(1, 4)..]
            }
            _ => &[""],
        };
        Self { architecture, variants }
    }
}

/// This machine.
pub fn this() -> Machine {
    Machine::of(architecture(), amd64_level())
}

/// Which of the x86-64 levels this processor has (psABI, 3.1.1), with the system's support for its registers.
#[cfg(target_arch = "x86_64")]
fn amd64_level() -> usize {
    macro_rules! has {
        ($($feature:tt)+) => { $(std::arch::is_x86_feature_detected!($feature))&&+ };
    }
    let v2 = has!("cmpxchg16b" "popcnt" "sse3" "sse4.1" "sse4.2" "ssse3");
    let v3 = v2 && has!("avx" "avx2" "bmi1" "bmi2" "f16c" "fma" "lzcnt" "movbe");
    let v4 = v3 && has!("avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl");
    1 + usize::from(v2) + usize::from(v3) + usize::from(v4)
}

#[cfg(not(target_arch = "x86_64"))]
fn amd64_level() -> usize {
    1
}

/// The manifest that suits a machine best.
pub fn choose<'i>(index: &'i ImageIndex, machine: &Machine) -> Option<&'i Descriptor> {
    let Machine { architecture, variants } = *machine;
    let rank = |descriptor: &Descriptor| {
        let platform = descriptor.platform().as_ref()?;
        let fits = platform.os().to_string() == "linux" && platform.architecture().to_string() == architecture;
        let variant = platform.variant().as_deref().unwrap_or("");
        variants.iter().position(|known| *known == variant).filter(|_| fits)
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

    fn chosen(platforms: &[&str], architecture: &'static str) -> Option<String> {
        chosen_at(platforms, architecture, 1)
    }

    fn chosen_at(platforms: &[&str], architecture: &'static str, amd64_level: usize) -> Option<String> {
        let index = index(platforms);
        choose(&index, &Machine::of(architecture, amd64_level)).map(|descriptor| {
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

    #[test]
    fn of_the_levels_of_amd64_the_highest_that_the_processor_has() {
        let all = ["linux/amd64", "linux/amd64/v2", "linux/amd64/v3", "linux/amd64/v4"];
        for (level, wanted) in (1..).zip(all) {
            assert_eq!(chosen_at(&all, "amd64", level).as_deref(), Some(wanted));
        }
        assert_eq!(chosen_at(&["linux/amd64/v3", "linux/amd64/v2"], "amd64", 2).as_deref(), Some("linux/amd64/v2"));
        assert_eq!(chosen_at(&["linux/amd64/v1"], "amd64", 4).as_deref(), Some("linux/amd64/v1"));
        assert_eq!(chosen_at(&["linux/amd64/v4"], "amd64", 3), None);
    }

    /// The kernel has asked the same processor, and names what it found in its own words.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_level_is_what_the_kernel_says_of_the_processor() {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap();
        let has = |names: &str| names.split(' ').all(|name| flags.split_whitespace().any(|flag| flag == name));
        let levels = [
            "cx16 popcnt pni sse4_1 sse4_2 ssse3",
            "avx avx2 bmi1 bmi2 f16c fma abm movbe",
            "avx512f avx512bw avx512cd avx512dq avx512vl",
        ];
        assert_eq!(amd64_level(), 1 + levels.iter().take_while(|names| has(names)).count());
    }
}
