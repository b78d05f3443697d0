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
    #[error("cannot look at volume {name}")]
    Look {
        name: String,
        #[source]
        source: Box<kube::Error>,
    },
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
        // The watch may be behind: what it shows as released may be another claim's by now, so ask again. From here on
        // only this recycler takes the old claim off the volume, so nobody else can get it before it is empty.
        if released(&volume, bed).is_none() {
            continue;
        }
        let name = volume.name_any();
        let fresh = api.get_opt(&name).await.map_err(|e| Error::Look {
            name: name.clone(),
            source: Box::new(e),
        })?;
        let Some((volume, path)) = fresh.and_then(|v| released(&v, bed).map(|path| (v, path))) else {
            continue;
        };
        empty(&path).map_err(|source| Error::Empty {
            path: path.display().to_string(),
            source,
        })?;
        let patch = serde_json::json!({
            "metadata": {"resourceVersion": volume.resource_version()},
            "spec": {"claimRef": null},
        });
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

/// The directory of a volume of this bed whose claim is gone. Once the claim is off the volume, its phase lags behind:
/// such a volume is already empty.
fn released(volume: &PersistentVolume, bed: &Path) -> Option<PathBuf> {
    let phase = volume.status.as_ref()?.phase.as_deref()?;
    let spec = volume.spec.as_ref()?;
    spec.claim_ref.as_ref()?;
    let path = PathBuf::from(&spec.local.as_ref()?.path);
    let ours = path.starts_with(bed) && !path.components().any(|c| c == std::path::Component::ParentDir);
    (phase == "Released" && ours && path.parent()?.ends_with("volumes")).then_some(path)
}

/// Puts a fresh directory in the place of the old one. A pod that was deleted by force may still write to the old one,
/// which goes then and not into the next claim.
fn empty(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mut old = None;
    if dir.exists() {
        let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(dir)?);
        let aside = dir.with_added_extension(format!("old-{inode}"));
        fs::rename(dir, &aside)?;
        old = Some(aside);
    }
    fs::create_dir(dir)?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    if let Some(Err(e)) = old.map(fs::remove_dir_all) {
        eprintln!("volume recycler: what was in {} goes with the bed: {e}", dir.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(phase: &str, path: &str) -> PersistentVolume {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "v"},
            "spec": {"local": {"path": path}, "claimRef": {"name": "c"}},
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
        let mut free = volume("Released", "/beds/dev/node-0/volumes/pv-00");
        free.spec.as_mut().unwrap().claim_ref = None;
        assert_eq!(released(&free, bed), None, "its phase lags behind");
    }
}
