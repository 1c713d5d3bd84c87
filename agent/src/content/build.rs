//! Packs a root directory, or one static program, into an OCI image layout (image-spec image-layout.md), so that users
//! need no other tool. The same input gives the same digests: names are sorted, times are zero, owners are root.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use edged_model::id::Digest;
use flate2::Compression;
use flate2::write::GzEncoder;
use oci_spec::image::{
    Arch, ConfigBuilder, Descriptor, DescriptorBuilder, ImageConfigurationBuilder, ImageIndexBuilder,
    ImageManifestBuilder, MediaType, Os, PlatformBuilder, RootFsBuilder,
};
use sha2::{Digest as _, Sha256};

#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("{path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the image's documents")]
    Document(#[from] oci_spec::OciSpecError),
}

/// What to pack.
#[derive(Debug, Clone, Default)]
pub struct BuildSpec {
    /// Each directory becomes one layer, in order; a plain file becomes `/<its name>`.
    pub layers: Vec<PathBuf>,
    /// `amd64`, `arm64`, `arm`: the names of GOARCH.
    pub architecture: String,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub workdir: Option<String>,
    pub user: Option<String>,
    pub stop_signal: Option<String>,
    /// `org.opencontainers.image.ref.name`.
    pub reference: String,
}

/// Writes the layout to `out`, a new or empty directory, and returns the digest of the image manifest.
pub fn build_layout(spec: &BuildSpec, out: &Path) -> Result<Digest, BuildError> {
    let blobs = out.join("blobs/sha256");
    fs::create_dir_all(&blobs).map_err(file(&blobs))?;
    let mut layers = Vec::new();
    let mut diff_ids = Vec::new();
    for source in &spec.layers {
        let (layer, diff_id) = pack(source, &blobs)?;
        layers.push(layer);
        diff_ids.push(diff_id.to_string());
    }
    let mut run =
        ConfigBuilder::default().entrypoint(spec.entrypoint.clone()).cmd(spec.cmd.clone()).env(spec.env.clone());
    if let Some(workdir) = &spec.workdir {
        run = run.working_dir(workdir.clone());
    }
    if let Some(user) = &spec.user {
        run = run.user(user.clone());
    }
    if let Some(signal) = &spec.stop_signal {
        run = run.stop_signal(signal.clone());
    }
    let architecture = Arch::from(spec.architecture.as_str());
    let rootfs = RootFsBuilder::default().typ("layers").diff_ids(diff_ids).build()?;
    let configuration = ImageConfigurationBuilder::default()
        .architecture(architecture.clone())
        .os(Os::Linux)
        .config(run.build()?)
        .rootfs(rootfs)
        .build()?;
    let config = blob(&blobs, &json(&configuration)?, MediaType::ImageConfig)?;
    let manifest = ImageManifestBuilder::default()
        .schema_version(2_u32)
        .media_type(MediaType::ImageManifest)
        .config(config)
        .layers(layers)
        .build()?;
    let bytes = json(&manifest)?;
    let mut descriptor = blob(&blobs, &bytes, MediaType::ImageManifest)?;
    descriptor.set_platform(Some(PlatformBuilder::default().architecture(architecture).os(Os::Linux).build()?));
    let name = ("org.opencontainers.image.ref.name".to_owned(), spec.reference.clone());
    descriptor.set_annotations(Some([name].into()));
    let index = ImageIndexBuilder::default().schema_version(2_u32).manifests(vec![descriptor]).build()?;
    let write = |name: &str, bytes: &[u8]| {
        let path = out.join(name);
        fs::write(&path, bytes).map_err(file(&path))
    };
    write("index.json", &json(&index)?)?;
    write("oci-layout", b"{\"imageLayoutVersion\":\"1.0.0\"}")?;
    Ok(Digest::of(&bytes))
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> BuildError + '_ {
    move |source| BuildError::File { path: path.to_owned(), source }
}

fn json<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, BuildError> {
    serde_json::to_vec(value).map_err(|error| BuildError::Document(error.into()))
}

fn blob(blobs: &Path, bytes: &[u8], media_type: MediaType) -> Result<Descriptor, BuildError> {
    let digest = Digest::of(bytes);
    let path = blobs.join(digest.hex());
    fs::write(&path, bytes).map_err(file(&path))?;
    descriptor(digest, bytes.len() as u64, media_type)
}

fn descriptor(digest: Digest, size: u64, media_type: MediaType) -> Result<Descriptor, BuildError> {
    let digest: oci_spec::image::Digest = digest.to_string().parse()?;
    Ok(DescriptorBuilder::default().media_type(media_type).size(size).digest(digest).build()?)
}

/// A writer that hashes and counts what goes through it.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), bytes: 0 }
    }

    fn digest(&self) -> Digest {
        Digest::from_bytes(self.hash.clone().finalize().into())
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// One layer as a blob, written as it is packed; and the digest of what is in it.
fn pack(source: &Path, blobs: &Path) -> Result<(Descriptor, Digest), BuildError> {
    let staged = blobs.join("layer.new");
    let blob = File::create(&staged).map_err(file(&staged))?;
    let gzip = GzEncoder::new(Hashing::new(io::BufWriter::new(blob)), Compression::default());
    let mut packer = Packer { archive: tar::Builder::new(Hashing::new(gzip)), links: HashMap::new() };
    if source.is_dir() {
        packer.directory(source, Path::new(""))?;
    } else {
        let name = source.file_name().map(PathBuf::from).unwrap_or_default();
        packer.entry(source, &name)?;
    }
    let finish = || -> io::Result<(Digest, Digest, u64)> {
        let archive = packer.archive.into_inner()?;
        let diff_id = archive.digest();
        let mut compressed = archive.inner.finish()?;
        compressed.flush()?;
        compressed.inner.get_ref().sync_all()?;
        Ok((diff_id, compressed.digest(), compressed.bytes))
    };
    let (diff_id, digest, size) = finish().map_err(file(source))?;
    fs::rename(&staged, blobs.join(digest.hex())).map_err(file(&staged))?;
    Ok((descriptor(digest, size, MediaType::ImageLayerGzip)?, diff_id))
}

struct Packer<W: Write> {
    archive: tar::Builder<W>,
    /// Device and inode of a file with several names, and the first of them.
    links: HashMap<(u64, u64), PathBuf>,
}

impl<W: Write> Packer<W> {
    fn directory(&mut self, source: &Path, inside: &Path) -> Result<(), BuildError> {
        let mut names: Vec<_> = fs::read_dir(source)
            .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.file_name())).collect())
            .map_err(file(source))?;
        names.sort();
        for name in names {
            let (path, inside) = (source.join(&name), inside.join(&name));
            self.entry(&path, &inside)?;
            if path.is_dir() && !path.is_symlink() {
                self.directory(&path, &inside)?;
            }
        }
        Ok(())
    }

    /// Of what the file system knows, type, content and mode (with the setuid bits) go into the image.
    fn entry(&mut self, path: &Path, inside: &Path) -> Result<(), BuildError> {
        let meta = fs::symlink_metadata(path).map_err(file(path))?;
        let mut header = tar::Header::new_gnu();
        header.set_mode(meta.mode() & 0o7777);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        let kind = meta.file_type();
        let added = if kind.is_dir() {
            header.set_entry_type(tar::EntryType::Directory);
            self.archive.append_data(&mut header, inside.join(""), io::empty())
        } else if kind.is_symlink() {
            header.set_entry_type(tar::EntryType::Symlink);
            fs::read_link(path).and_then(|target| self.archive.append_link(&mut header, inside, target))
        } else if kind.is_file() {
            match self.links.get(&(meta.dev(), meta.ino())) {
                Some(first) => {
                    header.set_entry_type(tar::EntryType::Link);
                    self.archive.append_link(&mut header, inside, first)
                }
                None => {
                    if meta.nlink() > 1 {
                        self.links.insert((meta.dev(), meta.ino()), inside.to_owned());
                    }
                    header.set_size(meta.len());
                    // A file that grows meanwhile must not spoil the archive.
                    File::open(path)
                        .and_then(|content| self.archive.append_data(&mut header, inside, content.take(meta.len())))
                }
            }
        } else if kind.is_fifo() {
            header.set_entry_type(tar::EntryType::Fifo);
            self.archive.append_data(&mut header, inside, io::empty())
        } else {
            Err(io::Error::other("neither file, directory, link nor fifo: an image cannot hold it"))
        };
        added.map_err(file(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_same_input_gives_the_same_image_whatever_its_times() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::write(root.join("bin/tool"), "tool").unwrap();
        fs::set_permissions(root.join("bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::hard_link(root.join("bin/tool"), root.join("bin/other")).unwrap();
        std::os::unix::fs::symlink("bin/tool", root.join("link")).unwrap();
        let spec = BuildSpec { layers: vec![root.clone()], architecture: "amd64".to_owned(), ..BuildSpec::default() };
        let first = build_layout(&spec, &dir.path().join("one")).unwrap();
        File::open(root.join("bin/tool")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(build_layout(&spec, &dir.path().join("two")).unwrap(), first);
        fs::write(root.join("bin/tool"), "tooL").unwrap();
        assert_ne!(build_layout(&spec, &dir.path().join("three")).unwrap(), first);
        let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
        let error = build_layout(&spec, &dir.path().join("four")).unwrap_err();
        assert!(error.to_string().ends_with("socket"), "{error}");
    }
}
