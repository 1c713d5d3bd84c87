//! Packages of other architectures and newer releases. apt gets a private configuration and database under `.cache/`;
//! packages are unpacked there and never installed, so the system's own database does not learn of them. The mirror is
//! the one this machine already uses; signatures are checked as ever.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use edged_qemu::process;

use crate::progress;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One release of Debian for one architecture.
#[derive(Debug)]
pub struct Archive {
    home: PathBuf,
    suite: String,
    arch: String,
}

impl Archive {
    /// Sets it up under `cache`; its index is fetched when something is first asked of it.
    pub fn open(cache: &Path, suite: &str, arch: &str) -> Result<Self> {
        let home = cache.join("debian").join(format!("{suite}-{arch}"));
        let archive = Self { home, suite: suite.to_owned(), arch: arch.to_owned() };
        for dir in ["lists/partial", "archives/partial", "empty", "debs", "unpacked"] {
            fs::create_dir_all(archive.home.join(dir))?;
        }
        fs::write(archive.home.join("status"), "")?;
        let home = archive.home.display();
        let config = format!(
            "Dir::State \"{home}\";\nDir::State::lists \"{home}/lists\";\nDir::State::status \"{home}/status\";\n\
             Dir::Cache \"{home}\";\nDir::Cache::archives \"{home}/archives\";\n\
             Dir::Etc::SourceList \"{home}/sources.list\";\nDir::Etc::SourceParts \"{home}/empty\";\n\
             Dir::Etc::Preferences \"{home}/none\";\nDir::Etc::PreferencesParts \"{home}/empty\";\n\
             APT::Architecture \"{arch}\";\nAPT::Architectures {{ \"{arch}\"; }};\nAPT::Sandbox::User \"root\";\n\
             Acquire::Languages \"none\";\nDebug::NoLocking \"true\";\n"
        );
        fs::write(archive.home.join("apt.conf"), config)?;
        Ok(archive)
    }

    /// Unpacks a package into a directory of its own, the newest version or a named one. What is there stays: the
    /// archive keeps only its current point release, so the cache is what pins.
    pub fn unpack(&self, package: &str, version: Option<&str>) -> Result<PathBuf> {
        let target = self.home.join("unpacked").join(package);
        if target.exists() {
            return Ok(target);
        }
        self.index()?;
        progress::step(&format!("fetching {package} ({}, {})", self.suite, self.arch));
        let debs = self.home.join("debs").join(package);
        let name = version.map_or_else(|| package.to_owned(), |version| format!("{package}={version}"));
        self.with_fresh_index(|| {
            let _ = fs::remove_dir_all(&debs);
            fs::create_dir_all(&debs)?;
            process::run(self.apt("apt-get").args(["-q", "download", &name]).current_dir(&debs))
        })?;
        extract(&debs, &target)?;
        Ok(target)
    }

    /// Unpacks packages and all they depend on into one tree.
    pub fn unpack_with_dependencies(&self, packages: &[&str]) -> Result<PathBuf> {
        let name = packages.join("+");
        let target = self.home.join("unpacked").join(format!("{name}.tree"));
        if target.exists() {
            return Ok(target);
        }
        self.index()?;
        progress::step(&format!("fetching {name} and what they need ({}, {})", self.suite, self.arch));
        let debs = self.home.join("debs").join(&name);
        self.with_fresh_index(|| {
            let _ = fs::remove_dir_all(&debs);
            fs::create_dir_all(debs.join("partial"))?;
            let archives = format!("Dir::Cache::archives={}", debs.display());
            let mut command = self.apt("apt-get");
            command.args(["-q", "-y", "--no-install-recommends", "--download-only", "-o", &archives, "install"]);
            process::run(command.args(packages))
        })?;
        extract(&debs, &target)?;
        Ok(target)
    }

    /// The versions there are of a package, newest first.
    pub fn versions(&self, package: &str) -> Result<Vec<String>> {
        self.field(package, "Version")
    }

    /// One field of each version's record.
    pub fn field(&self, package: &str, field: &str) -> Result<Vec<String>> {
        self.index()?;
        let text = process::read(self.apt("apt-cache").args(["show", package]))?;
        let prefix = format!("{field}: ");
        Ok(text.lines().filter_map(|line| line.strip_prefix(&prefix)).map(str::to_owned).collect())
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.home.join("apt.conf"));
        command
    }

    /// The index may be older than the mirror's packages: one failure fetches it anew.
    fn with_fresh_index<T>(&self, mut fetch: impl FnMut() -> Result<T>) -> Result<T> {
        match fetch() {
            Ok(value) => Ok(value),
            Err(_) => {
                self.update()?;
                fetch()
            }
        }
    }

    fn index(&self) -> Result<()> {
        let has_index = fs::read_dir(self.home.join("lists"))?
            .filter_map(Result::ok)
            .any(|entry| entry.file_name().to_string_lossy().contains("_Packages"));
        if has_index { Ok(()) } else { self.update() }
    }

    fn update(&self) -> Result<()> {
        progress::step(&format!("reading the index of {} for {}", self.suite, self.arch));
        let source = format!("deb [signed-by={KEYRING}] {} {} main\n", mirror()?, self.suite);
        fs::write(self.home.join("sources.list"), source)?;
        process::run(self.apt("apt-get").args(["-q", "update"])).map(drop)
    }
}

/// Unpacks every package of a directory into one tree, which appears when it is complete.
fn extract(debs: &Path, target: &Path) -> Result<()> {
    let partial = target.with_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial)?;
    let mut names = Vec::new();
    for entry in fs::read_dir(debs)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            process::run(Command::new("dpkg").arg("-x").arg(&path).arg(&partial))?;
            names.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
    }
    ensure!(!names.is_empty(), "{} holds no package", debs.display());
    names.sort();
    fs::write(partial.join(".packages"), names.join("\n"))?;
    fs::rename(&partial, target)?;
    fs::remove_dir_all(debs)?;
    Ok(())
}

/// The Debian mirror this machine's own apt uses, or `EDGED_DEBIAN_MIRROR`.
fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("EDGED_DEBIAN_MIRROR") {
        return Ok(mirror);
    }
    let text = process::read(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(COMPONENT)",
        "Created-By: Packages",
    ]))?;
    text.lines()
        .filter_map(|line| line.strip_suffix(" main"))
        .find(|uri| uri.trim_end_matches('/').ends_with("/debian"))
        .map(str::to_owned)
        .context("apt's sources name no Debian mirror; set EDGED_DEBIAN_MIRROR")
}
