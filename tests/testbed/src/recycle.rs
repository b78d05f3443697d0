//! Empties the directory of a PersistentVolume whose claim was deleted and makes the volume available again.
//!
//! Kubernetes' own reclaim policies do this for no `local` volume. It deliberately touches only directories of its bed.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::PersistentVolume;
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
    runtime::{WatchStreamExt, watcher},
};

use crate::client;

/// Why a volume could not be recycled.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot connect")]
    Connect(#[source] client::Error),
    #[error("cannot watch volumes")]
    Watch(#[source] Box<watcher::Error>),
    #[error("cannot empty {path}")]
    Empty {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot release volume {name}")]
    Release {
        name: String,
        #[source]
        source: Box<kube::Error>,
    },
}

/// Runs for as long as the bed does; errors are written to the log and tried again.
pub async fn run(kubeconfig: PathBuf, bed: PathBuf) {
    loop {
        if let Err(e) = watch(&kubeconfig, &bed).await {
            let mut message = e.to_string();
            let mut cause = std::error::Error::source(&e);
            while let Some(c) = cause {
                message = format!("{message}: {c}");
                cause = c.source();
            }
            eprintln!("volume recycler: {message}");
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

async fn watch(kubeconfig: &Path, bed: &Path) -> Result<(), Error> {
    let client = client::connect(kubeconfig).await.map_err(Error::Connect)?;
    let api: Api<PersistentVolume> = Api::all(client);
    let stream = watcher(api.clone(), watcher::Config::default())
        .default_backoff()
        .applied_objects();
    let mut stream = std::pin::pin!(stream.map_err(|e| Error::Watch(Box::new(e))).boxed());
    while let Some(volume) = stream.try_next().await? {
        let Some(path) = released(&volume, bed) else { continue };
        empty(&path).map_err(|source| Error::Empty {
            path: path.display().to_string(),
            source,
        })?;
        // With the resource version, so that a volume that was bound meanwhile is left alone.
        let patch = serde_json::json!({
            "metadata": {"resourceVersion": volume.resource_version()},
            "spec": {"claimRef": null},
        });
        let name = volume.name_any();
        match api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 => {}
            Err(source) => {
                return Err(Error::Release {
                    name,
                    source: Box::new(source),
                });
            }
            Ok(_) => eprintln!("volume recycler: {name} is available again"),
        }
    }
    Ok(())
}

/// The directory of a volume of this bed whose claim is gone.
fn released(volume: &PersistentVolume, bed: &Path) -> Option<PathBuf> {
    let phase = volume.status.as_ref()?.phase.as_deref()?;
    let path = PathBuf::from(&volume.spec.as_ref()?.local.as_ref()?.path);
    let ours = path.starts_with(bed) && !path.components().any(|c| c == std::path::Component::ParentDir);
    (phase == "Released" && ours && path.parent()?.ends_with("volumes")).then_some(path)
}

/// Removes what is in the directory and gives it the owner and mode of a fresh file system.
fn empty(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(path)?
        } else {
            fs::remove_file(path)?
        }
    }
    std::os::unix::fs::chown(dir, Some(0), Some(0))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(phase: &str, path: &str) -> PersistentVolume {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "v"},
            "spec": {"local": {"path": path}},
            "status": {"phase": phase},
        }))
        .unwrap()
    }

    #[test]
    fn plan_recycles_only_released_volumes_of_its_bed() {
        let bed = Path::new("/beds/dev");
        assert!(released(&volume("Released", "/beds/dev/node-0/volumes/pv-00"), bed).is_some());
        assert_eq!(released(&volume("Bound", "/beds/dev/node-0/volumes/pv-00"), bed), None);
        assert_eq!(
            released(&volume("Released", "/beds/other/node-0/volumes/pv-00"), bed),
            None
        );
        assert_eq!(released(&volume("Released", "/beds/dev/node-0/var/lib"), bed), None);
        assert_eq!(released(&volume("Released", "/beds/dev/../x/volumes/pv-00"), bed), None);
    }
}
