//! Writes files whole or not at all.
//!
//! It neither knows what is in them nor who reads them.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Largest file that is read, in bytes: a Secret holds at most 1 MiB (etcd's request limit), so this is plenty.
pub const FILE_MAX: u64 = 4 << 20;

/// Why a file was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Not to be opened or read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Longer than [`FILE_MAX`].
    #[error("{} is larger than {FILE_MAX} bytes", .path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
    },
    /// Not to be created, written or moved into place.
    #[error("cannot write {}", .path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A mode that is no octal number of permission bits.
    #[error("{mode:?} is not a file mode; write it in octal, for example \"0600\"")]
    Mode {
        /// What the document says.
        mode: String,
    },
    /// A path that is not absolute, or climbs.
    #[error("{path:?} is not an absolute path without \"..\"")]
    Path {
        /// What the document says.
        path: String,
    },
}

/// Reads a file of at most [`FILE_MAX`] bytes.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    let failed = |source| FileError::Read {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    File::open(path)
        .map_err(failed)?
        .take(FILE_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    Ok(bytes)
}

/// Permission bits from their octal text.
pub fn parse_mode(text: &str) -> Result<u32, FileError> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| FileError::Mode { mode: text.to_owned() })
}

/// An absolute path without `..`.
pub fn parse_path(text: &str) -> Result<PathBuf, FileError> {
    let path = Path::new(text);
    let climbs = path
        .components()
        .any(|part| matches!(part, std::path::Component::ParentDir));
    if path.is_absolute() && !climbs && path.file_name().is_some() {
        Ok(path.to_owned())
    } else {
        Err(FileError::Path { path: text.to_owned() })
    }
}

/// Makes `path` hold `content` with `mode`; true if it did not before. Missing parents are made.
///
/// A reader sees the old content or the new, never a part; the file is never open to more than `mode` allows.
pub fn write(path: &Path, content: &[u8], mode: u32) -> Result<bool, FileError> {
    if holds(path, content, mode) {
        return Ok(false);
    }
    replace(path, content, mode).map_err(|source| FileError::Write {
        path: path.to_owned(),
        source,
    })?;
    Ok(true)
}

fn holds(path: &Path, content: &[u8], mode: u32) -> bool {
    let same_mode = fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o7777 == mode);
    same_mode && read(path).is_ok_and(|found| found == content)
}

fn replace(path: &Path, content: &[u8], mode: u32) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".new");
    let fresh = path.with_file_name(name);
    // Left by a run that was killed; removing it lets create_new refuse a link planted there.
    let _ = fs::remove_file(&fresh);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&fresh)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_write_tells_whether_anything_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/key.pem");
        assert!(write(&path, b"one", 0o600).unwrap());
        assert!(!write(&path, b"one", 0o600).unwrap());
        assert!(write(&path, b"one", 0o640).unwrap());
        assert!(write(&path, b"two", 0o640).unwrap());
        assert_eq!(read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn files_refuse_odd_modes_and_paths() {
        assert_eq!(parse_mode("0600").unwrap(), 0o600);
        assert!(parse_mode("rw").is_err());
        assert!(parse_mode("4755").is_err());
        assert!(parse_path("/etc/a").is_ok());
        assert!(parse_path("/etc/../a").is_err());
        assert!(parse_path("etc/a").is_err());
        assert!(parse_path("/").is_err());
    }
}
