//! Makes what disks need before the domain starts: overlays, sparse files, FAT images.
//!
//! Nothing that exists on a claim is ever changed. An image's disk file is believed as little as the image: it must lie
//! inside the image and must not lead qemu to another file.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use futures::future::try_join_all;
use kubernest_domain::machine::{Backend, CloudInit, CloudInitLayout, Disk, Machine, Source, Text};
use kubernest_domain::{fat, paths};
use serde::Deserialize;

use crate::helper::{self, HelperError};

/// Why a disk is not there.
#[derive(Debug, thiserror::Error)]
#[error("disk {disk}: {step}")]
pub struct PrepareError {
    /// The VMI's name of the disk.
    pub disk: String,
    /// What failed.
    pub step: Step,
}

/// What fails when a disk is made.
#[derive(Debug, thiserror::Error)]
pub enum Step {
    /// Looking for the disk file in an image.
    #[error("finding the disk file below {0}: there must be exactly one file")]
    Ambiguous(PathBuf),
    /// A link leads out of the image.
    #[error("{0} lies outside the image")]
    Outside(PathBuf),
    /// qemu-img.
    #[error("{0}")]
    QemuImg(#[from] HelperError),
    /// qemu-img's answer.
    #[error("qemu-img's description of the image: {0}")]
    Describe(#[from] serde_json::Error),
    /// An image that names other files.
    #[error("the image refers to another file ({0})")]
    Refers(String),
    /// An image format that is not allowed.
    #[error("image format {0}: only qcow2 and raw are supported")]
    Format(String),
    /// Files.
    #[error("{path}: {source}")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// What was wrong.
        source: io::Error,
    },
    /// What is there is no disk.
    #[error("{0} is neither file nor block device")]
    Kind(PathBuf),
    /// No Secret key.
    #[error("none of the keys {0} is in the Secret")]
    Key(String),
    /// FAT.
    #[error("making the image: {0}")]
    Fat(#[from] fat::FatError),
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> Step {
    let path = path.to_owned();
    move |source| Step::File { path, source }
}

/// Makes every disk of a machine.
pub async fn disks(qemu_img: &Path, machine: &Machine) -> Result<(), PrepareError> {
    // Also without a disk: EFI's variables lie there.
    fs::create_dir_all(paths::DISKS).map_err(|source| PrepareError {
        disk: paths::DISKS.to_owned(),
        step: file_error(Path::new(paths::DISKS))(source),
    })?;
    let all = machine.disks.iter().map(|disk| async {
        make(qemu_img, disk).await.map_err(|step| PrepareError {
            disk: disk.name.clone(),
            step,
        })
    });
    try_join_all(all).await.map(drop)
}

async fn make(qemu_img: &Path, disk: &Disk) -> Result<(), Step> {
    let (Backend::Raw(target) | Backend::Qcow2(target) | Backend::Block(target)) = &disk.backend;
    match &disk.source {
        Source::Overlay { image, file } => overlay(qemu_img, image, file.as_deref(), target).await,
        Source::Keep { size } => keep(target, *size),
        Source::Empty { size } => sparse(target, *size),
        Source::Device => match fs::metadata(target).map_err(file_error(target))?.file_type() {
            kind if kind.is_block_device() => Ok(()),
            _ => Err(Step::Kind(target.clone())),
        },
        Source::Ephemeral { base } => ephemeral(qemu_img, base, target).await,
        Source::CloudInit(data) => {
            let label = match data.layout {
                CloudInitLayout::NoCloud => fat::CLOUD_INIT_LABEL,
                CloudInitLayout::ConfigDrive => fat::CONFIG_DRIVE_LABEL,
            };
            write(target, &fat::image(label, disk.sector_bytes(), &cloud_init(data)?)?)
        }
        Source::Files { directory, label } => {
            write(target, &fat::image(label, disk.sector_bytes(), &files(directory)?)?)
        }
    }
}

/// What `qemu-img info --output=json` says.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Described {
    format: String,
    backing_filename: Option<String>,
    #[serde(default)]
    format_specific: FormatSpecific,
}

#[derive(Default, Deserialize)]
struct FormatSpecific {
    #[serde(default)]
    data: FormatData,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FormatData {
    data_file: Option<String>,
}

async fn overlay(qemu_img: &Path, image: &Path, file: Option<&Path>, target: &Path) -> Result<(), Step> {
    let base = match file {
        Some(file) => image.join(file),
        None => only_file(&image.join(paths::CONTAINER_DISK_DIR))?,
    };
    let root = fs::canonicalize(image).map_err(file_error(image))?;
    let base = fs::canonicalize(&base).map_err(file_error(&base))?;
    if !base.starts_with(&root) {
        return Err(Step::Outside(base));
    }
    if !base.is_file() {
        return Err(Step::Kind(base));
    }
    let described = helper::output(qemu_img, &["info".as_ref(), "--output=json".as_ref(), base.as_os_str()]).await?;
    let described: Described = serde_json::from_slice(&described)?;
    if let Some(other) = described.backing_filename.or(described.format_specific.data.data_file) {
        return Err(Step::Refers(other));
    }
    if !matches!(described.format.as_str(), "qcow2" | "raw") {
        return Err(Step::Format(described.format));
    }
    create_overlay(qemu_img, &described.format, &base, target).await
}

/// An overlay over a claim's disk. Whatever the claim holds is read as raw: no byte in it makes qemu open another file.
async fn ephemeral(qemu_img: &Path, base: &Path, target: &Path) -> Result<(), Step> {
    let kind = fs::symlink_metadata(base).map_err(file_error(base))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Step::Kind(base.to_owned()));
    }
    create_overlay(qemu_img, "raw", base, target).await
}

async fn create_overlay(qemu_img: &Path, format: &str, base: &Path, target: &Path) -> Result<(), Step> {
    let create = ["create", "-q", "-f", "qcow2", "-F", format, "-b"].map(OsStr::new);
    let create = [&create[..], &[base.as_os_str(), target.as_os_str()]].concat();
    helper::output(qemu_img, &create).await?;
    Ok(())
}

fn only_file(directory: &Path) -> Result<PathBuf, Step> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(file_error(directory))?.take(64) {
        let path = entry.map_err(file_error(directory))?.path();
        if path.is_file() {
            found.push(path);
        }
    }
    match (found.pop(), found.is_empty()) {
        (Some(file), true) => Ok(file),
        _ => Err(Step::Ambiguous(directory.to_owned())),
    }
}

/// The raw disk of a claim: made when absent, otherwise left as it is.
fn keep(path: &Path, size: u64) -> Result<(), Step> {
    match fs::symlink_metadata(path) {
        Ok(there) if there.is_file() => Ok(()),
        Ok(_) => Err(Step::Kind(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => sparse(path, size),
        Err(error) => Err(file_error(path)(error)),
    }
}

fn sparse(path: &Path, size: u64) -> Result<(), Step> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o660)
        .open(path)
        .map_err(file_error(path))?;
    file.set_len(size).map_err(file_error(path))
}

fn write(path: &Path, content: &[u8]) -> Result<(), Step> {
    fs::write(path, content).map_err(file_error(path))
}

fn cloud_init(data: &CloudInit) -> Result<Vec<(String, Vec<u8>)>, Step> {
    let [meta_data, user_data, network_data] = match data.layout {
        CloudInitLayout::NoCloud => ["meta-data", "user-data", "network-config"],
        CloudInitLayout::ConfigDrive => [
            "openstack/latest/meta_data.json",
            "openstack/latest/user_data",
            "openstack/latest/network_data.json",
        ],
    };
    let mut files = vec![
        (meta_data.to_owned(), with_keys(data)?.into_bytes()),
        (user_data.to_owned(), text(&data.user_data)?),
    ];
    if let Some(content) = &data.network_data {
        files.push((network_data.to_owned(), text(content)?));
    }
    Ok(files)
}

/// The meta data with the keys that are in the folders now, numbered as cloud-init's sources want them.
fn with_keys(data: &CloudInit) -> Result<String, Step> {
    let mut meta_data = data.meta_data.clone();
    let mut keys = serde_json::Map::new();
    let mut bytes = 0;
    for folder in &data.ssh_keys {
        for (_, content) in files(folder)? {
            bytes += content.len();
            if bytes > fat::MAX_CONTENT {
                let files = data.ssh_keys.len();
                return Err(fat::FatError::TooLarge { files, bytes }.into());
            }
            // One entry a key: cloud-init takes what follows the first for its comment.
            let text = String::from_utf8_lossy(&content);
            let lines = text.lines().map(str::trim);
            for key in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
                keys.insert(keys.len().to_string(), key.into());
            }
        }
    }
    if !keys.is_empty() {
        let name = match data.layout {
            CloudInitLayout::NoCloud => "public-keys",
            CloudInitLayout::ConfigDrive => "public_keys",
        };
        meta_data.insert(name.to_owned(), keys.into());
    }
    Ok(serde_json::Value::Object(meta_data).to_string())
}

fn text(text: &Text) -> Result<Vec<u8>, Step> {
    match text {
        Text::Inline(bytes) => Ok(bytes.clone()),
        Text::Mounted(candidates) => match candidates.iter().find(|path| path.exists()) {
            Some(path) => read(path),
            None => {
                let keys: Vec<_> = candidates
                    .iter()
                    .filter_map(|path| path.file_name()?.to_str())
                    .collect();
                Err(Step::Key(keys.join(", ")))
            }
        },
    }
}

/// The keys of a mounted Secret or ConfigMap; its `..data` machinery is not one.
fn files(directory: &Path) -> Result<Vec<(String, Vec<u8>)>, Step> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(file_error(directory))? {
        let entry = entry.map_err(file_error(directory))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("..") && entry.path().is_file() {
            files.push((name, read(&entry.path())?));
        }
    }
    files.sort();
    Ok(files)
}

/// At most one byte more than an image may hold, so that too much is refused there.
fn read(path: &Path) -> Result<Vec<u8>, Step> {
    let mut content = Vec::new();
    let file = fs::File::open(path).map_err(file_error(path))?;
    file.take(fat::MAX_CONTENT as u64 + 1)
        .read_to_end(&mut content)
        .map_err(file_error(path))?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prepare_keeps_what_is_on_a_claim() {
        let claim = tempfile::tempdir().unwrap();
        let disk = claim.path().join("disk.img");
        keep(&disk, 1 << 20).unwrap();
        assert_eq!(fs::metadata(&disk).unwrap().len(), 1 << 20);
        fs::write(&disk, b"precious").unwrap();
        keep(&disk, 1 << 20).unwrap();
        assert_eq!(fs::read(&disk).unwrap(), b"precious");
        fs::remove_file(&disk).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &disk).unwrap();
        assert!(matches!(keep(&disk, 1), Err(Step::Kind(_))));
    }

    #[tokio::test]
    async fn prepare_refuses_images_that_lead_elsewhere() {
        let qemu_img = Path::new("/usr/bin/qemu-img");
        assert!(qemu_img.exists(), "install qemu-utils");
        let image = tempfile::tempdir().unwrap();
        let out = image.path().join("overlay.qcow2");
        let at = |name: &str| image.path().join(name);
        std::os::unix::fs::symlink("/etc/passwd", at("link")).unwrap();
        let refused = overlay(qemu_img, image.path(), Some(Path::new("link")), &out).await;
        assert!(matches!(refused, Err(Step::Outside(_))), "{refused:?}");
        sparse(&at("raw"), 1 << 20).unwrap();
        let create = |args: &[&str]| {
            let status = std::process::Command::new(qemu_img)
                .arg("create")
                .arg("-q")
                .args(args)
                .status()
                .unwrap();
            assert!(status.success());
        };
        let (raw, backed, split) = (at("raw"), at("backed"), at("split"));
        create(&[
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            raw.to_str().unwrap(),
            backed.to_str().unwrap(),
        ]);
        let refused = overlay(qemu_img, image.path(), Some(Path::new("backed")), &out).await;
        assert!(matches!(refused, Err(Step::Refers(_))), "{refused:?}");
        let data_file = format!("data_file={},data_file_raw=on", at("data").display());
        create(&["-f", "qcow2", "-o", &data_file, split.to_str().unwrap(), "1M"]);
        let refused = overlay(qemu_img, image.path(), Some(Path::new("split")), &out).await;
        assert!(matches!(refused, Err(Step::Refers(_))), "{refused:?}");
        overlay(qemu_img, image.path(), Some(Path::new("raw")), &out)
            .await
            .unwrap();
        assert!(out.exists());
    }

    #[test]
    fn prepare_files_of_a_mounted_secret() {
        let mount = tempfile::tempdir().unwrap();
        fs::create_dir(mount.path().join("..2026")).unwrap();
        fs::write(mount.path().join("..2026/key"), b"value").unwrap();
        std::os::unix::fs::symlink("..2026", mount.path().join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/key", mount.path().join("key")).unwrap();
        assert_eq!(files(mount.path()).unwrap(), [("key".to_owned(), b"value".to_vec())]);
    }
}
