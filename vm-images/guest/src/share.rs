//! The bootstrap share: a read-only virtiofs mount of the slot's Secret.
//!
//! It reads the document and the files' contents and notices changes; what to do about them is the agent's business.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kubernest_bootstrap::{NODE_CONFIG_KEY, NodeConfig, ParseError, SHARE_TAG};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use crate::disk;
use crate::files::{self, FileError};

/// Why the share gave nothing usable.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The mount point could not be made.
    #[error("cannot make the mount point of the bootstrap share")]
    MountPoint(#[source] std::io::Error),
    /// No share of that tag.
    #[error(
        "the VM has no virtiofs share with tag {SHARE_TAG:?}; give its VirtualMachineInstance a secret volume and a filesystem of that name"
    )]
    Missing(#[source] Errno),
    /// Any other failure of mount(2).
    #[error("cannot mount the bootstrap share")]
    Mount(#[source] Errno),
    /// A key that is not the name of a file on the share.
    #[error("{path} names the key {key:?}, which cannot be a key of a Secret")]
    Key {
        /// File that wants it.
        path: String,
        /// The odd key.
        key: String,
    },
    /// A file of the share is missing, unreadable or too large.
    #[error("the bootstrap share is incomplete")]
    Read(#[source] FileError),
    /// The document is not one that this guest carries out.
    #[error("the bootstrap share cannot be used")]
    Parse(#[source] ParseError),
    /// The Secret was replaced while it was read, time and again.
    #[error("the bootstrap share keeps changing while it is read")]
    Unsteady,
}

/// What one state of the share says.
#[derive(Debug)]
pub struct Bootstrap {
    /// The document.
    pub config: NodeConfig,
    /// Content of each key that the document's files name.
    pub contents: BTreeMap<String, Vec<u8>>,
}

/// Tells one state of the share from another; equal stamps mean equal content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp(String);

/// A mounted share.
pub struct Share {
    path: PathBuf,
}

impl Share {
    /// Mounts the share at `path`, unless it is mounted already.
    pub fn mount(path: &Path) -> Result<Self, ShareError> {
        let share = Self::at(path);
        if disk::is_mounted(path) {
            return Ok(share);
        }
        fs::create_dir_all(path).map_err(ShareError::MountPoint)?;
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        match mount(Some(SHARE_TAG), path, Some("virtiofs"), flags, None::<&str>) {
            Ok(()) => Ok(share),
            Err(error @ (Errno::EINVAL | Errno::ENODEV)) => Err(ShareError::Missing(error)),
            Err(error) => Err(ShareError::Mount(error)),
        }
    }

    /// A share that is a plain folder.
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Two cheap calls: the link `..data`, which a kubelet swings to a new folder with every change of a Secret
    /// (pkg/volume/util/atomic_writer.go), or else times and sizes.
    pub fn stamp(&self) -> Stamp {
        if let Ok(target) = fs::read_link(self.path.join("..data")) {
            return Stamp(target.to_string_lossy().into_owned());
        }
        let mut entries: Vec<String> = fs::read_dir(&self.path)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let found = fs::metadata(entry.path()).ok()?;
                Some(format!(
                    "{} {} {}.{}",
                    entry.file_name().to_string_lossy(),
                    found.size(),
                    found.mtime(),
                    found.mtime_nsec()
                ))
            })
            .collect();
        entries.sort();
        Stamp(entries.join("\n"))
    }

    /// Reads the document and all that it names, from one state of the share.
    pub fn read(&self) -> Result<(Stamp, Bootstrap), ShareError> {
        for _ in 0..5 {
            let stamp = self.stamp();
            let read = self.read_once();
            if self.stamp() == stamp {
                return Ok((stamp, read?));
            }
        }
        Err(ShareError::Unsteady)
    }

    fn read_once(&self) -> Result<Bootstrap, ShareError> {
        let text = files::read(&self.path.join(NODE_CONFIG_KEY)).map_err(ShareError::Read)?;
        let config = NodeConfig::parse(&text).map_err(ShareError::Parse)?;
        let mut contents = BTreeMap::new();
        for file in &config.files {
            if file.key.contains('/') || file.key.starts_with("..") || file.key.is_empty() {
                return Err(ShareError::Key {
                    path: file.path.clone(),
                    key: file.key.clone(),
                });
            }
            if !contents.contains_key(&file.key) {
                let content = files::read(&self.path.join(&file.key)).map_err(ShareError::Read)?;
                contents.insert(file.key.clone(), content);
            }
        }
        Ok(Bootstrap { config, contents })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const DOCUMENT: &str = r#"{"apiVersion":"bootstrap.kubernest.io/v1","hostname":"a","interfaces":[],
        "files":[{"path":"/etc/x","key":"KEY","mode":"0600"}],"stages":[],"cni":{"type":"flannel"}}"#;

    fn publish(folder: &Path, version: &str, document: &str) {
        let data = folder.join(version);
        fs::create_dir(&data).unwrap();
        fs::write(data.join("x"), version).unwrap();
        fs::write(data.join(NODE_CONFIG_KEY), document).unwrap();
        symlink(version, folder.join("..tmp")).unwrap();
        fs::rename(folder.join("..tmp"), folder.join("..data")).unwrap();
        for name in ["x", NODE_CONFIG_KEY] {
            let _ = symlink(Path::new("..data").join(name), folder.join(name));
        }
    }

    #[test]
    fn share_stamp_changes_with_the_kubelets_data_link() {
        let folder = tempfile::tempdir().unwrap();
        let share = Share::at(folder.path());
        publish(folder.path(), "..one", &DOCUMENT.replace("KEY", "x"));
        let (first, bootstrap) = share.read().unwrap();
        assert_eq!(bootstrap.contents["x"], b"..one");
        assert_eq!(share.stamp(), first);
        publish(folder.path(), "..two", &DOCUMENT.replace("KEY", "x"));
        let (second, bootstrap) = share.read().unwrap();
        assert_ne!(second, first);
        assert_eq!(bootstrap.contents["x"], b"..two");
    }

    #[test]
    fn share_read_refuses_keys_that_leave_the_share() {
        let folder = tempfile::tempdir().unwrap();
        publish(folder.path(), "..one", &DOCUMENT.replace("KEY", "../../etc/shadow"));
        assert!(matches!(Share::at(folder.path()).read(), Err(ShareError::Key { .. })));
    }

    #[test]
    fn share_read_names_a_missing_key() {
        let folder = tempfile::tempdir().unwrap();
        publish(folder.path(), "..one", &DOCUMENT.replace("KEY", "absent.pem"));
        let error = Share::at(folder.path()).read().unwrap_err();
        assert!(crate::console::chain(&error).contains("absent.pem"), "{error:?}");
    }
}
