//! OCI image layouts (image-spec, image-layout.md), made without Docker: directories become layers, and the same
//! directories give the same digests.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use edged_qemu::arch::Arch;
use edged_qemu::process;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// How a container of the image starts.
#[derive(Debug, Clone, Copy, Default)]
pub struct Start {
    pub entrypoint: &'static [&'static str],
    pub cmd: &'static [&'static str],
    pub env: &'static [&'static str],
    pub stop_signal: Option<&'static str>,
}

/// Writes a layout with one image, its layers in order from the bottom, tagged `latest`.
pub fn write(out: &Path, arch: Arch, layers: &[&Path], start: Start) -> Result<()> {
    let blobs = out.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let mut descriptors = Vec::new();
    let mut diff_ids = Vec::new();
    for layer in layers {
        let tar = tar(layer)?;
        diff_ids.push(digest(&tar));
        let scratch = out.join("layer.tar");
        fs::write(&scratch, &tar)?;
        let packed = process::run(Command::new("gzip").args(["-9", "-n", "-c"]).arg(&scratch))?.stdout;
        fs::remove_file(scratch)?;
        descriptors.push(put(&blobs, "application/vnd.oci.image.layer.v1.tar+gzip", &packed)?);
    }
    let config = config(arch, &diff_ids, start);
    let config = put(&blobs, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": descriptors,
    });
    let mut entry = put(&blobs, "application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes())?;
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    let (architecture, variant) = arch.oci();
    entry["platform"] = json!({ "os": "linux", "architecture": architecture });
    if let Some(variant) = variant {
        entry["platform"]["variant"] = json!(variant);
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    });
    fs::write(out.join("index.json"), index.to_string())?;
    fs::write(out.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(())
}

fn config(arch: Arch, diff_ids: &[String], start: Start) -> Value {
    let (architecture, variant) = arch.oci();
    let mut run = json!({ "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"] });
    if let Some(environment) = run["Env"].as_array_mut() {
        environment.extend(start.env.iter().map(|pair| json!(pair)));
    }
    if !start.entrypoint.is_empty() {
        run["Entrypoint"] = json!(start.entrypoint);
    }
    if !start.cmd.is_empty() {
        run["Cmd"] = json!(start.cmd);
    }
    if let Some(signal) = start.stop_signal {
        run["StopSignal"] = json!(signal);
    }
    let mut config = json!({
        "created": "1970-01-01T00:00:00Z",
        "os": "linux",
        "architecture": architecture,
        "config": run,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    if let Some(variant) = variant {
        config["variant"] = json!(variant);
    }
    config
}

/// The directory as an archive that depends on nothing but its content.
fn tar(dir: &Path) -> Result<Vec<u8>> {
    let output = process::run(
        Command::new("tar")
            .args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--format=posix"])
            .args(["--pax-option=delete=atime,delete=ctime", "-cf", "-", "-C"])
            .arg(dir)
            .arg("."),
    )
    .with_context(|| format!("the layer {}", dir.display()))?;
    Ok(output.stdout)
}

pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Stores a blob and gives back its descriptor.
fn put(blobs: &Path, media_type: &str, bytes: &[u8]) -> Result<Value> {
    let digest = digest(bytes);
    fs::write(blobs.join(digest.trim_start_matches("sha256:")), bytes)?;
    Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
}
