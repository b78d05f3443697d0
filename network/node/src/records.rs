//! What the agent notes about attachments, one small file each in a folder that outlives the agent but not the node's
//! boot. Only for finding pods again later; DEL works without it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kubernest_plan::{TapName, Vni};
use serde::{Deserialize, Serialize};

use crate::netns::NetnsId;

/// How long a pod may take from its network to its first process.
const NEW: Duration = Duration::from_secs(600);

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Not written.
    #[error("note the attachment in {0}")]
    Write(PathBuf, #[source] io::Error),
    /// Not removed.
    #[error("remove the note {0}")]
    Remove(PathBuf, #[source] io::Error),
    /// Not listed.
    #[error("list the attachments in {0}")]
    List(PathBuf, #[source] io::Error),
}

/// One attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The sandbox.
    pub container_id: String,
    /// The tap in it.
    pub tap: TapName,
    /// The pod's namespace, for messages.
    pub namespace: String,
    /// The pod's name, for messages.
    pub pod: String,
    /// Whether it is of the pod network, and not of a tenant.
    pub masquerade: bool,
    /// The tenant's network that it joined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joined: Option<Joined>,
    /// The pod's network namespace.
    pub netns: NetnsId,
}

/// A tenant's network, and whose it was when a pod joined it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The network.
    pub vni: Vni,
    /// UID of the TenantCluster.
    pub owner: String,
}

/// The folder of records.
#[derive(Debug, Clone)]
pub struct Records(PathBuf);

impl Records {
    /// Uses a folder, which is made with the first record.
    pub fn at(folder: impl AsRef<Path>) -> Self {
        Self(folder.as_ref().to_owned())
    }

    // Both parts were parsed: neither contains a slash, and the tap no dot.
    fn path(&self, container_id: &str, tap: &TapName) -> PathBuf {
        self.0.join(format!("{container_id}.{tap}"))
    }

    /// Writes a record, whole or not at all.
    ///
    /// # Errors
    /// [`RecordError::Write`].
    pub fn write(&self, record: &Record) -> Result<(), RecordError> {
        let path = self.path(&record.container_id, &record.tap);
        let part = path.with_extension(format!("{}~", record.tap));
        let write = || {
            std::fs::create_dir_all(&self.0)?;
            std::fs::write(&part, serde_json::to_vec(record)?)?;
            std::fs::rename(&part, &path)
        };
        write().map_err(|source| RecordError::Write(path.clone(), source))
    }

    /// Removes a record, if it is there.
    ///
    /// # Errors
    /// [`RecordError::Remove`].
    pub fn remove(&self, container_id: &str, tap: &TapName) -> Result<(), RecordError> {
        let path = self.path(container_id, tap);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(RecordError::Remove(path, error)),
            _ => Ok(()),
        }
    }

    /// Removes a record that is not of the last minutes, so that what the runtime never took away is not kept for good.
    ///
    /// # Errors
    /// [`RecordError::Remove`].
    pub fn remove_old(&self, record: &Record) -> Result<(), RecordError> {
        let written = std::fs::metadata(self.path(&record.container_id, &record.tap)).and_then(|meta| meta.modified());
        match written.ok().and_then(|written| written.elapsed().ok()) {
            Some(age) if age > NEW => self.remove(&record.container_id, &record.tap),
            _ => Ok(()),
        }
    }

    /// All records. Files that are none are passed over.
    ///
    /// # Errors
    /// [`RecordError::List`].
    pub fn list(&self) -> Result<Vec<Record>, RecordError> {
        let entries = match std::fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|source| RecordError::List(self.0.clone(), source))?,
        };
        let files = entries.flatten().filter_map(|entry| std::fs::read(entry.path()).ok());
        Ok(files.filter_map(|bytes| serde_json::from_slice(&bytes).ok()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_until_removed() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::at(folder.path().join("attachments"));
        assert_eq!(records.list().unwrap(), []);
        let record = Record {
            container_id: "a.b".into(),
            tap: "tap0".parse().unwrap(),
            namespace: "ns".into(),
            pod: "p".into(),
            masquerade: false,
            joined: Some(Joined {
                vni: 4097.try_into().unwrap(),
                owner: "uid".into(),
            }),
            netns: NetnsId::at(Path::new("/proc/self/ns/net")).unwrap(),
        };
        records.write(&record).unwrap();
        records.write(&record).unwrap();
        assert_eq!(records.list().unwrap(), std::slice::from_ref(&record));
        records.remove(&record.container_id, &record.tap).unwrap();
        records.remove(&record.container_id, &record.tap).unwrap();
        assert_eq!(records.list().unwrap(), []);
    }
}
