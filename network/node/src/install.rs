//! Puts the CNI plugin into the node's folder of plugins. Only ever replaces its own file, and that at one stroke: a
//! runtime that calls meanwhile runs the old or the new one.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// The plugin's name, which networks have as their `type`.
pub const PLUGIN: &str = "kubernest-cni";

/// The plugin is not installed.
#[derive(Debug, thiserror::Error)]
#[error("install the CNI plugin as {to}: mount the node's folder of CNI plugins there")]
pub struct InstallError {
    to: PathBuf,
    source: io::Error,
}

/// Copies the plugin `from` the image into the node's `folder`.
///
/// # Errors
/// [`InstallError`].
pub fn install(from: &Path, folder: &Path) -> Result<(), InstallError> {
    let to = folder.join(PLUGIN);
    // A name that no runtime takes for a plugin's, in the same file system.
    let part = folder.join(format!(".{PLUGIN}.new"));
    let install = || {
        let bytes = std::fs::read(from)?;
        if std::fs::read(&to).is_ok_and(|there| there == bytes) {
            return Ok(());
        }
        std::fs::write(&part, bytes)?;
        std::fs::set_permissions(&part, std::fs::Permissions::from_mode(0o755))?;
        std::fs::rename(&part, &to)
    };
    install().map_err(|source| InstallError { to: to.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn install_replaces_only_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("source");
        let bin = folder.path().join("bin");
        std::fs::create_dir(&bin).unwrap();
        std::fs::write(&from, "1").unwrap();
        install(&from, &bin).unwrap();
        let first = std::fs::metadata(bin.join(PLUGIN)).unwrap();
        assert_eq!(first.permissions().mode() & 0o777, 0o755);
        install(&from, &bin).unwrap();
        let ino = |meta: &std::fs::Metadata| std::os::unix::fs::MetadataExt::ino(meta);
        assert_eq!(ino(&std::fs::metadata(bin.join(PLUGIN)).unwrap()), ino(&first));
        std::fs::write(&from, "2").unwrap();
        install(&from, &bin).unwrap();
        assert_eq!(std::fs::read(bin.join(PLUGIN)).unwrap(), b"2");
        assert_eq!(std::fs::read_dir(&bin).unwrap().count(), 1);
    }
}
