//! Packs a root directory, or one static program, into an OCI image layout (image-spec image-layout.md), so that users
//! need no other tool. The same input gives the same digests: names are sorted, times are zero, owners are root.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use edged_model::id::Digest;
use flate2::Compression;
use flate2::write::GzEncoder;
use oci_spec::image::{
    Arch, ConfigBuilder, DescriptorBuilder, ImageConfigurationBuilder, ImageIndexBuilder, ImageManifestBuilder,
    MediaType, Os, PlatformBuilder, RootFsBuilder,
};

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
        let archive = archive(source)?;
        diff_ids.push(Digest::of(&archive).to_string());
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        let packed = gzip.write_all(&archive).and_then(|()| gzip.finish()).map_err(file(source))?;
        layers.push(blob(&blobs, &packed, MediaType::ImageLayerGzip)?);
    }
    let mut run = ConfigBuilder::default().entrypoint(spec.entrypoint.clone()).cmd(spec.cmd.clone()).env(spec.env.clone());
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

fn blob(blobs: &Path, bytes: &[u8], media_type: MediaType) -> Result<oci_spec::image::Descriptor, BuildError> {
    let digest = Digest::of(bytes);
    let path = blobs.join(digest.hex());
    fs::write(&path, bytes).map_err(file(&path))?;
    let digest: oci_spec::image::Digest = digest.to_string().parse()?;
    Ok(DescriptorBuilder::default().media_type(media_type).size(bytes.len() as u64).digest(digest).build()?)
}

fn archive(source: &Path) -> Result<Vec<u8>, BuildError> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.mode(tar::HeaderMode::Deterministic);
    builder.follow_symlinks(false);
    if source.is_dir() {
        add_directory(&mut builder, source, Path::new(""))?;
    } else {
        let name = source.file_name().map(PathBuf::from).unwrap_or_default();
        let mut program = File::open(source).map_err(file(source))?;
        builder.append_file(name, &mut program).map_err(file(source))?;
    }
    builder.into_inner().map_err(file(source))
}

fn add_directory(builder: &mut tar::Builder<Vec<u8>>, source: &Path, inside: &Path) -> Result<(), BuildError> {
    let mut names: Vec<_> = fs::read_dir(source)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.file_name())).collect())
        .map_err(file(source))?;
    names.sort();
    for name in names {
        let (path, inside) = (source.join(&name), inside.join(&name));
        builder.append_path_with_name(&path, &inside).map_err(file(&path))?;
        if path.is_dir() && !path.is_symlink() {
            add_directory(builder, &path, &inside)?;
        }
    }
    Ok(())
}
