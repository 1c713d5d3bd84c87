//! The folders and files of one workload on the device: the writable upper of its root, its volumes, its secrets, and
//! the three files of `/etc` that every container expects. All of it can be made twice with the same result.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use edged_model::id::{Digest, SecretName, VolumeName, WorkloadName};
use edged_model::moment::LOCKS_VOLUME;

use crate::config::Places;
use crate::content::remove;

#[derive(Debug, thiserror::Error)]
#[error("cannot prepare {path}")]
pub struct PlaceError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> PlaceError + '_ {
    move |source| PlaceError { path: path.to_owned(), source }
}

/// The writable part of a root file system. Kept over restarts, new for a new specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WritableRoot {
    pub upper: PathBuf,
    pub work: PathBuf,
    pub mount_at: PathBuf,
}

/// Where the writable root of `workload` is, there or not.
pub fn root_paths(places: &Places, workload: &WorkloadName, spec: Digest) -> WritableRoot {
    let home = places.workloads().join(workload.as_str()).join(spec.short());
    WritableRoot { upper: home.join("upper"), work: home.join("work"), mount_at: home.join("root") }
}

/// Makes the upper of `workload` for the specification `spec` and takes away those of earlier specifications. `former`: by
/// what it was named in earlier versions. `owner`: of its top, on the disk.
pub fn writable_root(
    places: &Places,
    workload: &WorkloadName,
    spec: Digest,
    former: Digest,
    owner: u32,
) -> Result<WritableRoot, PlaceError> {
    let home = places.workloads().join(workload.as_str());
    let mine = spec.short();
    fs::create_dir_all(&home).map_err(at(&home))?;
    let (here, there) = (home.join(&mine), home.join(former.short()));
    if !here.exists() && there.exists() {
        fs::rename(&there, &here).map_err(at(&there))?;
    }
    for entry in fs::read_dir(&home).map_err(at(&home))? {
        let entry = entry.map_err(at(&home))?;
        if entry.file_name() != mine.as_str() {
            fs::remove_dir_all(entry.path()).map_err(at(&entry.path()))?;
        }
    }
    let home = home.join(mine);
    let root = root_paths(places, workload, spec);
    for dir in [&root.upper, &root.work, &root.mount_at] {
        fs::create_dir_all(dir).map_err(at(dir))?;
        fs::set_permissions(dir, Permissions::from_mode(0o755)).map_err(at(dir))?;
    }
    if fs::metadata(&root.work).map_err(at(&root.work))?.uid() != owner {
        for dir in [&root.upper, &root.work] {
            std::os::unix::fs::lchown(dir, Some(owner), Some(owner)).map_err(at(dir))?;
        }
    }
    // Only root may enter: a setuid program left in an upper is nobody else's.
    fs::set_permissions(&home, Permissions::from_mode(0o700)).map_err(at(&home))?;
    Ok(root)
}

/// Makes a named volume, durably: a program may write to it the instant it runs.
pub fn volume(places: &Places, name: &VolumeName) -> Result<PathBuf, PlaceError> {
    let parent = places.volumes();
    let dir = parent.join(name.as_str());
    if !dir.is_dir() {
        fs::create_dir_all(&dir).map_err(at(&dir))?;
        // Whoever mounts the locks may hold one, under whatever user it runs.
        let mode = if name.as_str() == LOCKS_VOLUME { 0o1777 } else { 0o755 };
        fs::set_permissions(&dir, Permissions::from_mode(mode)).map_err(at(&dir))?;
        File::open(&parent).and_then(|dir| dir.sync_all()).map_err(at(&parent))?;
    }
    // A setuid program that root inside left there is for nobody outside. Earlier versions made the directory open.
    let open = fs::metadata(&parent).map_err(at(&parent))?.permissions().mode() & 0o077 != 0;
    if open {
        fs::set_permissions(&parent, Permissions::from_mode(0o700)).map_err(at(&parent))?;
    }
    Ok(dir)
}

/// What a workload sees under `/etc` and `/run/secrets`, as files of the run directory (memory on a device).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunFiles {
    pub hosts: String,
    pub resolv_conf: String,
    pub hostname: String,
    pub secrets: Vec<(SecretName, Vec<u8>)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunPaths {
    pub hosts: PathBuf,
    pub resolv_conf: PathBuf,
    pub hostname: PathBuf,
    /// A directory with one file per secret.
    pub secrets: PathBuf,
}

/// Where a workload's run files are, there or not.
pub fn run_paths(places: &Places, workload: &WorkloadName) -> RunPaths {
    let home = run_home(places, workload);
    RunPaths {
        hosts: home.join("hosts"),
        resolv_conf: home.join("resolv.conf"),
        hostname: home.join("hostname"),
        secrets: home.join("secrets"),
    }
}

/// Writes the files in place: a running container that has them bind-mounted sees the new content.
pub fn run_files(places: &Places, workload: &WorkloadName, files: &RunFiles) -> Result<RunPaths, PlaceError> {
    let home = run_home(places, workload);
    let paths = run_paths(places, workload);
    fs::create_dir_all(&paths.secrets).map_err(at(&paths.secrets))?;
    fs::set_permissions(&home, Permissions::from_mode(0o700)).map_err(at(&home))?;
    write(&paths.hosts, files.hosts.as_bytes(), 0o644)?;
    write(&paths.resolv_conf, files.resolv_conf.as_bytes(), 0o644)?;
    write(&paths.hostname, format!("{}\n", files.hostname).as_bytes(), 0o644)?;
    for (name, bytes) in &files.secrets {
        write(&paths.secrets.join(name.as_str()), bytes, 0o444)?;
    }
    Ok(paths)
}

/// Makes the container's root the owner of its run files: they are bound as they are.
pub fn give_run_files(paths: &Path, owner: u32) -> Result<(), PlaceError> {
    let chown = |path: &Path| std::os::unix::fs::lchown(path, Some(owner), Some(owner)).map_err(at(path));
    for entry in fs::read_dir(paths).map_err(at(paths))? {
        let entry = entry.map_err(at(paths))?.path();
        chown(&entry)?;
        if entry.is_dir() {
            for secret in fs::read_dir(&entry).map_err(at(&entry))? {
                chown(&secret.map_err(at(&entry))?.path())?;
            }
        }
    }
    Ok(())
}

/// Where [`run_files`] puts them.
pub fn run_home(places: &Places, workload: &WorkloadName) -> PathBuf {
    places.run().join("workloads").join(workload.as_str())
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), PlaceError> {
    let mut file = File::create(path).map_err(at(path))?;
    file.write_all(bytes).map_err(at(path))?;
    file.set_permissions(Permissions::from_mode(mode)).map_err(at(path))
}

/// Takes away what a workload left: its upper, its run files, its log. Never a volume.
pub fn remove(places: &Places, workload: &WorkloadName) -> Result<(), PlaceError> {
    let name = workload.as_str();
    for dir in [places.workloads().join(name), run_home(places, workload), places.log().join(name)] {
        remove::path(&dir).map_err(at(&dir))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upper_lives_as_long_as_its_specification() {
        let root = tempfile::tempdir().unwrap();
        let places = Places::new(Some(root.path()), None);
        let web = WorkloadName::parse("web").unwrap();
        let first = writable_root(&places, &web, Digest::of(b"1"), Digest::of(b"-"), 0).unwrap();
        fs::write(first.upper.join("kept"), "x").unwrap();
        assert_eq!(writable_root(&places, &web, Digest::of(b"1"), Digest::of(b"-"), 0).unwrap(), first);
        assert!(first.upper.join("kept").exists(), "kept over a restart");
        let second = writable_root(&places, &web, Digest::of(b"2"), Digest::of(b"-"), 0).unwrap();
        assert!(!first.upper.exists() && second.upper.exists());
    }

    #[test]
    fn removing_a_workload_leaves_its_volumes() {
        let root = tempfile::tempdir().unwrap();
        let places = Places::new(Some(root.path()), None);
        let (web, data) = (WorkloadName::parse("web").unwrap(), VolumeName::parse("data").unwrap());
        let volume = volume(&places, &data).unwrap();
        let upper = writable_root(&places, &web, Digest::of(b"1"), Digest::of(b"-"), 0).unwrap().upper;
        run_files(&places, &web, &RunFiles::default()).unwrap();
        remove(&places, &web).unwrap();
        remove(&places, &web).unwrap();
        assert!(volume.exists() && !upper.exists());
    }
}
