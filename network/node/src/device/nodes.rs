//! Device nodes of our own for the launcher's user. Those of the host stay as they are, for root only.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use kubernest_plan::LAUNCHER_UID;
use nix::sys::stat::{Mode, SFlag, major, makedev, minor, mknod};

/// Numbers of /dev/net/tun, the same everywhere (devices.txt of the kernel's documentation).
const TUN: (u64, u64) = (10, 200);
/// Numbers of /dev/kvm, the same everywhere.
const KVM: (u64, u64) = (10, 232);

/// A device node was not made.
#[derive(Debug, thiserror::Error)]
#[error("make the device node {path}: kubernest-node must run privileged")]
pub struct NodeError {
    path: PathBuf,
    source: io::Error,
}

/// Makes the device node `tun` or `kvm` in a folder, for the launcher's user only; one that is there and right stays.
///
/// # Errors
/// [`NodeError`].
pub fn make(folder: &Path, name: &str) -> Result<PathBuf, NodeError> {
    let path = folder.join(name);
    let (wanted_major, wanted_minor) = if name == "kvm" { KVM } else { TUN };
    let make = || {
        std::fs::create_dir_all(folder)?;
        let there = std::fs::symlink_metadata(&path).ok();
        let right = there.as_ref().is_some_and(|meta| {
            let rdev = meta.rdev();
            meta.file_type().is_char_device() && (major(rdev), minor(rdev)) == (wanted_major, wanted_minor)
        });
        if !right {
            if there.is_some() {
                std::fs::remove_file(&path)?;
            }
            mknod(
                &path,
                SFlag::S_IFCHR,
                Mode::empty(),
                makedev(wanted_major, wanted_minor),
            )?;
        }
        chown(&path, Some(LAUNCHER_UID), Some(LAUNCHER_UID))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
    };
    make().map_err(|source| NodeError {
        path: path.clone(),
        source,
    })?;
    Ok(path)
}
