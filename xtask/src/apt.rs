//! Debian packages of other suites and architectures, unpacked into the cache and never installed: kernels, cosign, a
//! compiler for ARM, what goes into images. A private apt configuration asks the mirrors this machine uses anyway.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use edged_qemu::run::run;

use crate::{build, say};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One suite of Debian, for all architectures.
pub struct Suite {
    name: &'static str,
    dir: PathBuf,
}

impl Suite {
    pub fn open(name: &'static str) -> Result<Self> {
        let dir = build::cache().join("apt").join(name);
        for sub in ["lists/partial", "archives/partial"] {
            std::fs::create_dir_all(dir.join(sub))?;
        }
        let suite = Self { name, dir };
        let show = |sub: &str| suite.dir.join(sub).display().to_string();
        let config = format!(
            "Dir::Etc::SourceList \"{}\";\nDir::Etc::SourceParts \"/dev/null\";\nDir::State::Lists \"{}\";\n\
             Dir::State::Status \"{}\";\nDir::Cache \"{}\";\nDir::Cache::Archives \"{}\";\n\
             APT::Architecture \"amd64\";\nAPT::Architectures {{ \"amd64\"; \"arm64\"; \"armhf\"; }};\n\
             APT::Sandbox::User \"root\";\n",
            show("sources.list"),
            show("lists"),
            show("status"),
            suite.dir.display(),
            show("archives")
        );
        std::fs::write(suite.dir.join("apt.conf"), config)?;
        std::fs::write(suite.dir.join("status"), "")?;
        if !suite.dir.join("ready").exists() {
            say::step(&format!("reading the package lists of Debian {name}"));
            std::fs::write(suite.dir.join("sources.list"), format!("deb [signed-by={KEYRING}] {} {name} main\n", mirror()?))?;
            suite.apt("apt-get", &["-qq", "update"])?;
            std::fs::write(suite.dir.join("ready"), "")?;
        }
        Ok(suite)
    }

    fn apt(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        run(command.args(args).env("APT_CONFIG", self.dir.join("apt.conf")).current_dir(self.dir.join("archives")))
    }

    /// The names of packages that contain each of `parts`, sorted.
    pub fn names(&self, parts: &[&str]) -> Result<Vec<String>> {
        let all = self.apt("apt-cache", &["pkgnames", parts[0]])?;
        let mut names: Vec<_> = all.lines().filter(|name| parts.iter().all(|part| name.contains(part))).map(str::to_owned).collect();
        names.sort();
        Ok(names)
    }

    /// The package unpacked; fetched once.
    pub fn unpacked(&self, package: &str, arch: &str) -> Result<PathBuf> {
        let dir = build::cache().join("deb").join(self.name).join(arch).join(package);
        if !dir.exists() {
            say::step(&format!("fetching {package} ({arch}) from Debian {}", self.name));
            let before = debs(&self.dir)?;
            self.apt("apt-get", &["-qq", "download", &format!("{package}:{arch}")])?;
            let new = debs(&self.dir)?.into_iter().find(|deb| !before.contains(deb));
            let prefix = format!("{package}_");
            let known = before.iter().find(|deb| {
                let name = deb.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                name.starts_with(&prefix) && (name.ends_with(&format!("_{arch}.deb")) || name.ends_with("_all.deb"))
            });
            let deb = new.as_ref().or(known).with_context(|| format!("{package}: nothing was fetched"))?;
            let fresh = dir.with_extension("new");
            std::fs::create_dir_all(&fresh)?;
            run(Command::new("dpkg").arg("-x").arg(deb).arg(&fresh))?;
            std::fs::rename(fresh, &dir)?;
        }
        Ok(dir)
    }

    /// Several packages laid over each other in `into`.
    pub fn unpack_all(&self, packages: &[&str], arch: &str, into: &Path) -> Result<()> {
        std::fs::create_dir_all(into)?;
        for package in packages {
            let from = self.unpacked(package, arch)?;
            run(Command::new("cp").args(["-a", "--"]).arg(from.join(".")).arg(into))?;
        }
        Ok(())
    }
}

fn debs(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir.join("archives"))?.collect::<std::io::Result<Vec<_>>>()?;
    Ok(entries.into_iter().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "deb")).collect())
}

/// The Debian mirror that this machine's own configuration names.
fn mirror() -> Result<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(Result::ok).map(|entry| entry.path()));
    }
    for file in files {
        let Ok(text) = std::fs::read_to_string(file) else { continue };
        let words = text.lines().filter(|line| line.starts_with("deb ") || line.starts_with("URIs:")).flat_map(str::split_whitespace);
        let is_mirror = |word: &&str| word.starts_with("http") && word.trim_end_matches('/').ends_with("/debian");
        if let Some(mirror) = words.into_iter().find(is_mirror) {
            return Ok(mirror.to_owned());
        }
    }
    bail!("no Debian mirror in /etc/apt: this step needs a Debian machine")
}
