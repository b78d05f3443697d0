//! Where the upstream binaries are: below `KUBERNEST_COMPONENTS`, or where `vm-images/components/build` puts them.

use std::path::{Path, PathBuf};

/// Kubernetes version whose binaries are the outer cluster's.
const KUBERNETES: &str = "kubernetes-v1.35.4";

/// A binary that is not there.
#[derive(Debug, thiserror::Error)]
#[error("{0} is not built; run vm-images/components/build")]
pub struct BinaryError(pub PathBuf);

/// Finds upstream binaries.
#[derive(Clone, Debug)]
pub struct Binaries {
    root: PathBuf,
}

impl Binaries {
    /// The usual place.
    pub fn locate() -> Self {
        let root = std::env::var_os("KUBERNEST_COMPONENTS")
            .map(PathBuf::from)
            .unwrap_or_else(|| {
                let cache = std::env::var_os("XDG_CACHE_HOME")
                    .map(PathBuf::from)
                    .unwrap_or_else(|| {
                        Path::new(&std::env::var_os("HOME").unwrap_or_else(|| "/".into())).join(".cache")
                    });
                cache.join("kubernest/components")
            });
        Self { root }
    }

    /// etcd.
    ///
    /// # Errors
    /// When it is not built.
    pub fn etcd(&self) -> Result<PathBuf, BinaryError> {
        self.find("etcd", "etcd")
    }

    /// A binary of Kubernetes, for example `kube-apiserver` or `kubectl`.
    ///
    /// # Errors
    /// When it is not built.
    pub fn kubernetes(&self, name: &str) -> Result<PathBuf, BinaryError> {
        self.find(KUBERNETES, name)
    }

    fn find(&self, component: &str, name: &str) -> Result<PathBuf, BinaryError> {
        let path = self.root.join(component).join("bin").join(name);
        if path.is_file() {
            Ok(path)
        } else {
            Err(BinaryError(path))
        }
    }
}
