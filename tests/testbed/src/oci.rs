//! OCI archives: makes small ones from files of this machine, and reads name and digest of any.
//!
//! Format: OCI image layout 1.0 in a tar file. It deliberately compresses nothing: the archives never leave the machine.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::run::{self, run};

/// Why an archive could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("cannot prepare {path}")]
    File {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A command failed.
    #[error("cannot pack or unpack {path}")]
    Tar {
        /// Which archive.
        path: String,
        /// Why.
        #[source]
        source: run::Error,
    },
    /// It is not an OCI archive with one image.
    #[error(
        "{path} is not an OCI archive with one image: make it with `buildah push <image> oci-archive:{path}:<name>`"
    )]
    NotOne {
        /// Which archive.
        path: String,
    },
}

/// A file of an image: what it is and where it goes.
pub type Entry = (Source, String);

/// What a file of an image is made from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// A file of this machine, with its mode.
    File(PathBuf),
    /// A script, made executable.
    Script(&'static str),
}

/// What an image runs.
#[derive(Debug, Clone, Copy)]
pub struct Config<'a> {
    /// Its name, as in `localhost/x:1`.
    pub name: &'a str,
    /// The entry point.
    pub entrypoint: &'a [&'a str],
    /// The user and group, as numbers.
    pub user: &'a str,
}

/// Makes the archive at `to` unless it is there. `scratch` is a directory that is used and removed.
pub async fn make(to: &Path, scratch: &Path, config: &Config<'_>, files: &[Entry]) -> Result<(), Error> {
    if to.exists() {
        return Ok(());
    }
    let (root, layout) = (scratch.join("root"), scratch.join("layout"));
    let blobs = layout.join("blobs/sha256");
    fs::remove_dir_all(scratch).ok();
    for dir in [&root, &blobs] {
        fs::create_dir_all(dir).map_err(file_error(dir))?;
    }
    for (from, into) in files {
        let into = root.join(into.trim_start_matches('/'));
        if let Some(parent) = into.parent() {
            fs::create_dir_all(parent).map_err(file_error(parent))?;
        }
        match from {
            Source::File(from) => drop(fs::copy(from, &into).map_err(file_error(from))?),
            Source::Script(text) => {
                use std::os::unix::fs::PermissionsExt;
                fs::write(&into, text).map_err(file_error(&into))?;
                fs::set_permissions(&into, fs::Permissions::from_mode(0o755)).map_err(file_error(&into))?;
            }
        }
    }
    let layer = scratch.join("layer.tar");
    tar(&layer, &root).await?;
    let sum = run(&["sha256sum", &layer.display().to_string()])
        .await
        .map_err(tar_error(to))?;
    let digest = sum.split_whitespace().next().unwrap_or_default().to_owned();
    let size = fs::metadata(&layer).map_err(file_error(&layer))?.len();
    fs::rename(&layer, blobs.join(&digest)).map_err(file_error(&layer))?;

    let image = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {"Entrypoint": config.entrypoint, "User": config.user, "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    let image = blob(&blobs, "application/vnd.oci.image.config.v1+json", &image)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": image,
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": format!("sha256:{digest}"), "size": size}],
    });
    let mut manifest = blob(&blobs, "application/vnd.oci.image.manifest.v1+json", &manifest)?;
    manifest["annotations"] =
        json!({"org.opencontainers.image.ref.name": config.name, "io.containerd.image.name": config.name});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    let write = |name: &str, value: Value| {
        fs::write(layout.join(name), value.to_string()).map_err(file_error(&layout.join(name)))
    };
    write("index.json", index)?;
    write("oci-layout", json!({"imageLayoutVersion": "1.0.0"}))?;
    let new = to.with_added_extension("new");
    tar(&new, &layout).await?;
    fs::rename(&new, to).map_err(file_error(to))?;
    fs::remove_dir_all(scratch).map_err(file_error(scratch))
}

/// The image in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its name with tag.
    pub name: String,
    /// The digest of its manifest, `sha256:…`.
    pub digest: String,
}

impl Image {
    /// The name by which pods refer to exactly this image: `localhost/x@sha256:…`.
    pub fn digest_reference(&self) -> String {
        let slash = self.name.rfind('/').map_or(0, |i| i + 1);
        let end = self.name[slash..]
            .find([':', '@'])
            .map_or(self.name.len(), |i| slash + i);
        format!("{}@{}", &self.name[..end], self.digest)
    }
}

/// Reads an archive's index.
pub async fn inspect(archive: &Path) -> Result<Image, Error> {
    let path = archive.display().to_string();
    // Stops at the first: an archive may be gigabytes.
    let index = match run(&["tar", "--occurrence=1", "-xOf", &path, "index.json"]).await {
        Err(run::Error::Failed { .. }) => run(&["tar", "--occurrence=1", "-xOf", &path, "./index.json"]).await,
        other => other,
    };
    let index: Value = serde_json::from_str(&index.map_err(tar_error(archive))?).unwrap_or_default();
    let stem = archive.file_stem().unwrap_or_default().to_string_lossy();
    image(&index, &stem).ok_or(Error::NotOne { path })
}

/// The single image of an index; without a name of its own it takes that of the file.
fn image(index: &Value, stem: &str) -> Option<Image> {
    let [manifest] = index["manifests"].as_array()?.as_slice() else {
        return None;
    };
    let annotation = |key: &str| manifest["annotations"][key].as_str();
    let name = annotation("io.containerd.image.name").or_else(|| annotation("org.opencontainers.image.ref.name"));
    let name = match name {
        Some(name) if name.contains('/') => name.to_owned(),
        Some(name) if name.contains(':') => format!("localhost/{name}"),
        Some(tag) => format!("localhost/{stem}:{tag}"),
        None => format!("localhost/{stem}:latest"),
    };
    Some(Image {
        name,
        digest: manifest["digest"].as_str()?.to_owned(),
    })
}

fn blob(dir: &Path, media_type: &str, value: &Value) -> Result<Value, Error> {
    let text = value.to_string();
    let digest: String = Sha256::digest(&text).iter().map(|b| format!("{b:02x}")).collect();
    fs::write(dir.join(&digest), &text).map_err(file_error(dir))?;
    Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": text.len()}))
}

/// The same files give the same bytes, so the same digest.
async fn tar(to: &Path, dir: &Path) -> Result<(), Error> {
    let (file, from) = (to.display().to_string(), dir.display().to_string());
    let fixed = [
        "--sort=name",
        "--mtime=@0",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "--format=gnu",
    ];
    run(&[["tar"].as_slice(), &fixed, &["-C", &from, "-cf", &file, "."]].concat())
        .await
        .map(drop)
        .map_err(tar_error(to))
}

/// This machine's architecture in OCI's words.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error::File { path, source }
}

fn tar_error(path: &Path) -> impl FnOnce(run::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error::Tar { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_digest_reference_replaces_the_tag() {
        let image = |name: &str| {
            Image {
                name: name.into(),
                digest: "sha256:ab".into(),
            }
            .digest_reference()
        };
        assert_eq!(image("localhost/x:1"), "localhost/x@sha256:ab");
        assert_eq!(image("localhost:5000/x"), "localhost:5000/x@sha256:ab");
    }

    #[test]
    fn plan_names_images_without_a_full_name_after_their_file() {
        let index = |annotations: Value| json!({"manifests": [{"digest": "sha256:ab", "annotations": annotations}]});
        let name = |i: Value| image(&i, "api").map(|i| i.name);
        assert_eq!(name(index(json!({}))).as_deref(), Some("localhost/api:latest"));
        assert_eq!(
            name(index(json!({"org.opencontainers.image.ref.name": "dev"}))).as_deref(),
            Some("localhost/api:dev")
        );
        assert_eq!(
            name(index(json!({"org.opencontainers.image.ref.name": "localhost/a:1"}))).as_deref(),
            Some("localhost/a:1")
        );
        assert_eq!(name(json!({"manifests": []})), None);
    }
}
