//! Where the upstream binaries are: below `KUBERNEST_COMPONENTS`, or where `vm-images/components/build` puts them
//! (`KUBERNEST_CACHE` moves that).

use std::path::PathBuf;

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
        let given = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let home = || given("HOME").unwrap_or_else(|| "/".into()).join(".cache");
        let cache = || {
            given("KUBERNEST_CACHE")
                .unwrap_or_else(|| given("XDG_CACHE_HOME").unwrap_or_else(home).join("kubernest"))
                .join("components")
        };
        let root = given("KUBERNEST_COMPONENTS").unwrap_or_else(cache);
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

    /// Helm.
    ///
    /// # Errors
    /// When it is not built.
    pub fn helm(&self) -> Result<PathBuf, BinaryError> {
        self.find("helm", "helm")
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
