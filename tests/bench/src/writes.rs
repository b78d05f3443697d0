//! Who wrote what to the outer API server, from its audit log.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kubernest_crds::labels::SYSTEM_NAMESPACE;
use serde_json::Value;

/// Writes to one kind of object, for example `patch tenantclusters/status`.
pub type Writes = BTreeMap<String, usize>;

/// The audit log, read from where it last ended.
pub struct Audit {
    file: PathBuf,
    at: u64,
    all: Writes,
}

impl Audit {
    /// From the end of what is there now.
    pub fn open(file: &Path) -> Result<Self> {
        let length = std::fs::metadata(file)
            .with_context(|| format!("the audit log {}", file.display()))?
            .len();
        Ok(Self {
            file: file.into(),
            at: length,
            all: Writes::new(),
        })
    }

    /// What Kubernest's service accounts wrote since the last question.
    pub fn since(&mut self) -> Result<Writes> {
        let mut reader = BufReader::new(File::open(&self.file)?);
        reader.seek(SeekFrom::Start(self.at))?;
        let mut writes = Writes::new();
        let mut line = String::new();
        // A line without its end is still being written.
        while reader.read_line(&mut line)? > 0 && line.ends_with('\n') {
            self.at += line.len() as u64;
            if let Some(write) = kubernests(&serde_json::from_str(&line)?) {
                *self.all.entry(write.clone()).or_default() += 1;
                *writes.entry(write).or_default() += 1;
            }
            line.clear();
        }
        Ok(writes)
    }

    /// What they wrote in all that was read.
    pub fn all(&self) -> Writes {
        self.all.clone()
    }

    /// Waits until nothing but leases was written for `quiet`, at most `patience`.
    pub async fn rest(&mut self, quiet: Duration, patience: Duration) -> Result<bool> {
        let began = Instant::now();
        while began.elapsed() < patience {
            tokio::time::sleep(quiet).await;
            if self.since()?.keys().all(|write| is_lease(write)) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Leader election renews its lease as every controller's does; it is counted apart.
pub fn is_lease(write: &str) -> bool {
    write.ends_with(" leases")
}

fn kubernests(event: &Value) -> Option<String> {
    let user = event["user"]["username"].as_str()?;
    if !user.starts_with(&format!("system:serviceaccount:{SYSTEM_NAMESPACE}:")) {
        return None;
    }
    let object = &event["objectRef"];
    let subresource = object["subresource"].as_str().map(|name| format!("/{name}"));
    Some(format!(
        "{} {}{}",
        event["verb"].as_str()?,
        object["resource"].as_str()?,
        subresource.unwrap_or_default()
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn unit_only_writes_of_kubernests_accounts_count() {
        let event = |user: &str| {
            json!({
                "verb": "patch", "user": {"username": user},
                "objectRef": {"resource": "tenantclusters", "subresource": "status"},
            })
        };
        let ours = kubernests(&event("system:serviceaccount:kubernest-system:kubernest-operator"));
        assert_eq!(ours.as_deref(), Some("patch tenantclusters/status"));
        assert_eq!(
            kubernests(&event("system:serviceaccount:kube-system:node-controller")),
            None
        );
        assert!(is_lease("update leases") && !is_lease("patch tenantclusters/status"));
    }
}
