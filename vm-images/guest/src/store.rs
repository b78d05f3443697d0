//! The container images that the node image brings: makes a containerd root of them on the data disk.
//!
//! Layers stay in the node image: a snapshot is a link to its unpacked folder there, so nothing is copied but a few
//! hundred kilobytes of metadata. A data disk that was seeded by another node image is seeded afresh: what it holds
//! is a cache, and its links would point at folders that are gone.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// File in the seed that names its content, and in the containerd root the seed that it was made from.
const STAMP: &str = "seed-id";
/// Folder of unpacked layers below a containerd root (containerd's overlayfs snapshotter).
const SNAPSHOTS: &str = "io.containerd.snapshotter.v1.overlayfs/snapshots";

/// Why the store could not be prepared.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}", .path.display())]
pub struct StoreError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError { what, path, source }
}

/// Makes `root` the containerd root that `seed` describes; true if it was not before. containerd must not run yet.
pub fn seed(seed: &Path, root: &Path) -> Result<bool, StoreError> {
    let stamp = seed.join(STAMP);
    let wanted = fs::read(&stamp).map_err(failed("read", &stamp))?;
    if fs::read(root.join(STAMP)).is_ok_and(|found| found == wanted) {
        return Ok(false);
    }
    empty(root)?;
    copy(seed, root, seed)?;
    // Last, so that a seeding cut short is repeated.
    let stamp = root.join(STAMP);
    fs::write(&stamp, wanted).map_err(failed("write", &stamp))?;
    Ok(true)
}

fn empty(root: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(root).map_err(failed("list", root))? {
        let entry = entry.map_err(failed("list", root))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(failed("inspect", &path))?;
        if kind.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        }
        .map_err(failed("remove", &path))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path, seed: &Path) -> Result<(), StoreError> {
    fs::create_dir_all(to).map_err(failed("make", to))?;
    let layers = from == seed.join(SNAPSHOTS);
    for entry in fs::read_dir(from).map_err(failed("list", from))? {
        let entry = entry.map_err(failed("list", from))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if layers {
            symlink(&source, &target).map_err(failed("link", &target))?;
        } else if source.is_dir() {
            copy(&source, &target, seed)?;
        } else if entry.file_name() != STAMP {
            fs::copy(&source, &target).map_err(failed("copy", &target))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seed_folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join(SNAPSHOTS).join("1/fs")).unwrap();
        fs::write(folder.path().join(SNAPSHOTS).join("1/fs/pause"), "program").unwrap();
        fs::create_dir_all(folder.path().join("io.containerd.metadata.v1.bolt")).unwrap();
        fs::write(folder.path().join("io.containerd.metadata.v1.bolt/meta.db"), "db").unwrap();
        fs::write(folder.path().join(STAMP), "first").unwrap();
        folder
    }

    #[test]
    fn store_seed_links_layers_and_copies_the_rest_once() {
        let (seed_from, root) = (seed_folder(), tempfile::tempdir().unwrap());
        assert!(seed(seed_from.path(), root.path()).unwrap());
        let layer = root.path().join(SNAPSHOTS).join("1");
        assert!(layer.is_symlink() && layer.join("fs/pause").exists());
        fs::write(root.path().join("io.containerd.metadata.v1.bolt/meta.db"), "changed").unwrap();
        assert!(!seed(seed_from.path(), root.path()).unwrap());
        assert_eq!(
            fs::read(root.path().join("io.containerd.metadata.v1.bolt/meta.db")).unwrap(),
            b"changed"
        );
    }

    #[test]
    fn store_seed_starts_afresh_for_another_image_and_spares_the_seed() {
        let (seed_from, root) = (seed_folder(), tempfile::tempdir().unwrap());
        seed(seed_from.path(), root.path()).unwrap();
        fs::write(root.path().join("io.containerd.metadata.v1.bolt/meta.db"), "changed").unwrap();
        fs::write(seed_from.path().join(STAMP), "second").unwrap();
        assert!(seed(seed_from.path(), root.path()).unwrap());
        assert_eq!(
            fs::read(root.path().join("io.containerd.metadata.v1.bolt/meta.db")).unwrap(),
            b"db"
        );
        assert!(seed_from.path().join(SNAPSHOTS).join("1/fs/pause").exists());
    }
}
