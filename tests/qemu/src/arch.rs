//! What differs between the architectures, in one place.

use std::fmt;
use std::str::FromStr;

use crate::filesystem::Filesystem;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    X86_64,
    Aarch64,
    Armv7,
}

impl Arch {
    pub const ALL: [Self; 3] = [Self::X86_64, Self::Aarch64, Self::Armv7];

    /// As people and `--arch` spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
            Self::Armv7 => "armv7",
        }
    }

    /// As Debian spells it.
    pub fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
            Self::Armv7 => "armhf",
        }
    }

    /// As an OCI image spells it: architecture and variant.
    pub fn oci(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::X86_64 => ("amd64", None),
            Self::Aarch64 => ("arm64", Some("v8")),
            Self::Armv7 => ("arm", Some("v7")),
        }
    }

    pub fn rust_target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
            Self::Armv7 => "armv7-unknown-linux-gnueabihf",
        }
    }

    /// The C compiler that links for it.
    pub fn linker(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-linux-gnu-gcc",
            Self::Aarch64 => "aarch64-linux-gnu-gcc",
            Self::Armv7 => "arm-linux-gnueabihf-gcc",
        }
    }

    /// Debian's kernel package that follows the newest build. Those for clouds are small and have no f2fs.
    pub fn kernel_package(self, filesystem: Filesystem) -> &'static str {
        match (self, filesystem) {
            (Self::X86_64, Filesystem::Ext4) => "linux-image-cloud-amd64",
            (Self::X86_64, Filesystem::F2fs) => "linux-image-amd64",
            (Self::Aarch64, Filesystem::Ext4) => "linux-image-cloud-arm64",
            (Self::Aarch64, Filesystem::F2fs) => "linux-image-arm64",
            (Self::Armv7, _) => "linux-image-armmp",
        }
    }

    pub fn qemu(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-system-x86_64",
            Self::Aarch64 => "qemu-system-aarch64",
            Self::Armv7 => "qemu-system-arm",
        }
    }

    /// Machine and processor. QEMU 7.2's x86 emulation crashes Linux 6.12 at random (about one boot in ten) with
    /// cmpxchg16b on: it stays off.
    pub fn qemu_machine(self) -> [&'static str; 4] {
        match self {
            Self::X86_64 => ["-M", "q35", "-cpu", "max,-cx16"],
            Self::Aarch64 => ["-M", "virt", "-cpu", "cortex-a53"],
            Self::Armv7 => ["-M", "virt,highmem=off", "-cpu", "cortex-a15"],
        }
    }

    /// The kernel's name of the first serial port.
    pub fn console(self) -> &'static str {
        match self {
            Self::X86_64 => "ttyS0",
            Self::Aarch64 | Self::Armv7 => "ttyAMA0",
        }
    }

    /// The machine this program runs on, if it is one of the three.
    pub fn host() -> Option<Self> {
        Self::ALL.into_iter().find(|arch| {
            let name = std::env::consts::ARCH;
            arch.name() == name || (*arch == Self::Armv7 && name == "arm")
        })
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Arch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|arch| arch.name() == text)
            .ok_or_else(|| format!("`{text}` is none of x86_64, aarch64, armv7"))
    }
}
